//! Two sides that must not miss each other: each says something, then looks at what the other said.
#![cfg_attr(
    all(target_arch = "x86_64", not(loom)),
    expect(unsafe_code, reason = "an instruction that Rust has no name for")
)]

/// Says something, then looks at what the other side has said, which does the same the other way
/// round. At least one of the two sees what the other has said.
///
/// If our saying comes first in the order of the fences, the other side's look sees it. If theirs
/// comes first, our look sees that. A driver and a device agree in this way whether one has to wake
/// the other (virtio 1.2, 2.7.7 and 2.7.10): what is said is "I sleep" and "here is work".
#[inline]
pub fn say_then_look<T>(say: impl FnOnce(), look: impl FnOnce() -> T) -> T {
    say();
    full_fence();
    look()
}

/// The fence of [`say_then_look`], for where other things are done between the two.
///
/// Sequentially consistent. On x86-64 it is a locked instruction, which orders as much as the
/// `mfence` that the compiler makes of one and takes less time. (Linux's `smp_mb` is the same.)
#[inline(always)]
pub fn full_fence() {
    #[cfg(loom)]
    if crate::ordering::fence_handshake() {
        crate::sync::fence(std::sync::atomic::Ordering::SeqCst);
    }
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    // SAFETY: changes no bit of a word of our own stack. The compiler moves no access across it, as
    // it may touch memory for all that is said here.
    unsafe {
        core::arch::asm!("lock or dword ptr [rsp - 4], 0");
    }
    #[cfg(not(any(target_arch = "x86_64", loom)))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
