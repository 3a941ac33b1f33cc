//! Guest memory as atomic integers, for fields that are read millions of times a second.
#![expect(unsafe_code, reason = "vm-memory hands out one atomic at a time, and checks each")]

use vm_memory::AtomicInteger;

use crate::guest::Window;

/// Returns the window's memory as atomics, as many as fit. The other side may write them at any
/// time.
///
/// # Panics
/// If the window's address is not a multiple of the atomic's size: a bug of this crate.
pub(crate) fn words<T: AtomicInteger>(window: &Window) -> &[T] {
    let first = window.user_addr() as *const T;
    assert!(first.is_aligned(), "{first:?} is not aligned");
    let len = window.len() / size_of::<T>();
    // SAFETY: the window lies in a mapping that is valid as long as the window's `GuestRam`, which
    // the borrow keeps; `len` values fit in it, and the first one is aligned. Atomics may be shared
    // with any writer, and every bit pattern is an integer.
    unsafe { std::slice::from_raw_parts(first, len) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    use super::*;
    use crate::guest::GuestRam;

    #[test]
    fn they_cover_exactly_the_bytes_of_the_window() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let window = ram.window(20, 8).unwrap();
        let wide: &[AtomicU64] = words(&window);
        assert_eq!((wide.len(), words::<AtomicU8>(&window).len()), (2, 20));
        wide[1].store(0x0102, Ordering::Relaxed);
        let mut bytes = [0; 3];
        ram.read(window.gpa() + 8, &mut bytes).unwrap();
        assert_eq!(bytes, [2, 1, 0]);
        ram.write(window.gpa() + 19, &[7]).unwrap();
        assert_eq!(words::<AtomicU8>(&window)[19].load(Ordering::Relaxed), 7);
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn an_unaligned_window_is_refused() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        ram.alloc(1, 1).unwrap();
        words::<AtomicU64>(&ram.window(16, 1).unwrap());
    }
}
