//! Record locks of one file.

use fuser::{FileHandle, LockOwner};

/// The locks that are held on a file.
#[derive(Default)]
pub(super) struct Locks(Vec<Lock>);

/// A lock on a range, its end included.
#[derive(Clone, Copy)]
pub(super) struct Lock {
    /// The open file description that it was taken through.
    pub(super) handle: FileHandle,
    pub(super) owner: LockOwner,
    pub(super) start: u64,
    pub(super) end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(super) kind: i32,
    pub(super) pid: u32,
}

impl Locks {
    /// A lock of somebody else's that stands against this one.
    pub(super) fn conflict(&self, wanted: &Lock) -> Option<&Lock> {
        self.0.iter().find(|held| {
            let overlap = held.start <= wanted.end && wanted.start <= held.end;
            let exclusive = libc::F_WRLCK;
            let matters = held.kind == exclusive || wanted.kind == exclusive;
            held.owner != wanted.owner && overlap && matters
        })
    }

    /// Takes or gives up a lock. `false` if it conflicts. An owner's earlier locks that overlap go as
    /// a whole: nobody here splits them.
    pub(super) fn set(&mut self, wanted: Lock) -> bool {
        if wanted.kind != libc::F_UNLCK && self.conflict(&wanted).is_some() {
            return false;
        }
        self.0.retain(|held| {
            held.owner != wanted.owner || held.start > wanted.end || wanted.start > held.end
        });
        if wanted.kind != libc::F_UNLCK {
            self.0.push(wanted);
        }
        true
    }

    /// Gives up what was taken through a description, when that is closed: the kernel does not say
    /// so for locks that belong to descriptions.
    pub(super) fn close(&mut self, handle: FileHandle) {
        self.0.retain(|held| held.handle != handle);
    }
}
