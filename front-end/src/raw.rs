//! A connection that says what it is told to: any bytes, any fds, in any order.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
    sendmsg, socket_with, sockopt,
};

use crate::error::{Error, LIMIT, Result};

/// Header flags: version 1 of the protocol, as every message carries it.
pub const VERSION: u32 = 1;
/// Header flag: the sender wants an answer.
pub const NEED_REPLY: u32 = 1 << 3;
/// Fds that one message can carry here.
const FDS_MAX: usize = 64;

/// The bytes of a message with a well-formed header. The flags are [`VERSION`] and more.
#[must_use]
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, payload.len() as u32];
    let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(payload);
    bytes
}

/// A message that came in.
#[derive(Debug)]
pub struct Message {
    /// Number of the request it is, or answers.
    pub request: u32,
    /// Flags of its header.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Fds that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload's first eight bytes as a number, as many answers have it.
    #[must_use]
    pub fn value(&self) -> Option<u64> {
        Some(u64::from_le_bytes(*self.payload.first_chunk()?))
    }
}

/// A socket to a back end with no protocol on it. Every read and write ends after [`LIMIT`].
#[derive(Debug)]
pub struct RawConnection {
    stream: UnixStream,
}

impl RawConnection {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(path: &Path) -> Result<Self> {
        Self::over(connect_stream(path, LIMIT)?)
    }

    /// Speaks over `stream`.
    ///
    /// # Errors
    /// The limits on reading and writing cannot be set.
    pub fn over(stream: UnixStream) -> Result<Self> {
        stream
            .set_read_timeout(Some(LIMIT))
            .and_then(|()| stream.set_write_timeout(Some(LIMIT)))
            .map_err(Error::system("cannot limit a socket's waiting"))?;
        Ok(Self { stream })
    }

    /// Sends `bytes` as they are; `fds` go with the first of them.
    ///
    /// # Errors
    /// [`Error::Closed`], or the system's refusal.
    ///
    /// # Panics
    /// With more than 64 fds.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "at most 64 fds");
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let part = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &part, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(Error::Closed);
                }
                Err(e) => return Err(Error::system("cannot send")(e)),
            }
            ancillary.clear();
        }
        Ok(())
    }

    /// Sends a well-formed header, `payload` and `fds`. The flags are [`VERSION`] and more.
    ///
    /// # Errors
    /// As [`RawConnection::send`].
    pub fn send_message(
        &mut self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.send(&message(request, flags, payload), fds)
    }

    /// Sends `bytes` again and again, at most `times`, until there is no room for them or the back end
    /// has closed the connection. The last ones may be cut.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn flood(&self, bytes: &[u8], times: usize) -> Result<()> {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, WouldBlock};
        let system = |e| Error::system("cannot flood a socket")(e);
        self.stream.set_nonblocking(true).map_err(system)?;
        for _ in 0..times {
            match (&self.stream).write(bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(_) => break,
                Err(e) if matches!(e.kind(), WouldBlock | BrokenPipe | ConnectionReset) => break,
                Err(e) => return Err(system(e)),
            }
        }
        self.stream.set_nonblocking(false).map_err(system)
    }

    /// Reads one message.
    ///
    /// # Errors
    /// [`Error::Closed`] at the end, [`Error::NoAnswer`] after [`LIMIT`], [`Error::Nonsense`] for a
    /// message of more than 64 KiB.
    pub fn receive(&mut self) -> Result<Message> {
        let mut header = [0; 12];
        let fds = self.receive_first(&mut header)?;
        let mut words = header
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("chunks of four bytes")));
        let mut next = || words.next().expect("three of them");
        let (request, flags, size) = (next(), next(), next());
        if size > 1 << 16 {
            return Err(Error::Nonsense("its size is over 64 KiB"));
        }
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).map_err(broken)?;
        Ok(Message { request, flags, payload, fds })
    }

    /// Waits until the back end closes the connection; messages before that are thrown away.
    ///
    /// # Errors
    /// [`Error::NoAnswer`] if it does not within [`LIMIT`] of its last message.
    pub fn wait_for_close(&mut self) -> Result<()> {
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(Error::Closed) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// The socket itself.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads a header, and the fds that come with its first byte.
    fn receive_first(&mut self, header: &mut [u8; 12]) -> Result<Vec<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let read = loop {
            let mut part = [std::io::IoSliceMut::new(header)];
            match recvmsg(&self.stream, &mut part, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => break got.bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(broken(e.into())),
            }
        };
        if read == 0 {
            return Err(Error::Closed);
        }
        self.stream.read_exact(&mut header[read..]).map_err(broken)?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        Ok(fds)
    }
}

/// Connects to the socket at `path`; gives up after `limit` if nobody accepts.
pub(crate) fn connect_stream(path: &Path, limit: Duration) -> Result<UnixStream> {
    let error = |e: rustix::io::Errno| Error::Connect { path: path.to_owned(), source: e.into() };
    let flags = SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(error)?;
    // A full backlog makes connect wait; the limit on sending covers it.
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(limit)).map_err(error)?;
    connect(&fd, &SocketAddrUnix::new(path).map_err(error)?).map_err(error)?;
    sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, None).map_err(error)?;
    Ok(UnixStream::from(fd))
}

fn broken(e: std::io::Error) -> Error {
    use std::io::ErrorKind::{ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    match e.kind() {
        WouldBlock | TimedOut => Error::NoAnswer { message: "a message", limit: LIMIT },
        UnexpectedEof | ConnectionReset => Error::Closed,
        _ => Error::system("cannot receive")(e),
    }
}
