//! The feature bits of virtio and of the protocol that front end and back end negotiate.

use std::time::Duration;

pub use vhost::vhost_user::message::VhostUserProtocolFeatures as ProtocolFeatures;

use crate::error::LIMIT;

/// Feature bit: the back end logs what it writes while migrating.
pub const LOG_ALL: u64 = 1 << 26;
/// Feature bit: requests may be in indirect tables.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: the driver and the device name the indices at which they want a kick or a call.
pub const EVENT_IDX: u64 = 1 << 29;
/// Feature bit: protocol features are negotiated, and messages enable rings.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bit: virtio 1.
pub const VERSION_1: u64 = 1 << 32;
/// Feature bit: the ring is packed: [`crate::PackedQueue`] and [`crate::prepared`] drive one.
pub const RING_PACKED: u64 = 1 << 34;
/// The features that Linux's virtio-blk driver accepts, and those that the protocol adds: SIZE_MAX,
/// SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES,
/// ANY_LAYOUT and those above except [`LOG_ALL`] and [`RING_PACKED`]. Not NOTIFY_ON_EMPTY, which
/// requests calls that no driver uses.
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

/// The features to negotiate.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The virtio features to accept if offered.
    pub features: u64,
    /// The protocol features to accept if offered.
    pub protocol: ProtocolFeatures,
    /// Request an acknowledgement of every message, if REPLY_ACK is negotiated: refusals become
    /// errors.
    pub acks: bool,
    /// Use an in-flight area. Starting fails if INFLIGHT_SHMFD is not negotiated.
    pub inflight: bool,
    /// The limit for the back end's reply to a message. After it, the connection is shut down.
    pub limit: Duration,
}

impl Default for Options {
    /// [`DRIVER_FEATURES`], and the protocol features that this crate uses.
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
