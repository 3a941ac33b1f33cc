//! Ends the "process" of a test at a store of its choice.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static STORES: Cell<u64> = const { Cell::new(0) };
}

/// What unwinds a process that was killed.
struct Killed;

/// Called before every store to an area, and by tests before those to a ring.
pub(super) fn store() {
    let left = LEFT.get();
    if left == 0 {
        // Unlike a panic, this prints nothing.
        resume_unwind(Box::new(Killed));
    }
    LEFT.set(left - 1);
    STORES.set(STORES.get() + 1);
}

/// Stores on this thread so far.
pub(super) fn stores() -> u64 {
    STORES.get()
}

/// Runs a process that is killed before its store number `at`, counted from 0. `None` if it was.
pub(super) fn killed_at<T>(at: u64, process: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(at);
    let end = catch_unwind(AssertUnwindSafe(process));
    LEFT.set(u64::MAX);
    match end {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}
