//! A handshake of two threads: each stores a flag, then loads the other's flag, and at least one of
//! them sees the other's store.
#![cfg_attr(
    all(target_arch = "x86_64", not(loom)),
    expect(unsafe_code, reason = "a locked instruction as a fence")
)]

/// Calls `store`, which stores a flag, then `load`, which loads the other side's flag. If both
/// sides do this, at least one of them sees the other's store.
///
/// If this side's fence comes first, the other side's load sees this side's store. If the other
/// side's fence comes first, this side's load sees the other's store. A virtio driver and a device
/// decide in this way whether a notification is necessary (virtio 1.2, 2.7.7 and 2.7.10): one side
/// stores "I sleep", the other "there is work".
#[inline]
pub fn store_then_load<T>(store: impl FnOnce(), load: impl FnOnce() -> T) -> T {
    store();
    full_fence();
    load()
}

/// The fence of [`store_then_load`], for callers that do other work between the store and the load.
///
/// It is sequentially consistent. On x86-64 it is a locked instruction, which orders as much as the
/// compiler's `mfence` and takes less time. (Linux's `smp_mb` is the same.)
#[inline(always)]
pub fn full_fence() {
    #[cfg(loom)]
    if crate::ordering::fence_handshake() {
        crate::sync::fence(std::sync::atomic::Ordering::SeqCst);
    }
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    // The compiler moves no access across the instruction, because `asm!` may access any memory.
    // SAFETY: the instruction ORs zero into a word of this thread's stack, which changes nothing.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp - 4], 0");
    }
    #[cfg(not(any(target_arch = "x86_64", loom)))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
