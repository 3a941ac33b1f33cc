//! The thread of one disk that passes its I/Os to librbd, and librbd's completions.
//!
//! librbd takes locks, allocates, copies the data of writes, and waits when too much is under way.
//! So no reactor calls it. A channel puts I/Os into its [`Line`]; this thread submits them; librbd
//! reports each on a thread of its own, which puts the result into the line.
#![expect(unsafe_code, reason = "calls librbd with a guest's memory")]

use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use arc_swap::ArcSwapOption;
use bdev::{Durability, Ended, Io, Line, Op, Waker};

use crate::image::{Events, Image};
use crate::library::{CompletionPtr, Library, ZEROES_THICK};

/// The most I/Os that the thread takes from one channel before it serves the others.
const BATCH: usize = 32;

/// What the thread does with I/Os.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// Submits them.
    Serving,
    /// Keeps them until the image is open again.
    Reopening,
    /// Fails them: the cluster has blocklisted this client, and another client owns the image, the
    /// disk is being deleted, or the cluster cannot be reached and the disk has a `timeout`.
    Refused,
    /// Fails them, at the end of the process. No other mode follows.
    Ended,
}

/// What a disk's thread, librbd's callbacks, the channels and the control side share.
pub(crate) struct Shared {
    library: &'static Library,
    /// The image that I/O goes to; `None` at the end of the process.
    image: ArcSwapOption<Image>,
    /// The bytes of the disk that are within the image. librbd would silently cut writes that cross
    /// its end.
    size: AtomicU64,
    mode: AtomicU8,
    /// A lost client may have had completed writes in its cache only.
    durability: Durability,
    lines: Mutex<Vec<Arc<Served>>>,
    /// I/Os that failed because the cluster has blocklisted the client. They wait for another
    /// connection.
    parked: Mutex<Vec<(Arc<Served>, Io)>>,
    /// Whether parked I/Os may be submitted again: no other client has written meanwhile.
    resubmits: AtomicBool,
    waker: Waker,
    /// The disk is deleted: I/O does not wait for another connection.
    deleted: AtomicBool,
    ending: AtomicBool,
    events: Arc<Events>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("mode", &self.mode()).finish_non_exhaustive()
    }
}

/// A channel's line.
struct Served {
    line: Arc<Line>,
    /// The losses of writes that its flushes have reported: see [`Durability::take_loss`]. Only the
    /// disk's thread changes it.
    losses: AtomicU64,
}

/// The thread. Dropping it ends it; no I/O is under way then.
#[derive(Debug)]
pub(crate) struct Worker(pub(crate) Arc<Shared>);

impl Worker {
    /// Starts the thread.
    pub(crate) fn start(image: Image, size: u64, events: Arc<Events>) -> io::Result<Self> {
        let library = Library::get().map_err(io::Error::other)?;
        let shared = Arc::new(Shared {
            library,
            image: ArcSwapOption::from_pointee(image),
            size: AtomicU64::new(size),
            mode: AtomicU8::new(Mode::Serving as u8),
            durability: Durability::default(),
            lines: Mutex::default(),
            parked: Mutex::default(),
            resubmits: AtomicBool::new(false),
            waker: Waker::new()?,
            deleted: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            events,
        });
        let worker = Self(Arc::clone(&shared));
        thread::Builder::new().name("vhost-rbd".into()).spawn(move || shared.work())?;
        Ok(worker)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.ending.store(true, Ordering::Release);
        self.0.waker.wake();
        self.0.events.end();
    }
}

impl Shared {
    fn lines(&self) -> MutexGuard<'_, Vec<Arc<Served>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a channel.
    pub(crate) fn add(&self, line: &Arc<Line>) {
        let losses = AtomicU64::new(self.durability.channel_opened());
        self.lines().push(Arc::new(Served { line: Arc::clone(line), losses }));
    }

    /// Stops serving a channel, which has no outstanding I/O.
    pub(crate) fn remove(&self, line: &Arc<Line>) {
        self.lines().retain(|other| !Arc::ptr_eq(line, &other.line));
        self.durability.channel_closed();
    }

    /// Wakes the thread if it sleeps. Does not wait.
    pub(crate) fn wake(&self) {
        self.waker.wake();
    }

    /// The bytes of the disk that are within the image.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        // Relaxed suffices: no other data is published with the number.
        self.size.load(Ordering::Relaxed)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    pub(crate) fn mode(&self) -> Mode {
        // Acquire: pairs with `set_mode`; who sees the mode also sees the image that was set before
        // it.
        match self.mode.load(Ordering::Acquire) {
            0 => Mode::Serving,
            1 if self.deleted.load(Ordering::Relaxed) => Mode::Refused,
            1 => Mode::Reopening,
            2 => Mode::Refused,
            _ => Mode::Ended,
        }
    }

