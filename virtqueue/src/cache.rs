//! Prefetches of cache lines.
#![expect(unsafe_code, reason = "prefetch instructions")]

/// Bytes in a cache line.
pub const LINE: usize = 64;

/// Prefetches the line at `at` for reading. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and never faults.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Prefetches the line at `at` for writing, which gets exclusive ownership in one step. The
/// compiler's own prefetch for writing becomes one for reading unless a target processor is set.
#[inline(always)]
pub fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint. Processors without the instruction execute it as a no-op (Intel, 3.1.1,
    // "PREFETCHW").
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
