//! Dirty logs from an untrusted front end, which truncates them meanwhile.
//!
//! Invariants: the marked pages are exactly those of the ranges, within the log; a truncated file does not crash the
//! process.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;

use closer::ForeignFd;
use guest_memory::DirtyLog;
use guest_memory::FileError;
use guest_memory::Unmapper;

use crate::guest::memfd;
use crate::input::Input;

const FILE_BYTES: usize = 0x3000;
const PAGE: u64 = 4096;
/// Limit on mappings at a time: another thread unmaps them, and is slower than the inputs.
const MAPPINGS_MAX: usize = 32;

thread_local! {
    static STAGE: RefCell<(File, Unmapper)> = RefCell::new({
        let unmapper = Unmapper::start().expect("a thread");
        (File::from(memfd(FILE_BYTES as u64)), unmapper.limited(MAPPINGS_MAX))
    });
}

fn map(file: &File, offset: u64, size: u64, unmapper: &Unmapper) -> Option<DirtyLog> {
    loop {
        let fd = ForeignFd::alone(OwnedFd::from(file.try_clone().expect("an fd")));
        match DirtyLog::map(&fd, offset, size, unmapper) {
            Ok(log) => return Some(log),
            Err(FileError::TooManyOfController(_)) => thread::yield_now(),
            Err(_) => return None,
        }
    }
}

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    STAGE.with_borrow_mut(|(file, unmapper)| {
        file.set_len(FILE_BYTES as u64).expect("a memfd");
        file.write_all_at(&[0; FILE_BYTES], 0).expect("a memfd");
        let mut input = Input::new(bytes);
        let (offset, size) = match input.u8() % 4 {
            0 => (input.u64(), input.u64()),
            _ => (u64::from(input.u16()) % PAGE, u64::from(input.u16()) % (2 * PAGE)),
        };
        let Some(log) = map(file, offset, size, unmapper) else { return };
        assert!(offset.checked_add(size).is_some_and(|end| end <= FILE_BYTES as u64));
        let mut expected = vec![0; FILE_BYTES];
        let mut whole = true;
        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            let (gpa, len) = match input.u8() {
                // Rarely: each page fault costs time.
                0xff if whole => {
                    file.set_len(input.u16().into()).expect("a memfd");
                    whole = false;
                    continue;
                }
                0xfe => (input.u64(), input.u64()),
                0xc0.. => (u64::from(input.u32()) << 4, input.u32().into()),
                _ => (u64::from(input.u16()) << 8, u64::from(input.u16()) << 4),
            };
            log.mark(gpa, len);
            mark(&mut expected[offset as usize..][..size as usize], gpa, len);
        }
        if whole {
            let mut found = vec![0; FILE_BYTES];
            file.read_exact_at(&mut found, 0).expect("a memfd");
            assert!(found == expected, "not the pages that were written");
        }
    });
}

/// The reference: marks page by page.
fn mark(log: &mut [u8], gpa: u64, len: u64) {
    let Some(last) = len.checked_sub(1).and_then(|last| gpa.checked_add(last)) else { return };
    let pages = 8 * log.len() as u64;
    for page in (gpa / PAGE..=last / PAGE).take_while(|page| *page < pages) {
        log[page as usize / 8] |= 1 << (page % 8);
    }
}
