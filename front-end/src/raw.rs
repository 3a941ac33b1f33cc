//! A connection that sends what a test gives it: any bytes and any fds, in any order.

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

/// Header flags: version 1 of the protocol, which every message carries.
pub const VERSION: u32 = 1;
/// Header flag: the sender requests a reply.
pub const NEED_REPLY: u32 = 1 << 3;
/// The most fds that one message can carry here.
const FDS_MAX: usize = 64;

/// Returns the bytes of a message with a well-formed header. The flags are [`VERSION`] and others.
#[must_use]
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len().try_into().expect("a payload has less than 4 GiB");
    let header = [request, flags, size];
    let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(payload);
    bytes
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// The number of the request, or of the request that it replies to.
    pub request: u32,
    /// The flags of its header.
    pub flags: u32,
    /// The bytes after the header.
    pub payload: Vec<u8>,
    /// The fds that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Returns the payload's first eight bytes as a number, as in many replies.
    #[must_use]
    pub fn value(&self) -> Option<u64> {
        Some(u64::from_le_bytes(*self.payload.first_chunk()?))
    }
}

/// A socket to a back end without a protocol. Every read and write fails after [`LIMIT`].
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

    /// Uses `stream` as the connection.
    ///
    /// # Errors
    /// The timeouts of the socket cannot be set.
    pub fn over(stream: UnixStream) -> Result<Self> {
        stream
            .set_read_timeout(Some(LIMIT))
            .and_then(|()| stream.set_write_timeout(Some(LIMIT)))
            .map_err(Error::system("cannot set the timeouts of a socket"))?;
        Ok(Self { stream })
    }

    /// Sends `bytes` unchanged. `fds` go with the first byte.
    ///
    /// # Errors
    /// [`Error::Closed`], or the system's error.
    ///
    /// # Panics
    /// With more than 64 fds.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(
                ancillary.push(SendAncillaryMessage::ScmRights(fds)),
                "a message can carry at most 64 fds"
            );
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

    /// Sends a well-formed header, `payload` and `fds`. The flags are [`VERSION`] and others.
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

    /// Sends `bytes` repeatedly, at most `times`, until the socket buffer is full or the back end
    /// has closed the connection. The last copy may be truncated.
    ///
    /// # Errors
    /// The system's error.
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
    /// [`Error::Closed`] at the end of the stream, [`Error::NoAnswer`] after [`LIMIT`],
    /// [`Error::Nonsense`] for a message of more than 64 KiB.
    pub fn receive(&mut self) -> Result<Message> {
        let mut header = [0; 12];
        let fds = self.receive_first(&mut header)?;
        let mut words = header
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("each chunk has four bytes")));
        let mut next = || words.next().expect("the header has three words");
        let (request, flags, size) = (next(), next(), next());
        if size > 1 << 16 {
            return Err(Error::Nonsense("the payload is larger than 64 KiB"));
        }
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).map_err(broken)?;
        Ok(Message { request, flags, payload, fds })
    }

    /// Waits until the back end closes the connection. Discards the messages before that.
    ///
    /// # Errors
    /// [`Error::NoAnswer`] if the back end does not close it within [`LIMIT`] of its last message.
    pub fn wait_for_close(&mut self) -> Result<()> {
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(Error::Closed) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    /// Returns the socket.
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

/// Connects to the socket at `path`. Fails after `limit` if the back end does not accept.
pub(crate) fn connect_stream(path: &Path, limit: Duration) -> Result<UnixStream> {
    let error = |e: rustix::io::Errno| Error::Connect { path: path.to_owned(), source: e.into() };
    let flags = SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(error)?;
    // With a full backlog, connect waits; the send timeout limits it.
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
