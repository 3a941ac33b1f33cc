//! The columns of both tables: their text, and the order of controllers by them.

use std::cmp::Ordering;

use crate::number::{count, to_f64, whole};
use crate::view::{ControllerRow, ReactorRow};

/// A column of the controllers' table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    Name,
    State,
    Iops,
    Reads,
    Writes,
    ReadMib,
    WriteMib,
    Latency,
    P50,
    P99,
    Inflight,
    Errors,
    Throttled,
    Quarantined,
    Queues,
    Bdev,
}

/// What a column is sorted by.
enum Key<'a> {
    Text(&'a str),
    Number(Option<f64>),
}

impl Column {
    /// All, from left to right.
    pub(crate) const ALL: [Self; 16] = [
        Self::Name,
        Self::State,
        Self::Iops,
        Self::Reads,
        Self::Writes,
        Self::ReadMib,
        Self::WriteMib,
        Self::Latency,
        Self::P50,
        Self::P99,
        Self::Inflight,
        Self::Errors,
        Self::Throttled,
        Self::Quarantined,
        Self::Queues,
        Self::Bdev,
    ];

    /// Its heading.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Name => "CONTROLLER",
            Self::State => "STATE",
            Self::Iops => "IOPS",
            Self::Reads => "R/s",
            Self::Writes => "W/s",
            Self::ReadMib => "RMiB/s",
            Self::WriteMib => "WMiB/s",
            Self::Latency => "LATus",
            Self::P50 => "P50us",
            Self::P99 => "P99us",
            Self::Inflight => "INFL",
            Self::Errors => "ERR/s",
            Self::Throttled => "THR/s",
            Self::Quarantined => "QUARANT",
            Self::Queues => "QUEUES",
            Self::Bdev => "BDEV",
        }
    }

    /// Whether it is aligned to the left, and sorted from A to Z.
    pub(crate) fn is_text(self) -> bool {
        matches!(self, Self::Name | Self::State | Self::Queues | Self::Bdev)
    }

    /// The limits on its width: numbers do not move when they change, and a long name leaves room.
    pub(crate) fn widths(self) -> (usize, usize) {
        match self {
            Self::Name => (10, 32),
            Self::State => (7, 11),
            Self::Queues | Self::Bdev => (6, 32),
            Self::Inflight => (4, 7),
            _ => (5, 8),
        }
    }

    /// The text in a row.
    pub(crate) fn text(self, row: &ControllerRow) -> String {
        let mib = |bytes: Option<f64>| bytes.map(|bytes| bytes / f64::from(1 << 20));
        match self {
            Self::Name => plain(&row.name),
            Self::State => states(&row.states),
            Self::Iops => rate(row.rates.iops),
            Self::Reads => rate(row.rates.read_iops),
            Self::Writes => rate(row.rates.write_iops),
            Self::ReadMib => rate(mib(row.rates.read_bytes_per_s)),
            Self::WriteMib => rate(mib(row.rates.write_bytes_per_s)),
            Self::Latency => rate(row.latency_us),
            Self::P50 => rate(row.latency_p50_us),
            Self::P99 => rate(row.latency_p99_us),
            Self::Inflight => whole(row.inflight),
            Self::Errors => rate(row.rates.errors_per_s),
            Self::Throttled => rate(row.rates.throttled_per_s),
            Self::Quarantined => crate::number::bytes(row.quarantined_bytes).replace(' ', ""),
            Self::Queues => queues(row),
            Self::Bdev => row.bdev.as_deref().map_or_else(|| "-".to_owned(), plain),
        }
    }

    fn key(self, row: &ControllerRow) -> Key<'_> {
        match self {
            Self::Name => Key::Text(&row.name),
            Self::State => Key::Text(row.states.first().map_or("", String::as_str)),
            Self::Iops => Key::Number(row.rates.iops),
            Self::Reads => Key::Number(row.rates.read_iops),
            Self::Writes => Key::Number(row.rates.write_iops),
            Self::ReadMib => Key::Number(row.rates.read_bytes_per_s),
            Self::WriteMib => Key::Number(row.rates.write_bytes_per_s),
            Self::Latency => Key::Number(row.latency_us),
            Self::P50 => Key::Number(row.latency_p50_us),
            Self::P99 => Key::Number(row.latency_p99_us),
            Self::Inflight => Key::Number(Some(to_f64(row.inflight))),
            Self::Errors => Key::Number(row.rates.errors_per_s),
            Self::Throttled => Key::Number(row.rates.throttled_per_s),
            Self::Quarantined => Key::Number(Some(to_f64(row.quarantined_bytes))),
            Self::Queues => {
                let queues = row.queues.iter().map(|place| place.count as u64).sum();
                Key::Number(Some(to_f64(queues)))
            }
            Self::Bdev => Key::Text(row.bdev.as_deref().unwrap_or("")),
        }
    }

    fn compare(self, a: &ControllerRow, b: &ControllerRow) -> Ordering {
        match (self.key(a), self.key(b)) {
            (Key::Text(a), Key::Text(b)) => a.cmp(b),
            // The largest first, and rows without a value last.
            (Key::Number(a), Key::Number(b)) => b.unwrap_or(-1.0).total_cmp(&a.unwrap_or(-1.0)),
            _ => Ordering::Equal,
        }
    }
}

/// The order of the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sort {
    pub(crate) column: Column,
    pub(crate) reversed: bool,
}

impl Sort {
    /// The most active first.
    pub(crate) const DEFAULT: Self = Self { column: Column::Iops, reversed: false };

