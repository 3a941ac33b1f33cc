//! Sessions with a device, and their parameters.

use std::sync::Arc;

use bdev::{Malloc, MallocOptions};
use guest_memory::GuestMemory;
use guest_memory::testing::flat_at;
use vhost_blk::Blk;
use vhost_scsi::Scsi;
use vhost_target::device::{Device, Negotiated, OpenError};
use vhost_target::session::{Effect, RingState, Session};
use virtqueue::{QUEUES_MAX, RingAddrs};

use crate::entropy::{Entropy, Source, Stream};

/// VERSION_1, the features of rings, and the protocol features.
pub(crate) const OFFERED: u64 = 0x1_7000_0000;
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const USER: u64 = 0x7000_0000;

/// A device that a session offers.
pub(crate) trait Offered {
    /// Features of the device of which `CHANGE` needs one.
    const FEATURES: u64;
    /// A write to the config space, and whether queues need new views because of it.
    const CHANGE: (u32, &[u8], bool);
    /// The length of the config space.
    const CONFIG_BYTES: usize;

    /// Returns the device.
    fn create() -> Arc<dyn Device>;

    /// Returns the state of a new connection.
    fn connect() -> Box<dyn Negotiated> {
        Self::create().connect()
    }
}

/// The block device. The driver may switch its write cache.
pub(crate) struct Block;

impl Offered for Block {
    /// FLUSH and CONFIG_WCE.
    const FEATURES: u64 = 1 << 9 | 1 << 11;
    const CHANGE: (u32, &[u8], bool) = (32, &[0], true);
    const CONFIG_BYTES: usize = 60;

    fn create() -> Arc<dyn Device> {
        let options =
            MallocOptions { name: "m".into(), num_blocks: 64, block_size: 512, uuid: None };
        Blk::new(Malloc::create(options).unwrap(), false)
    }
}

/// The SCSI device, without targets. Front ends have its config space.
pub(crate) struct ScsiDevice;

impl Offered for ScsiDevice {
    const FEATURES: u64 = 0;
    const CHANGE: (u32, &[u8], bool) = (0, &[1], false);
    const CONFIG_BYTES: usize = 0;

    fn create() -> Arc<dyn Device> {
        Scsi::new("s", &Arc::default())
    }
}

/// The entropy device. It has no config space.
pub(crate) struct EntropyDevice;

impl Offered for EntropyDevice {
    const FEATURES: u64 = 0;
    const CHANGE: (u32, &[u8], bool) = (0, &[1], false);
    const CONFIG_BYTES: usize = 0;

    fn create() -> Arc<dyn Device> {
        Entropy::new(Arc::new(Unopened))
    }
}

/// A source that is never opened: a session opens no queue.
#[derive(Debug)]
struct Unopened;

impl Source for Unopened {
    fn open(self: Arc<Self>) -> Result<Box<dyn Stream>, OpenError> {
        Err(OpenError("a session opened a queue".into()))
    }
}

/// Returns a session that offers these features.
pub(crate) fn session_of<D: Offered>(offered: u64) -> Session {
    Session::new(offered, QUEUES_MAX, D::connect())
}

pub(crate) fn memory(len: u64) -> Arc<GuestMemory> {
    flat_at(len, USER)
}

pub(crate) fn addrs(ring: u64) -> RingAddrs {
    let base = USER + 0x4000 * ring;
    RingAddrs { desc: base, avail: base + 0x1000, used: base + 0x2000 }
}

pub(crate) fn set_up(session: &mut Session, ring: usize) {
    session.set_num(ring, 128).unwrap();
    session.set_base(ring, 7).unwrap();
    session.set_addrs(ring, addrs(ring as u64)).unwrap();
}

/// Starts a ring whose gate opens at once.
pub(crate) fn start(session: &mut Session, ring: usize) {
    assert_eq!(session.set_kick(ring, None).unwrap(), [Effect::Gate(ring)]);
    assert!(session.open_gate(ring));
    assert_eq!(session.ring(ring).state, RingState::Opening);
    assert!(session.opened(ring));
}

/// Returns a session with two started rings.
pub(crate) fn running<D: Offered>() -> Session {
    let mut session = session_of::<D>(OFFERED);
    session.set_features(OFFERED).unwrap();
    session.set_memory(memory(0x10000)).unwrap();
    for ring in 0..2 {
        set_up(&mut session, ring);
        start(&mut session, ring);
    }
    session
}
