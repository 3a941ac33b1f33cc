//! The bdev that a queue has opened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::{
    BdevChannel, Channel, Counters, Failure, FailureKind, Limiting, Op, Shortcut, Status, Tag,
};
use reactor::Wait;

use crate::user::User;

/// The length of a slice of a rate limit: throttled I/O is submitted again after this time.
const SLICE: Duration = Duration::from_millis(1);

/// A bdev that a queue has opened.
pub struct Opened {
    /// The shortcut of `channel`. Renewed by `set_limiting`, valid until the channel is closed.
    pub shortcut: Shortcut,
    /// Rate limits apply to the channel's I/O.
    pub limited: bool,
    /// In a box, so that it can be released without an allocation.
    pub channel: Box<BdevChannel>,
    /// The counters of this user.
    pub counters: Arc<Counters>,
}

impl Opened {
    /// Opens a bdev for a queue with at most `depth` requests in flight.
    ///
    /// # Errors
    /// The bdev cannot be opened.
    pub fn open(user: &User, depth: u16) -> Result<Self, bdev::Error> {
        let channel = Box::new(BdevChannel::open(user.bdev(), depth)?);
        let (shortcut, counters) = (channel.shortcut(), user.bdev().stats().attach(user.id()));
        Ok(Self { shortcut, limited: false, channel, counters })
    }

    /// Applies or ends rate limits of the channel's I/O.
    #[cold]
    pub fn set_limiting(&mut self, limiting: Limiting, limited: bool) {
        self.channel.set_limiting(limiting);
        self.shortcut = self.channel.shortcut();
        self.limited = limited;
    }

    /// Returns how the owner waits for the next visit, while `queued` I/Os are in the channel and
    /// `throttled` ones wait for a rate limit.
    pub fn wait(&self, queued: usize, throttled: usize) -> Wait {
        let wait = match self.channel.wait() {
            _ if queued == 0 => Wait::Event,
            bdev::Wait::Poll => Wait::Poll,
            bdev::Wait::Event => Wait::Event,
            bdev::Wait::Until(until) => Wait::Until(until),
        };
        if throttled == 0 { wait } else { wait.sooner(Wait::Until(Instant::now() + SLICE)) }
    }

    /// Records the reason of a failure for the control side, which logs it. Returns it.
    #[cold]
    #[inline(never)]
    pub fn count_failure(
        &mut self,
        (tag, op, len): (u16, Op, u64),
        ticks: u64,
        status: Status,
    ) -> Failure {
        let unsupported = status == Status::Unsupported;
        let errno = if unsupported { libc::EOPNOTSUPP } else { libc::EIO };
        let unknown = Failure { kind: FailureKind::Failed, op, offset: None, len, errno };
        let failure = self.channel.failure(Tag(tag)).unwrap_or(unknown);
        self.counters.record_failure(ticks, &failure);
        failure
    }
}
