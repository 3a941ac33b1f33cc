//! A controller: a device under a name, served on a socket, and what the operator sees of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use closer::Account;
use guest_memory::Unmapper;
use reactor::{Core, read_tsc, ticks_per_second};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::device::Device;
use crate::queue::Coalescing;
use crate::session::Phase;

/// SPDK's default for `iops_threshold`.
pub const IOPS_THRESHOLD_DEFAULT: u32 = 60_000;
/// SPDK's lower bound for `iops_threshold`: one request per coalescing window of 10 ms.
pub(crate) const IOPS_THRESHOLD_MIN: u32 = 100;

/// What a controller is made of.
#[derive(Clone, Debug)]
pub struct ControllerSpec {
    /// Its name, and the socket's below the socket directory.
    pub name: String,
    /// Where its socket is.
    pub socket: PathBuf,
    /// Its device.
    pub device: Arc<dyn Device>,
    /// Cores whose reactors may serve it, sorted; all of them when `None`.
    pub cores: Option<Vec<Core>>,
    /// Whether packed rings are offered.
    pub packed_ring: bool,
}

/// Identity of a controller, never reused, unlike its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ControllerId(pub u64);

#[derive(Debug)]
pub(crate) struct Controller {
    pub id: ControllerId,
    /// Counts up over all controllers.
    pub number: u64,
    pub made_ticks: u64,
    pub name: String,
    pub socket: PathBuf,
    pub packed_ring: bool,
    /// Sorted; never empty.
    pub cores: Vec<Core>,
    pub device: Arc<dyn Device>,
    /// Offered features; do not change, as a front end compares them when it reconnects.
    pub features: u64,
    pub coalescing: Arc<Coalescing>,
    pub delay_base_us: u32,
    pub iops_threshold: u32,
    pub sessions_made: u32,
    /// The configuration space has changed: a guest whose front end reconnects may know an old one.
    pub config_changed: bool,
    /// Counts the mappings of its front ends.
    pub unmapper: Unmapper,
    /// The account that owns the fds of its front ends.
    pub account: Account,
    /// Each thread that opens the device keeps one reference.
    pub openers: Arc<()>,
    /// New connections are refused.
    pub deleting: bool,
}

impl Controller {
    pub(crate) fn new(
        id: ControllerId,
        number: u64,
        spec: ControllerSpec,
        cores: Vec<Core>,
        unmapper: Unmapper,
        account: Account,
    ) -> Self {
        let packed = if spec.packed_ring { 1 << VIRTIO_F_RING_PACKED } else { 0 };
        let features = spec.device.features() | packed;
        Self {
            id,
            number,
            made_ticks: read_tsc(),
            name: spec.name,
            socket: spec.socket,
            packed_ring: spec.packed_ring,
            cores,
            features,
            device: spec.device,
            coalescing: Arc::default(),
            delay_base_us: 0,
            iops_threshold: IOPS_THRESHOLD_DEFAULT,
            sessions_made: 0,
            config_changed: false,
            unmapper,
            account,
            openers: Arc::default(),
            deleting: false,
        }
    }

    /// Sets coalescing; `false` if a value is out of SPDK's range.
    pub(crate) fn set_coalescing(&mut self, delay_base_us: u32, iops_threshold: u32) -> bool {
        use std::sync::atomic::Ordering::Relaxed;
        let ticks = u64::from(delay_base_us) * ticks_per_second() / 1_000_000;
        if iops_threshold < IOPS_THRESHOLD_MIN || ticks > u32::MAX.into() {
            return false;
        }
        self.delay_base_us = delay_base_us;
        self.iops_threshold = iops_threshold;
        self.coalescing.threshold.store(iops_threshold / 100, Relaxed);
        self.coalescing.delay_base_ticks.store(ticks, Relaxed);
        true
    }
}

/// A controller as the operator sees it.
#[derive(Clone, Debug)]
pub struct ControllerInfo {
    /// Its name.
    pub name: String,
    /// How many controllers were made before it.
    pub number: u64,
    /// When it was made, in ticks of the time-stamp counter.
    pub made_ticks: u64,
    /// Cores whose reactors may serve it.
    pub cores: Vec<Core>,
    /// Coalescing: base delay in microseconds.
    pub delay_base_us: u32,
    /// Coalescing: requests per second above which it sets in.
    pub iops_threshold: u32,
    /// Where its socket is.
    pub socket: PathBuf,
    /// Whether packed rings are offered.
    pub packed_ring: bool,
    /// Its device.
    pub device: Arc<dyn Device>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Open fds that its front ends, present and past, have sent, the connections included.
    pub fds: usize,
    /// Of those, the ones that wait to be closed.
    pub fds_closing: usize,
    /// A close has been in progress for seconds: no front end is accepted until it returns.
    pub fds_stuck: bool,
    /// Its connections, those that are gone but still have I/O in flight included.
    pub sessions: Vec<SessionInfo>,
}

/// A connection as the operator sees it.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// The transport's number.
    pub vid: i32,
    /// Counts up per controller.
    pub id: u32,
    /// What it is doing.
    pub phase: Phase,
    /// Rings that the front end has named.
    pub rings: usize,
    /// I/Os that have not completed.
    pub inflight: u64,
    /// Bytes of guest memory that are kept only for I/O in flight.
    pub quarantined_bytes: u64,
    /// Requests completed.
    pub requests: u64,
    /// Requests that were malformed, refused, or failed by the disk.
    pub errors: u64,
    /// Rings that are served, and where.
    pub queues: Vec<QueueInfo>,
}

/// A queue as the operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// Which ring of its session it is.
    pub ring: usize,
    /// Where it is served, or will be in a moment.
    pub core: Core,
    /// I/Os that have not completed.
    pub inflight: u32,
}

/// Whether a controller may have this name and socket.
pub(crate) fn check_name(name: &str, socket: &Path) -> Result<(), crate::error::Error> {
    use std::path::Component;
    /// `sun_path` less its final zero.
    const SOCKET_PATH_MAX: usize = 107;
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if name.is_empty() || name.contains('\0') || !Path::new(name).components().all(plain) {
        return Err(crate::error::Error::Name(name.into()));
    }
    let len = socket.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(crate::error::Error::SocketPath(socket.into(), len));
    }
    Ok(())
}
