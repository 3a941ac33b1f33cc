//! A request queue's part of task management: which commands it has, and which of them a barrier
//! waits for.

use std::sync::atomic::Ordering;

use crate::session::{Barrier, Ends, QueueLink};
use crate::wire::Response;

/// The command in a slot.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    tag: u64,
    target: u8,
    live: bool,
}

/// The commands of a queue, and the barrier that is to be reached.
pub(super) struct BarrierState {
    commands: Box<[Known]>,
    barrier: Option<Barrier>,
    /// All commands that the driver had made available before the barrier have been taken. The
    /// barrier waits for these slots: a bit for each.
    awaited: Option<[u64; 4]>,
    /// A disk waits to be handed to the reclaim thread.
    pub(super) leaves: bool,
}

impl BarrierState {
    pub(super) fn new(depth: u16) -> Self {
        let commands = vec![Known::default(); depth.into()].into_boxed_slice();
        Self { commands, barrier: None, awaited: None, leaves: false }
    }

    #[inline]
    pub(super) fn is_watching(&self) -> bool {
        self.barrier.is_some() || self.leaves
    }

    /// Takes note of a command.
    #[inline]
    pub(super) fn started(&mut self, slot: u16, target: u8, tag: u64) {
        self.commands[usize::from(slot)] = Known { tag, target, live: true };
    }

    /// Takes note of a command's end.
    #[inline]
    pub(super) fn ended(&mut self, slot: u16) {
        self.commands[usize::from(slot)].live = false;
        if let Some(awaited) = &mut self.awaited {
            awaited[usize::from(slot / 64)] &= !(1 << (slot % 64));
        }
    }

    /// Returns the response to a command that the barrier ends.
    #[inline]
    pub(super) fn ends(&self, target: u8, tag: u64) -> Option<Response> {
        let barrier = self.barrier.as_ref()?;
        match barrier.ends {
            _ if !barrier.is_about(target, tag) => None,
            Ends::Nothing => None,
            Ends::Aborted => Some(Response::Aborted),
            Ends::Reset | Ends::NexusReset => Some(Response::Reset),
        }
    }

    /// Returns the barrier, if it ends commands.
    #[inline]
    pub(super) fn ending(&self) -> Option<Barrier> {
        self.barrier.filter(|barrier| barrier.ends != Ends::Nothing)
    }

    /// Returns whether the command in a slot is one that the barrier is about.
    pub(super) fn is_about(&self, barrier: &Barrier, slot: u16) -> bool {
        let Known { tag, target, live } = self.commands[usize::from(slot)];
        live && barrier.is_about(target, tag)
    }

    /// Takes the barrier of a new view, unless it was reached before.
    pub(super) fn adopt(&mut self, barrier: Option<Barrier>, reached: u64) {
        let Some(barrier) = barrier.filter(|barrier| barrier.number > reached) else { return };
        if self.barrier.is_none_or(|known| known.number != barrier.number) {
            self.barrier = Some(barrier);
            self.awaited = None;
        }
    }

    /// Called at the end of a visit, when the guest can see what was finished in it.
    pub(super) fn visited(&mut self, caught_up: bool, link: &QueueLink) {
        let Some(barrier) = self.barrier else { return };
        if self.awaited.is_none() && caught_up {
            self.awaited = Some(self.about(&barrier));
            if self.awaited != Some([0; 4]) {
                link.found.store(barrier.number, Ordering::Relaxed);
            }
        }
        // A query does not wait for the commands that it finds.
        let reached = match self.awaited {
            None => false,
            Some(awaited) => barrier.ends == Ends::Nothing || awaited == [0; 4],
        };
        if reached {
            self.barrier = None;
            self.awaited = None;
            // Release: what was written for the guest comes before.
            link.reached.store(barrier.number, Ordering::Release);
        }
    }

    /// Returns the slots of the commands that a barrier is about.
    fn about(&self, barrier: &Barrier) -> [u64; 4] {
        let mut slots = [0; 4];
        for slot in (0..).take(self.commands.len()).filter(|slot| self.is_about(barrier, *slot)) {
            slots[usize::from(slot / 64)] |= 1 << (slot % 64);
        }
        slots
    }
}
