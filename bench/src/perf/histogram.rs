//! Distributions of latencies: a fixed table during the measurement, an HDR histogram afterwards.

use hdrhistogram::Histogram;

/// Each power of two is divided into 2^CELL_BITS cells: values have a relative error of at most
/// 1/128.
const CELL_BITS: u32 = 7;
const CELLS: usize = 1 << CELL_BITS;
/// Values of 2^VALUE_BITS and more share the last cell. 2^44 ticks are more than an hour.
const VALUE_BITS: u32 = 44;
/// One row of cells for the values below `CELLS`, and one row for each larger power of two.
const ROWS: usize = (VALUE_BITS - CELL_BITS + 1) as usize;

/// Counts values in cells whose width grows with the value. Recording takes about ten instructions.
#[derive(Clone, Debug)]
pub struct Counts {
    cells: Box<[u64]>,
    total: u64,
    sum: u128,
    min: u64,
    max: u64,
}

impl Default for Counts {
    fn default() -> Self {
        let cells = vec![0; ROWS * CELLS].into_boxed_slice();
        Self { cells, total: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

impl Counts {
    /// Counts `value`, `times` times.
    #[inline]
    pub fn record(&mut self, value: u64, times: u64) {
        self.cells[cell(value)] += times;
        self.total += times;
        self.sum += u128::from(value) * u128::from(times);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// The number of values.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Removes all values.
    pub fn clear(&mut self) {
        self.cells.fill(0);
        (self.total, self.sum, self.min, self.max) = (0, 0, u64::MAX, 0);
    }

    /// Adds the values of `other`.
    pub fn add(&mut self, other: &Self) {
        self.cells.iter_mut().zip(&other.cells).for_each(|(sum, more)| *sum += more);
        self.total += other.total;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The distribution of the values, converted by `scale`.
    #[must_use]
    pub fn distribution(&self, scale: impl Fn(u64) -> u64) -> Distribution {
        let mut values = Histogram::new(3).expect("three digits are allowed");
        for (index, &times) in self.cells.iter().enumerate().filter(|(_, times)| **times > 0) {
            // The middle of the cell, within the range of the recorded values.
            let value = middle(index).clamp(self.min, self.max);
            values.record_n(scale(value), times).expect("it grows with its values");
        }
        // `scale` rounds to integers. Scaling the sum gives a mean with a fraction.
        let mean = match u64::try_from(self.sum) {
            Ok(sum) => scale(sum) as f64 / self.total.max(1) as f64,
            Err(_) => {
                let mean = self.sum / u128::from(self.total);
                scale(u64::try_from(mean).unwrap_or(u64::MAX)) as f64
            }
        };
        let min = if self.total == 0 { 0 } else { scale(self.min) };
        Distribution { values, min, mean, max: scale(self.max) }
    }
}

/// A distribution: an HDR histogram with three digits, and the exact extremes and mean.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// The values, with three digits.
    pub values: Histogram<u64>,
    /// The smallest value. 0 if there are no values.
    pub min: u64,
    /// The mean. 0 if there are no values.
    pub mean: f64,
    /// The largest value. 0 if there are no values.
    pub max: u64,
}

impl Distribution {
    /// The value that `percent` of all values do not exceed.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> u64 {
        if self.values.is_empty() {
            return 0;
        }
        self.values.value_at_percentile(percent).clamp(self.min, self.max)
    }
}

/// The index of the cell of `value`. Its eight highest bits select the cell in the row; the number
/// of lower bits selects the row.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "`value >> shift` has eight bits")]
fn cell(value: u64) -> usize {
    let shift = 63 - CELL_BITS - (value | (2 * CELLS as u64 - 1)).leading_zeros();
    let at = (value >> shift) as usize + shift as usize * CELLS;
    at.min(ROWS * CELLS - 1)
}

/// The middle of the values of cell `index`.
fn middle(index: usize) -> u64 {
    let shift = (index / CELLS).saturating_sub(1);
    let low = (index - shift * CELLS) as u64;
    (low << shift) + (1 << shift >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_counted_in_a_cell_around_it() {
        let mut last = 0;
        let steps = (0..1 << 12).chain(
            (12..VALUE_BITS)
                .flat_map(|bit| (0..400).map(move |i| (1_u64 << bit) + i * (1 << bit) / 400)),
        );
        for value in steps {
            let index = cell(value);
            assert!(index >= last, "{value}: cells follow one another");
            last = index;
            let off = middle(index).abs_diff(value) as f64;
            assert!(off <= value as f64 / 256.0, "{value} is counted as {}", middle(index));
        }
        assert_eq!(last, ROWS * CELLS - 1);
        assert_eq!(cell(u64::MAX), ROWS * CELLS - 1);
        assert_eq!((0..300).map(|v| middle(cell(v))).filter(|m| *m < 256).count(), 256);
    }

    #[test]
    fn a_distribution_has_the_values_percentiles() {
        let mut counts = Counts::default();
        let mut other = Counts::default();
        for value in 1..=100_000_u64 {
            if value % 2 == 0 { counts.record(value, 1) } else { other.record(value, 1) }
        }
        counts.add(&other);
        let scaled = counts.distribution(|v| 10 * v);
        for (percent, true_value) in [(50.0, 500_000.0), (99.0, 990_000.0), (99.99, 999_900.0)] {
            let off = scaled.percentile(percent) as f64 / true_value - 1.0;
            assert!(off.abs() < 0.006, "{percent}: {}", scaled.percentile(percent));
        }
        assert_eq!((scaled.min, scaled.max, counts.total()), (10, 1_000_000, 100_000));
        assert!((scaled.mean - 500_005.0).abs() < 1e-6, "{}", scaled.mean);
        assert_eq!(scaled.percentile(100.0), scaled.max);
    }

    #[test]
    fn an_empty_distribution_is_zero_and_clear_removes_all() {
        let mut counts = Counts::default();
        counts.record(5, 3);
        assert_eq!(counts.distribution(|v| v).percentile(50.0), 5);
        counts.clear();
        let empty = counts.distribution(|v| v);
        assert_eq!((empty.min, empty.max, empty.percentile(99.0), counts.total()), (0, 0, 0, 0));
        assert_eq!(empty.mean, 0.0);
    }
}
