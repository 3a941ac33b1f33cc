//! The front end's side of the vhost-user protocol for a block device.
//!
//! It sends QEMU's messages, in QEMU's order, and changes a running device on request.

use std::fmt;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::{VhostBackend, VringConfigData};

use crate::config_space::{BlkConfig, CONFIG_BYTES};
use crate::error::{Error, Result};
use crate::features::{
    EVENT_IDX, INDIRECT_DESC, LOG_ALL, Options, PROTOCOL_FEATURES, ProtocolFeatures, RING_PACKED,
};
use crate::guest::{GuestRam, RegionInfo};
use crate::link::{Killer, Link, clone};
use crate::packed::FIRST_BASE;
use crate::queue::{AnyQueue, Queue};
use crate::raw::{RawConnection, VERSION};
use crate::request::QueueOptions;
use crate::ring::Ring;

/// The only message that is sent without the `vhost` crate.
const SET_LOG_BASE: u32 = 6;
/// An area in which a back end records its requests in flight, and finds them again after a crash.
struct Inflight {
    info: VhostUserInflight,
    file: File,
}

impl fmt::Debug for Inflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflight").field("file", &self.file).finish_non_exhaustive()
    }
}

/// A negotiated connection to a back end.
///
/// The limit for each reply is [`Options::limit`]. After it, the connection is shut down and the
/// call fails. The connection does not own the guest's memory and queues: queues continue (also on
/// other threads) while memory tables and call fds change, and they survive a reconnection.
#[derive(Debug)]
pub struct FrontEnd {
    path: PathBuf,
    options: Options,
    ram: Arc<GuestRam>,
    link: Link,
    offered: u64,
    queues_offered: u64,
    inflight: Option<Inflight>,
    rings: Vec<Arc<Ring>>,
}

impl FrontEnd {
    /// Connects to the socket at `path`, and negotiates the features of `options` with the back
    /// end.
    ///
    /// # Errors
    /// [`Error::Connect`], or the error of a reply of the back end.
    pub fn connect(path: &Path, ram: Arc<GuestRam>, options: Options) -> Result<Self> {
        let link = Link::connect(path, options.limit)?;
        let path = path.to_owned();
        let mut front_end = Self {
            path,
            options,
            ram,
            link,
            offered: 0,
            queues_offered: 0,
            inflight: None,
            rings: Vec::new(),
        };
        front_end.negotiate()?;
        Ok(front_end)
    }

