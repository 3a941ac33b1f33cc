//! One stretch of time: the data of the neighbours, the kernel and the server.

use std::time::Duration;

use anyhow::Result;
use bench::Spread;
use bench::servers::{Error, Refusal, Server, ThreadTimes, core_steal, thread_times};
use serde_json::{Value, json};

use crate::client::{Clients, Seen};
use crate::new_vms::{self, Waits};

/// The RPC for reactors' longest poll iterations. SPDK does not have it.
const ITERATIONS: &str = "vhost_get_reactor_turns";

/// A reactor's longest poll iteration in a stretch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Iteration {
    pub(crate) us: f64,
    /// What the reactor did in it.
    pub(crate) causes: Vec<String>,
}

/// The data of one stretch.
#[derive(Clone, Debug)]
pub(crate) struct Stretch {
    pub(crate) requests: u64,
    pub(crate) p9999_ns: f64,
    /// The longest wait of any neighbour.
    pub(crate) longest_ns: f64,
    /// The part of it in which the neighbours' own thread did not run.
    pub(crate) longest_away_ns: f64,
    pub(crate) away_max_ns: f64,
    /// The longest of all reactors, if the server reports it.
    pub(crate) iteration: Option<Iteration>,
    pub(crate) reactors: ThreadTimes,
    pub(crate) clients: ThreadTimes,
    /// Time that the host stole from the clients' and the reactors' cores.
    pub(crate) stolen: Option<Duration>,
    /// The waits of new VMs and operators, if there were any.
    pub(crate) waits: Option<Waits>,
}

/// Runs `during`, whose duration is that of the stretch, and returns the data meanwhile, with that
/// of new VMs if `with_new_vms`.
pub(crate) fn watch(
    server: &Server,
    clients: &mut Clients,
    cores: &[usize],
    with_new_vms: bool,
    during: impl FnOnce() -> Result<()>,
) -> Result<Stretch> {
    // The calls precede and follow the stretch.
    iterations(server)?;
    let tid = clients.tid;
    let counters = || -> Result<_> {
        let stolen: Option<Duration> = cores.iter().map(|&core| core_steal(core)).sum();
        Ok((server.times()?, thread_times(std::process::id(), tid)?, stolen))
    };
    let (reactors, own, stolen) = counters()?;
    let new_vms = with_new_vms.then_some(server);
    let (seen, waits) = clients.watch(|| new_vms::beside(new_vms, during))?;
    let (reactors_after, own_after, stolen_after) = counters()?;
    let iteration = iterations(server)?;
    let Seen { latencies, longest, longest_away, away_max } = seen;
    Ok(Stretch {
        requests: latencies.len(),
        p9999_ns: latencies.value_at_quantile(0.9999) as f64,
        longest_ns: longest.as_nanos() as f64,
        longest_away_ns: longest_away.as_nanos() as f64,
        away_max_ns: away_max.as_nanos() as f64,
        iteration,
        reactors: reactors_after - reactors,
        clients: own_after - own,
        stolen: stolen.zip(stolen_after).map(|(before, after)| after.saturating_sub(before)),
        waits,
    })
}

