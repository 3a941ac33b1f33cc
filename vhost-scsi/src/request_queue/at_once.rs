//! READ and WRITE that a disk does at once, such as a disk in memory: neither their plan nor their I/O
//! is stored.

use bdev::{Io, Op, Tag};
use reactor::Iteration;
use scsi::Plan;
use vhost_target::device_queue::{Progress, Request};
use virtqueue::chain::Chain;

use super::task::Task;
use super::{RequestQueue, answer};
use crate::disk::Disk;

impl Disk {
    /// Does the plan of a READ or WRITE at once, if it can, and if the whole buffer is transferred
    /// and nothing else is to be done. Returns whether it has.
    #[inline(always)]
    pub(super) fn does_at_once(
        &mut self,
        plan: &Plan,
        slot: u16,
        task: &Task,
        chain: &Chain,
    ) -> bool {
        let len = plan.transfer_bytes();
        if len == 0 || !plan.is_exact() {
            return false;
        }
        let (op, segments) = match plan.op {
            scsi::Op::Read => (Op::Read, task.parts.data_in(chain)),
            scsi::Op::Write => (Op::Write, task.parts.data_out(chain)),
            _ => return false,
        };
        let io = Io::rw(op, Tag(slot), self.facts.bytes(plan.range.lba), len, segments);
        // SAFETY: the channel is open, and segments and memory do not change meanwhile.
        let done = unsafe { self.opened.shortcut.run(&io) };
        if done {
            self.tallies.add(op == Op::Write, len);
        }
        done
    }
}

impl RequestQueue {
    /// Answers a command that was done at once.
    #[inline(always)]
    pub(super) fn done_at_once<R: Request<Self>>(
        &mut self,
        mut request: R,
        plan: &Plan,
    ) -> Progress {
        let (task, _) = request.parts();
        self.tallied |= 1 << task.target;
        let bytes = plan.transfer_bytes();
        request.spend(bytes);
        answer::good(self, request, if plan.op == scsi::Op::Read { bytes } else { 0 })
    }

    /// Counts what was done at once in a visit. Each command took the same part of its time.
    #[inline]
    pub(super) fn record_tallies(&mut self, iteration: &mut Iteration) {
        let begun = iteration.now_ticks();
        let ticks = iteration.read_clock().saturating_sub(begun);
        let tallied = std::mem::take(&mut self.tallied);
        let Some(disks) = &mut self.disks else { return };
        let total: u64 =
            ones(tallied).filter_map(|n| Some(disks[n].as_ref()?.tallies.count())).sum();
        for n in ones(tallied) {
            let Some(disk) = &mut disks[n] else { continue };
            let count = disk.tallies.count();
            let share = if count == total { ticks } else { ticks * count / total };
            disk.tallies.record(&disk.opened.counters, share);
        }
    }
}

/// Returns the numbers of the bits that are set.
#[inline]
fn ones(mut left: u8) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let n = left.trailing_zeros() as usize;
        left &= left.checked_sub(1)?;
        Some(n)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_is_found() {
        assert_eq!(ones(0).count(), 0);
        assert!(ones(0b1001_0010).eq([1, 4, 7]));
    }
}
