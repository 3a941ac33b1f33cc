//! Tables of Markdown, and figures as people read them.

use std::fmt;

use crate::spread::Spread;

/// A table whose columns are as wide as they must be, so that it reads well unrendered too.
///
/// The first column is text, the others are figures and stand to the right.
#[derive(Clone, Debug)]
pub struct Table {
    columns: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One with these headings.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        let first = headings.iter().map(|&heading| heading.to_owned()).collect();
        Self { columns: headings.len(), rows: vec![first] }
    }

    /// Adds a row: cells that are missing at its end are empty.
    ///
    /// # Panics
    /// With more cells than there are headings.
    pub fn row(&mut self, mut cells: Vec<String>) {
        assert!(cells.len() <= self.columns, "{cells:?}");
        cells.resize(self.columns, String::new());
        // A bar would end the cell.
        self.rows.push(cells.into_iter().map(|cell| cell.replace('|', "\\|")).collect());
    }

    /// Whether it has headings only.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3)
        };
        let widths: Vec<usize> = (0..self.columns).map(width).collect();
        for (n, row) in self.rows.iter().enumerate() {
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                if column == 0 {
                    write!(f, "| {cell:<width$} |")?;
                } else {
                    write!(f, " {cell:>width$} |")?;
                }
            }
            writeln!(f)?;
            if n == 0 {
                for (column, &width) in widths.iter().enumerate() {
                    let start = if column == 0 { "|" } else { "" };
                    let end = if column == 0 { "-" } else { ":" };
                    write!(f, "{start}{}{end}|", "-".repeat(width + 1))?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

/// Three digits that count: `10.3 M`, `950 k`, `12.5`, `0.08`.
#[must_use]
pub fn count(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, " M"),
        v if v >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    format!("{}{unit}", digits(value))
}

/// A time: `350 ns`, `12.5 µs`, `3.20 ms`, `1.50 s`.
#[must_use]
pub fn time(ns: f64) -> String {
    let (value, unit) = match ns.abs() {
        v if v >= 1e9 => (ns / 1e9, "s"),
        v if v >= 1e6 => (ns / 1e6, "ms"),
        v if v >= 1e4 => (ns / 1e3, "µs"),
        _ => (ns, "ns"),
    };
    format!("{} {unit}", digits(value))
}

/// A ratio and the range of it: `0.18 (0.17–0.21)`, or a dash where there is none.
#[must_use]
pub fn ratio(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".into(),
        |Spread { median, min, max }| {
            format!("{} ({}–{})", digits(median), digits(min), digits(max))
        },
    )
}

/// The value with as many decimals as make three digits, at most two.
#[must_use]
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned() {
        let mut table = Table::new(&["disk", "IOPS"]);
        assert!(table.is_empty());
        table.row(vec!["null".into(), "10.3 M".into()]);
        table.row(vec!["a|µ".into()]);
        assert!(!table.is_empty());
        let expected = "\
| disk |   IOPS |
|------|-------:|
| null | 10.3 M |
| a\\|µ |        |
";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(count(10_312_345.0), "10.3 M");
        assert_eq!(count(950_123.0), "950 k");
        assert_eq!(count(9_512.0), "9512");
        assert_eq!(count(0.0812), "0.08");
        assert_eq!(time(351.4), "351 ns");
        assert_eq!(time(12_512.0), "12.5 µs");
        assert_eq!(time(3_200_000.0), "3.20 ms");
        assert_eq!(time(1.5e9), "1.50 s");
        assert_eq!(digits(99.96), "100");
        let spread = Spread { median: 0.181, min: 0.17, max: 12.34 };
        assert_eq!(ratio(Some(spread)), "0.18 (0.17–12.3)");
        assert_eq!(ratio(None), "-");
    }
}
