//! The dirty logs of a machine. Checks that what the target writes is marked there, and in time.
//!
//! From one check to the next, only the target and the disks write to a machine's memory, except
//! for the driver's writes, which are reported here.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small memories")]

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;

use guest_memory::RegionSpec;

use super::probe;
use super::request::Request;
use super::vm::{EXTRA, PAGE, RINGS, Vm};
use guest_memory::testing::memfd;

/// The offset of a log in its file. The log is long enough for all that is written.
pub(crate) const LOG_OFFSET: u64 = 8;
pub(crate) const LOG_BYTES: u64 = 64;

/// Pages that the target writes to: rings, statuses and data, in the near and the far region.
const NEAR: Range<u64> = 0..13;
const FAR: Range<u64> = EXTRA / PAGE + 5..EXTRA / PAGE + 13;

/// A log's contents: a bit for each page.
type Marks = [u8; LOG_BYTES as usize];
const NONE: Marks = [0; LOG_BYTES as usize];

/// The logs of a machine.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    all: Vec<File>,
    /// Logs in which the target has acknowledged to mark no more pages.
    given_up: BTreeSet<usize>,
    active: Option<ActiveLog>,
}

/// A log in use.
#[derive(Debug)]
struct ActiveLog {
    log: usize,
    /// The contents of the pages at the last check.
    held: Vec<u8>,
    /// The pages that were marked between the last two checks.
    marked: Marks,
    /// Earlier I/O may be in flight. It does not mark pages here until it has ended.
    drains: bool,
    /// Pages that were written since then, and are not marked.
    late: BTreeSet<u64>,
}

impl ActiveLog {
    fn is_marked(&self, page: u64) -> bool {
        is_marked(&self.marked, page)
    }
}

fn is_marked(marks: &Marks, page: u64) -> bool {
    marks[page as usize / 8] & 1 << (page % 8) != 0
}

/// Returns whether a page is in a machine's memory.
fn has_page(memory: &[RegionSpec], page: u64) -> bool {
    memory.iter().any(|region| (page * PAGE).wrapping_sub(region.gpa) < region.size)
}

/// Returns the pages of `len` bytes at `gpa`.
fn pages(gpa: u64, len: u64) -> RangeInclusive<u64> {
    gpa / PAGE..=(gpa + len - 1) / PAGE
}

impl Vm {
    /// Creates a log and returns its number.
    pub(crate) fn new_log(&mut self) -> (usize, File) {
        let log = File::from(memfd(PAGE));
        let dup = log.try_clone().expect("an fd");
        self.logs.all.push(log);
        (self.logs.all.len() - 1, dup)
    }

    /// Records that the target marks pages in `new` and no longer in `old`, except for I/O that
    /// keeps `in_use`.
    pub(crate) fn change_logs(&mut self, old: Option<usize>, new: Option<usize>, in_use: bool) {
        if let Some(old) = old {
            let marks = self.take_marks(old);
            if let Some(active) = &mut self.logs.active {
                active.late.retain(|page| new.is_some() && !is_marked(&marks, *page));
            }
            if !in_use {
                self.logs.given_up.insert(old);
            }
        }
        if let Some(new) = new {
            self.logs.given_up.remove(&new);
        }
    }

    /// Checks what was written since the last check. The target has to mark it in `log`: at once,
    /// or, with `drains`, when the earlier I/O has ended. Pages outside of `memory` are not marked
    /// then. Returns how many pages were written, and how many were marked later.
    pub(crate) fn check_marks(
        &mut self,
        log: Option<usize>,
        drains: bool,
        memory: &[RegionSpec],
    ) -> (usize, usize) {
        let before = self.logs.active.take();
        let Some(log) = log else { return (0, 0) };
        let is_first = before.as_ref().is_none_or(|before| before.log != log);
        let nothing = || vec![0; PAGE as usize * NEAR.chain(FAR).count()];
        let (held, late) =
            before.map_or_else(|| (nothing(), BTreeSet::new()), |w| (w.held, w.late));
        let mut active = ActiveLog { log, held, marked: self.take_marks(log), drains, late };
        let mut written = self.written(&mut active);
        if is_first {
            written.clear();
        }
        let mut late = std::mem::take(&mut active.late);
        let marked_late = late.iter().filter(|page| active.is_marked(**page)).count();
        late.retain(|page| !active.is_marked(*page) && has_page(memory, *page));
        let unmarked = written.iter().filter(|page| !active.is_marked(**page));
        if drains {
            late.extend(unmarked.filter(|page| has_page(memory, **page)));
            active.late = late;
        } else {
            for page in unmarked.chain(&late) {
                let due = self.is_mark_due_later(*page);
                assert!(due, "page {page:#x} was written and is not marked in log {log}");
            }
        }
        self.logs.active = Some(active);
        (written.len(), marked_late)
    }

    /// Returns whether the disk may have written to a page for an outstanding request.
    fn is_mark_due_later(&self, page: u64) -> bool {
        let mut all = (0..RINGS).flat_map(|ring| self.outstanding(ring));
        all.any(|r| r.read().is_some_and(|(gpa, len)| pages(gpa, len.into()).contains(&page)))
    }

    /// Checks the marks of a completed read, whose data may have been written long ago.
    pub(super) fn check_read_marked(&self, request: &Request, gpa: u64, len: u32) {
        let Some(active) = &self.logs.active else { return };
        let marked = pages(gpa, len.into()).all(|page| active.is_marked(page));
        assert!(
            marked || active.drains,
            "the data of {request:?} is not marked in log {}",
            active.log
        );
    }

    /// Records that the driver has written.
    pub(super) fn has_written(&mut self) {
        if let Some(mut active) = self.logs.active.take() {
            self.written(&mut active);
            self.logs.active = Some(active);
        }
    }

    /// Returns the pages that have changed since the last check, and updates their contents.
    fn written(&self, active: &mut ActiveLog) -> Vec<u64> {
        let mut now = [0; PAGE as usize];
        let changed = |(page, held): (u64, &mut [u8])| {
            self.get_into(page * PAGE, &mut now);
            let changed = held != now;
            if changed {
                held.copy_from_slice(&now);
            }
            changed.then_some(page)
        };
        let held = active.held.chunks_exact_mut(PAGE as usize);
        NEAR.chain(FAR).zip(held).filter_map(changed).collect()
    }

    fn marks(&self, log: usize) -> Marks {
        let mut marks = NONE;
        self.logs.all[log].read_exact_at(&mut marks, LOG_OFFSET).expect("the log has this length");
        marks
    }

    /// Returns and clears the marks of a log.
    fn take_marks(&self, log: usize) -> Marks {
        let marks = self.marks(log);
        if marks != NONE {
            self.logs.all[log].write_all_at(&NONE, LOG_OFFSET).expect("the log has this length");
        }
        marks
    }

    pub(crate) fn has_log_mapped(&self) -> bool {
        self.logs.all.iter().any(probe::is_mapped)
    }

    /// Checks that nothing was marked in a log after the target had acknowledged its end.
    pub(crate) fn check_logs_given_up(&self) {
        for log in &self.logs.given_up {
            assert_eq!(self.marks(*log), NONE, "log {log} was used after its end");
        }
    }
}
