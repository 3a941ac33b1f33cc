//! The results as Markdown and as JSON.

use std::fmt::Write;

use anyhow::Result;
use bench::markdown::{Table, digits, ratio, time};
use bench::servers::{date, machine};
use serde_json::{Value, json};

use crate::Findings;
use crate::new_vms::Waits;
use crate::options::Options;
use crate::stretch::{Found, Stretch};

/// The aim for the ratio of a neighbour's longest wait in a disturbed stretch to that in a quiet
/// one.
const LONGEST_RATIO_MAX: f64 = 1.5;

/// The report: machine and options, then the tables.
pub(crate) fn markdown(findings: &Findings, options: &Options) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "## Stalls on {}\n", date())?;
    writeln!(text, "{}\n", machine())?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    writeln!(text, "`bench/stall {}`\n", args.join(" "))?;
    let Options { clients, length, pause_us, .. } = options;
    writeln!(
        text,
        "{clients} neighbours at depth 1, random reads of 4 KiB, with a pause of {pause_us} µs \
         between rounds; {} pairs of a quiet and a disturbed stretch of {length} s, or as long as \
         the event takes. Figures are medians; ratios are those within a pair: median \
         (minimum–maximum). The longest wait is that of any neighbour; \"away\" is the part of it in \
         which the neighbours' own thread did not run, in the disturbed stretches.\n",
        options.runs
    )?;
    for note in &findings.notes {
        writeln!(text, "- {note}")?;
    }
    if !findings.notes.is_empty() {
        writeln!(text)?;
    }
    writeln!(text, "{}", waits(&findings.found))?;
    if findings.found.iter().any(|found| found.case_has_new_vms()) {
        let table = new_vms(&findings.found);
        writeln!(text, "### Waits of new VMs and operators\n\n{table}")?;
    }
    writeln!(text, "### Threads that did not run\n\n{}", absences(&findings.found))?;
    Ok(text)
}

fn waits(found: &[Found]) -> Table {
    let mut table = Table::new(&[
        "another VM",
        "server",
        "p99.99 quiet",
        "disturbed",
        "ratio",
        "longest wait quiet",
        "disturbed",
        "of it away",
        "ratio",
        "≤ 1.5",
        "longest iteration quiet",
        "disturbed",
        "its causes",
    ]);
    for found in found {
        let mut row = vec![found.words.to_owned(), found.server.clone()];
        row.extend(found.medians(|stretch| Some(stretch.p9999_ns)).map(shown));
        row.push(ratio(found.ratio(|stretch| stretch.p9999_ns)));
        row.extend(found.medians(|stretch| Some(stretch.longest_ns)).map(shown));
        row.push(shown(found.medians(|stretch| Some(stretch.longest_away_ns))[1]));
        let longest = found.ratio(|stretch| stretch.longest_ns);
        row.push(ratio(longest));
        let reached = longest.map(|s| if s.median <= LONGEST_RATIO_MAX { "yes" } else { "no" });
        row.push(reached.unwrap_or("-").into());
        row.extend(found.medians(|stretch| Some(stretch.iteration.as_ref()?.us * 1e3)).map(shown));
        let causes = found.causes().join(", ");
        row.push(if causes.is_empty() { "-".into() } else { causes });
        table.row(row);
    }
    table
}

/// The longest waits of each stretch: of a VM from connection to disconnection, and of an RPC.
fn new_vms(found: &[Found]) -> Table {
    let mut table = Table::new(&[
        "untrusted clients",
        "server",
        "a VM from connection to GET_VRING_BASE, quiet",
        "disturbed",
        "ratio",
        "vhost_get_controllers, quiet",
        "disturbed",
        "ratio",
    ]);
    for found in found.iter().filter(|found| found.case_has_new_vms()) {
        let mut row = vec![found.words.to_owned(), found.server.clone()];
        let figures: [fn(&Waits) -> f64; 2] =
            [|waits| waits.life.as_nanos() as f64, |waits| waits.rpc.as_nanos() as f64];
        for figure in figures {
            row.extend(found.medians(|stretch| stretch.waits.as_ref().map(figure)).map(shown));
            row.push(ratio(found.ratio(|stretch| stretch.waits.as_ref().map_or(0.0, figure))));
        }
        table.row(row);
    }
    table
}

fn shown(ns: Option<f64>) -> String {
    ns.map_or_else(|| "-".into(), time)
}

/// Delays that the host or other threads cause, not the reactor.
fn absences(found: &[Found]) -> Table {
    let mut table = Table::new(&[
        "case: quiet, disturbed",
        "server",
        "clients' longest absence",
        "clients ready and not running",
        "clients preempted",
        "reactors ready and not running",
        "reactors preempted",
        "stolen by the host",
    ]);
    let ns = |duration: std::time::Duration| duration.as_nanos() as f64;
    for found in found {
        let both = |figure: &dyn Fn(&Stretch) -> Option<f64>, show: fn(f64) -> String| {
            let shown = |value: Option<f64>| value.map_or_else(|| "-".into(), show);
            found.medians(figure).map(shown).join(", ")
        };
        table.row(vec![
            found.case.to_owned(),
            found.server.clone(),
            both(&|stretch| Some(stretch.away_max_ns), time),
            both(&|stretch| Some(ns(stretch.clients.waiting)), time),
            both(&|stretch| Some(stretch.clients.preemptions as f64), digits),
            both(&|stretch| Some(ns(stretch.reactors.waiting)), time),
            both(&|stretch| Some(stretch.reactors.preemptions as f64), digits),
            both(&|stretch| stretch.stolen.map(ns), time),
        ]);
    }
    table
}

/// Every stretch.
pub(crate) fn json(findings: &Findings, options: &Options) -> Value {
    json!({
        "date": date(),
        "machine": machine(),
        "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        "clients": options.clients,
        "runs": options.runs,
        "length_s": options.length,
        "pause_us": options.pause_us,
        "notes": findings.notes,
        "cases": findings.found.iter().map(Found::json).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stretch::tests::stretch;

    #[test]
    fn a_case_is_judged_by_the_ratio_and_a_server_without_iterations_has_a_dash() {
        let found = |disturbed| Found {
            server: "vhost".into(),
            case: "killed",
            words: "a VM is killed",
            pairs: vec![(stretch(10.0, None), stretch(disturbed, None))],
        };
        let table = waits(&[found(15.0), found(16.0)]).to_string();
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert!(rows[0].contains(" yes |") && rows[1].contains(" no |"), "{table}");
        assert!(rows[0].trim_end().ends_with("- |"), "{table}");
        assert!(absences(&[found(1.0)]).to_string().contains("| killed"));
    }

    #[test]
    fn only_cases_with_new_vms_are_in_their_table() {
        let with = |life| {
            let (life, rpc) = (Duration::from_millis(life), Duration::from_millis(1));
            Stretch { waits: Some(Waits { life, rpc }), ..stretch(1.0, None) }
        };
        let found =
            |words, pair| Found { server: "vhost".into(), case: "", words, pairs: vec![pair] };
        let quiet = found("not this", (stretch(1.0, None), stretch(1.0, None)));
        let table = new_vms(&[quiet, found("halves", (with(2), with(6)))]).to_string();
        assert_eq!(table.lines().count(), 3, "{table}");
        assert!(table.contains("halves") && table.contains("3.00"), "{table}");
    }
}