/// The longest poll iteration since the last call, if the server reports it.
fn iterations(server: &Server) -> Result<Option<Iteration>> {
    match server.call(ITERATIONS, json!({"reset": true})) {
        Ok(answer) => Ok(longest(&answer)),
        Err(Error::Refused { refusal, .. }) if refusal.code == Refusal::NO_SUCH_METHOD => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn longest(answer: &Value) -> Option<Iteration> {
    let iteration = |reactor: &Value| {
        let causes = reactor["causes"].as_array().into_iter().flatten();
        let causes = causes.filter_map(|cause| Some(cause.as_str()?.to_owned())).collect();
        Some(Iteration { us: reactor["longest_turn_us"].as_f64()?, causes })
    };
    answer.as_array()?.iter().filter_map(iteration).max_by(|a, b| a.us.total_cmp(&b.us))
}

impl Stretch {
    pub(crate) fn json(&self) -> Value {
        let times = |times: &ThreadTimes| {
            json!({
                "cpu_s": times.cpu.as_secs_f64(),
                "waiting_s": times.waiting.as_secs_f64(),
                "preemptions": times.preemptions,
            })
        };
        json!({
            "requests": self.requests,
            "p99.99_ns": self.p9999_ns,
            "longest_ns": self.longest_ns,
            "longest_away_ns": self.longest_away_ns,
            "away_max_ns": self.away_max_ns,
            "longest_turn_us": self.iteration.as_ref().map(|iteration| iteration.us),
            "causes": self.iteration.as_ref().map(|iteration| iteration.causes.clone()),
            "reactors": times(&self.reactors),
            "clients": times(&self.clients),
            "stolen_s": self.stolen.map(|stolen| stolen.as_secs_f64()),
            "new_vm_s": self.waits.map(|waits| waits.life.as_secs_f64()),
            "rpc_s": self.waits.map(|waits| waits.rpc.as_secs_f64()),
        })
    }
}

/// A quiet stretch, and the preceding disturbed stretch of the same length.
pub(crate) type Pair = (Stretch, Stretch);

/// All pairs of one case.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) server: String,
    pub(crate) case: &'static str,
    pub(crate) words: &'static str,
    pub(crate) pairs: Vec<Pair>,
}

impl Found {
    /// The medians of a figure in the quiet and in the disturbed stretches.
    pub(crate) fn medians(&self, figure: impl Fn(&Stretch) -> Option<f64>) -> [Option<f64>; 2] {
        let quiet: Option<Vec<f64>> = self.pairs.iter().map(|(quiet, _)| figure(quiet)).collect();
        let disturbed: Option<Vec<f64>> = self.pairs.iter().map(|(_, d)| figure(d)).collect();
        [quiet, disturbed].map(|values| Some(Spread::of(values?)?.median))
    }

    /// The ratio of a figure in a disturbed stretch to that in the quiet stretch of its pair.
    pub(crate) fn ratio(&self, figure: impl Fn(&Stretch) -> f64) -> Option<Spread> {
        let pair = |(quiet, disturbed): &Pair| (figure(disturbed), figure(quiet));
        Spread::of_ratios(self.pairs.iter().map(pair))
    }

    /// Whether new VMs were measured.
    pub(crate) fn case_has_new_vms(&self) -> bool {
        self.pairs.iter().all(|(quiet, disturbed)| quiet.waits.and(disturbed.waits).is_some())
    }

    /// The causes of the longest poll iterations in the disturbed stretches, most frequent first.
    pub(crate) fn causes(&self) -> Vec<String> {
        let mut counted: Vec<(usize, String)> = Vec::new();
        let iterations =
            self.pairs.iter().filter_map(|(_, disturbed)| disturbed.iteration.as_ref());
        for cause in iterations.flat_map(|iteration| &iteration.causes) {
            match counted.iter_mut().find(|(_, known)| known == cause) {
                Some((count, _)) => *count += 1,
                None => counted.push((1, cause.clone())),
            }
        }
        counted.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        counted.into_iter().map(|(_, cause)| cause).collect()
    }

    pub(crate) fn json(&self) -> Value {
        let pair = |(quiet, disturbed): &Pair| json!({"quiet": quiet.json(), "disturbed": disturbed.json()});
        json!({
            "server": self.server, "case": self.case,
            "pairs": self.pairs.iter().map(pair).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A stretch with these values.
    pub(crate) fn stretch(longest_ns: f64, iteration: Option<(f64, &[&str])>) -> Stretch {
        Stretch {
            requests: 1,
            p9999_ns: 1.0,
            longest_ns,
            longest_away_ns: 0.0,
            away_max_ns: 0.0,
            iteration: iteration.map(|(us, causes)| Iteration {
                us,
                causes: causes.iter().map(|&cause| cause.into()).collect(),
            }),
            reactors: ThreadTimes::default(),
            clients: ThreadTimes::default(),
            stolen: None,
            waits: None,
        }
    }

    #[test]
    fn the_longest_iteration_is_that_of_the_slowest_reactor() {
        let answer = json!([
            {"lcore": 1, "turns": 5, "longest_turn_us": 3.5, "causes": ["complete"]},
            {"lcore": 2, "turns": 5, "longest_turn_us": 12, "causes": ["adopt", "complete"]},
        ]);
        let iteration = longest(&answer).unwrap();
        assert_eq!(
            iteration,
            Iteration { us: 12.0, causes: vec!["adopt".into(), "complete".into()] }
        );
        assert_eq!(longest(&json!([])), None);
    }

    #[test]
    fn each_disturbed_stretch_is_held_against_the_quiet_one_beside_it() {
        let pair = |quiet, disturbed| {
            let iteration: Option<(f64, &[&str])> = Some((1.0, &["adopt"]));
            (stretch(quiet, None), stretch(disturbed, iteration))
        };
        let mut found = Found {
            server: "vhost".into(),
            case: "killed",
            words: "",
            pairs: vec![pair(10.0, 20.0), pair(1000.0, 2000.0), pair(10.0, 10.0)],
        };
        let spread = found.ratio(|stretch| stretch.longest_ns).unwrap();
        assert_eq!((spread.median, spread.min), (2.0, 1.0));
        assert_eq!(found.medians(|stretch| Some(stretch.longest_ns)), [Some(10.0), Some(20.0)]);
        assert_eq!(found.medians(|s| Some(s.iteration.as_ref()?.us)), [None, Some(1.0)]);
        found.pairs[0].1 = stretch(1.0, Some((1.0, &["complete", "adopt"])));
        assert_eq!(found.causes(), ["adopt", "complete"]);
    }
}