    /// Returns the virtio features that the back end offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Returns the negotiated virtio features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.offered & self.options.features
    }

    /// Returns the negotiated protocol features.
    #[must_use]
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.link.protocol
    }

    /// Returns the number of queues that the back end offers: 1 without the protocol feature MQ.
    #[must_use]
    pub fn queues_offered(&self) -> u64 {
        self.queues_offered
    }

    /// Reads `len` bytes of configuration space.
    ///
    /// # Errors
    /// The protocol feature CONFIG is not negotiated, or the back end refuses.
    pub fn config_bytes(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let space = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        let got = self.link.ask("GET_CONFIG", |n| n.get_config(offset, len, flags, &space))?;
        Ok(got.1)
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// As [`FrontEnd::config_bytes`].
    pub fn config(&mut self) -> Result<BlkConfig> {
        let bytes = self.config_bytes(0, CONFIG_BYTES)?;
        let bytes =
            bytes.first_chunk().ok_or(Error::Nonsense("its configuration space is too short"))?;
        Ok(BlkConfig::parse(bytes))
    }

    /// Writes configuration space.
    ///
    /// # Errors
    /// As [`FrontEnd::config_bytes`].
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.link.tell("SET_CONFIG", |n| n.set_config(offset, flags, bytes))
    }

    /// Makes `n` queues that match the negotiated features, and starts them from index 0.
    ///
    /// # Errors
    /// No guest memory is left, [`Error::NotOffered`] for indirect tables, or as
    /// [`FrontEnd::start`].
    pub fn start_new(&mut self, n: usize, options: QueueOptions) -> Result<Vec<Queue>> {
        self.check(options)?;
        let event_idx = self.features() & EVENT_IDX != 0;
        let queues = (0..n)
            .map(|index| Queue::new(&self.ram, index, options, event_idx))
            .collect::<Result<Vec<_>>>()?;
        self.start(queues.iter().map(|queue| (queue.ring().clone(), 0)).collect())?;
        Ok(queues)
    }

    /// Makes `n` queues of the negotiated layout, packed ones with RING_PACKED, and starts them
    /// from index 0.
    ///
    /// # Errors
    /// As [`FrontEnd::start_new`].
    pub fn start_any(&mut self, n: usize, options: QueueOptions) -> Result<Vec<AnyQueue>> {
        self.check(options)?;
        let [event_idx, packed] = [EVENT_IDX, RING_PACKED].map(|bit| self.features() & bit != 0);
        let queues = (0..n)
            .map(|index| AnyQueue::new(&self.ram, index, options, event_idx, packed))
            .collect::<Result<Vec<_>>>()?;
        self.start(queues.iter().map(|queue| (queue.ring().clone(), queue.base())).collect())?;
        Ok(queues)
    }

    fn check(&self, options: QueueOptions) -> Result<()> {
        if options.indirect && self.features() & INDIRECT_DESC == 0 {
            return Err(Error::NotOffered("indirect descriptors"));
        }
        Ok(())
    }

    /// Configures memory and rings in the back end, and starts each ring from the given available
    /// index. After a stop or on a new connection, that is the index that [`FrontEnd::stop`]
    /// returned.
    ///
    /// # Errors
    /// The back end refuses a message (an error only with [`Options::acks`]).
    pub fn start(&mut self, rings: Vec<(Arc<Ring>, u16)>) -> Result<()> {
        // Recorded first, so that a reconnection after a failure finds all rings.
        self.rings = rings.iter().map(|(ring, _)| ring.clone()).collect();
        let features = self.features();
        self.link.tell("SET_FEATURES", |n| n.set_features(features))?;
        self.set_up_inflight(&rings)?;
        self.give_memory()?;
        for (ring, base) in &rings {
            self.start_ring(ring, *base)?;
        }
        // QEMU enables rings after it has set up all of them.
        if features & PROTOCOL_FEATURES != 0 {
            for (ring, _) in &rings {
                self.enable(ring.index(), true)?;
            }
        }
        Ok(())
    }

    /// Configures one ring in the back end, up to its kick fd, and does not enable it.
    ///
    /// # Errors
    /// As [`FrontEnd::start`].
    pub fn start_ring(&mut self, ring: &Arc<Ring>, base: u16) -> Result<()> {
        let i = ring.index();
        let link = &mut self.link;
        link.tell("SET_VRING_NUM", |n| n.set_vring_num(i, ring.size()))?;
        link.tell("SET_VRING_BASE", |n| n.set_vring_base(i, base))?;
        link.tell("SET_VRING_ADDR", |n| n.set_vring_addr(i, &addrs(ring, false)))?;
        link.tell("SET_VRING_KICK", |n| n.set_vring_kick(i, ring.kick_fd()))?;
        link.tell("SET_VRING_CALL", |n| n.set_vring_call(i, &ring.call_fd()))?;
        self.rings.retain(|known| known.index() != i);
        self.rings.push(ring.clone());
        Ok(())
    }

    /// Adopts an in-flight area that another back end has made for `num_queues` rings of
    /// `queue_size`. The next start passes it to the back end instead of requesting a new one.
    ///
    /// # Errors
    /// The length of the file cannot be read.
    pub fn bring_inflight(&mut self, file: File, num_queues: u16, queue_size: u16) -> Result<()> {
        let len = file
            .metadata()
            .map_err(Error::system("cannot read the length of an in-flight area"))?
            .len();
        let info = VhostUserInflight::new(len, 0, num_queues, queue_size);
        self.inflight = Some(Inflight { info, file });
        Ok(())
    }

    /// Enables or disables ring `index` in the back end.
    ///
    /// # Errors
    /// As [`FrontEnd::start`].
    pub fn enable(&mut self, index: usize, on: bool) -> Result<()> {
        self.link.tell("SET_VRING_ENABLE", |n| n.set_vring_enable(index, on))
    }

    /// Stops every ring that was started, and returns each ring's available index, up to which the
    /// back end has taken chains. The back end replies once the ring has no request in flight.
    ///
    /// # Errors
    /// The back end does not reply; some rings may have been stopped.
    pub fn stop(&mut self) -> Result<Vec<u16>> {
        if self.features() & PROTOCOL_FEATURES != 0 {
            for i in 0..self.rings.len() {
                self.enable(self.rings[i].index(), false)?;
            }
        }
        let rings = std::mem::take(&mut self.rings);
        rings.iter().map(|ring| self.stop_ring(ring.index())).collect()
    }

    /// Stops ring `index` and returns its available index.
    ///
    /// # Errors
    /// As [`FrontEnd::stop`].
    pub fn stop_ring(&mut self, index: usize) -> Result<u16> {
        self.rings.retain(|ring| ring.index() != index);
        let base = self.link.ask("GET_VRING_BASE", |n| n.get_vring_base(index))?;
        // A packed ring has a second position in the upper half.
        Ok((base & 0xffff) as u16)
    }

    /// Sends a memory table to the back end, which replaces the previous one. Rings may run.
    ///
    /// # Errors
    /// As [`FrontEnd::start`].
    pub fn set_memory_table(&mut self, table: &[RegionInfo]) -> Result<()> {
        self.link.tell("SET_MEM_TABLE", |n| n.set_mem_table(table).map(drop))
    }

    /// Returns the number of memory slots of the back end.
    ///
    /// # Errors
    /// The protocol feature CONFIGURE_MEM_SLOTS is not negotiated, or as [`FrontEnd::start`].
    pub fn memory_slots(&mut self) -> Result<u64> {
        self.link.ask("GET_MAX_MEM_SLOTS", VhostUserFrontend::get_max_mem_slots)
    }

    /// Adds one region of memory in the back end. Rings may run.
    ///
    /// # Errors
    /// As [`FrontEnd::memory_slots`].
    pub fn add_memory(&mut self, region: &RegionInfo) -> Result<()> {
        self.link.tell("ADD_MEM_REG", |n| n.add_mem_region(region).map(drop))
    }

    /// Removes a region of memory from the back end. Rings may run.
    ///
    /// # Errors
    /// As [`FrontEnd::memory_slots`].
    pub fn remove_memory(&mut self, region: &RegionInfo) -> Result<()> {
        self.link.tell("REM_MEM_REG", |n| n.remove_mem_region(region))
    }

    /// Sends a new call fd for ring `index` to the back end. Wakes the waiters on the old one.
    ///
    /// # Errors
    /// No ring with this index is started, the eventfd cannot be created, or as
    /// [`FrontEnd::start`].
    pub fn change_call_fd(&mut self, index: usize) -> Result<()> {
        let ring = self.rings.iter().find(|ring| ring.index() == index).cloned();
        let ring = ring.ok_or(Error::NotOffered("a ring of this index"))?;
        let old = ring.renew_call_fd()?;
        let told = self.link.tell("SET_VRING_CALL", |n| n.set_vring_call(index, &ring.call_fd()));
        old.write(1).map_err(Error::system("cannot wake a waiter"))?;
        told
    }

    /// Makes the back end log the pages that it writes in the first `len` bytes of `log` from now
    /// on: one bit for each 4 KiB page of guest memory. [`FrontEnd::stop_log`] ends it.
    ///
    /// # Errors
    /// The protocol feature LOG_SHMFD is not negotiated, or as [`FrontEnd::start`].
    pub fn start_log(&mut self, log: &File, len: u64) -> Result<()> {
        if !self.link.protocol.contains(ProtocolFeatures::LOG_SHMFD) {
            return Err(Error::NotOffered("a shared log"));
        }
        // The `vhost` crate accepts only a reply with the size of the request, and neither
        // rte_vhost nor libvhost-user sends one.
        let mut raw = self.raw()?;
        let payload = [len, 0].map(u64::to_le_bytes).concat();
        raw.send_message(SET_LOG_BASE, VERSION, &payload, &[log.as_fd()])?;
        if raw.receive()?.request != SET_LOG_BASE {
            return Err(Error::Nonsense("the reply to SET_LOG_BASE is invalid"));
        }
        self.set_logging(true)
    }

    /// Ends logging.
    ///
    /// # Errors
    /// As [`FrontEnd::start`].
    pub fn stop_log(&mut self) -> Result<()> {
        self.set_logging(false)
    }

    fn set_logging(&mut self, on: bool) -> Result<()> {
        let features = self.features() & !LOG_ALL | if on { LOG_ALL } else { 0 };
        let link = &mut self.link;
        link.tell("SET_FEATURES", |n| n.set_features(features))?;
        for ring in &self.rings {
            let addrs = addrs(ring, on);
            link.tell("SET_VRING_ADDR", |n| n.set_vring_addr(ring.index(), &addrs))?;
        }
        Ok(())
    }

    /// Opens the back-end channel, for requests of the back end, and returns this side's end. The
    /// back end sends request 2 when the configuration space has changed.
    ///
    /// # Errors
    /// The protocol feature BACKEND_REQ is not negotiated, or as [`FrontEnd::start`].
    pub fn open_backend_channel(&mut self) -> Result<RawConnection> {
        let (ours, theirs) = UnixStream::pair()
            .map_err(Error::system("cannot make a socket pair for the back-end channel"))?;
        self.link.tell("SET_BACKEND_REQ_FD", |n| n.set_backend_request_fd(&theirs))?;
        RawConnection::over(ours)
    }

    /// Returns the same socket, for sending any bytes between messages.
    ///
    /// # Errors
    /// No fd is left.
    pub fn raw(&self) -> Result<RawConnection> {
        RawConnection::over(clone(&self.link.socket)?)
    }

    /// Returns a handle that ends this connection from another thread, even during a call.
    ///
    /// # Errors
    /// No fd is left.
    pub fn killer(&self) -> Result<Killer> {
        Ok(Killer { socket: clone(&self.link.socket)? })
    }

    /// Closes the socket at once without stopping rings, like a VMM that is killed.
    pub fn kill(self) {
        drop(self);
    }

    /// Returns whether the back end has closed the connection. Its rings then have no user.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let mut wait = [PollFd::new(&self.link.socket, PollFlags::RDHUP)];
        poll(&mut wait, Some(&Timespec::default())).is_ok() && !wait[0].revents().is_empty()
    }

    /// Stops the rings, then closes the socket, like a VMM that ends.
    ///
    /// # Errors
    /// As [`FrontEnd::stop`].
    pub fn disconnect(mut self) -> Result<Vec<u16>> {
        self.stop()
    }

    /// Connects to the same path again, whether or not the last connection is open, and continues
    /// the rings that were started, each from its used index, like QEMU. With an in-flight area
    /// ([`Options::inflight`]), the back end finds the requests there that it had taken. Without
    /// one, it takes the chains after that index again, which is correct only if it completes in
    /// order. A packed ring has no such index: only the area has the position, and the base that is
    /// sent here applies to a new ring.
    ///
    /// # Errors
    /// As [`FrontEnd::connect`] and [`FrontEnd::start`].
    pub fn reconnect(&mut self) -> Result<()> {
        let packed = self.features() & RING_PACKED != 0;
        self.reconnect_at(|ring| if packed { FIRST_BASE } else { ring.used_index() })
    }

    /// As [`FrontEnd::reconnect`], with each ring's base from `base`: packed rings have no index in
    /// memory.
    ///
    /// # Errors
    /// As [`FrontEnd::reconnect`].
    pub fn reconnect_at(&mut self, base: impl Fn(&Ring) -> u16) -> Result<()> {
        // A shutdown also affects clones of the socket in other connections.
        drop(self.link.socket.shutdown(Shutdown::Both));
        self.link = Link::connect(&self.path, self.options.limit)?;
        self.negotiate()?;
        let rings = self.rings.iter().map(|ring| (ring.clone(), base(ring))).collect();
        self.start(rings)
    }

    /// Sends all memory to the back end: one region at a time if that is negotiated, like QEMU, and
    /// once per connection.
    fn give_memory(&mut self) -> Result<()> {
        let table = self.ram.table();
        if !self.link.protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return self.set_memory_table(&table);
        }
        if !std::mem::replace(&mut self.link.has_memory, true) {
            table.iter().try_for_each(|region| self.add_memory(region))?;
        }
        Ok(())
    }

    fn negotiate(&mut self) -> Result<()> {
        let link = &mut self.link;
        self.offered = link.ask("GET_FEATURES", |n| n.get_features())?;
        self.queues_offered = 1;
        if self.offered & self.options.features & PROTOCOL_FEATURES != 0 {
            let offered =
                link.ask("GET_PROTOCOL_FEATURES", VhostUserFrontend::get_protocol_features)?;
            let accepted = offered & self.options.protocol;
            link.tell("SET_PROTOCOL_FEATURES", |n| n.set_protocol_features(accepted))?;
            link.protocol = accepted;
            link.acks = self.options.acks && accepted.contains(ProtocolFeatures::REPLY_ACK);
            if accepted.contains(ProtocolFeatures::MQ) {
                self.queues_offered = link.ask("GET_QUEUE_NUM", |n| n.get_queue_num())?;
            }
        }
        link.tell("SET_OWNER", |n| n.set_owner())
    }

    /// Gets an area for `rings` from the back end if there is none yet, and passes it to the back
    /// end.
    fn set_up_inflight(&mut self, rings: &[(Arc<Ring>, u16)]) -> Result<()> {
        let size = rings.iter().map(|(ring, _)| ring.size()).max();
        let (true, Some(size)) = (self.options.inflight, size) else { return Ok(()) };
        if !self.link.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            return Err(Error::NotOffered("an in-flight area"));
        }
        let inflight = match self.inflight.take() {
            Some(inflight) => inflight,
            None => {
                let queues = rings.iter().map(|(ring, _)| ring.index() + 1).max().unwrap_or(0);
                let queues = queues.try_into().expect("a device has at most 65,535 rings");
                let wanted = VhostUserInflight::new(0, 0, queues, size);
                let (info, file) =
                    self.link.ask("GET_INFLIGHT_FD", |n| n.get_inflight_fd(&wanted))?;
                Inflight { info, file }
            }
        };
        let Inflight { info, file } = self.inflight.insert(inflight);
        self.link.tell("SET_INFLIGHT_FD", |n| n.set_inflight_fd(info, file.as_raw_fd()))
    }
}

/// Returns the addresses of `ring` for SET_VRING_ADDR. With `log`, writes to its used ring are
/// logged.
fn addrs(ring: &Ring, log: bool) -> VringConfigData {
    let [desc_table_addr, avail_ring_addr, used_ring_addr] = ring.user_addrs();
    VringConfigData {
        queue_max_size: ring.size(),
        queue_size: ring.size(),
        flags: u32::from(log),
        desc_table_addr,
        used_ring_addr,
        avail_ring_addr,
        log_addr: log.then(|| ring.addrs()[2]),
    }
}
