//! What the data path asks of the processor's caches: lines fetched ahead of their use, and a fence.
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

/// A sequentially consistent fence. On x86-64 a locked instruction, which orders as much as the
/// `mfence` that the compiler makes of one and takes less time. (Linux's `smp_mb` is the same.)
#[inline(always)]
pub(crate) fn full_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: changes no bit of a word of our own stack. The compiler moves no access across it, as
    // it may touch memory for all that is said here.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp - 4], 0");
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