    /// By the column that is `steps` to the right.
    pub(crate) fn step(&mut self, steps: isize) {
        let all = Column::ALL;
        let at = all.iter().position(|column| *column == self.column).unwrap_or(0);
        let by = usize::try_from(steps.rem_euclid(all.len().cast_signed())).unwrap_or(0);
        self.column = all[(at + by) % all.len()];
    }

    /// Whether the column's values fall from top to bottom.
    pub(crate) fn descends(self) -> bool {
        let ascends = matches!(self.column, Column::Name | Column::State | Column::Bdev);
        ascends == self.reversed
    }

    /// The controllers whose names contain `filter` in any case, in this order. Those that are equal
    /// are ordered by name.
    pub(crate) fn rows<'a>(self, all: &'a [ControllerRow], filter: &str) -> Vec<&'a ControllerRow> {
        let filter = filter.to_lowercase();
        let matches = |row: &&ControllerRow| row.name.to_lowercase().contains(&filter);
        let mut rows: Vec<_> = all.iter().filter(matches).collect();
        rows.sort_by(|a, b| {
            let order = self.column.compare(a, b);
            let order = if self.reversed { order.reverse() } else { order };
            order.then_with(|| a.name.cmp(&b.name))
        });
        rows
    }
}

/// Headings of the reactors' table.
pub(crate) const REACTOR_TITLES: [&str; 7] =
    ["CORE", "LOAD%", "QUEUES", "SLEEPS/s", "ITER/s", "LONGESTus", "CAUSES"];

/// A row of the reactors' table.
pub(crate) fn reactor_cells(row: &ReactorRow) -> [String; 7] {
    let load = row.load_percent.map_or_else(|| "-".to_owned(), |load| format!("{load:.1}"));
    [
        row.core.to_string(),
        load,
        row.queues.map_or_else(|| "-".to_owned(), |queues| queues.to_string()),
        rate(row.sleeps_per_s),
        rate(row.iterations_per_s),
        rate(row.longest_us),
        plain(&row.causes.join(" ")),
    ]
}

/// A rate, or "-" for one that is not known.
pub(crate) fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), count)
}

/// A text without control characters, which a terminal would execute.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn states(states: &[String]) -> String {
    match states {
        [] => "-".to_owned(),
        [one] => plain(one),
        [first, rest @ ..] if rest.iter().all(|state| state == first) => {
            format!("{} {}", states.len(), plain(first))
        }
        _ => format!("{} mixed", states.len()),
    }
}

fn queues(row: &ControllerRow) -> String {
    if row.queues.is_empty() {
        return "-".to_owned();
    }
    let places = row.queues.iter().map(|place| format!("{}:{}", place.core, place.count));
    places.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::view::{Placement, Rates};

    /// A controller with this number of IOPS.
    pub(crate) fn row(name: &str, iops: Option<f64>) -> ControllerRow {
        ControllerRow {
            name: name.to_owned(),
            states: vec!["running".to_owned()],
            rates: Rates { iops, read_iops: iops, ..Rates::default() },
            latency_us: iops.map(|iops| 1e6 / iops),
            latency_p50_us: None,
            latency_p99_us: None,
            inflight: 1,
            quarantined_bytes: 0,
            queues: vec![Placement { core: 1, count: 2 }, Placement { core: 3, count: 1 }],
            bdev: Some(format!("disk-{name}")),
            histogram: false,
        }
    }

    fn names(sort: Sort, rows: &[ControllerRow], filter: &str) -> String {
        sort.rows(rows, filter).iter().map(|row| row.name.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn rows_are_sorted_and_filtered() {
        let rows =
            [row("b", Some(5.0)), row("c", None), row("Ab", Some(5.0)), row("d", Some(70.0))];
        let mut sort = Sort::DEFAULT;
        assert_eq!(names(sort, &rows, ""), "d Ab b c");
        assert_eq!(names(sort, &rows, "B"), "Ab b");
        sort.reversed = true;
        assert_eq!(names(sort, &rows, ""), "c Ab b d", "equal rows stay in the order of names");
        assert!(!sort.descends());
        sort.step(-2);
        assert_eq!((sort.column, sort.descends()), (Column::Name, true));
        assert_eq!(names(sort, &rows, ""), "d c b Ab");
        sort.step(-1);
        assert_eq!(sort.column, Column::Bdev);
        sort.step(1);
        assert_eq!(sort.column, Column::Name);
    }

    #[test]
    fn each_column_has_a_text_and_can_be_sorted_by() {
        let mut one = row("x\x1b[2J", Some(1234.0));
        one.rates.read_bytes_per_s = Some(f64::from(3 << 20));
        let texts = Column::ALL.map(|column| column.text(&one));
        let expected = [
            "x?[2J",
            "running",
            "1.23k",
            "1.23k",
            "-",
            "3.00",
            "-",
            "810",
            "-",
            "-",
            "1",
            "-",
            "-",
            "0B",
            "1:2 3:1",
            "disk-x?[2J",
        ];
        assert_eq!(texts, expected);
        one.states = vec!["running".into(), "running".into()];
        assert_eq!(Column::State.text(&one), "2 running");
        one.states[1] = "starting".into();
        assert_eq!(Column::State.text(&one), "2 mixed");
        let rows = [one, row("y", None)];
        for column in Column::ALL {
            for reversed in [false, true] {
                assert_eq!(Sort { column, reversed }.rows(&rows, "").len(), 2, "{column:?}");
            }
        }
    }
}
