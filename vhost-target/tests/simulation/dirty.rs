//! A machine's dirty logs: whether what the target writes is marked there, and marked in time.
//!
//! Nothing but the target and the disks writes to a machine's memory from one look to the next, but
//! for what the driver does, which says so.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;

use guest_memory::RegionSpec;

use super::probe;
use super::vm::{EXTRA, PAGE, RINGS, Request, Vm};
use guest_memory::testing::memfd;

/// Where a log is in its file: not at its beginning, and long enough for all that is written.
pub(crate) const LOG_OFFSET: u64 = 8;
pub(crate) const LOG_BYTES: u64 = 64;

/// Pages that the target writes to: rings, statuses and data, near and far.
const NEAR: Range<u64> = 0..13;
const FAR: Range<u64> = EXTRA / PAGE + 5..EXTRA / PAGE + 13;

/// A log's contents: a bit for each page.
type Marks = [u8; LOG_BYTES as usize];
const NONE: Marks = [0; LOG_BYTES as usize];

/// The logs of a machine.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    all: Vec<File>,
    /// Those that the target has said it marks nothing in any more.
    given_up: BTreeSet<usize>,
    watch: Option<Watch>,
}

/// A log in use.
#[derive(Debug)]
struct Watch {
    log: usize,
    /// What these pages held at the last look.
    held: Vec<u8>,
    /// What was marked from the look before that to the last one.
    marked: Marks,
    /// Earlier I/O may be in flight, which marks nothing here until it has ended.
    drains: bool,
    /// Pages that were written since it may be, and are not marked.
    late: BTreeSet<u64>,
}

impl Watch {
    fn is_marked(&self, page: u64) -> bool {
        is_marked(&self.marked, page)
    }
}

fn is_marked(marks: &Marks, page: u64) -> bool {
    marks[page as usize / 8] & 1 << (page % 8) != 0
}

/// Whether a page is in a machine's memory.
fn has_page(memory: &[RegionSpec], page: u64) -> bool {
    memory.iter().any(|region| (page * PAGE).wrapping_sub(region.gpa) < region.size)
}

/// The pages that lie in `len` bytes at `gpa`.
fn pages(gpa: u64, len: u64) -> RangeInclusive<u64> {
    gpa / PAGE..=(gpa + len - 1) / PAGE
}

impl Vm {
    /// A new log and its number.
    pub(crate) fn new_log(&mut self) -> (usize, File) {
        let log = File::from(memfd(PAGE));
        let dup = log.try_clone().expect("an fd");
        self.logs.all.push(log);
        (self.logs.all.len() - 1, dup)
    }

    /// The target has acknowledged that it marks in `new`, no longer in `old`, but for what is
    /// `in_use`.
    pub(crate) fn change_logs(&mut self, old: Option<usize>, new: Option<usize>, in_use: bool) {
        if let Some(old) = old {
            let marks = self.take_marks(old);
            if let Some(watch) = &mut self.logs.watch {
                watch.late.retain(|page| new.is_some() && !is_marked(&marks, *page));
            }
            if !in_use {
                self.logs.given_up.insert(old);
            }
        }
        if let Some(new) = new {
            self.logs.given_up.remove(&new);
        }
    }

    /// Looks at what was written since the last look: the target has promised to mark it in `log`,
    /// at once, or when the earlier I/O has ended that `drains`. What is not in `memory` then is
    /// not marked. Answers with how many pages were written, and how many were marked later.
    pub(crate) fn check_marks(
        &mut self,
        log: Option<usize>,
        drains: bool,
        memory: &[RegionSpec],
    ) -> (usize, usize) {
        let before = self.logs.watch.take();
        let Some(log) = log else { return (0, 0) };
        let is_first = before.as_ref().is_none_or(|before| before.log != log);
        let nothing = || vec![0; PAGE as usize * NEAR.chain(FAR).count()];
        let (held, late) =
            before.map_or_else(|| (nothing(), BTreeSet::new()), |w| (w.held, w.late));
        let mut watch = Watch { log, held, marked: self.take_marks(log), drains, late };
        let mut written = self.written(&mut watch);
        if is_first {
            written.clear();
        }
        let mut late = std::mem::take(&mut watch.late);
        let marked_late = late.iter().filter(|page| watch.is_marked(**page)).count();
        late.retain(|page| !watch.is_marked(*page) && has_page(memory, *page));
        let unmarked = written.iter().filter(|page| !watch.is_marked(**page));
        if drains {
            late.extend(unmarked.filter(|page| has_page(memory, **page)));
            watch.late = late;
        } else {
            for page in unmarked.chain(&late) {
                let due = self.is_mark_due_later(*page);
                assert!(due, "page {page:#x} was written and is not marked in log {log}");
            }
        }
        self.logs.watch = Some(watch);
        (written.len(), marked_late)
    }

    /// Whether the disk may have written to a page for a request that has not come back.
    fn is_mark_due_later(&self, page: u64) -> bool {
        let mut all = (0..RINGS).flat_map(|ring| self.outstanding(ring));
        all.any(|r| r.read().is_some_and(|(gpa, len)| pages(gpa, len.into()).contains(&page)))
    }

    /// A read has come back, whose data may have been written long ago.
    pub(super) fn check_read_marked(&self, request: &Request, gpa: u64, len: u32) {
        let Some(watch) = &self.logs.watch else { return };
        let marked = pages(gpa, len.into()).all(|page| watch.is_marked(page));
        assert!(
            marked || watch.drains,
            "the data of {request:?} is not marked in log {}",
            watch.log
        );
    }

    /// The driver has written.
    pub(super) fn has_written(&mut self) {
        if let Some(mut watch) = self.logs.watch.take() {
            self.written(&mut watch);
            self.logs.watch = Some(watch);
        }
    }

    /// The pages that have changed since the last look, which this one is.
    fn written(&self, watch: &mut Watch) -> Vec<u64> {
        let mut now = [0; PAGE as usize];
        let changed = |(page, held): (u64, &mut [u8])| {
            self.get_into(page * PAGE, &mut now);
            let changed = held != now;
            if changed {
                held.copy_from_slice(&now);
            }
            changed.then_some(page)
        };
        let held = watch.held.chunks_exact_mut(PAGE as usize);
        NEAR.chain(FAR).zip(held).filter_map(changed).collect()
    }

    fn marks(&self, log: usize) -> Marks {
        let mut marks = NONE;
        self.logs.all[log].read_exact_at(&mut marks, LOG_OFFSET).expect("as long");
        marks
    }

    /// What is marked in a log, and is no longer afterwards.
    fn take_marks(&self, log: usize) -> Marks {
        let marks = self.marks(log);
        if marks != NONE {
            self.logs.all[log].write_all_at(&NONE, LOG_OFFSET).expect("as long");
        }
        marks
    }

    pub(crate) fn has_log_mapped(&self) -> bool {
        self.logs.all.iter().any(probe::is_mapped)
    }

    /// Nothing was marked in a log after the target had said that it would not be.
    pub(crate) fn check_logs_given_up(&self) {
        for log in &self.logs.given_up {
            assert_eq!(self.marks(*log), NONE, "log {log} was used after its end");
        }
    }
}
