//! A pointer that readers load without blocking, and its earlier values.
#![expect(unsafe_code, reason = "frees values that other threads have read")]

use std::ptr::NonNull;
use std::sync::Arc;

use crate::domain::{Domain, Epoch, Reader};
use crate::ordering::{ptr_load, ptr_swap};
use crate::sync::AtomicPtr;

/// A value that readers see and writers replace.
#[derive(Debug)]
pub struct Published<T> {
    ptr: AtomicPtr<T>,
    domain: Arc<Domain>,
}

// SAFETY: several threads get a `&T`, which needs `Sync`, and one thread gets the `T` through
// `Retired`, which needs `Send`.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Publishes `value` to the readers of `domain`.
    #[must_use]
    pub fn new(domain: &Arc<Domain>, value: Box<T>) -> Self {
        Self { ptr: AtomicPtr::new(Box::into_raw(value)), domain: Arc::clone(domain) }
    }

    /// The current value, valid until the reader's iteration ends. Costs one load.
    ///
    /// # Safety
    /// `reader` must be online and belong to this value's domain. (Debug builds assert it.)
    #[inline]
    pub unsafe fn load<'r>(&'r self, reader: &'r Reader) -> &'r T {
        debug_assert!(reader.is_online(), "an offline reader may not load");
        debug_assert!(Arc::ptr_eq(&self.domain, reader.domain()), "a reader of another domain");
        let ptr = self.ptr.load(ptr_load());
        // SAFETY: `ptr` came from a box and was current after this iteration began. It is freed
        // only when this reader has been quiescent after the replacement, which needs `&mut
        // Reader`, and the returned reference borrows `reader`.
        unsafe { &*ptr }
    }

    /// Publishes `value` and returns the last value, which readers may still use.
    pub fn replace(&self, value: Box<T>) -> Retired<T> {
        let old = self.ptr.swap(Box::into_raw(value), ptr_swap());
        let epoch = self.domain.advance();
        let old = NonNull::new(old).expect("only pointers from boxes are stored");
        Retired { value: Some(old), epoch, domain: Arc::clone(&self.domain) }
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        // Relaxed: `&mut self` means that no other thread uses the pointer.
        let ptr = self.ptr.load(std::sync::atomic::Ordering::Relaxed);
        // SAFETY: `ptr` came from a box. References from `load` borrow `self`, so none is left.
        drop(unsafe { Box::from_raw(ptr) });
    }
}

/// A retired value: no longer published, but readers may still use it.
///
/// If it is dropped before its grace period has ended, the value leaks, because a reader may use
/// it.
#[derive(Debug)]
pub struct Retired<T> {
    value: Option<NonNull<T>>,
    epoch: Epoch,
    domain: Arc<Domain>,
}

// SAFETY: it owns the value, and readers on other threads may hold a `&T`.
unsafe impl<T: Send + Sync> Send for Retired<T> {}

impl<T> Retired<T> {
    /// Whether the grace period has ended, so that no reader uses the value. Never blocks.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.domain.passed(self.epoch)
    }

    /// The value, which readers may also use.
    #[must_use]
    pub fn get(&self) -> &T {
        let value = self.value.as_ref().expect("taken only when self is consumed");
        // SAFETY: the value lives as long as `self`, and is never borrowed mutably.
        unsafe { value.as_ref() }
    }

    /// The value, if the grace period has ended.
    ///
    /// # Errors
    /// Returns `self` if the grace period has not ended.
    pub fn try_into_inner(mut self) -> Result<Box<T>, Self> {
        if !self.ready() {
            return Err(self);
        }
        let value = self.value.take().expect("taken only here, where self is consumed");
        // SAFETY: `value` came from a box, is no longer published, and no reader uses it.
        Ok(unsafe { Box::from_raw(value.as_ptr()) })
    }
}

impl<T> Drop for Retired<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take()
            && self.ready()
        {
            // SAFETY: as in `try_into_inner`.
            drop(unsafe { Box::from_raw(value.as_ptr()) });
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_value_outlives_the_iteration_that_loaded_it() {
        let domain = Domain::new(1);
        let mut reader = domain.reader().unwrap();
        let published = Published::new(&domain, Box::new(Arc::new(1)));
        reader.online();
        // SAFETY: online, same domain.
        let held = Arc::downgrade(unsafe { published.load(&reader) });
        let retired = published.replace(Box::new(Arc::new(2))).try_into_inner().unwrap_err();
        assert!(held.upgrade().is_some());
        reader.quiesce();
        drop(retired);
        assert!(held.upgrade().is_none());
    }

    #[test]
    fn the_current_value_is_dropped_with_the_pointer() {
        let domain = Domain::new(1);
        let value = Arc::new(1);
        let published = Published::new(&domain, Box::new(Arc::clone(&value)));
        assert_eq!(Arc::strong_count(&value), 2);
        drop(published);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn two_retirements_need_one_quiescent_state() {
        let domain = Domain::new(1);
        let mut reader = domain.reader().unwrap();
        reader.online();
        let published = Published::new(&domain, Box::new(1));
        let first = published.replace(Box::new(2));
        let second = published.replace(Box::new(3));
        reader.quiesce();
        assert_eq!(*first.try_into_inner().unwrap(), 1);
        assert_eq!(*second.try_into_inner().unwrap(), 2);
    }
}