    /// Changes the mode, and makes the thread act on it. Does not leave [`Mode::Ended`].
    pub(crate) fn set_mode(&self, mode: Mode) {
        let order = Ordering::AcqRel;
        let change = |now| (now != Mode::Ended as u8).then_some(mode as u8);
        let _ = self.mode.fetch_update(order, Ordering::Acquire, change);
        self.waker.wake();
    }

    /// Records that the disk is being deleted.
    pub(crate) fn set_deleted(&self) {
        self.deleted.store(true, Ordering::Relaxed);
        self.waker.wake();
    }

    /// The image that I/O goes to; `None` at the end of the process.
    pub(crate) fn image(&self) -> Option<Arc<Image>> {
        self.image.load_full()
    }

    /// Stops serving, and returns the image if no I/O is under way.
    pub(crate) fn take_image(&self) -> Option<Image> {
        // Before the thread wakes and takes a reference.
        let image = self.image.swap(None);
        self.set_mode(Mode::Ended);
        Arc::into_inner(image?)
    }

    /// Uses another connection to the image, which has this size, from now on. `resubmits`: no
    /// other client has written to the image meanwhile, so parked writes may be submitted again.
    pub(crate) fn adopt(&self, image: Image, size: u64, resubmits: bool) {
        self.size.fetch_min(size, Ordering::Relaxed);
        self.resubmits.store(resubmits, Ordering::Relaxed);
        self.durability.server_lost();
        self.image.store(Some(Arc::new(image)));
        self.set_mode(Mode::Serving);
    }

    pub(crate) fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Whether the thread may take I/Os of this line. In [`Mode::Reopening`], only to cancel them.
    fn takes(served: &Served, mode: Mode) -> bool {
        mode != Mode::Reopening || served.line.abandoned().load(Ordering::Relaxed)
    }

    /// The thread's main function.
    fn work(self: Arc<Self>) {
        let mut lines: Vec<Arc<Served>> = vec![];
        while !self.ending.load(Ordering::Acquire) {
            lines.clone_from(&self.lines());
            let mode = self.mode();
            let image = self.image();
            let mut taken = self.settle_parked();
            for line in lines.iter().filter(|line| Self::takes(line, mode)) {
                for io in std::iter::from_fn(|| line.line.take_job()).take(BATCH) {
                    self.begin(line, image.as_ref(), mode, io);
                    taken += 1;
                }
            }
            drop(image);
            lines.clear();
            if taken == 0 {
                self.waker.wait(|| self.has_work());
            }
        }
    }

    fn has_work(&self) -> bool {
        let mode = self.mode();
        let waits = |served: &Arc<Served>| served.line.waiting() > 0 && Self::takes(served, mode);
        let parked = || self.parked().iter().any(|(line, _)| Self::takes(line, mode));
        self.ending.load(Ordering::Acquire) || self.lines().iter().any(waits) || parked()
    }

    fn parked(&self) -> MutexGuard<'_, Vec<(Arc<Served>, Io)>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Submits or fails the parked I/Os that the mode allows. Returns their number.
    fn settle_parked(self: &Arc<Self>) -> usize {
        let mut parked = self.parked();
        // Read with the list locked: `park` changes the mode before it adds an I/O, so the mode here
        // is not from before that change.
        let mode = self.mode();
        let settled: Vec<_> = parked.extract_if(.., |(line, _)| Self::takes(line, mode)).collect();
        drop(parked);
        let (image, resubmits) = (self.image(), self.resubmits.load(Ordering::Relaxed));
        for (line, io) in &settled {
            // A read may always be submitted again.
            let mode = if resubmits || io.op == Op::Read { mode } else { Mode::Refused };
            self.begin(line, image.as_ref(), mode, *io);
        }
        settled.len()
    }

    fn begin(self: &Arc<Self>, line: &Arc<Served>, image: Option<&Arc<Image>>, mode: Mode, io: Io) {
        if line.line.abandoned().load(Ordering::Relaxed) {
            return line.line.complete(io.tag, Ended::Failed(libc::ECANCELED));
        }
        let Some(image) = image.filter(|_| matches!(mode, Mode::Serving | Mode::Reopening)) else {
            return line.line.complete(io.tag, Ended::Failed(libc::ESHUTDOWN));
        };
        if io.op == Op::Flush {
            let mut losses = line.losses.load(Ordering::Relaxed);
            if self.durability.take_loss(&mut losses) {
                line.losses.store(losses, Ordering::Relaxed);
                return line.line.complete(io.tag, Ended::Failed(libc::EIO));
            }
        }
        let flight = Flight {
            shared: Arc::clone(self),
            line: Arc::clone(line),
            image: Arc::clone(image),
            io,
            written: self.durability.written(),
        };
        let flight = Box::into_raw(Box::new(flight));
        let mut completion = ptr::null_mut();
        // SAFETY: the call fills `completion`; `on_done` frees the flight, once.
        let made = unsafe {
            (self.library.rbd_aio_create_completion)(flight.cast(), on_done, &raw mut completion)
        };
        let started = match made {
            // SAFETY: the channel keeps the I/O's memory until it is reported.
            0.. => unsafe { self.submit(image, &io, completion) },
            errno => errno,
        };
        if started < 0 {
            if made >= 0 {
                // SAFETY: librbd has not taken the I/O, so it does not call back.
                unsafe { (self.library.rbd_aio_release)(completion) };
            }
            // SAFETY: it comes from `into_raw` above, and no callback has it.
            unsafe { Box::from_raw(flight) }.end(started as isize);
        }
    }

