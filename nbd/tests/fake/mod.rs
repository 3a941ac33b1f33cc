//! A server of a disk in memory that shows faults. Each connection has a [`Fault`]; apart from it,
//! the server follows the protocol. Replies come in the order of the requests.
#![allow(dead_code, reason = "each test uses the part that it needs")]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use bdev_conformance::SIZE;
use nbd::protocol::{
    INIT_MAGIC, OPTION_MAGIC, OptionHeader, OptionReply, Request, SimpleReply, command,
    errno_to_wire, info, option, option_reply, transmission,
};
use nbd::{NbdOptions, NbdUri};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

/// What is wrong with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// It is closed after so many bytes of replies.
    CloseAfter(usize),
    /// The server shuts its direction down after so many bytes, and goes on reading.
    HalfCloseAfter(usize),
    /// The reply with this number has a wrong magic number.
    WrongMagic(usize),
    /// The reply with this number has a cookie that the client has not sent.
    WrongCookie(usize),
    /// The reply with this number is sent twice.
    Twice(usize),
    /// The reply with this number has the cookie of the one before.
    Stale(usize),
    /// The reply with this number has more data than was asked for.
    Longer(usize),
    /// A reply comes before any request.
    Unasked,
    /// The replies come in single bytes.
    Trickle,
    /// From the reply with this number on, the server replies that it is shutting down, does
    /// nothing, and keeps the connection.
    ShuttingDown(usize),
    /// The server reads no request.
    Unresponsive,
    /// The server reads requests, and does not reply.
    Mute,
    /// The server stops in the handshake, after so many bytes.
    Handshake(usize),
    /// The export has another size.
    OtherSize,
}

trait Stream: Read + Write + AsFd + Send {
    fn end(&self, how: Shutdown);
}

impl Stream for UnixStream {
    fn end(&self, how: Shutdown) {
        let _ = self.shutdown(how);
    }
}

impl Stream for TcpStream {
    fn end(&self, how: Shutdown) {
        let _ = self.shutdown(how);
    }
}

type Script = Box<dyn Fn(usize) -> Fault + Send + Sync>;

struct Shared {
    script: Script,
    flags: u16,
    store: Mutex<Vec<u8>>,
    connections: AtomicUsize,
    requests: AtomicUsize,
    ending: AtomicBool,
}

/// A server, until it is dropped.
pub(crate) struct Fake {
    shared: Arc<Shared>,
    address: Address,
    _dir: TempDir,
}

enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Fake {
    /// Starts a server on a Unix socket. `script` says the fault of each connection, from number 0.
    pub(crate) fn unix(
        flags: u16,
        script: impl Fn(usize) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        Self::start(dir, Address::Unix(socket), flags, script, move || {
            Ok(Box::new(listener.accept()?.0))
        })
    }

    /// Starts a server on a TCP port.
    pub(crate) fn tcp(flags: u16, script: impl Fn(usize) -> Fault + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        Self::start(TempDir::new().unwrap(), address, flags, script, move || {
            Ok(Box::new(listener.accept()?.0))
        })
    }

    fn start(
        dir: TempDir,
        address: Address,
        flags: u16,
        script: impl Fn(usize) -> Fault + Send + Sync + 'static,
        accept: impl Fn() -> io::Result<Box<dyn Stream>> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            script: Box::new(script),
            flags: flags | transmission::HAS_FLAGS,
            store: Mutex::new(vec![0; usize::try_from(SIZE).unwrap()]),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok(stream) = accept() {
                if of_thread.ending.load(Ordering::Relaxed) {
                    return;
                }
                let number = of_thread.connections.fetch_add(1, Ordering::Relaxed);
                let shared = Arc::clone(&of_thread);
                thread::spawn(move || shared.serve(stream, number));
            }
        });
        Self { shared, address, _dir: dir }
    }

    /// Options for a disk on this server.
    pub(crate) fn options(&self) -> NbdOptions {
        let uri = match &self.address {
            Address::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
            Address::Tcp(address) => format!("nbd://{address}/"),
        };
        NbdOptions {
            name: "d".into(),
            uri: NbdUri::parse(&uri).unwrap(),
            block_size: None,
            readonly: false,
            uuid: None,
            reconnect_delay: None,
            reconnect_interval: std::time::Duration::ZERO,
            connections: 3,
        }
    }

    /// The number of connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// The number of requests so far, on all connections.
    pub(crate) fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// What the disk holds.
    pub(crate) fn store(&self) -> MutexGuard<'_, Vec<u8>> {
        self.shared.store.lock().unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        // The thread that accepts sees the flag.
        match &self.address {
            Address::Unix(path) => drop(UnixStream::connect(path)),
            Address::Tcp(address) => drop(TcpStream::connect(address)),
        }
    }
}

impl Shared {
    fn serve(&self, mut stream: Box<dyn Stream>, number: usize) {
        let fault = (self.script)(number);
        // The client may close the connection at any time.
        let _ = self.talk(&mut *stream, fault);
        stream.end(Shutdown::Both);
    }

