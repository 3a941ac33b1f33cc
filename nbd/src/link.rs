//! A stream socket on an io_uring of its own, with staging buffers. Knows no protocol.
//!
//! The kernel accesses the staging buffers only. So it never has an address of a guest's memory,
//! and an I/O can be given up at any time.
//!
//! At most one send and one receive are under way, which keeps the order of the bytes. A thread
//! that calls these methods does not wait: the kernel tries each operation once, and finishes it
//! later if the socket is not ready.
#![expect(unsafe_code, reason = "hands buffers to the kernel")]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, cqueue, opcode, squeue, types};

/// The bytes of data in each staging buffer: about as much as a Unix socket takes in one call by
/// default.
pub(crate) const STAGING: usize = 256 << 10;

/// More bytes in the output buffer, for headers.
const HEADERS: usize = 4 << 10;

/// The index of the socket in the ring's table.
const SOCKET: types::Fixed = types::Fixed(0);

/// The ring's entries: one send and one receive.
const ENTRIES: u32 = 2;

/// The `user_data` of the operations.
const SEND: u64 = 1;
const RECEIVE: u64 = 2;

/// What has happened on a [`Link`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// All of the output is sent.
    Sent,
    /// So many bytes have arrived: see [`Link::input`].
    Received(usize),
    /// The peer has closed the connection.
    Closed,
    /// The connection has failed with this errno.
    Failed(i32),
}

