//! A pointer that readers follow without blocking, and the values that it pointed to before.
#![expect(unsafe_code, reason = "frees what other threads may have been reading")]

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

// SAFETY: it gives `&T` to several threads and, through `Retired`, a `T` to another one.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Publishes `value` to the readers of `domain`.
    #[must_use]
    pub fn new(domain: &Arc<Domain>, value: Box<T>) -> Self {
        Self { ptr: AtomicPtr::new(Box::into_raw(value)), domain: Arc::clone(domain) }
    }

    /// The current value, good until the reader's turn ends. Costs one load.
    ///
    /// # Safety
    /// `reader` is online and of this value's domain. (Debug builds assert it.)
    #[inline]
    pub unsafe fn load<'r>(&'r self, reader: &'r Reader) -> &'r T {
        debug_assert!(reader.is_online(), "a sleeping reader may not load");
        debug_assert!(Arc::ptr_eq(&self.domain, reader.domain()), "a reader of another domain");
        let ptr = self.ptr.load(ptr_load());
        // SAFETY: `ptr` came from a box and was current after this turn began. It is freed only
        // when this reader has been quiescent after it was replaced, which needs `&mut Reader`,
        // and the borrow of `reader` lasts as long as the answer.
        unsafe { &*ptr }
    }

    /// Publishes `value` and returns the one before, which readers may still be using.
    pub fn replace(&self, value: Box<T>) -> Retired<T> {
        let old = self.ptr.swap(Box::into_raw(value), ptr_swap());
        let epoch = self.domain.advance();
        let old = NonNull::new(old).expect("only boxes are ever stored");
        Retired { value: Some(old), epoch, domain: Arc::clone(&self.domain) }
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        // Relaxed will do: `&mut self` says that no reader and no writer is left.
        let ptr = self.ptr.load(std::sync::atomic::Ordering::Relaxed);
        // SAFETY: `ptr` came from a box, and with the last borrow of `self` the last use of it
        // that `load` gave out has ended.
        drop(unsafe { Box::from_raw(ptr) });
    }
}

/// A value that is no longer published but may still be in use.
///
/// Dropped before it is ready it leaks: losing memory is better than freeing it under a reader.
#[derive(Debug)]
pub struct Retired<T> {
    value: Option<NonNull<T>>,
    epoch: Epoch,
    domain: Arc<Domain>,
}

// SAFETY: it owns the value, of which readers on other threads may hold a `&T` at first.
unsafe impl<T: Send + Sync> Send for Retired<T> {}

impl<T> Retired<T> {
    /// Whether the last reader is done with it. Never blocks.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.domain.passed(self.epoch)
    }

    /// The value, which readers may be using too.
    #[must_use]
    pub fn get(&self) -> &T {
        let value = self.value.as_ref().expect("taken only where self ends");
        // SAFETY: not freed before self ends, and never borrowed mutably.
        unsafe { value.as_ref() }
    }

    /// The value, if no reader uses it any more.
    ///
    /// # Errors
    /// Gives itself back when it is too early.
    pub fn try_into_inner(mut self) -> Result<Box<T>, Self> {
        if !self.ready() {
            return Err(self);
        }
        let value = self.value.take().expect("taken only here, where self ends");
        // SAFETY: it came from a box, is no longer published, and no reader uses it.
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
    fn a_value_outlives_the_turn_that_loaded_it() {
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
    fn the_current_value_goes_with_what_published_it() {
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
