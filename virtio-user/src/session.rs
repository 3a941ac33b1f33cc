//! One connection to a server: the vhost-user handshake, and the disk's properties.
#![expect(unsafe_code, reason = "hands an fd over to the `vhost` crate's type")]

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use bdev::Error;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{Layout, Memory};
use crate::request::{Limits, SECTOR};
use crate::ring::Ring;

/// The longest time for a handshake, and for the start of the rings.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// The number of queues that vhost-user's messages for kick and call fds can name.
const QUEUES_MAX: u16 = 256;

/// Connects to a socket. Does not wait for a server that does not accept connections.
fn connect_stream(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// Ends the connection if it is not dropped within [`LIMIT`]. The `vhost` crate itself would wait for
/// ever.
struct Deadline(#[expect(dead_code, reason = "dropping it ends the wait")] mpsc::Sender<()>);

impl Deadline {
    fn start(socket: &UnixStream) -> io::Result<Self> {
        let (sender, passed) = mpsc::channel();
        let socket = socket.try_clone()?;
        thread::Builder::new().name("vhost-deadline".into()).spawn(move || {
            if passed.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        })?;
        Ok(Self(sender))
    }
}

/// The protocol features bit of vhost-user.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Bytes of the configuration space up to the limits of write-zeroes.
const CONFIG_BYTES: u32 = 56;

/// The properties of a server's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Properties {
    /// In bytes.
    pub(crate) size: u64,
    /// In bytes.
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
    pub(crate) limits: Limits,
}

/// A connection whose rings are not in use yet.
pub(crate) struct Session {
    /// The features that the server offers.
    offered: u64,
    pub(crate) properties: Properties,
    front_end: Frontend,
    /// Ends when the server goes away.
    pub(crate) socket: UnixStream,
    /// What the server sends by itself, if it can: that its configuration space has changed.
    pub(crate) messages: Option<UnixStream>,
    /// The queues that the server has.
    pub(crate) queues: u16,
}

impl Session {
    /// Connects to a server and asks for its properties. Blocks for [`LIMIT`] at most.
    ///
    /// # Errors
    /// ENOENT or ECONNREFUSED if no server listens; EAGAIN if its queue of connections is full; EIO
    /// if it violates the protocol or lacks a feature.
    pub(crate) fn connect(path: &Path) -> Result<Self, Error> {
        let named = |source| Error::System { what: path.display().to_string(), source };
        let socket = connect_stream(path).map_err(named)?;
        let _deadline = Deadline::start(&socket).map_err(named)?;
        let stream = socket.try_clone().map_err(named)?;
        let front_end = Frontend::from_stream(stream, QUEUES_MAX.into());
        negotiate(front_end, socket).map_err(named)
    }

    /// Takes what the server has sent by itself. Of the messages of a server, this end can receive
    /// only VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, so it need not be decoded.
    pub(crate) fn take_messages(&mut self) {
        let mut bytes = [0; 1024];
        let more =
            self.messages.as_ref().is_some_and(|mut messages| match messages.read(&mut bytes) {
                Ok(len) => len > 0,
                Err(e) => e.kind() == io::ErrorKind::WouldBlock,
            });
        if !more {
            self.messages = None;
        }
    }

    /// Asks for the disk's properties again. May block like [`Session::connect`].
    ///
    /// # Errors
    /// EIO if the server does not answer in time, or violates the protocol.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        let named = |source| Error::System { what: "the server's disk".into(), source };
        let _deadline = Deadline::start(&self.socket).map_err(named)?;
        self.properties = properties(&mut self.front_end, self.offered).map_err(named)?;
        Ok(())
    }

    /// Starts the rings of `calls.len()` queues, each with an fd that the server signals. May block
    /// like [`Session::connect`]. The connection lasts as long as the session.
    pub(crate) fn start(&self, layout: Layout, calls: &[BorrowedFd<'_>]) -> io::Result<Vec<Ring>> {
        let queues = u16::try_from(calls.len()).map_err(io::Error::other)?;
        let memory = Arc::new(Memory::new(queues, layout)?);
        let _deadline = Deadline::start(&self.socket)?;
        let front_end = &self.front_end;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.len(),
            userspace_addr: memory.address(),
            mmap_offset: 0,
            mmap_handle: memory.file.as_raw_fd(),
        };
        front_end.set_mem_table(&[region]).map_err(failed("SET_MEM_TABLE"))?;
        let mut rings = vec![];
        for (queue, call) in (0..).zip(calls) {
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            self.start_ring(queue.into(), &memory.part(queue).addresses(), layout, &kick, call)?;
            rings.push(Ring::new(&memory, queue, kick));
        }
        Ok(rings)
    }

    fn start_ring(
        &self,
        queue: usize,
        addresses: &[u64; 3],
        layout: Layout,
        kick: &OwnedFd,
        call: &BorrowedFd<'_>,
    ) -> io::Result<()> {
        let front_end = &self.front_end;
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = *addresses;
        let size = layout.ring_size;
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        front_end.set_vring_num(queue, size).map_err(failed("SET_VRING_NUM"))?;
        front_end.set_vring_base(queue, 0).map_err(failed("SET_VRING_BASE"))?;
        front_end.set_vring_addr(queue, &config).map_err(failed("SET_VRING_ADDR"))?;
        front_end
            .set_vring_kick(queue, &event_fd(kick.as_fd())?)
            .map_err(failed("SET_VRING_KICK"))?;
        front_end.set_vring_call(queue, &event_fd(*call)?).map_err(failed("SET_VRING_CALL"))?;
        let mut front_end = front_end.clone();
        front_end.set_vring_enable(queue, true).map_err(failed("SET_VRING_ENABLE"))
    }
}

