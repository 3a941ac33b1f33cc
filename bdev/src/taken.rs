//! A value that threads use one after another, and that a reactor never waits for.
#![expect(unsafe_code, reason = "shares a value without a lock")]

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// A value that one thread at a time can take. A reactor calls [`TryTaken::try_take`], and goes on
/// without the value if another thread has it.
pub struct TryTaken<T> {
    /// Set while a thread has the value.
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is accessed only by the thread that has set `taken`, so sharing the cell hands
// the value from thread to thread, as `Send` permits.
unsafe impl<T: Send> Sync for TryTaken<T> {}

impl<T> fmt::Debug for TryTaken<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TryTaken").finish_non_exhaustive()
    }
}

impl<T> TryTaken<T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        Self { taken: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Takes the value, unless another thread has it. Does not wait.
    #[inline]
    pub fn try_take(&self) -> Option<Taken<'_, T>> {
        // Acquire: pairs with the Release of the thread that had it before.
        // Not `then_some`: dropping a `Taken` releases the value.
        (!self.taken.swap(true, Ordering::Acquire)).then(|| Taken(self))
    }

    /// Takes the value, for threads that may wait. The caller knows that no thread keeps it for
    /// long.
    pub fn take(&self) -> Taken<'_, T> {
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            thread::yield_now();
        }
    }
}

/// The right to use the value, until this is dropped.
pub struct Taken<'a, T>(&'a TryTaken<T>);

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        // Release: the next thread sees what this one has done.
        self.0.taken.store(false, Ordering::Release);
    }
}

impl<T> Deref for Taken<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this thread has set `taken`, and `self` is borrowed as long as the value.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { &mut *self.0.value.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_has_the_value() {
        const ROUNDS: u64 = 20_000;
        let value = TryTaken::new(0_u64);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        let mut taken = value.take();
                        assert!(value.try_take().is_none());
                        *taken += 1;
                    }
                });
            }
        });
        assert_eq!(*value.take(), 2 * ROUNDS);
    }
}
