//! Kills the "process" of a test at a chosen store.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static STORES: Cell<u64> = const { Cell::new(0) };
}

/// The payload of the unwinding that stands for a kill.
struct Killed;

/// Called before every store to an area, and by tests before stores to a ring.
pub(super) fn store() {
    let left = LEFT.get();
    if left == 0 {
        // Unlike a panic, this prints no message.
        resume_unwind(Box::new(Killed));
    }
    LEFT.set(left - 1);
    STORES.set(STORES.get() + 1);
}

/// Number of stores by this thread so far.
pub(super) fn stores() -> u64 {
    STORES.get()
}

/// Runs a process that is killed before store number `at`, counted from 0. Returns `None` if it was
/// killed.
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
