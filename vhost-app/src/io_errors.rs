//! Logs I/O errors of bdevs. Reactors count them with the bdev's statistics; the control thread
//! reads the counts once a second.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev::Bdev;
use tracing::error;

/// The shortest interval between two log lines about one bdev.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The time of each bdev's last log line, by name.
#[derive(Debug, Default)]
pub(crate) struct IoErrors(HashMap<String, Instant>);

impl IoErrors {
    /// Logs the I/O errors of `bdevs`: at most one line for each bdev in [`LINE_EVERY`].
    pub(crate) fn log(&mut self, bdevs: &[Arc<dyn Bdev>], now: Instant) {
        for line in self.lines(bdevs, now) {
            error!("{line}");
        }
    }

    fn lines(&mut self, bdevs: &[Arc<dyn Bdev>], now: Instant) -> Vec<String> {
        self.0.retain(|_, last| now.saturating_duration_since(*last) < LINE_EVERY);
        let mut lines = vec![];
        for bdev in bdevs {
            let name = bdev.name();
            if self.0.contains_key(name) {
                continue;
            }
            let Some((first, count)) = bdev.stats().report_failures() else { continue };
            lines.push(match count {
                1 => format!("bdev {name}: {first}"),
                _ => format!("bdev {name}: {first}; {count} I/Os failed since the last report"),
            });
            self.0.insert(name.to_owned(), now);
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdev::{Failure, FailureKind, Null, NullOptions, Op, QosUser};

    #[test]
    fn a_bdev_has_a_line_at_once_and_then_one_per_interval() {
        let null = |name: &str| {
            let options =
                NullOptions { name: name.into(), num_blocks: 8, block_size: 512, uuid: None };
            Null::create(options).unwrap() as Arc<dyn Bdev>
        };
        let bdevs = [null("a"), null("b")];
        let users = bdevs.each_ref().map(|bdev| bdev.stats().attach(QosUser::new(0)));
        let fail = |n: usize, offset| {
            let (kind, op, len) = (FailureKind::Failed, Op::Write, 512);
            let failure = Failure { kind, op, offset: Some(offset), len, errno: libc::EIO };
            users[n].record_failure(1, &failure);
        };
        let (mut errors, begun) = (IoErrors::default(), Instant::now());
        let mut at = |second: u64| errors.lines(&bdevs, begun + Duration::from_secs(second));
        let line = |name, offset, more| {
            let why = "Input/output error (os error 5)";
            format!("bdev {name}: write of 512 bytes at offset {offset}: {why}{more}")
        };
        assert_eq!(at(0), [""; 0]);
        fail(0, 1);
        assert_eq!(at(1), [line("a", 1, "")]);
        (2..5).for_each(|offset| fail(0, offset));
        fail(1, 9);
        assert_eq!(at(2), [line("b", 9, "")], "each has its own");
        assert_eq!(at(10), [""; 0]);
        let more = "; 3 I/Os failed since the last report";
        assert_eq!(at(11), [line("a", 2, more)]);
        assert_eq!(at(30), [""; 0], "nothing has failed since");
    }
}
