//! Makes the members equal again where a change has failed on some of them, and none was removed:
//! on all of them, or because the channel's owner has abandoned its I/O. Otherwise, reads of such a
//! range would return this or that, for ever.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use bdev::{Bdev, Buffer, Request, Rights};
use tracing::warn;

use super::{PAUSE, Thread};
use crate::array::lane::xor;
use crate::array::{bit, slots_of};
use crate::level::Level;
use crate::member_channel::MemberChannel;
use crate::metadata::LIMIT;

/// Bytes that are made equal at a time.
const PIECE: u64 = 1 << 20;

impl Thread {
    /// Whether there is a range to repair. During a rebuild, it waits.
    pub(super) fn has_repairs(&self) -> bool {
        self.rebuild.is_none() && !self.array.torn.is_empty()
    }

    /// Repairs one range.
    pub(super) fn step_repair(&mut self) {
        if !self.has_repairs() {
            return;
        }
        let Some(torn) = self.array.torn.pop() else { return };
        let unit = match self.array.layout.level {
            Level::Raid5f => self.array.layout.stripe(),
            _ => u64::from(self.array.layout.block_size),
        };
        let piece = PIECE.next_multiple_of(unit);
        let mut at = torn.start;
        while at < torn.end {
            let window = at..at.saturating_add(piece).min(torn.end);
            if !self.lock(&window) {
                // Something else comes first.
                self.unlock();
                let _ = self.array.torn.push(at..torn.end);
                return;
            }
            if let Err(e) = self.make_equal(&window) {
                warn!(
                    "bdev {}: cannot repair bytes {window:?}, in which the members may differ: {e}",
                    self.array.name
                );
            }
            at = window.end;
        }
        self.unlock();
    }

    /// Locks a range, and waits for the changes under way. Returns false if something else is due.
    fn lock(&self, window: &Range<u64>) -> bool {
        self.set_window(Some(window.clone()));
        loop {
            let lanes = self.array.state().open_lanes();
            if !lanes.iter().any(|cell| cell.lane.take().changes_window()) {
                return true;
            }
            if self.has_work() {
                return false;
            }
            thread::sleep(PAUSE);
        }
    }

    fn unlock(&self) {
        self.set_window(None);
    }

    fn set_window(&self, window: Option<Range<u64>>) {
        let lanes = {
            let mut state = self.array.state();
            state.window.clone_from(&window);
            state.open_lanes()
        };
        for cell in lanes {
            cell.lane.take().lock_window(window.clone(), 0);
            cell.wake_owner();
        }
    }

    /// Copies a range from the first member that can be read to the others or, for raid5f, computes its parity.
    fn make_equal(&mut self, window: &Range<u64>) -> Result<(), String> {
        let live: Vec<usize> = slots_of(self.array.live.load(Ordering::Acquire)).collect();
        if self.array.layout.level == Level::Raid5f {
            return self.make_parity(window, &live);
        }
        let len = usize::try_from(window.end - window.start).map_err(|e| e.to_string())?;
        let mut last = "no member is there".to_owned();
        for source in &live {
            let data = match self.read(*source, window.start, len) {
                Ok(data) => data,
                Err(e) => {
                    last = format!("read of member {source}: {e}");
                    continue;
                }
            };
            for slot in live.iter().filter(|slot| *slot != source) {
                let mut copy = Buffer::new(len);
                copy.bytes_mut().copy_from_slice(data.bytes());
                self.write(*slot, window.start, copy);
            }
            return Ok(());
        }
        Err(last)
    }

    fn make_parity(&mut self, window: &Range<u64>, live: &[usize]) -> Result<(), String> {
        let layout = self.array.layout.clone();
        if live.len() < layout.members() {
            // There is no redundancy to repair.
            return Ok(());
        }
        let len = usize::try_from(layout.strip).map_err(|e| e.to_string())?;
        for stripe in window.start / layout.stripe()..window.end / layout.stripe() {
            let (own, at) = (layout.parity_member(stripe), stripe * layout.strip);
            let mut sum = Buffer::new(len);
            for slot in (0..layout.members()).filter(|slot| *slot != own) {
                xor(sum.bytes_mut(), self.read(slot, at, len)?.bytes());
            }
            self.write(own, at, sum);
        }
        Ok(())
    }

    fn member(&self, slot: usize) -> Result<Arc<dyn Bdev>, String> {
        let slots = &self.array.state().slots;
        slots.get(slot).and_then(|slot| slot.bdev.clone()).ok_or_else(|| "a member is gone".into())
    }

    fn read(&self, slot: usize, at: u64, len: usize) -> Result<Buffer, String> {
        let bdev = self.member(slot)?;
        let mut channel = MemberChannel::open(&bdev, Rights::Read).map_err(|e| e.to_string())?;
        let offset = self.array.layout.extents[slot].offset + at;
        let read = channel.run(Request::read(offset, len), Instant::now() + LIMIT);
        read.map_err(|errno| std::io::Error::from_raw_os_error(errno).to_string())
    }

    /// Writes to a member, which is removed if it fails.
    fn write(&mut self, slot: usize, at: u64, data: Buffer) {
        let offset = self.array.layout.extents[slot].offset + at;
        let member = self.member(slot).ok();
        let channel = member.and_then(|bdev| MemberChannel::open(&bdev, Rights::Write).ok());
        let write = Request::write(offset, data);
        let written = channel.is_some_and(|mut c| c.run(write, Instant::now() + LIMIT).is_ok());
        if !written && self.array.remove_live(bit(slot)) {
            self.remove(bit(slot), true);
        }
    }
}
