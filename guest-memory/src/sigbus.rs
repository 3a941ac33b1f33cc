//! Handles SIGBUS, so that a front end can truncate a mapped memory file without ending this
//! process.
//!
//! An access to a page beyond the end of the file raises SIGBUS. The handler finds the mapping in a
//! lock-free table. It maps zeroes from the page to the end of the mapping, marks the mapping as
//! truncated, and lets the access run again. The queues that use the mapping stop at their next
//! visit.
#![expect(unsafe_code, reason = "a signal handler")]

use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// Maximum number of mappings of memory files at a time, for all guests together. A truncated one
/// takes two of the process's mappings. Even if all are truncated, they take half of the mappings
/// that Linux allows a process (65,530), so that the rest of the process can always map memory.
const SLOTS: usize = 16 << 10;

/// An entry of the table. `end` is 0 while it is free, and 1 while it is being filled.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    truncated: AtomicPtr<AtomicBool>,
}

/// The index of an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot(usize);

static TABLE: [Entry; SLOTS] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        truncated: AtomicPtr::new(std::ptr::null_mut()),
    }
}; SLOTS];

/// Number of slots, from the first on, that were ever in use. The lowest free slot is taken first,
/// so a search ends here.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Whether the handler has ever marked a mapping. While it is false, no mapping needs to be
/// checked.
static TRUNCATED: AtomicBool = AtomicBool::new(false);

/// Returns whether any mapping of any guest has been marked since the process started.
#[inline]
pub(crate) fn ever_truncated() -> bool {
    // Relaxed: the access that faulted was in the calling thread, or happened before this load for
    // another reason.
    TRUNCATED.load(Ordering::Relaxed)
}

/// Guards `len` bytes at `start`. `truncated` is set when an access finds a page of them missing.
/// Returns `None` if the table is full.
pub(crate) fn register(
    start: usize,
    len: usize,
    page: usize,
    truncated: &Arc<AtomicBool>,
) -> Option<Slot> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    let claim = |e: &Entry| {
        // AcqRel: the slot's earlier contents were cleared before it became free. The load before
        // the exchange keeps the cache lines of used slots shared.
        e.end.load(Ordering::Relaxed) == 0
            && e.end.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    let slot = TABLE.iter().position(claim)?;
    // AcqRel: a handler that faults in the mapping also sees its slot, because the mapping is used
    // only after this.
    USED.fetch_max(slot + 1, Ordering::AcqRel);
    let entry = &TABLE[slot];
    entry.start.store(start, Ordering::Relaxed);
    entry.page.store(page, Ordering::Relaxed);
    entry.truncated.store(Arc::into_raw(Arc::clone(truncated)).cast_mut(), Ordering::Relaxed);
    // Release: a handler that loads the end also sees the other fields.
    entry.end.store(start + len, Ordering::Release);
    Some(Slot(slot))
}

/// Ends the guard. The mapping has no user any more, so no handler uses the entry.
pub(crate) fn unregister(slot: Slot) {
    let entry = &TABLE[slot.0];
    let truncated = entry.truncated.swap(std::ptr::null_mut(), Ordering::AcqRel);
    entry.start.store(usize::MAX, Ordering::Relaxed);
    // Release: the entry is empty before it becomes free.
    entry.end.store(0, Ordering::Release);
    // SAFETY: the pointer came from an `Arc` in `register`, and only this line takes it back.
    drop(unsafe { Arc::from_raw(truncated) });
}

fn install() {
    // SAFETY: all zeroes is a valid value of this C struct.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler is async-signal-safe: it uses atomics and one mmap system call.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
}

extern "C" fn handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO, the kernel passes a valid siginfo.
    let info = unsafe { &*info };
    // SAFETY: a SIGBUS from a memory access has an address. For others, the address is not used.
    let address = unsafe { info.si_addr() } as usize;
    // BUS_ADRERR: the page is beyond the end of the file. It is neither a memory error nor a signal
    // from `kill`.
    if info.si_code != libc::BUS_ADRERR || !replace_rest(address) {
        // Not a guarded mapping: the access faults again and ends the process.
        // SAFETY: async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// If `address` is in a guarded mapping, maps zeroes from its page to the end of the mapping.
/// Returns whether it did so. The pages after a missing page are missing too, and a single new
/// mapping for all of them cannot use up the process's mappings.
fn replace_rest(address: usize) -> bool {
    let range = |entry: &Entry| {
        // Acquire: pairs with the Release in `register`.
        let end = entry.end.load(Ordering::Acquire);
        let start = entry.start.load(Ordering::Relaxed);
        (address < end && address >= start).then_some(end)
    };
    // Loaded twice: between the two loads, the slot may have become another mapping's. The mapping
    // that faulted is in use, so its own entry does not change.
    let covers = |entry: &&Entry| {
        let end = range(entry);
        end.is_some() && range(entry) == end
    };
    // Acquire: see `register`; the mapping that faulted was registered before it was used.
    let used = USED.load(Ordering::Acquire);
    let Some(entry) = TABLE[..used].iter().find(covers) else { return false };
    let end = entry.end.load(Ordering::Relaxed);
    let start = address & !(entry.page.load(Ordering::Relaxed) - 1);
    // SAFETY: replaces pages of a guarded mapping. The file has no bytes there any more.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            end - start,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    let truncated = entry.truncated.load(Ordering::Relaxed);
    // SAFETY: valid until `unregister`, which comes after the last use of the mapping. The access
    // that faulted is a use.
    unsafe { &*truncated }.store(true, Ordering::Relaxed);
    TRUNCATED.store(true, Ordering::Relaxed);
    mapped != libc::MAP_FAILED
}
