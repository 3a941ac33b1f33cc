//! Survives a front end that cuts its memory file short after we have mapped it.
//!
//! Touching a page beyond the end of the file raises SIGBUS. The handler finds the mapping in a
//! table that needs no lock, puts zeroes from there to its end, marks the region, and lets the
//! access run again. The marked region's queues stop at their next visit.
#![expect(unsafe_code, reason = "a signal handler")]

use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// How many parts of memory files can be mapped at a time, by all guests together. With a hole cut
/// into each of them they are half of the mappings that Linux lets a process have (65,530), so that
/// the rest of the process always finds room for its own.
const SLOTS: usize = 16 << 10;

/// A place in the table. `end` is 0 where it is free, 1 while it is being filled.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    truncated: AtomicPtr<AtomicBool>,
}

/// An entry's number.
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

/// How many slots, from the first on, were ever in use: free ones are taken lowest first, so no
/// look goes further.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Whether the handler has ever marked a region: spares the look at each one.
static TRUNCATED: AtomicBool = AtomicBool::new(false);

/// Whether any region of any guest has been marked since the program began.
#[inline]
pub(crate) fn ever_truncated() -> bool {
    // Relaxed: the access that faulted is the looking thread's own or comes before it otherwise.
    TRUNCATED.load(Ordering::Relaxed)
}

/// Guards `len` bytes at `start`; `truncated` is set if a page of them turns out to be missing.
/// `None` when the table is full.
pub(crate) fn register(
    start: usize,
    len: usize,
    page: usize,
    truncated: &Arc<AtomicBool>,
) -> Option<Slot> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    let claim = |e: &Entry| {
        // AcqRel: the slot's earlier contents were cleared before it became free. The look before
        // it leaves the lines of the slots that are taken to everybody.
        e.end.load(Ordering::Relaxed) == 0
            && e.end.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    let slot = TABLE.iter().position(claim)?;
    // AcqRel: whoever finds the mapping's address finds its entry, which comes after.
    USED.fetch_max(slot + 1, Ordering::AcqRel);
    let entry = &TABLE[slot];
    entry.start.store(start, Ordering::Relaxed);
    entry.page.store(page, Ordering::Relaxed);
    entry.truncated.store(Arc::into_raw(Arc::clone(truncated)).cast_mut(), Ordering::Relaxed);
    // Release: whoever finds the end finds the rest.
    entry.end.store(start + len, Ordering::Release);
    Some(Slot(slot))
}

/// Ends the guard. The mapping has no user any more, so no access can be looking at the entry.
pub(crate) fn unregister(slot: Slot) {
    let entry = &TABLE[slot.0];
    let truncated = entry.truncated.swap(std::ptr::null_mut(), Ordering::AcqRel);
    entry.start.store(usize::MAX, Ordering::Relaxed);
    // Release: the entry is empty before it is free.
    entry.end.store(0, Ordering::Release);
    // SAFETY: `register` made it from an `Arc` and this is the one place that takes it back.
    drop(unsafe { Arc::from_raw(truncated) });
}

fn install() {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler is async-signal-safe: atomics, and one mmap system call.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
}

extern "C" fn handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS comes with an address.
    let address = unsafe { info.si_addr() } as usize;
    // Beyond the end of the file, and not a broken memory cell or somebody's kill.
    if info.si_code != libc::BUS_ADRERR || !replace_rest(address) {
        // Not ours: let the access fault again and end the process as usual.
        // SAFETY: async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Puts zeroes from the page at `address` to the end of the guarded mapping that it lies in, if it
/// lies in one: what follows the end of the file is missing too, and one mapping for all of it
/// cannot use up the process's mappings.
fn replace_rest(address: usize) -> bool {
    let range = |entry: &Entry| {
        // Acquire: pairs with the Release in `register`.
        let end = entry.end.load(Ordering::Acquire);
        let start = entry.start.load(Ordering::Relaxed);
        (address < end && address >= start).then_some(end)
    };
    // Looked at twice: between the two loads the slot may have become another mapping's. The
    // mapping that faulted is in use, so its own entry does not change.
    let covers = |entry: &&Entry| {
        let end = range(entry);
        end.is_some() && range(entry) == end
    };
    // Acquire: see `register`; the mapping that faulted was registered before it was used.
    let used = USED.load(Ordering::Acquire);
    let Some(entry) = TABLE[..used].iter().find(covers) else { return false };
    let end = entry.end.load(Ordering::Relaxed);
    let start = address & !(entry.page.load(Ordering::Relaxed) - 1);
    // SAFETY: replaces pages of a mapping that is ours; the file's bytes there are gone anyway.
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
    // SAFETY: valid until `unregister`, which comes after the mapping's last use; the access that
    // faulted is a use.
    unsafe { &*truncated }.store(true, Ordering::Relaxed);
    TRUNCATED.store(true, Ordering::Relaxed);
    mapped != libc::MAP_FAILED
}
