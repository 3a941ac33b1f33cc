//! Which core a thread runs on.

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::{Error, Result};

/// Keeps the calling thread on `core` from now on.
///
/// # Errors
/// There is no such core, or this process may not use it.
pub fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).map_err(|e| Error::Core(core, e.into()))
}
