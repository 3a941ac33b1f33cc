//! READ and WRITE through the shortcut of a disk, without storing a plan or an I/O.

use bdev::{Io, Op, Tag};
use reactor::Iteration;
use scsi::Plan;
use vhost_target::device_queue::{Progress, Request};
use virtqueue::chain::Chain;

use super::task::Task;
use super::{RequestQueue, answer};
use crate::disk::Disk;

impl Disk {
    /// Executes a READ or WRITE through the shortcut, if its plan is exact. Returns whether it did.
    #[inline(always)]
    pub(super) fn run_shortcut(
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
    /// Answers a command that the shortcut has executed.
    #[inline(always)]
    pub(super) fn end_shortcut<R: Request<Self>>(
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

    /// Adds the visit's I/O through shortcuts to the counters. The time since the start of the visit
    /// is divided evenly among these commands, whatever else the visit has done.
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

/// Returns the positions of the set bits.
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
