//! A controller: a device with a name and a socket; and the information about it for the operator.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use closer::Account;
use guest_memory::Unmapper;
use reactor::{Core, read_tsc, ticks_per_second};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::device::Device;
use crate::error::Error;
use crate::queue::Coalescing;
use crate::session::Phase;

/// SPDK's default for `iops_threshold`.
pub const IOPS_THRESHOLD_DEFAULT: u32 = 60_000;
/// SPDK's lower bound for `iops_threshold`: one request per coalescing window of 10 ms.
pub(crate) const IOPS_THRESHOLD_MIN: u32 = 100;

/// The parameters of a new controller.
#[derive(Clone, Debug)]
pub struct ControllerSpec {
    /// Its name, and the name of the socket in the socket directory.
    pub name: String,
    /// The path of its socket.
    pub socket: PathBuf,
    /// Its device.
    pub device: Arc<dyn Device>,
    /// Cores whose reactors may serve it, sorted. `None`: all cores.
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
    /// The number of controllers created before it.
    pub number: u64,
    pub made_ticks: u64,
    pub name: String,
    pub socket: PathBuf,
    pub packed_ring: bool,
    /// It has no socket before [`Target::start_controller`](crate::Target::start_controller).
    pub delayed: bool,
    /// Sorted; never empty.
    pub cores: Vec<Core>,
    pub device: Arc<dyn Device>,
    /// Offered features. They do not change, because a front end compares them when it reconnects.
    pub features: u64,
    pub coalescing: Arc<Coalescing>,
    pub delay_base_us: u32,
    pub iops_threshold: u32,
    pub sessions_made: u32,
    /// The configuration space has changed: the guest of a front end that reconnects may know an
    /// old one.
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
            delayed: false,
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

    /// Sets coalescing. Fails if a value is out of SPDK's range.
    pub(crate) fn set_coalescing(
        &mut self,
        delay_base_us: u32,
        iops_threshold: u32,
    ) -> Result<(), Error> {
        use std::sync::atomic::Ordering::Relaxed;
        check_coalescing(delay_base_us, iops_threshold)?;
        self.delay_base_us = delay_base_us;
        self.iops_threshold = iops_threshold;
        self.coalescing.threshold.store(iops_threshold / 100, Relaxed);
        self.coalescing.delay_base_ticks.store(ticks(delay_base_us), Relaxed);
        Ok(())
    }
}

fn ticks(us: u32) -> u64 {
    u64::from(us) * ticks_per_second() / 1_000_000
}

/// Checks the parameters of [`Target::set_coalescing`](crate::Target::set_coalescing).
///
/// # Errors
/// [`Error::Coalescing`].
pub fn check_coalescing(delay_us: u32, iops: u32) -> Result<(), Error> {
    let fits = iops >= IOPS_THRESHOLD_MIN && ticks(delay_us) <= u32::MAX.into();
    if fits { Ok(()) } else { Err(Error::Coalescing) }
}

/// Information about a controller for the operator.
#[derive(Clone, Debug)]
pub struct ControllerInfo {
    /// Its name.
    pub name: String,
    /// The number of controllers created before it.
    pub number: u64,
    /// When it was created, in ticks of the time-stamp counter.
    pub made_ticks: u64,
    /// Cores whose reactors may serve it.
    pub cores: Vec<Core>,
    /// Coalescing: base delay in microseconds.
    pub delay_base_us: u32,
    /// Coalescing: requests per second above which calls are delayed.
    pub iops_threshold: u32,
    /// The path of its socket.
    pub socket: PathBuf,
    /// Whether packed rings are offered.
    pub packed_ring: bool,
    /// Whether it has no socket before
    /// [`Target::start_controller`](crate::Target::start_controller).
    pub delayed: bool,
    /// Its device.
    pub device: Arc<dyn Device>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Open fds that its present and past front ends have sent, including the connections.
    pub fds: usize,
    /// The number of these fds that wait to be closed.
    pub fds_closing: usize,
    /// A close has been in progress for some seconds. No front end is accepted until it returns.
    pub fds_stuck: bool,
    /// Its connections, including closed ones that still have I/O in flight.
    pub sessions: Vec<SessionInfo>,
}

/// Information about a connection for the operator.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// The transport's number of the connection.
    pub vid: i32,
    /// The number of connections of the controller before it.
    pub id: u32,
    /// The phase of the session.
    pub phase: Phase,
    /// The number of rings that the front end has set up at least in part.
    pub rings: usize,
    /// I/Os that have not completed.
    pub inflight: u64,
    /// Bytes of guest memory that stay mapped only for I/O in flight.
    pub quarantined_bytes: u64,
    /// The number of completed requests.
    pub requests: u64,
    /// The number of requests that were malformed, refused, or failed by the disk.
    pub errors: u64,
    /// The rings that reactors serve.
    pub queues: Vec<QueueInfo>,
}

/// Information about a queue for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// The number of its ring in the session.
    pub ring: usize,
    /// The core that serves it, or to which it is being moved.
    pub core: Core,
    /// I/Os that have not completed.
    pub inflight: u32,
}

/// Checks whether a controller may have this name and socket.
///
/// # Errors
/// [`Error::Name`] or [`Error::SocketPath`].
pub fn check_name(name: &str, socket: &Path) -> Result<(), Error> {
    use std::path::Component;
    /// The size of `sun_path`, without the final zero.
    const SOCKET_PATH_MAX: usize = 107;
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if name.is_empty() || name.contains('\0') || !Path::new(name).components().all(plain) {
        return Err(Error::Name(name.into()));
    }
    let len = socket.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(Error::SocketPath(socket.into(), len));
    }
    Ok(())
}
