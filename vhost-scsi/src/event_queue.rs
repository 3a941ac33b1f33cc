//! The event queue (virtio 1.2, section 5.6.6.3): buffers stay in the ring until there is an event.
#![expect(unsafe_code, reason = "writes guest memory")]

use std::sync::Arc;

use bdev::memory;
use reactor::Iteration;
use vhost_target::device_queue::{Answer, DeviceQueue, Progress, Request};
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_EVT_RESET_REMOVED, VIRTIO_SCSI_EVT_RESET_RESCAN, VIRTIO_SCSI_T_EVENTS_MISSED,
    VIRTIO_SCSI_T_NO_EVENT, VIRTIO_SCSI_T_PARAM_CHANGE, VIRTIO_SCSI_T_TRANSPORT_RESET,
};
use virtqueue::chain::Chain;

use crate::session::{Event, Session};
use crate::view::ScsiView;
use crate::wire::{self, EVENT_BYTES};

/// CAPACITY DATA HAS CHANGED: additional sense code, and qualifier in the second byte.
const CAPACITY_CHANGED: u32 = 0x092a;

/// Bytes of an event, for the used ring.
#[expect(clippy::cast_possible_truncation, reason = "16 bytes")]
const WRITTEN: u32 = EVENT_BYTES as u32;

/// The device of an event queue.
#[derive(Default)]
pub(crate) struct EventQueue {
    session: Option<Arc<Session>>,
    released: bool,
}

impl std::fmt::Debug for EventQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventQueue")
    }
}

impl EventQueue {
    fn next(&self) -> [u8; EVENT_BYTES] {
        match self.session.as_ref().and_then(|session| session.events.take()) {
            Some((Event::Removed, target)) => {
                let reason = VIRTIO_SCSI_EVT_RESET_REMOVED;
                wire::event(VIRTIO_SCSI_T_TRANSPORT_RESET, Some(target), reason)
            }
            Some((Event::Added, target)) => {
                let reason = VIRTIO_SCSI_EVT_RESET_RESCAN;
                wire::event(VIRTIO_SCSI_T_TRANSPORT_RESET, Some(target), reason)
            }
            Some((Event::Resized, target)) => {
                wire::event(VIRTIO_SCSI_T_PARAM_CHANGE, Some(target), CAPACITY_CHANGED)
            }
            // A resubmitted buffer: the events since an earlier process took it are lost.
            None => wire::event(VIRTIO_SCSI_T_NO_EVENT | VIRTIO_SCSI_T_EVENTS_MISSED, None, 0),
        }
    }
}

impl DeviceQueue for EventQueue {
    type Request = ();
    type View = ScsiView;

    const SELECTIVE: bool = true;

    fn refuse(_: &mut Chain) -> Answer {
        Answer { last_byte: None, written: 0, dirty: 0 }
    }

    fn start<R: Request<Self>>(&mut self, _: &ScsiView, mut request: R, _: bool) -> Progress {
        let (_, chain) = request.parts();
        let of_chain = chain.parts();
        let totals = *of_chain.totals;
        if totals.malformed || totals.writable_bytes() < EVENT_BYTES as u64 {
            // The event stays for the next buffer.
            request.count_error();
            return request.finish(Answer { last_byte: None, written: 0, dirty: 0 });
        }
        let event = self.next();
        let segments = &of_chain.segments[totals.readable..totals.count];
        // SAFETY: the segments are guest memory that stays mapped while the chain is in use.
        unsafe { memory::scatter(segments, 0, event.as_ptr(), EVENT_BYTES) };
        request.finish(Answer { last_byte: None, written: WRITTEN, dirty: WRITTEN.into() })
    }

    fn retry<R: Request<Self>>(&mut self, request: R) -> Progress {
        request.finish(Answer { last_byte: None, written: 0, dirty: 0 })
    }

    fn adopted(&mut self, view: Option<&ScsiView>) {
        if self.session.is_none() {
            self.session = view.map(|view| Arc::clone(view.session()));
        }
    }

    fn wants_requests(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.events.any())
    }

    fn poll(&mut self, _: &mut Iteration) -> usize {
        0
    }

    fn progressed(&self, _: usize) -> u16 {
        0
    }

    fn advance<R: Request<Self>>(&mut self, _: usize, request: R) -> Progress {
        request.keep()
    }

    fn discard<R: Request<Self>>(&mut self, _: usize, _: &mut R) {}

    fn is_open(&self) -> bool {
        !self.released
    }

    /// Nothing is to be dropped.
    fn release(&mut self) -> Option<Box<dyn Send>> {
        self.released = true;
        None
    }
}
