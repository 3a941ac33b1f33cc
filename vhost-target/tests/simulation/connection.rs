//! The state of a connection, as its front end knows it.

use std::collections::VecDeque;
use std::sync::Arc;

use guest_memory::RegionSpec;
use reactor::EventFd;
use vhost_target::ConnId;
use vhost_target::session::VHOST_F_LOG_ALL;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::message::Message;
use super::transport::FakeConnection;
use super::vm::{self, RINGS};

/// The state of a ring, as its front end knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Served {
    /// Not started on this connection.
    #[default]
    Not,
    Yes,
    /// Started before the last RESET_OWNER or RESET_DEVICE.
    Reset,
    /// Stopped, with a reply to GET_VRING_BASE.
    Stopped,
}

/// The pending reply of a front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    /// GET_VRING_BASE of a ring.
    Base(usize),
    /// RESET_DEVICE.
    Reset,
}

/// The front end's state as the view of a reset ring keeps it.
#[derive(Clone, Debug)]
pub(crate) struct KeptView {
    pub(crate) memory: Vec<RegionSpec>,
    pub(crate) writes_through: bool,
}

#[derive(Debug, Default)]
pub(crate) struct FrontRing {
    pub(crate) served: Served,
    pub(crate) call: Option<EventFd>,
    /// Requests were completed, and no call was noticed since.
    pub(crate) uncalled: bool,
    /// The view that it had at a RESET_OWNER. Until the ring has drained, the requests in flight of
    /// an earlier connection are resubmitted under it, even if the ring is started again meanwhile.
    pub(crate) kept: Option<KeptView>,
    /// It may still drain after a reset.
    pub(crate) drains: bool,
    /// Connections that were closed when it was started.
    pub(crate) behind: Vec<usize>,
}

/// An I/O in flight of a request whose controller was deleted: its completion is not reported.
#[derive(Debug)]
pub(crate) struct Lost {
    pub(crate) front: usize,
    pub(crate) vm: usize,
    pub(crate) ring: usize,
    /// The memory table that its data is in.
    pub(crate) table: usize,
}

impl FrontRing {
    /// Records calls.
    pub(crate) fn look(&mut self) {
        self.uncalled &= self.call.as_ref().is_some_and(|call| call.take() == 0);
    }
}

/// A connection and its front end.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) id: ConnId,
    pub(crate) fake: Arc<FakeConnection>,
    pub(crate) controller: usize,
    pub(crate) vm: usize,
    /// The front end sends no more messages.
    pub(crate) gone: bool,
    /// The target was told that it is closed.
    pub(crate) closed: bool,
    /// The features that it has accepted; 0 if it has not sent any.
    pub(crate) features: u64,
    /// The value that this front end, or an earlier one, has written.
    pub(crate) write_cache: Option<bool>,
    /// It has sent a reset: the target signals requests that were in flight then on the call fds of
    /// that time.
    pub(crate) was_reset: bool,
    /// The memory that it has set up.
    pub(crate) memory: Vec<RegionSpec>,
    /// The numbers of the in-flight area and of the dirty log that it has set.
    pub(crate) area: Option<usize>,
    pub(crate) log: Option<usize>,
    pub(crate) rings: [FrontRing; RINGS],
    /// The pending reply.
    pub(crate) pending: Option<Pending>,
    pub(crate) script: VecDeque<Message>,
    /// Connections of the same controller, or of the same machine, that were closed when this one
    /// was created.
    pub(crate) before: Vec<usize>,
    /// Closed connections had not drained then, and have not all drained since.
    pub(crate) gated: bool,
}

impl Front {
    /// Returns whether it is served and not about to be closed.
    pub(crate) fn is_well(&self) -> bool {
        !self.gone && !self.closed && !self.fake.is_shut()
    }

    pub(crate) fn has_accepted(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// See [`FrontRing::kept`].
    pub(crate) fn kept(&self, ring: usize) -> Option<&KeptView> {
        self.rings[ring].kept.as_ref()
    }

    /// Returns the current view of its rings.
    pub(crate) fn view(&self) -> KeptView {
        KeptView { memory: self.memory.clone(), writes_through: self.writes_through() }
    }

    /// Returns the memory tables that it has set up, or the current regions of them.
    pub(crate) fn tables(&self) -> impl Iterator<Item = usize> {
        self.memory.iter().filter_map(vm::table_of)
    }

    /// Returns the latest table.
    pub(crate) fn table(&self) -> Option<usize> {
        self.tables().max()
    }

    /// Returns the log in which the target has acknowledged to mark its writes.
    pub(crate) fn logging(&self) -> Option<usize> {
        self.log.filter(|_| self.has_accepted(VHOST_F_LOG_ALL))
    }

    /// Returns whether it can switch the cache but not flush it. The cache is initially off then
    /// (section 5.2.5.2).
    pub(crate) fn cannot_flush(&self) -> bool {
        self.has_accepted(VIRTIO_BLK_F_CONFIG_WCE) && !self.has_accepted(VIRTIO_BLK_F_FLUSH)
    }

    /// Returns the value in the config space.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache.unwrap_or(!self.cannot_flush())
    }

    /// Returns whether writes have to be durable when they are answered (virtio 1.2, section
    /// 5.2.6.2).
    pub(crate) fn writes_through(&self) -> bool {
        if self.has_accepted(VIRTIO_BLK_F_CONFIG_WCE) {
            !self.write_cache()
        } else {
            !self.has_accepted(VIRTIO_BLK_F_FLUSH)
        }
    }

    /// Returns whether it is the connection for which a ring of `vm` is served.
    pub(crate) fn serves(&self, vm: usize, ring: usize) -> bool {
        self.vm == vm && !self.closed && self.rings[ring].served == Served::Yes
    }
}