/// Negotiates the features, and reads the disk's properties and the number of queues.
fn negotiate(mut front_end: Frontend, socket: UnixStream) -> io::Result<Session> {
    front_end.set_owner().map_err(failed("SET_OWNER"))?;
    let offered = front_end.get_features().map_err(failed("GET_FEATURES"))?;
    let has = |bit: u32| offered & (1 << bit) != 0;
    if !has(VIRTIO_F_VERSION_1) || offered & PROTOCOL_FEATURES == 0 {
        return Err(io::Error::other(
            "the server lacks VIRTIO_F_VERSION_1 or VHOST_USER_F_PROTOCOL_FEATURES",
        ));
    }
    let wanted = VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::BACKEND_REQ;
    let protocol = front_end.get_protocol_features().map_err(failed("GET_PROTOCOL_FEATURES"))?;
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(io::Error::other("the server lacks VHOST_USER_PROTOCOL_F_CONFIG"));
    }
    let accepted = protocol & wanted;
    front_end.set_protocol_features(accepted).map_err(failed("SET_PROTOCOL_FEATURES"))?;
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    let used = bits.iter().fold(PROTOCOL_FEATURES, |bits, bit| bits | 1 << bit) & offered;
    front_end.set_features(used).map_err(failed("SET_FEATURES"))?;
    let queues = if accepted.contains(VhostUserProtocolFeatures::MQ) {
        front_end.get_queue_num().map_err(failed("GET_QUEUE_NUM"))?
    } else {
        1
    };
    let queues = u16::try_from(queues).unwrap_or(QUEUES_MAX).clamp(1, QUEUES_MAX);
    let messages = if accepted.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
        let (ours, server) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        front_end.set_backend_request_fd(&server).map_err(failed("SET_BACKEND_REQ_FD"))?;
        Some(ours)
    } else {
        None
    };
    // After the fd is set, so that no change is missed.
    let properties = properties(&mut front_end, offered)?;
    Ok(Session { offered, properties, front_end, socket, messages, queues })
}

/// Reads the properties of a disk whose server offers these features.
fn properties(front_end: &mut Frontend, offered: u64) -> io::Result<Properties> {
    let flags = VhostUserConfigFlags::WRITABLE;
    let room = [0; CONFIG_BYTES as usize];
    let (_, config) =
        front_end.get_config(0, CONFIG_BYTES, flags, &room).map_err(failed("GET_CONFIG"))?;
    Properties::of(&config, &|bit| offered & (1 << bit) != 0)
}

impl Properties {
    /// Reads the configuration space (section 5.2.4 of the virtio specification).
    fn of(config: &[u8], has: &dyn Fn(u32) -> bool) -> io::Result<Self> {
        let number = |offset: usize, len: usize| {
            let bytes = config.get(offset..offset + len)?;
            let mut number = [0; 8];
            number[..len].copy_from_slice(bytes);
            Some(u64::from_le_bytes(number))
        };
        let short = || io::Error::other("the server's configuration space is too short");
        let field = |offset, len| number(offset, len).ok_or_else(short);
        let only_if = |feature: u32, offset| if has(feature) { field(offset, 4) } else { Ok(0) };
        let size = field(0, 8)?.checked_mul(SECTOR);
        let size = size.ok_or_else(|| io::Error::other("the server's disk is too large"))?;
        let block_size = match only_if(VIRTIO_BLK_F_BLK_SIZE, 20)? {
            0 => 512,
            given => u32::try_from(given).map_err(io::Error::other)?,
        };
        let limits = Limits::new(
            only_if(VIRTIO_BLK_F_SIZE_MAX, 8)?,
            only_if(VIRTIO_BLK_F_DISCARD, 36)?.saturating_mul(SECTOR),
            only_if(VIRTIO_BLK_F_WRITE_ZEROES, 48)?.saturating_mul(SECTOR),
        );
        Ok(Self {
            size,
            block_size,
            read_only: has(VIRTIO_BLK_F_RO),
            flush: has(VIRTIO_BLK_F_FLUSH),
            discard: has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
            limits,
        })
    }
}

/// Returns a duplicate of an eventfd, as the type that the `vhost` crate takes.
fn event_fd(fd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the fd is an open eventfd, and nobody else owns it.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

fn failed(message: &'static str) -> impl Fn(vhost::Error) -> io::Error {
    move |e| io::Error::other(format!("{message}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_come_from_the_configuration_space() {
        let mut config = [0; CONFIG_BYTES as usize];
        config[0] = 16;
        config[20..24].copy_from_slice(&4096_u32.to_le_bytes());
        config[36..40].copy_from_slice(&8_u32.to_le_bytes());
        let all = Properties::of(&config, &|_| true).unwrap();
        assert_eq!((all.size, all.block_size), (8192, 4096));
        assert!(all.read_only && all.flush && all.discard && all.write_zeroes);
        assert_eq!(all.limits, Limits::new(0, 4096, 0));
        let none = Properties::of(&config, &|_| false).unwrap();
        assert_eq!((none.block_size, none.read_only), (512, false));
        assert!(Properties::of(&config[..7], &|_| false).is_err());
        config[..8].fill(0xff);
        assert!(Properties::of(&config, &|_| false).is_err(), "too large");
    }
}
