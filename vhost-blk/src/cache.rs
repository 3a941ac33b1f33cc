//! What the data path asks of the processor's caches: lines fetched ahead of their use.
#![expect(unsafe_code, reason = "instructions that Rust has no name for")]

/// Bytes in a cache line.
pub(crate) const LINE: usize = 64;

/// Has the processor fetch the line at `at`. Any address will do: a prefetch never faults.
#[inline(always)]
pub(crate) fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which does nothing where it can do nothing.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The same for a line that will be written: taken away from whoever has it, in one go. The
/// compiler's own prefetch for writing becomes one for reading unless the processor is named.
#[inline(always)]
pub(crate) fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; processors without it take it for a no-op (Intel, 3.1.1, "PREFETCHW").
    unsafe {
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