    /// Passes an I/O to librbd. Returns a negative errno if librbd has not taken it.
    ///
    /// # Safety
    /// The I/O's segments and their memory are valid until librbd has reported it.
    unsafe fn submit(&self, image: &Image, io: &Io, completion: CompletionPtr) -> c_int {
        let (library, image) = (self.library, image.as_ptr());
        let (segments, count) = io.iovecs();
        let Ok(count) = c_int::try_from(count) else { return -libc::EINVAL };
        match io.op {
            // SAFETY: the image is open, as the flight holds it; the memory by the caller's promise.
            Op::Read => unsafe {
                (library.rbd_aio_readv)(image, segments, count, io.offset, completion)
            },
            // SAFETY: as above.
            Op::Write => unsafe {
                (library.rbd_aio_writev)(image, segments, count, io.offset, completion)
            },
            // SAFETY: the image is open.
            Op::Flush => unsafe { (library.rbd_aio_flush)(image, completion) },
            // SAFETY: the image is open.
            Op::Unmap => unsafe { (library.rbd_aio_discard)(image, io.offset, io.len, completion) },
            Op::WriteZeroes => {
                let Ok(len) = usize::try_from(io.len) else { return -libc::EINVAL };
                let flags = if io.may_unmap { 0 } else { ZEROES_THICK };
                // SAFETY: the image is open.
                unsafe {
                    (library.rbd_aio_write_zeroes)(image, io.offset, len, completion, flags, 0)
                }
            }
        }
    }

    /// Parks an I/O that failed because the cluster has blocklisted the client that opened this
    /// image.
    fn park(&self, image: &Arc<Image>, line: Arc<Served>, io: Io) {
        self.refused(image);
        // After the change of the mode: the thread must not settle this I/O in the mode before.
        self.parked().push((line, io));
        self.waker.wake();
    }

    /// Records that the cluster has blocklisted the client that opened this image. If the disk
    /// still uses it, I/O waits, and the disk's task opens the image again.
    pub(crate) fn refused(&self, image: &Arc<Image>) {
        image.cluster().set_blocklisted();
        let present = self.image.load();
        if !present.as_ref().is_some_and(|present| Arc::ptr_eq(present, image)) {
            return;
        }
        let (from, to) = (Mode::Serving as u8, Mode::Reopening as u8);
        if self.mode.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.events.any.notify_one();
        }
    }
}

/// An I/O that was submitted to librbd.
struct Flight {
    shared: Arc<Shared>,
    line: Arc<Served>,
    /// Keeps the image open.
    image: Arc<Image>,
    io: Io,
    /// [`Durability::written`] at its start.
    written: u64,
}

impl Flight {
    /// Reports the result: the number of bytes of a read, 0 for other I/Os, or a negative errno.
    fn end(self, result: isize) {
        let Self { shared, line, image, io, written } = self;
        let ended = match (result, io.op) {
            (..0, _) => Ended::Failed(i32::try_from(result.unsigned_abs()).unwrap_or(libc::EIO)),
            (read, Op::Read) if read.unsigned_abs() as u64 != io.len => Ended::Failed(0),
            // The image has become smaller, and librbd may have cut the I/O.
            (_, Op::Write | Op::WriteZeroes | Op::Unmap) if !bdev::within(&io, shared.size()) => {
                Ended::Failed(0)
            }
            _ => Ended::Ok,
        };
        if ended == Ended::Failed(libc::ESHUTDOWN) {
            return shared.park(&image, line, io);
        }
        // Before the report: whoever waits for the I/O may close the image next.
        drop(image);
        if ended == Ended::Ok {
            shared.durability.done(io.op, written);
        }
        line.line.complete(io.tag, ended);
    }
}

/// Called by librbd, on one of its threads, when an I/O has ended.
unsafe extern "C" fn on_done(completion: CompletionPtr, flight: *mut c_void) {
    // SAFETY: it comes from `Box::into_raw` in `begin`, and librbd calls back once.
    let flight = unsafe { Box::from_raw(flight.cast::<Flight>()) };
    let library = flight.shared.library;
    // SAFETY: the completion is valid until its release below.
    let result = unsafe { (library.rbd_aio_get_return_value)(completion) };
    // SAFETY: it is not used after this.
    unsafe { (library.rbd_aio_release)(completion) };
    flight.end(result);
}
