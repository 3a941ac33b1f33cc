//! Histograms of latencies as `bdev_get_histogram` returns them, and their percentiles.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::number::to_f64;

/// Limits of SPDK's format, with which no shift below overflows.
const GRANULARITY_MAX: u32 = 24;
const RANGE_MAX: u32 = 64;

/// Counters of latencies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Histogram {
    granularity: u32,
    min_range: u32,
    ticks_per_s: u64,
    counts: Vec<u64>,
}

#[derive(Deserialize)]
struct Answer {
    histogram: String,
    granularity: u32,
    #[serde(default)]
    min_range: u32,
    tsc_rate: u64,
}

impl Histogram {
    /// Decodes an answer; `None` if it is not in SPDK's format.
    pub(crate) fn parse(answer: serde_json::Value) -> Option<Self> {
        let answer: Answer = serde_json::from_value(answer).ok()?;
        let bytes = STANDARD.decode(answer.histogram).ok()?;
        let (numbers, rest) = bytes.as_chunks::<8>();
        let valid = rest.is_empty()
            && answer.granularity <= GRANULARITY_MAX
            && answer.min_range <= RANGE_MAX - answer.granularity
            && answer.tsc_rate > 0;
        valid.then(|| Self {
            granularity: answer.granularity,
            min_range: answer.min_range,
            ticks_per_s: answer.tsc_rate,
            counts: numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect(),
        })
    }

    /// What was counted since `before`. If that one has other options or higher counters, the
    /// counting began anew after it.
    pub(crate) fn since(&self, before: Option<&Self>) -> Self {
        let same = |before: &&Self| {
            (before.granularity, before.min_range) == (self.granularity, self.min_range)
                && before.counts.len() == self.counts.len()
                && before.counts.iter().zip(&self.counts).all(|(before, now)| before <= now)
        };
        let mut since = self.clone();
        if let Some(before) = before.filter(same) {
            since.counts.iter_mut().zip(&before.counts).for_each(|(now, before)| *now -= before);
        }
        since
    }

    /// The latency below or at which this share of the I/Os completed; `None` without I/Os.
    pub(crate) fn percentile_us(&self, percent: f64) -> Option<f64> {
        let total = to_f64(self.counts.iter().fold(0, |sum, count| count.saturating_add(sum)));
        let mut below = 0;
        for (slot, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            below = count.saturating_add(below);
            if to_f64(below) >= total * percent / 100.0 {
                let ticks = self.middle(u64::try_from(slot).ok()?)?;
                return Some(to_f64(ticks) / to_f64(self.ticks_per_s) * 1e6);
            }
        }
        None
    }

    /// The middle of the latencies that a slot counts, in ticks.
    fn middle(&self, slot: u64) -> Option<u64> {
        let range = u64::from(self.min_range) + (slot >> self.granularity);
        let index = slot & ((1 << self.granularity) - 1);
        if range == 0 {
            return Some(index);
        }
        let shift = u32::try_from(range - 1).ok()?;
        let (first, width) = ((1 << self.granularity) + index, 1_u64.checked_shl(shift)?);
        Some(first.saturating_mul(width).saturating_add(width / 2))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A histogram of these latencies, by the formula of the format.
    pub(crate) fn of(granularity: u32, min_range: u32, latencies: &[u64]) -> Histogram {
        let slots = (65 - granularity - min_range) << granularity;
        let mut counts = vec![0_u64; usize::try_from(slots).unwrap()];
        for v in latencies {
            let range = (64 - granularity).saturating_sub(v.leading_zeros());
            let index = (v >> range.saturating_sub(1)) & ((1 << granularity) - 1);
            let slot = (u64::from(range - min_range) << granularity) + index;
            counts[usize::try_from(slot).unwrap()] += 1;
        }
        let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        let answer = json!({"histogram": STANDARD.encode(bytes), "granularity": granularity,
            "min_range": min_range, "max_range": 64 - granularity, "tsc_rate": 1_000_000});
        Histogram::parse(answer).unwrap()
    }

    #[test]
    fn percentiles_are_exact_to_the_granularity() {
        assert_eq!(of(7, 0, &[]).percentile_us(50.0), None);
        let all: Vec<u64> = (1..=1000).collect();
        for min_range in [0, 1] {
            let all = if min_range == 0 { &all[..] } else { &all[200..] };
            let histogram = of(7, min_range, all);
            for percent in [0.1, 50.0, 99.0, 100.0] {
                let at = percent / 100.0 * to_f64(all.len() as u64);
                let exact = to_f64(all[0]) - 1.0 + at;
                let shown = histogram.percentile_us(percent).unwrap();
                assert!((shown - exact).abs() <= 0.01 * exact + 1.0, "{percent}: {shown} {exact}");
            }
        }
        assert!(of(7, 0, &[u64::MAX]).percentile_us(99.0).unwrap() > 1e19);
    }

    #[test]
    fn differences_begin_anew_when_counters_fall() {
        let (one, two, other) = (of(7, 0, &[5]), of(7, 0, &[5, 900]), of(7, 0, &[900]));
        let p50 = |histogram: Histogram| histogram.percentile_us(50.0).unwrap();
        assert!(p50(two.since(Some(&one))) > 800.0);
        assert!(p50(other.since(Some(&one))) > 800.0, "the counter of 5 has fallen");
        assert_eq!(p50(one.since(Some(&of(3, 0, &[5])))), 5.0);
        assert_eq!(p50(one.since(None)), 5.0);
        assert_eq!(two.since(Some(&two)).percentile_us(50.0), None);
    }

    #[test]
    fn other_formats_are_refused() {
        let good = json!({"histogram": "", "granularity": 7, "min_range": 0, "tsc_rate": 1});
        assert!(Histogram::parse(good.clone()).is_some());
        let wrong = [
            ("histogram", json!("AAAA")),
            ("granularity", json!(60)),
            ("min_range", json!(60)),
            ("tsc_rate", json!(0)),
            ("tsc_rate", json!(-1)),
        ];
        for (key, value) in wrong {
            let mut answer = good.clone();
            answer[key] = value;
            assert_eq!(Histogram::parse(answer), None, "{key}");
        }
    }
}
