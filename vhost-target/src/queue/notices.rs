//! What a device passes on to the control side: what it wants, and what it has let go of.

use reactor::Events;

use super::core::{At, Core};
use super::fetch::Serve;
use super::{Control, Event, Leftover};
use crate::device_queue::{DeviceQueue, Notice};

/// The number of places in the ring that chains have taken. It wraps around.
#[derive(Debug, Default)]
pub(super) struct Places {
    taken: u32,
    /// That number when the view was adopted.
    before: u32,
}

impl Places {
    /// A view is adopted.
    pub(super) fn begin(&mut self) {
        self.before = self.taken;
    }

    /// Chains have taken places.
    #[inline]
    pub(super) fn take(&mut self, places: u16) {
        self.taken = self.taken.wrapping_add(places.into());
    }

    /// Returns whether all chains were taken that were available when the view was adopted: they
    /// had no more places than the ring has. A guest may make others available as fast as they are
    /// taken.
    fn have_passed(&self, size: u16) -> bool {
        self.taken.wrapping_sub(self.before) >= size.into()
    }
}

impl<D: DeviceQueue> Core<D> {
    /// Ends a visit of a device that is watching, and sends its notices.
    #[cold]
    pub(super) fn end_watched_visit<R: Serve>(
        &mut self,
        at: At<'_, R, D::View>,
        events: &Events<Event>,
    ) {
        let At { control, view, ring, .. } = at;
        let core = &mut self.ring;
        let none_follows = core.broken || core.stopping && core.resubmissions.is_empty();
        let all_taken = none_follows
            || core.resubmissions.is_empty()
                && (core.places.have_passed(view.ring.size())
                    || matches!(ring.pending(core.last_avail), Ok(0)));
        // The device may not know of a request that waits.
        let caught_up = all_taken && core.parked.is_empty();
        // A notice that waits to be sent has to be sent first.
        while core.pending_event.is_none() && self.device.is_watching() {
            let event = match self.device.visited(caught_up) {
                Some(Notice::Views) => Event::ViewsWanted(control.id),
                Some(Notice::Leftover(leftover)) => Event::Released(control.id, Leftover(leftover)),
                None => break,
            };
            core.send(event, events);
        }
    }

    /// Releases a removed device once it has no requests in flight.
    #[cold]
    pub(super) fn release_device(&mut self, control: &Control, events: &Events<Event>) {
        if self.ring.inflight == 0
            && self.ring.pending_event.is_none()
            && let Some(leftover) = self.device.release()
        {
            self.ring.send(Event::Released(control.id, Leftover(leftover)), events);
        }
    }
}
