//! Medians, and how far the values lie about them: what a few repetitions can honestly say.
//!
//! Machines that share their cores drift by large factors within minutes, and they do so for
//! everybody. So two things are compared by the ratio of what was measured one right after the
//! other, and only then is the median of these ratios taken: [`Spread::of_ratios`].

/// The median of some values, the least and the greatest of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of `values`, if there are any; those that are not finite are left out.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }

    /// Of each pair's first value divided by its second. Pairs that were not measured together say
    /// nothing, and a pair with a 0 has no ratio.
    pub fn of_ratios(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        Self::of(pairs.into_iter().filter(|&(_, to)| to != 0.0).map(|(of, to)| of / to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, min: f64, max: f64) -> Option<Spread> {
        Some(Spread { median, min, max })
    }

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert_eq!(Spread::of([9.0, 1.0, 5.0]), spread(5.0, 1.0, 9.0));
        assert_eq!(Spread::of([9.0, 1.0, 5.0, 4.0]), spread(4.5, 1.0, 9.0));
        assert_eq!(Spread::of([3.0]), spread(3.0, 3.0, 3.0));
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN, 2.0, f64::INFINITY]), spread(2.0, 2.0, 2.0));
    }

    #[test]
    fn ratios_are_formed_pair_by_pair() {
        // The machine became four times slower in the middle: the ratio of the medians would be 1
        // divided by 4, while each pair says 2.
        let pairs = [(2.0, 1.0), (2.0, 1.0), (8.0, 4.0), (8.0, 4.0), (8.0, 4.0)];
        assert_eq!(Spread::of_ratios(pairs), spread(2.0, 2.0, 2.0));
        assert_eq!(Spread::of_ratios([(1.0, 0.0), (3.0, 2.0)]), spread(1.5, 1.5, 1.5));
        assert_eq!(Spread::of_ratios([(1.0, 0.0)]), None);
    }
}
