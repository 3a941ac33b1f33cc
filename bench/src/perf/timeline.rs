//! Completions over time, and the longest times without completions.

/// Number of gaps that are kept, longest first.
const LONGEST: usize = 10;

/// A time in which a queue with requests in flight completed none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// Its start, in ticks.
    pub from: u64,
    /// Its length, in ticks.
    pub length: u64,
}

/// One bucket of the time line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Requests that completed in it.
    pub completed: u64,
    /// The longest gap that overlaps it, in ticks.
    pub longest_gap: u64,
}

/// A time line of buckets of equal width. All buckets are allocated at the start; recording usually
/// costs two comparisons.
#[derive(Clone, Debug)]
pub struct Timeline {
    start: u64,
    width: u64,
    buckets: Vec<Bucket>,
    at: usize,
    /// The end of bucket `at`.
    end: u64,
    gaps: [Gap; LONGEST],
    /// Gaps up to this length change neither the bucket nor `gaps`.
    threshold: u64,
}

impl Timeline {
    /// `count` buckets of `width` ticks from `start`. Later completions count in the last bucket.
    ///
    /// # Panics
    /// `count` or `width` is 0.
    #[must_use]
    pub fn new(start: u64, width: u64, count: usize) -> Self {
        assert!(width > 0 && count > 0, "there is a bucket, and it has a width");
        let mut timeline = Self {
            start,
            width,
            buckets: vec![Bucket::default(); count],
            at: 0,
            end: 0,
            gaps: [Gap::default(); LONGEST],
            threshold: 0,
        };
        timeline.enter(0);
        timeline
    }

    /// The same buckets without contents.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self::new(self.start, self.width, self.buckets.len())
    }

    /// The start of the first bucket.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Records that `completed` requests of a queue completed at `now`, and the ones before at
    /// `last`.
    #[inline]
    pub fn note(&mut self, now: u64, last: u64, completed: u64) {
        if now >= self.end {
            self.enter(self.index(now));
        }
        self.buckets[self.at].completed += completed;
        let length = now.saturating_sub(last);
        if length > self.threshold {
            self.note_gap(Gap { from: last, length });
        }
    }

    /// Adds the contents of another time line with the same buckets.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.buckets.iter_mut().zip(&other.buckets) {
            sum.completed += more.completed;
            sum.longest_gap = sum.longest_gap.max(more.longest_gap);
        }
        self.at = self.at.max(other.at);
        other.gaps.iter().for_each(|&gap| self.keep(gap));
    }

    /// The buckets up to the last one with contents, and their width in ticks.
    #[must_use]
    pub fn buckets(&self) -> (&[Bucket], u64) {
        (&self.buckets[..=self.at], self.width)
    }

    /// The longest gaps, at most ten, longest first.
    pub fn longest_gaps(&self) -> impl Iterator<Item = Gap> {
        self.gaps.into_iter().filter(|gap| gap.length > 0)
    }

    fn index(&self, now: u64) -> usize {
        let index = now.saturating_sub(self.start) / self.width;
        usize::try_from(index).unwrap_or(usize::MAX).min(self.buckets.len() - 1)
    }

    fn enter(&mut self, index: usize) {
        self.at = index;
        self.end = self.start + (index as u64 + 1) * self.width;
        self.set_threshold();
    }

    #[cold]
    fn note_gap(&mut self, gap: Gap) {
        let (from, to) = (self.index(gap.from), self.index(gap.from + gap.length));
        for bucket in &mut self.buckets[from..=to] {
            bucket.longest_gap = bucket.longest_gap.max(gap.length);
        }
        self.keep(gap);
        self.set_threshold();
    }

    fn keep(&mut self, gap: Gap) {
        let place = self.gaps.partition_point(|kept| kept.length >= gap.length);
        if place < LONGEST {
            self.gaps[place..].rotate_right(1);
            self.gaps[place] = gap;
        }
    }

    fn set_threshold(&mut self) {
        self.threshold = self.buckets[self.at].longest_gap.min(self.gaps[LONGEST - 1].length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(timeline: &Timeline) -> Vec<u64> {
        timeline.longest_gaps().map(|gap| gap.length).collect()
    }

    #[test]
    fn completions_count_where_they_fall_and_late_ones_in_the_last() {
        let mut timeline = Timeline::new(1000, 100, 4);
        timeline.note(1001, 1000, 5);
        timeline.note(1099, 1098, 1);
        timeline.note(1100, 1099, 2);
        timeline.note(1350, 1349, 3);
        let counts = |t: &Timeline| t.buckets().0.iter().map(|b| b.completed).collect::<Vec<_>>();
        assert_eq!(counts(&timeline), [6, 2, 0, 3]);
        timeline.note(9999, 9998, 4);
        assert_eq!(counts(&timeline), [6, 2, 0, 7]);
    }

    #[test]
    fn a_gap_counts_in_each_bucket_that_it_overlaps() {
        let mut timeline = Timeline::new(0, 100, 5);
        timeline.note(10, 0, 1);
        timeline.note(350, 150, 1);
        timeline.note(380, 350, 1);
        let gaps: Vec<_> = timeline.buckets().0.iter().map(|b| b.longest_gap).collect();
        assert_eq!(gaps, [10, 200, 200, 200]);
        assert_eq!(lengths(&timeline), [200, 30, 10]);
        assert_eq!(timeline.longest_gaps().next(), Some(Gap { from: 150, length: 200 }));
    }

    #[test]
    fn the_ten_longest_are_kept_in_order() {
        let mut timeline = Timeline::new(0, 1 << 20, 1);
        let mut now = 0;
        for length in [5, 3, 9, 1, 12, 7, 2, 8, 4, 11, 6, 10] {
            timeline.note(now + length, now, 1);
            now += length;
        }
        assert_eq!(lengths(&timeline), [12, 11, 10, 9, 8, 7, 6, 5, 4, 3]);
        let mut other = Timeline::new(0, 1 << 20, 1);
        other.note(100, 0, 7);
        other.add(&timeline);
        assert_eq!(lengths(&other), [100, 12, 11, 10, 9, 8, 7, 6, 5, 4]);
        assert_eq!(other.buckets().0, [Bucket { completed: 19, longest_gap: 100 }]);
    }
}
