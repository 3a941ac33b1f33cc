//! Every memory ordering of this crate, with its reason, and the mutants that must not survive.
//!
//! In the loom build the environment variable `QSBR_MUTANT` names one to weaken; `qsbr/mutants`
//! checks that the loom tests fail for each.

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
    /// Acquire: a reader that sees the epoch of a retirement also sees the pointer swapped before
    /// it, so it cannot load the old value in the turn that it is about to begin.
    epoch_read = Acquire, or Relaxed
}
ordering! {
    /// Release: the uses of the turn that ended come before the announcement that it has ended.
    slot_quiesce = Release, or Relaxed
}
ordering! {
    /// Release: as for a quiescent state; without it a writer may see "online at the new epoch"
    /// and not the uses that came before the reader went offline.
    slot_online = Release, or Relaxed
}
ordering! {
    /// Release: the uses of the last turn come before the announcement that the reader sleeps.
    slot_offline = Release, or Relaxed
}
ordering! {
    /// Acquire: the writer that sees a reader's announcement also sees the end of its uses, so
    /// freeing comes after them.
    slot_check = Acquire, or Relaxed
}
ordering! {
    /// AcqRel: Release publishes the new value's contents, Acquire takes over the old value from
    /// whichever writer published it.
    ptr_swap = AcqRel, or Relaxed
}
ordering! {
    /// Acquire: a reader that loads a pointer sees what it points to.
    ptr_load = Acquire, or Relaxed
}
ordering! {
    /// AcqRel: Release puts the swap before the new epoch; Acquire chains several writers, so that
    /// a reader that sees a later epoch sees the earlier swaps too.
    epoch_advance = AcqRel, or Relaxed
}

/// Whether the fence of [`crate::Reader::online`] stays.
pub(crate) fn fence_online() -> bool {
    !weakened("fence_online")
}

/// Whether the fence of [`crate::Domain::advance`] stays.
pub(crate) fn fence_advance() -> bool {
    !weakened("fence_advance")
}

/// Whether the fence of [`crate::handshake`] stays.
#[cfg(loom)]
pub(crate) fn fence_handshake() -> bool {
    !weakened("fence_handshake")
}
