//! What a front end and a back end agree on: feature bits of virtio and of the protocol.

use std::time::Duration;

pub use vhost::vhost_user::message::VhostUserProtocolFeatures as ProtocolFeatures;

use crate::error::LIMIT;

/// Feature bit: the back end logs what it writes while migrating.
pub const LOG_ALL: u64 = 1 << 26;
/// Feature bit: requests may be in indirect tables.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: kicks and calls at named indices.
pub const EVENT_IDX: u64 = 1 << 29;
/// Feature bit: the vhost-user protocol has features of its own, and rings are enabled by message.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bit: virtio 1.
pub const VERSION_1: u64 = 1 << 32;
/// Feature bit: the ring is packed: [`crate::PackedQueue`] and [`crate::prepared`] drive one.
pub const RING_PACKED: u64 = 1 << 34;
/// The features that Linux's virtio-blk driver accepts, and what the protocol adds: SIZE_MAX, SEG_MAX,
/// GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, ANY_LAYOUT and the
/// ones above but [`LOG_ALL`] and [`RING_PACKED`]. Not NOTIFY_ON_EMPTY, which asks for calls that
/// nobody wants.
pub const DRIVER_FEATURES: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 27
    | INDIRECT_DESC
    | EVENT_IDX
    | PROTOCOL_FEATURES
    | VERSION_1;

/// What to agree on.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Virtio features to accept of those that are offered.
    pub features: u64,
    /// Protocol features to accept of those that are offered.
    pub protocol: ProtocolFeatures,
    /// Ask for an answer to every message, if REPLY_ACK is agreed on: refusals become errors.
    pub acks: bool,
    /// Use an in-flight area: starting is an error if INFLIGHT_SHMFD is not agreed on.
    pub inflight: bool,
    /// How long the back end may take to answer a message. Then the connection is shut down.
    pub limit: Duration,
}

impl Default for Options {
    /// [`DRIVER_FEATURES`], and the protocol features that are used here.
    fn default() -> Self {
        use ProtocolFeatures as P;
        Self {
            features: DRIVER_FEATURES,
            protocol: P::MQ
                | P::REPLY_ACK
                | P::CONFIG
                | P::BACKEND_REQ
                | P::LOG_SHMFD
                | P::INFLIGHT_SHMFD,
            acks: true,
            inflight: false,
            limit: LIMIT,
        }
    }
}
