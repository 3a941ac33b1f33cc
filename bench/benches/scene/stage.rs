//! A reactor without a thread, and the guest that it serves.

use std::sync::Arc;

use bdev::Bdev;
use reactor::Reclaim;
use vhost_target::{Core, Mode};
use vhost_target::{Events, Reactor, SteppedReactor};

use super::guest::{Form, Guest, Kind};

/// Turns after which a request that has not come back never will.
const TURNS_MAX: u32 = 1 << 24;

/// A reactor that polls all of a guest's queues.
pub(crate) struct Stage {
    pub(crate) reactor: SteppedReactor,
    pub(crate) guest: Guest,
}

impl Stage {
    pub(crate) fn new(queues: usize, form: Form, bdev: &Arc<dyn Bdev>) -> Self {
        Self::of(Guest::new(queues, form, bdev))
    }

    /// Of one queue, whose front end keeps a record of what is in flight.
    pub(crate) fn tracked(form: Form, bdev: &Arc<dyn Bdev>) -> Self {
        Self::of(Guest::tracked(form, bdev))
    }

    /// Of one queue of a virtio-scsi device.
    pub(crate) fn scsi(bdev: &Arc<dyn Bdev>) -> Self {
        let mut stage = Self::of(Guest::scsi(bdev));
        let Self { reactor, guest } = &mut stage;
        guest.driver.clear_attention(|| {
            reactor.step();
        });
        stage
    }

    fn of(guest: Guest) -> Self {
        let events = Arc::new(Events::new().unwrap());
        let reactor = Arc::new(Reactor::new(Core(0), &guest.domain, Mode::Poll).unwrap());
        reactor.publish(guest.pollables(), &Reclaim::start(|| {}).unwrap());
        let mut reactor = SteppedReactor::new(&reactor, &guest.domain, &events).unwrap();
        reactor.step();
        Self { reactor, guest }
    }

    /// Has the driver submit `depth` requests, makes turns with `turn` until all are answered, and
    /// takes the answers.
    pub(crate) fn batch(
        &mut self,
        kind: Kind,
        depth: u64,
        mut turn: impl FnMut(&mut SteppedReactor),
    ) {
        self.guest.driver.submit(kind, depth);
        let (mut back, mut turns) = (0, 0);
        while back < depth {
            turn(&mut self.reactor);
            back += self.guest.driver.take_back();
            turns += 1;
            assert!(turns < TURNS_MAX, "a request is lost");
        }
    }
}