/// A connected socket, for one user at a time.
pub(crate) struct Link {
    ring: IoUring,
    /// Entries in the ring that the kernel has not taken.
    unsubmitted: usize,
    output: ManuallyDrop<Box<[u8]>>,
    /// The bytes of `output` to send, and how many of them are sent.
    filled: usize,
    sent: usize,
    sending: bool,
    input: ManuallyDrop<Box<[u8]>>,
    receiving: bool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sending, receiving, .. } = self;
        f.debug_struct("Link")
            .field("sending", sending)
            .field("receiving", receiving)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// Makes a link. `call` is an eventfd, which the kernel signals for each event. The caller
    /// keeps a file descriptor of the socket, and shuts it down in the end.
    ///
    /// # Errors
    /// The system's error, such as a limit on memory or open files.
    pub(crate) fn new(socket: BorrowedFd<'_>, call: BorrowedFd<'_>) -> io::Result<Box<Self>> {
        // Not zeroes, which would be mapped when a reactor touches them first.
        let buffer = |len| ManuallyDrop::new(vec![0xff; len].into_boxed_slice());
        Ok(Box::new(Self {
            ring: make_ring(socket, call)?,
            unsubmitted: 0,
            output: buffer(STAGING + HEADERS),
            filled: 0,
            sent: 0,
            sending: false,
            input: buffer(STAGING),
            receiving: false,
        }))
    }

    /// Returns the output buffer if nothing is being sent.
    pub(crate) fn output(&mut self) -> Option<&mut [u8]> {
        if self.sending { None } else { Some(&mut self.output) }
    }

    /// Sends the first `len` bytes of the output buffer. Nothing is being sent now.
    pub(crate) fn send(&mut self, len: usize) {
        debug_assert!(!self.sending && len <= self.output.len());
        (self.filled, self.sent) = (len.min(self.output.len()), 0);
        self.push_send();
    }

    /// Receives bytes into the input buffer, if that is not under way already. The bytes before are
    /// lost.
    pub(crate) fn receive(&mut self) {
        if !self.receiving {
            self.push_receive();
        }
    }

    /// The first `len` bytes of the input buffer. Valid after [`Event::Received`], until the next
    /// [`Link::receive`].
    pub(crate) fn input(&self, len: usize) -> &[u8] {
        debug_assert!(!self.receiving);
        &self.input[..len]
    }

    /// Whether the kernel may access the buffers.
    pub(crate) fn is_busy(&self) -> bool {
        self.sending || self.receiving
    }

    /// Whether [`Link::submit`] or [`Link::poll`] have something to do now.
    pub(crate) fn has_work(&mut self) -> bool {
        self.unsubmitted > 0 || !self.ring.completion().is_empty()
    }

    /// Passes new operations to the kernel. A system call, if there are any.
    #[inline]
    pub(crate) fn submit(&mut self) {
        if self.unsubmitted == 0 {
            return;
        }
        // Never waits. After an error (such as no memory for an operation), the entries stay in the
        // ring, and the next call tries again.
        if let Ok(n) = self.ring.submit() {
            self.unsubmitted = self.unsubmitted.saturating_sub(n);
        }
    }

    /// Returns the next event, if there is one. Reads memory only.
    #[inline]
    pub(crate) fn poll(&mut self) -> Option<Event> {
        loop {
            let entry = self.ring.completion().next()?;
            let result = usize::try_from(entry.result()).map_err(|_| -entry.result());
            let event = match entry.user_data() {
                SEND => self.send_ended(result),
                _ => self.receive_ended(result),
            };
            if event.is_some() {
                return event;
            }
        }
    }

    fn send_ended(&mut self, result: Result<usize, i32>) -> Option<Event> {
        self.sending = false;
        match result {
            Ok(n) => self.sent += n,
            Err(errno) if is_temporary(errno) => {}
            Err(errno) => return Some(Event::Failed(errno)),
        }
        if self.sent >= self.filled {
            return Some(Event::Sent);
        }
        self.push_send();
        None
    }

    fn receive_ended(&mut self, result: Result<usize, i32>) -> Option<Event> {
        self.receiving = false;
        match result {
            Ok(0) => Some(Event::Closed),
            Ok(n) => Some(Event::Received(n)),
            Err(errno) if is_temporary(errno) => {
                self.push_receive();
                None
            }
            Err(errno) => Some(Event::Failed(errno)),
        }
    }

    fn push_send(&mut self) {
        let rest = &self.output[self.sent..self.filled];
        let entry = opcode::Send::new(SOCKET, rest.as_ptr(), len_of(rest))
            .flags(libc::MSG_NOSIGNAL)
            .build()
            .user_data(SEND);
        self.sending = true;
        self.push(&entry);
    }

    fn push_receive(&mut self) {
        let (at, len) = (self.input.as_mut_ptr(), len_of(&self.input));
        let entry = opcode::Recv::new(SOCKET, at, len).build().user_data(RECEIVE);
        self.receiving = true;
        self.push(&entry);
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the buffer lives until the operation has ended: `drop` sees to that.
        let pushed = unsafe { self.ring.submission().push(entry) };
        debug_assert!(pushed.is_ok(), "the ring has an entry for each operation");
        self.unsubmitted += 1;
    }
}

impl Drop for Link {
    /// If the kernel may still access the buffers, they are leaked.
    fn drop(&mut self) {
        while self.poll().is_some() {}
        if !self.is_busy() {
            // SAFETY: the buffers are not used after this.
            unsafe { ManuallyDrop::drop(&mut self.output) };
            // SAFETY: as above.
            unsafe { ManuallyDrop::drop(&mut self.input) };
        }
    }
}

/// Whether an operation that failed with this errno has to be tried again. ECANCELED: the thread
/// that has submitted it has ended.
fn is_temporary(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::EINTR | libc::ECANCELED | libc::ENOBUFS | libc::ENOMEM)
}

fn len_of(buffer: &[u8]) -> u32 {
    u32::try_from(buffer.len()).expect("a buffer has less than 4 GiB")
}

