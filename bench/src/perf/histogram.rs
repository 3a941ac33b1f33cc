//! Latencies by the million: counted in a fixed table while they come, in an HDR histogram after.

use hdrhistogram::Histogram;

/// Cells that each power of two is divided into, as a power of two: values are known to 1/128.
const CELL_BITS: u32 = 7;
const CELLS: usize = 1 << CELL_BITS;
/// Values from here on share the last cell: 2^44 ticks are an hour and more on any processor.
const VALUE_BITS: u32 = 44;
/// One row of cells for the values below `CELLS`, and one for each power of two above.
const ROWS: usize = (VALUE_BITS - CELL_BITS + 1) as usize;

/// Counts values in cells whose width grows with the value. Recording costs some ten instructions.
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

    /// How many values there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Forgets all values.
    pub fn clear(&mut self) {
        self.cells.fill(0);
        (self.total, self.sum, self.min, self.max) = (0, 0, u64::MAX, 0);
    }

    /// Adds what `other` has counted.
    pub fn add(&mut self, other: &Self) {
        self.cells.iter_mut().zip(&other.cells).for_each(|(sum, more)| *sum += more);
        self.total += other.total;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// What was counted, in the unit that `scale` turns values into.
    #[must_use]
    pub fn distribution(&self, scale: impl Fn(u64) -> u64) -> Distribution {
        let mut values = Histogram::new(3).expect("three digits are allowed");
        for (index, &times) in self.cells.iter().enumerate().filter(|(_, times)| **times > 0) {
            // A cell's middle, but nothing that lies outside of what was seen.
            let value = middle(index).clamp(self.min, self.max);
            values.record_n(scale(value), times).expect("it grows with its values");
        }
        // A mean with a fraction, though `scale` knows none: that of a sum is small enough.
        let mean = match u64::try_from(self.sum) {
            Ok(sum) => scale(sum) as f64 / self.total.max(1) as f64,
            Err(_) => scale((self.sum / u128::from(self.total)) as u64) as f64,
        };
        let min = if self.total == 0 { 0 } else { scale(self.min) };
        Distribution { values, min, mean, max: scale(self.max) }
    }
}

/// What was counted, as an HDR histogram, and exactly where that only knows three digits.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// Each value to three digits.
    pub values: Histogram<u64>,
    /// The smallest one, or 0 if there is none.
    pub min: u64,
    /// The mean, or 0.
    pub mean: f64,
    /// The greatest one, or 0.
    pub max: u64,
}

impl Distribution {
    /// The value that `percent` of all values are not above.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> u64 {
        if self.values.is_empty() {
            return 0;
        }
        self.values.value_at_percentile(percent).clamp(self.min, self.max)
    }
}

/// Where `value` is counted: its eight highest bits say which cell, the number of those below how
/// wide it is.
#[inline]
fn cell(value: u64) -> usize {
    let shift = 63 - CELL_BITS - (value | (2 * CELLS as u64 - 1)).leading_zeros();
    let at = (value >> shift) as usize + shift as usize * CELLS;
    at.min(ROWS * CELLS - 1)
}

/// The middle of the values that cell `index` counts.
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
        let told = counts.distribution(|v| 10 * v);
        for (percent, true_value) in [(50.0, 500_000.0), (99.0, 990_000.0), (99.99, 999_900.0)] {
            let off = told.percentile(percent) as f64 / true_value - 1.0;
            assert!(off.abs() < 0.006, "{percent}: {}", told.percentile(percent));
        }
        assert_eq!((told.min, told.max, counts.total()), (10, 1_000_000, 100_000));
        assert!((told.mean - 500_005.0).abs() < 1e-6, "{}", told.mean);
        assert_eq!(told.percentile(100.0), told.max);
    }

    #[test]
    fn nothing_is_zero_and_clear_forgets() {
        let mut counts = Counts::default();
        counts.record(5, 3);
        assert_eq!(counts.distribution(|v| v).percentile(50.0), 5);
        counts.clear();
        let told = counts.distribution(|v| v);
        assert_eq!((told.min, told.max, told.percentile(99.0), counts.total()), (0, 0, 0, 0));
        assert_eq!(told.mean, 0.0);
    }
}
