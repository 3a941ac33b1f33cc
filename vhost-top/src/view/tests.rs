//! Samples for tests, and their differences.

use std::time::{Duration, Instant};

use serde_json::json;

use super::*;
use crate::histogram::tests::of as histogram;

/// A sample of a server with these controllers, as the server describes them.
pub(crate) fn sample(at: Instant, controllers: serde_json::Value) -> Sample {
    let reactors = json!({"tick_rate": 1_000_000, "pid": 9, "stuck_closes": [{"name": "c"}],
        "reactors": [{"lcore": 1, "busy": 100, "idle": 300}, {"lcore": 2}]});
    let iterations = json!([{"lcore": 1, "turns": 1000, "sleeps": 50, "longest_turn_us": 12.5,
        "causes": ["fetch", "call"]}]);
    Sample {
        at,
        version: "v".to_owned(),
        reactors: serde_json::from_value(reactors).unwrap(),
        iterations: serde_json::from_value(iterations).unwrap(),
        controllers: serde_json::from_value(controllers).unwrap(),
        histograms: [("M".to_owned(), histogram(7, 0, &[5]))].into(),
        missing: vec![],
    }
}

fn controller(reads: u64, errors: u64, failed: u64) -> serde_json::Value {
    let queues = json!([{"queue": 0, "core": 2}, {"queue": 1, "core": 1}, {"queue": 2, "core": 2}]);
    json!([{
        "ctrlr": "c",
        "sessions": [{"id": 3, "state": "running", "inflight_task_cnt": 4,
            "quarantined_bytes": 4096, "errors": errors, "queues": queues}],
        "backend_specific": {"block": {"bdev": "M"}},
        "io": {"num_read_ops": reads, "bytes_read": reads * 512, "read_latency_ticks": reads * 7,
            "num_flush_ops": reads, "failed": failed, "throttled": 2 * reads},
    }])
}

/// Two samples, two seconds apart.
fn two(before: serde_json::Value, now: serde_json::Value) -> (Sample, Sample) {
    let start = Instant::now();
    (sample(start, before), sample(start + Duration::from_secs(2), now))
}

#[test]
fn rates_are_differences_by_time() {
    let (before, mut now) = two(controller(100, 1, 5), controller(300, 5, 6));
    now.reactors.reactors[0].busy += 30;
    now.reactors.reactors[0].idle += 90;
    now.iterations[0].iterations += 10;
    now.iterations[0].sleeps += 4;
    now.histograms = [("M".to_owned(), histogram(7, 0, &[5, 20, 20, 90]))].into();
    let view = View::new(Some(&before), &now);
    let row = &view.controllers[0];
    let rates = Rates {
        iops: Some(200.0),
        read_iops: Some(100.0),
        write_iops: Some(0.0),
        other_iops: Some(100.0),
        read_bytes_per_s: Some(51_200.0),
        write_bytes_per_s: Some(0.0),
        errors_per_s: Some(2.0),
        throttled_per_s: Some(200.0),
    };
    assert_eq!((row.rates, view.totals.rates), (rates, rates));
    assert_eq!((row.latency_us, row.latency_p50_us), (Some(7.0), Some(20.0)));
    assert_eq!(row.latency_p99_us, Some(90.0));
    assert_eq!((row.inflight, view.totals.quarantined_bytes), (4, 4096));
    let placement = [Placement { core: 1, count: 1 }, Placement { core: 2, count: 2 }];
    assert_eq!(row.queues, placement);
    let [one, two] = &view.reactors[..] else { panic!("{view:?}") };
    assert_eq!((one.load_percent, one.queues, one.sleeps_per_s), (Some(25.0), Some(1), Some(2.0)));
    assert_eq!((one.iterations_per_s, one.longest_us), (Some(5.0), Some(12.5)));
    assert_eq!((two.load_percent, two.sleeps_per_s, two.longest_us), (None, None, None));
    assert_eq!((view.interval_s, &view.stuck_closes[..]), (Some(2.0), &["c".to_owned()][..]));
}

#[test]
fn the_first_sample_and_another_process_have_no_rates() {
    let (before, mut now) = two(controller(100, 0, 0), controller(300, 0, 0));
    now.reactors.pid = Some(10);
    for view in [View::new(None, &now), View::new(Some(&before), &now)] {
        let row = &view.controllers[0];
        assert_eq!((row.rates, view.totals.rates), (Rates::default(), Rates::default()));
        assert_eq!((row.latency_us, row.latency_p50_us, view.interval_s), (None, None, None));
        assert!(view.reactors[0].load_percent.is_none() && row.histogram);
    }
}

#[test]
fn counters_that_fall_have_started_from_zero() {
    let (mut before, now) = two(controller(1000, 9, 9), controller(40, 2, 2));
    before.reactors.reactors[0].busy = 1000;
    before.iterations[0].sleeps = 1000;
    let view = View::new(Some(&before), &now);
    let row = &view.controllers[0];
    assert_eq!((row.rates.read_iops, row.rates.errors_per_s), (Some(20.0), Some(1.0)));
    assert_eq!(row.latency_us, Some(7.0));
    assert_eq!(view.reactors[0].sleeps_per_s, Some(25.0));
    assert_eq!(view.reactors[0].load_percent, Some(100.0));
}

#[test]
fn a_new_controller_has_counted_since_its_creation() {
    let (before, now) = two(json!([]), controller(40, 0, 0));
    let view = View::new(Some(&before), &now);
    assert_eq!(view.controllers[0].rates.read_iops, Some(20.0));
    let later = sample(now.at + Duration::from_secs(1), json!([]));
    let gone = View::new(Some(&now), &later);
    assert_eq!((gone.totals.controllers, gone.totals.rates.iops), (0, Some(0.0)));
}

#[test]
fn a_controller_without_io_has_no_latency() {
    let (before, now) = two(controller(40, 0, 0), controller(40, 0, 0));
    let row = View::new(Some(&before), &now).controllers.remove(0);
    assert_eq!((row.rates.iops, row.latency_us, row.latency_p50_us), (Some(0.0), None, None));
}

#[test]
fn the_json_has_flat_documented_keys() {
    let (before, now) = two(controller(40, 0, 0), controller(80, 0, 0));
    let json = serde_json::to_value(View::new(Some(&before), &now)).unwrap();
    assert_eq!(json["totals"]["read_iops"], 20.0);
    assert_eq!(json["controllers"][0]["queues"][1], json!({"core": 2, "count": 2}));
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    let expected = [
        "version",
        "pid",
        "interval_s",
        "missing_methods",
        "totals",
        "reactors",
        "controllers",
        "stuck_closes",
    ];
    assert_eq!(keys, expected);
}
