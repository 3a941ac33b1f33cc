//! Cases in which a server failed. The other cases are measured nevertheless.

use std::fmt::Display;

use anyhow::Result;
use bench::markdown::Table;
use bench::servers::{Interrupt, Kind, Spec};
use serde_json::{Value, json};

/// Limit on the characters of a reason in a row.
const WHY_MAX: usize = 300;

/// A case that could not be measured.
#[derive(Clone, Debug)]
struct Failure {
    name: String,
    /// The server is this project's vhost.
    ours: bool,
    case: String,
    why: String,
}

/// All failures.
#[derive(Debug, Default)]
pub(crate) struct Failures(Vec<Failure>);

impl Failures {
    /// The result of a case. If `server` failed, records the failure and returns `None`.
    ///
    /// # Errors
    /// The run was interrupted, which may have caused the failure.
    pub(crate) fn keep<T>(
        &mut self,
        server: &Spec,
        case: impl Display,
        result: Result<T>,
        interrupt: &Interrupt,
    ) -> Result<Option<T>> {
        self.keep_of((&server.name, server.kind == Kind::Ours), case, result, interrupt)
    }

    /// As [`Failures::keep`], for a contender with this name that may be this project's vhost.
    ///
    /// # Errors
    /// As [`Failures::keep`].
    pub(crate) fn keep_of<T>(
        &mut self,
        who: (&str, bool),
        case: impl Display,
        result: Result<T>,
        interrupt: &Interrupt,
    ) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => {
                interrupt.check()?;
                self.add(who, case, &format!("{error:#}"));
                Ok(None)
            }
        }
    }

    fn add(&mut self, (name, ours): (&str, bool), case: impl Display, why: &str) {
        let line: Vec<&str> = why.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let why = line.join("; ").chars().take(WHY_MAX).collect();
        self.0.push(Failure { name: name.into(), ours, case: case.to_string(), why });
    }

    /// The cases in which this project's vhost failed. Failures of other servers are results.
    pub(crate) fn ours(&self) -> Vec<String> {
        let ours = self.0.iter().filter(|failure| failure.ours);
        ours.map(|failure| format!("{}: {}: {}", failure.name, failure.case, failure.why)).collect()
    }

    /// A table row for each failure.
    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new(&["server", "case", "why"]);
        for Failure { name, case, why, .. } in &self.0 {
            table.row(vec![name.clone(), case.clone(), why.clone()]);
        }
        table
    }

    pub(crate) fn json(&self) -> Value {
        let failure = |Failure { name, case, why, .. }: &Failure| json!({"server": name, "case": case, "why": why});
        self.0.iter().map(failure).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_a_row_and_the_rest_is_kept() {
        let interrupt = Interrupt::install().unwrap();
        let (ours, spdk) =
            (Spec::new("vhost", Kind::Ours, "vhost"), Spec::new("SPDK", Kind::Spdk, "vhost"));
        let mut failures = Failures::default();
        assert!(failures.table().is_empty());
        let good = failures.keep(&spdk, "null randread", Ok(7), &interrupt).unwrap();
        assert_eq!(good, Some(7));
        let error = anyhow::anyhow!("the connection has ended\n  at byte 7\n")
            .context("cannot connect idle guest 33 of 64");
        let bad: Option<u8> =
            failures.keep(&spdk, "64 idle neighbours", Err(error), &interrupt).unwrap();
        assert_eq!(bad, None);
        let text = failures.table().to_string();
        let row = text.lines().next_back().unwrap();
        assert!(row.contains("SPDK") && row.contains("64 idle neighbours"), "{text}");
        let why = "cannot connect idle guest 33 of 64: the connection has ended; at byte 7";
        assert!(row.contains(why), "{text}");
        assert_eq!(failures.json()[0]["why"], why);
        assert_eq!(failures.ours(), [""; 0], "others may fail");
        let long = Err::<(), _>(anyhow::anyhow!("é".repeat(1000)));
        failures.keep(&ours, "idle CPU", long, &interrupt).unwrap();
        assert_eq!(failures.ours(), [format!("vhost: idle CPU: {}", "é".repeat(WHY_MAX))]);
    }
}
