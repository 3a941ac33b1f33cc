//! Every memory ordering of this crate, with its reason, and its mutant.
//!
//! In the loom build, the environment variable `QSBR_MUTANT` names an ordering to weaken;
//! `qsbr/mutants` checks that the loom tests fail for each.

use std::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release};

/// Whether this run weakens `name`.
#[cfg(loom)]
fn weakened(name: &str) -> bool {
    std::env::var("QSBR_MUTANT").is_ok_and(|mutant| mutant == name)
}

#[cfg(not(loom))]
const fn weakened(_name: &str) -> bool {
    false
}

macro_rules! ordering {
    ($(#[$doc:meta])* $name:ident = $strong:ident, or $weak:ident) => {
        $(#[$doc])*
        #[inline]
        pub(crate) fn $name() -> Ordering {
            if weakened(stringify!($name)) { $weak } else { $strong }
        }
    };
}

ordering! {
    /// Acquire: a reader that sees the epoch of a retirement also sees the pointer swap before it.
    /// So it cannot load the old value in the iteration that begins.
    epoch_read = Acquire, or Relaxed
}
ordering! {
    /// Release: orders the uses in the last iteration before the announcement of its end.
    slot_quiesce = Release, or Relaxed
}
ordering! {
    /// Release: as for a quiescent state. Without it, a writer may see "online at the new epoch"
    /// but not the uses before the reader went offline.
    slot_online = Release, or Relaxed
}
ordering! {
    /// Release: orders the uses in the last iteration before the announcement that the reader
    /// sleeps.
    slot_offline = Release, or Relaxed
}
ordering! {
    /// Acquire: a writer that sees a reader's announcement also sees the end of its uses, so it
    /// frees after them.
    slot_check = Acquire, or Relaxed
}
ordering! {
    /// AcqRel: Release publishes the new value's contents; Acquire makes the old value's contents,
    /// which another writer may have published, visible to this writer.
    ptr_swap = AcqRel, or Relaxed
}
ordering! {
    /// Acquire: a reader that loads a pointer sees the value's contents.
    ptr_load = Acquire, or Relaxed
}
ordering! {
    /// AcqRel: Release orders the swap before the new epoch; Acquire chains writers, so that a
    /// reader that sees a later epoch also sees the earlier swaps.
    epoch_advance = AcqRel, or Relaxed
}

/// Whether [`crate::Reader::online`] has its fence.
pub(crate) fn fence_online() -> bool {
    !weakened("fence_online")
}

/// Whether [`crate::Domain::advance`] has its fence.
pub(crate) fn fence_advance() -> bool {
    !weakened("fence_advance")
}

/// Whether [`crate::handshake`] has its fence.
#[cfg(loom)]
pub(crate) fn fence_handshake() -> bool {
    !weakened("fence_handshake")
}