/// Makes an io_uring whose only registered file is `socket`. If the kernel supports it (5.10), the
/// ring is restricted.
///
/// Without `IORING_SETUP_COOP_TASKRUN`: the users of a link may be on several threads, and one of
/// them must not wait until another one enters the kernel.
fn make_ring(socket: BorrowedFd<'_>, call: BorrowedFd<'_>) -> io::Result<IoUring> {
    let register = |ring: &IoUring| {
        ring.submitter().register_files(&[socket.as_raw_fd()])?;
        ring.submitter().register_eventfd(call.as_raw_fd())
    };
    let restricted = |builder: &mut Builder<squeue::Entry, cqueue::Entry>| {
        let ring = builder.dontfork().setup_r_disabled().build(ENTRIES)?;
        register(&ring)?;
        restrict(&ring)?;
        Ok(ring)
    };
    let mut all = IoUring::builder();
    all.setup_submit_all();
    restricted(&mut all).or_else(|_: io::Error| restricted(&mut IoUring::builder())).or_else(|_| {
        let ring = IoUring::builder().dontfork().build(ENTRIES)?;
        register(&ring)?;
        Ok(ring)
    })
}

/// Makes the kernel refuse everything but sends and receives on the ring's own socket from now on:
/// seccomp does not see what a thread submits to an io_uring.
fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut restrictions = [
        Restriction::sqe_op(opcode::Send::CODE),
        Restriction::sqe_op(opcode::Recv::CODE),
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
    ];
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn call() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn next(link: &mut Link) -> Event {
        loop {
            link.submit();
            if let Some(event) = link.poll() {
                return event;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn bytes_are_sent_and_received_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(ours.as_fd(), call().as_fd()).unwrap();
        let bytes: Vec<u8> = (0..STAGING).map(|i| (i % 251).to_le_bytes()[0]).collect();
        for len in [1, 4096, STAGING] {
            link.output().unwrap()[..len].copy_from_slice(&bytes[..len]);
            link.send(len);
            assert!(link.output().is_none());
            let mut peer = theirs.try_clone().unwrap();
            let reads = std::thread::spawn(move || {
                let mut got = vec![0; len];
                peer.read_exact(&mut got).unwrap();
                got
            });
            assert_eq!(next(&mut link), Event::Sent);
            assert_eq!(reads.join().unwrap(), bytes[..len]);
        }
        for part in bytes.chunks(100_000) {
            link.receive();
            link.submit();
            theirs.write_all(part).unwrap();
            let mut got = vec![];
            while got.len() < part.len() {
                link.receive();
                let Event::Received(n) = next(&mut link) else { panic!("closed") };
                got.extend_from_slice(link.input(n));
            }
            assert_eq!(got, part);
        }
        drop(theirs);
        link.receive();
        assert_eq!(next(&mut link), Event::Closed);
        link.send(1);
        assert_eq!(next(&mut link), Event::Failed(libc::EPIPE));
        assert!(!link.is_busy());
    }

    #[test]
    fn a_shutdown_ends_all_operations() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(ours.as_fd(), call().as_fd()).unwrap();
        link.receive();
        while link.output().is_some() {
            link.send(STAGING);
            link.submit();
            while link.poll().is_some() {}
        }
        assert!(link.is_busy());
        ours.shutdown(Shutdown::Both).unwrap();
        let ended = [next(&mut link), next(&mut link)];
        assert!(ended.contains(&Event::Closed) && ended.contains(&Event::Failed(libc::EPIPE)));
        assert!(!link.is_busy());
    }

    #[test]
    fn the_ring_only_uses_its_socket() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (other, _peer) = UnixStream::pair().unwrap();
        let mut ring = make_ring(ours.as_fd(), call().as_fd()).unwrap();
        let mut result = |entry: squeue::Entry| {
            // SAFETY: the memory that it refers to outlives the wait.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        let bytes = [0_u8; 4];
        let send = |fd| opcode::Send::new(fd, bytes.as_ptr(), 4).build();
        assert_eq!(result(opcode::Send::new(SOCKET, bytes.as_ptr(), 4).build()), 4);
        assert_eq!(result(send(types::Fd(other.as_raw_fd()))), -libc::EACCES);
        assert_eq!(result(opcode::Nop::new().build()), -libc::EACCES);
        let here = types::Fd(libc::AT_FDCWD);
        assert_eq!(
            result(opcode::OpenAt::new(here, c"/etc/passwd".as_ptr()).build()),
            -libc::EACCES
        );
        ring.submitter().register_files_update(0, &[other.as_raw_fd()]).unwrap_err();
    }
}