    fn talk(&self, stream: &mut dyn Stream, fault: Fault) -> io::Result<()> {
        self.greet(stream, fault)?;
        if fault == Fault::Unasked {
            stream.write_all(&SimpleReply { error: 0, cookie: 1 << 24 }.encode())?;
        }
        if fault == Fault::Unresponsive {
            // Until the client gives up.
            poll(&mut [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::RDHUP)], None)?;
            return Ok(());
        }
        let mut out = Out { fault, sent: 0, number: 0, last: 0 };
        loop {
            let mut header = [0; Request::SIZE];
            stream.read_exact(&mut header)?;
            let request = Request::decode(&header).expect("a request");
            let mut payload =
                vec![0; if request.command == command::WRITE { request.len } else { 0 } as usize];
            stream.read_exact(&mut payload)?;
            if request.command == command::DISC {
                return Ok(());
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            let data = match fault {
                Fault::ShuttingDown(number) if out.number >= number => vec![],
                _ => self.apply(&request, &payload),
            };
            if !out.reply(stream, request.cookie, data)? {
                return Ok(());
            }
        }
    }

    fn greet(&self, stream: &mut dyn Stream, fault: Fault) -> io::Result<()> {
        let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(3_u16.to_be_bytes());
        let size = if fault == Fault::OtherSize { SIZE * 2 } else { SIZE };
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(size.to_be_bytes());
        export.extend(self.flags.to_be_bytes());
        let reply = |kind, data: &[u8]| {
            let len = u32::try_from(data.len()).unwrap();
            let header = OptionReply { option: option::GO, kind, len }.encode();
            [&header[..], data].concat()
        };
        let mut answer = reply(option_reply::INFO, &export);
        answer.extend(reply(option_reply::ACK, &[]));
        if let Fault::Handshake(len) = fault {
            let all = [hello, answer].concat();
            return stream.write_all(&all[..len]).and(Err(io::ErrorKind::Other.into()));
        }
        stream.write_all(&hello)?;
        let mut flags_and_option = [0; 4 + OptionHeader::SIZE];
        stream.read_exact(&mut flags_and_option)?;
        let header = flags_and_option[4..].try_into().unwrap();
        let header = OptionHeader::decode(&header).expect("an option");
        assert_eq!(header.option, option::GO);
        stream.read_exact(&mut vec![0; header.len as usize])?;
        stream.write_all(&answer)
    }

    /// Does a request, and returns the data of a read.
    fn apply(&self, request: &Request, payload: &[u8]) -> Vec<u8> {
        let mut store = self.store.lock().unwrap();
        let start = usize::try_from(request.offset).unwrap();
        let range = start..start + request.len as usize;
        match request.command {
            command::READ => return store[range].to_vec(),
            command::WRITE => store[range].copy_from_slice(payload),
            command::TRIM | command::WRITE_ZEROES => store[range].fill(0),
            _ => {}
        }
        vec![]
    }
}

/// The replies of a connection.
struct Out {
    fault: Fault,
    /// Bytes so far.
    sent: usize,
    /// The number of the next reply.
    number: usize,
    /// The cookie of the reply before.
    last: u64,
}

impl Out {
    /// Sends a reply. Returns whether the connection goes on.
    fn reply(&mut self, stream: &mut dyn Stream, cookie: u64, data: Vec<u8>) -> io::Result<bool> {
        let number = self.number;
        self.number += 1;
        let mut reply = SimpleReply { error: 0, cookie };
        let last = std::mem::replace(&mut self.last, cookie);
        match self.fault {
            Fault::WrongCookie(n) if n == number => reply.cookie ^= 1 << 24,
            Fault::Stale(n) if n == number => reply.cookie = last,
            Fault::ShuttingDown(n) if n <= number => reply.error = errno_to_wire(libc::ESHUTDOWN),
            _ => {}
        }
        let mut bytes = reply.encode().to_vec();
        match self.fault {
            Fault::WrongMagic(n) if n == number => bytes[3] ^= 1,
            _ => {}
        }
        bytes.extend(data);
        match self.fault {
            Fault::Twice(n) if n == number => bytes.extend(bytes.clone()),
            Fault::Longer(n) if n == number => bytes.extend([0; 512]),
            Fault::CloseAfter(len) | Fault::HalfCloseAfter(len)
                if self.sent + bytes.len() >= len =>
            {
                stream.write_all(&bytes[..len - self.sent])?;
                if matches!(self.fault, Fault::CloseAfter(_)) {
                    return Ok(false);
                }
                stream.end(Shutdown::Write);
                self.fault = Fault::Mute;
                return Ok(true);
            }
            Fault::Mute => return Ok(true),
            Fault::Trickle => {
                for byte in bytes {
                    stream.write_all(&[byte])?;
                }
                return Ok(true);
            }
            _ => {}
        }
        self.sent += bytes.len();
        stream.write_all(&bytes)?;
        Ok(true)
    }
}
