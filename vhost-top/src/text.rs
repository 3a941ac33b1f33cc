//! A view as text: what `--once` prints, and the lines above the tables.

use std::fmt::Write;

use crate::columns::{Column, REACTOR_TITLES, Sort, plain, rate, reactor_cells};
use crate::number::bytes;
use crate::sample::Sample;
use crate::view::View;

/// A table of cells with aligned columns.
#[derive(Debug)]
pub(crate) struct Grid {
    pub(crate) titles: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
    /// In characters.
    pub(crate) widths: Vec<usize>,
    /// Whether a column is aligned to the left.
    pub(crate) left: Vec<bool>,
}

impl Grid {
    /// The reactors, in the server's order.
    pub(crate) fn reactors(view: &View) -> Self {
        let rows: Vec<Vec<String>> =
            view.reactors.iter().map(|row| reactor_cells(row).to_vec()).collect();
        let limits = [(4, 5), (5, 5), (6, 6), (8, 8), (8, 8), (9, 9), (6, 60)];
        let left = (0..limits.len()).map(|n| n + 1 == limits.len()).collect();
        Self::new(REACTOR_TITLES.to_vec(), rows, &limits, left)
    }

    /// The controllers of a filter in an order.
    pub(crate) fn controllers(view: &View, sort: Sort, filter: &str) -> Self {
        let rows = sort.rows(&view.controllers, filter);
        let cells = rows.iter().map(|row| Column::ALL.map(|column| column.text(row)).to_vec());
        let titles = Column::ALL.map(Column::title).to_vec();
        let left = Column::ALL.map(Column::is_text).to_vec();
        Self::new(titles, cells.collect(), &Column::ALL.map(Column::widths), left)
    }

    fn new(
        titles: Vec<&'static str>,
        rows: Vec<Vec<String>>,
        limits: &[(usize, usize)],
        left: Vec<bool>,
    ) -> Self {
        let width = |(n, (min, max)): (usize, &(usize, usize))| {
            let cells = rows.iter().map(|row| row[n].chars().count());
            let width = cells.chain([titles[n].len()]).max().unwrap_or(0);
            width.clamp(*min, (*max).max(titles[n].len()))
        };
        let widths = limits.iter().enumerate().map(width).collect();
        Self { titles, rows, widths, left }
    }

    /// A row of these columns as a line. A cell that is too long ends with "+".
    pub(crate) fn line<T: AsRef<str>>(&self, cells: &[T], columns: &[usize]) -> String {
        let mut line = String::new();
        for &n in columns {
            let (cell, width) = (cells[n].as_ref(), self.widths[n]);
            let cell = if cell.chars().count() > width {
                cell.chars().take(width.saturating_sub(1)).chain(['+']).collect()
            } else {
                cell.to_owned()
            };
            let separator = if line.is_empty() { "" } else { " " };
            let written = if self.left[n] {
                write!(line, "{separator}{cell:<width$}")
            } else {
                write!(line, "{separator}{cell:>width$}")
            };
            written.expect("a String takes all");
        }
        line
    }
}

/// The lines about the whole server.
pub(crate) fn header(view: &View) -> [String; 3] {
    let totals = &view.totals;
    let pid = view.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    let mib = |bytes: Option<f64>| rate(bytes.map(|bytes| bytes / f64::from(1 << 20)));
    [
        format!("{}, pid {pid}", plain(&view.version)),
        format!(
            "controllers {}, sessions {}   IOPS {} (R {}, W {})   MiB/s R {}, W {}",
            totals.controllers,
            totals.sessions,
            rate(totals.rates.iops),
            rate(totals.rates.read_iops),
            rate(totals.rates.write_iops),
            mib(totals.rates.read_bytes_per_s),
            mib(totals.rates.write_bytes_per_s),
        ),
        format!(
            "in flight {}   errors/s {}   quarantined {}   stuck closes {}",
            totals.inflight,
            rate(totals.rates.errors_per_s),
            bytes(totals.quarantined_bytes),
            stuck_closes(view),
        ),
    ]
}

fn stuck_closes(view: &View) -> String {
    if view.stuck_closes.is_empty() {
        return "0".to_owned();
    }
    let names: Vec<String> = view.stuck_closes.iter().map(|name| plain(name)).collect();
    format!("{} ({})", names.len(), names.join(", "))
}

/// What the display lacks with this server, if it lacks something.
pub(crate) fn missing(view: &View) -> Option<String> {
    let missing = view.missing_methods.join(", ");
    let because = if view.missing_methods.contains(&Sample::STATS) {
        ": rates are those of the bdevs"
    } else {
        ""
    };
    (!missing.is_empty()).then(|| format!("the server has no {missing}{because}"))
}

/// What `--once` prints.
pub(crate) fn page(view: &View) -> String {
    let mut lines = header(view).to_vec();
    for grid in [Grid::reactors(view), Grid::controllers(view, Sort::DEFAULT, "")] {
        let columns: Vec<usize> = (0..grid.titles.len()).collect();
        lines.push(String::new());
        lines.push(grid.line(&grid.titles, &columns));
        lines.extend(grid.rows.iter().map(|row| grid.line(row, &columns)));
    }
    let trimmed = lines.iter().map(|line| format!("{}\n", line.trim_end()));
    trimmed.collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::columns::tests::row;
    use crate::view::{ReactorRow, Totals};

    /// A view of two reactors and three controllers.
    pub(crate) fn view() -> View {
        let reactor = |core, load_percent| ReactorRow {
            core,
            load_percent,
            queues: Some(2),
            sleeps_per_s: Some(0.0),
            iterations_per_s: Some(1.5e6),
            longest_us: Some(87.6),
            causes: vec!["fetch".to_owned(), "call".to_owned()],
        };
        View {
            version: "SPDK v26.05".to_owned(),
            pid: Some(4242),
            interval_s: Some(1.0),
            missing_methods: vec![],
            totals: Totals { controllers: 3, sessions: 3, ..Totals::default() },
            reactors: vec![reactor(1, Some(93.25)), reactor(2, None)],
            controllers: vec![
                row("vhost.0", Some(10.0)),
                row("vhost.1", None),
                row(&"long".repeat(10), Some(2e6)),
            ],
            stuck_closes: vec![],
        }
    }

    #[test]
    fn a_page_has_all_and_its_columns_are_aligned() {
        let page = page(&view());
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!(lines[0], "SPDK v26.05, pid 4242");
        assert_eq!(lines[4], "CORE LOAD% QUEUES SLEEPS/s   ITER/s LONGESTus CAUSES");
        assert_eq!(lines[5], "   1  93.2      2        0    1.50M      87.6 fetch call");
        assert!(lines[8].starts_with("CONTROLLER                       STATE    IOPS"), "{page}");
        assert!(lines[9].starts_with("longlonglonglonglonglonglonglon+ running 2.00M"), "{page}");
        assert!(lines[10].ends_with("1:2 3:1 disk-vhost.0"), "{page}");
        assert_eq!(lines.len(), 12);
    }

    #[test]
    fn a_server_without_the_own_methods_is_named() {
        let mut view = view();
        assert_eq!(missing(&view), None);
        view.missing_methods = vec!["vhost_get_reactor_turns", "vhost_get_controller_stats"];
        assert_eq!(
            missing(&view).unwrap(),
            "the server has no vhost_get_reactor_turns, vhost_get_controller_stats: rates are \
             those of the bdevs"
        );
        view.stuck_closes = vec!["vhost.0".to_owned()];
        assert!(header(&view)[2].ends_with("stuck closes 1 (vhost.0)"));
    }
}
