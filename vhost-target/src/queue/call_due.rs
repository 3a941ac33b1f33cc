//! Coalescing: when the guest may be notified of completions next.

use std::sync::atomic::Ordering;

use reactor::Iteration;

use super::Coalescing;

/// The state of coalescing: when the next notification may be sent.
#[derive(Debug, Default)]
pub(super) struct CallDue {
    /// There are completions of which the guest may not have been notified.
    pub(super) pending: bool,
    pub(super) not_before_ticks: u64,
    delay_ticks: u64,
    window_end_ticks: u64,
    pub(super) window_requests: u32,
}

impl CallDue {
    /// Returns whether the notification has to wait. SPDK's rule: every 10 ms, if there were more
    /// requests than the threshold, the delay becomes the base times the excess over the threshold.
    #[inline]
    pub(super) fn wait(&mut self, coalescing: &Coalescing, iteration: &mut Iteration) -> bool {
        let base = coalescing.delay_base_ticks.load(Ordering::Relaxed);
        if base == 0 {
            self.window_requests = 0;
            return false;
        }
        let now = iteration.now_ticks();
        if now >= self.window_end_ticks {
            let threshold = coalescing.threshold.load(Ordering::Relaxed).max(1);
            let excess = u64::from(self.window_requests.saturating_sub(threshold));
            self.delay_ticks = base.saturating_mul(excess) / u64::from(threshold);
            self.window_requests = 0;
            self.window_end_ticks = now + iteration.ticks_per_second() / 100;
        }
        if now < self.not_before_ticks {
            return true;
        }
        self.not_before_ticks = now + self.delay_ticks;
        false
    }
}
