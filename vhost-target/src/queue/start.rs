//! Where a new queue begins.

use virtqueue::AnyRing;
use virtqueue::inflight::{Recovery, Tracker};

use super::{StartError, Tracked};

/// Returns where a queue begins and what it resubmits, according to its ring and to the record of
/// the requests in flight.
pub(super) fn begin(
    ring: &AnyRing,
    base: u16,
    tracked: Option<Tracked<'_>>,
) -> Result<(Option<Tracker>, Recovery), StartError> {
    let size = ring.size();
    let untracked = |at| (None, Recovery { used: at, last_avail: at, ..Recovery::default() });
    let tracker = match (ring, tracked) {
        // The queue starts at the ring's used index, which the guest reads, and not at `base`. A
        // front end that reconnects sends as `base` the used index that it saw when the connection
        // ended: requests that completed after that would be fetched and completed again.
        (AnyRing::Split(ring), None) => return Ok(untracked(ring.used_idx())),
        (AnyRing::Packed(ring), _) if !ring.valid(base) => return Err(StartError::Base(base)),
        (AnyRing::Packed(_), None) => return Ok(untracked(base)),
        (AnyRing::Split(ring), Some(Tracked { area, ring: n })) => {
            Tracker::split(area, n, size, ring.used_idx())
        }
        (AnyRing::Packed(ring), Some(Tracked { area, ring: n })) => {
            Tracker::packed(area, n, size, base, |position| ring.flags(position))
        }
    };
    let (tracker, recovery) = tracker.ok_or(StartError::NoRoom)?;
    if let Some(damage) = recovery.damage {
        tracing::warn!("{damage}");
    }
    if let AnyRing::Packed(ring) = ring {
        ring.take_back(recovery.used, recovery.last_avail);
    }
    Ok((Some(tracker), recovery))
}
