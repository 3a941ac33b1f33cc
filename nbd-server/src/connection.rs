//! The thread of one client: moves bytes between its socket and the protocol.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bdev::{Bdev, Rights, ThreadChannel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::held::Held;
use crate::negotiation::{Chosen, Negotiation, Progress};
use crate::properties::Properties;
use crate::transmission::{DEPTH, Transmission, Violation};

/// The limit on the handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// The bytes that are received at a time.
const RECEIVE: usize = 256 << 10;

/// Why a connection ends before its client leaves.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    /// A system call on the socket failed, as it does when the client is gone.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// The bdev cannot be opened.
    #[error("cannot open the bdev: {0}")]
    Bdev(#[from] bdev::Error),
    /// The client has violated the protocol.
    #[error("{0}")]
    Violation(#[from] Violation),
}

/// A connected client.
pub(crate) struct Client {
    socket: Held,
    /// The received bytes that are not consumed are at `pending`.
    buffer: Vec<u8>,
    pending: Range<usize>,
}

impl Client {
    pub(crate) fn new(socket: Held) -> Self {
        Self { socket, buffer: vec![0; RECEIVE], pending: 0..0 }
    }

    /// Does the handshake. `None`: the client has left, or must leave.
    pub(crate) fn negotiate(
        &mut self,
        name: &str,
        properties: &Properties,
    ) -> io::Result<Option<Chosen>> {
        let mut negotiation = Negotiation::new(name, properties);
        let deadline = Instant::now() + HANDSHAKE_LIMIT;
        let mut input = vec![];
        loop {
            input.extend_from_slice(&self.buffer[std::mem::take(&mut self.pending)]);
            let progress = negotiation.advance(&mut input);
            while !negotiation.output.is_empty() {
                match self.send(&[io::IoSlice::new(&negotiation.output)])? {
                    Some(n) => drop(negotiation.output.drain(..n)),
                    None => self.wait(PollFlags::OUT, deadline)?,
                }
            }
            match progress {
                Progress::Done(chosen) => {
                    self.pending = 0..input.len();
                    input.resize(input.len().max(RECEIVE), 0);
                    self.buffer = input;
                    return Ok(Some(chosen));
                }
                Progress::Over => return Ok(None),
                Progress::Going if Instant::now() >= deadline => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Progress::Going => {}
            }
            match self.receive()? {
                Some(0) => return Ok(None),
                Some(_) => {}
                None => self.wait(PollFlags::IN, deadline)?,
            }
        }
    }

    /// Serves requests until the client leaves or `stopping` is set.
    pub(crate) fn serve(
        &mut self,
        bdev: Arc<dyn Bdev>,
        properties: Properties,
        chosen: Chosen,
        stopping: &AtomicBool,
    ) -> Result<(), Problem> {
        let rights = if properties.read_only { Rights::Read } else { Rights::Write };
        let channel = ThreadChannel::open(&bdev, DEPTH, rights)?;
        let mut transmission = Transmission::new(bdev, properties, chosen, channel);
        while !stopping.load(Ordering::Acquire) {
            let n = transmission.advance(&self.buffer[self.pending.clone()])?;
            self.pending.start += n;
            let mut idle = n == 0;
            idle &= !transmission.collect();
            while !transmission.output().is_empty() {
                match self.send(&transmission.output().front())? {
                    Some(n) => {
                        transmission.output().advance(n);
                        idle = false;
                    }
                    None => break,
                }
            }
            if transmission.is_over() {
                return Ok(());
            }
            let takes = transmission.has_room();
            if takes {
                match self.receive()? {
                    Some(0) => return Ok(()),
                    Some(_) => idle = false,
                    None => {}
                }
            }
            if idle {
                let mut events = PollFlags::empty();
                events.set(PollFlags::IN, takes);
                events.set(PollFlags::OUT, !transmission.output().is_empty());
                let mut socket = [PollFd::from_borrowed_fd(self.socket.as_fd(), events)];
                transmission.channel().sleep(&mut socket)?;
                let gone = PollFlags::HUP | PollFlags::ERR;
                if !takes && socket[0].revents().intersects(gone) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Receives bytes behind the pending ones, which are at most a header. `Some(0)` is the end;
    /// `None` means that there are none now.
    fn receive(&mut self) -> io::Result<Option<usize>> {
        self.buffer.copy_within(self.pending.clone(), 0);
        self.pending = 0..self.pending.len();
        let room = &mut self.buffer[self.pending.end..];
        // No message of the protocol has file descriptors: their account closes them.
        match closer::receive(self.socket.as_fd(), room, libc::MSG_DONTWAIT, self.socket.account())
        {
            Ok((n, _fds)) => {
                self.pending.end += n;
                Ok(Some(n))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sends bytes. `None` means that the socket has no room now.
    fn send(&self, parts: &[io::IoSlice<'_>]) -> io::Result<Option<usize>> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(self.socket.as_fd(), parts, &mut SendAncillaryBuffer::default(), flags) {
            Ok(n) => Ok(Some(n)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn wait(&self, events: PollFlags, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let tv_sec = i64::try_from(left.as_secs()).unwrap_or(0);
        let left = Timespec { tv_sec, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(self.socket.as_fd(), events)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
