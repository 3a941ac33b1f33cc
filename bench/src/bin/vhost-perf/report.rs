//! The results as text and as JSON.

use std::fmt::Write;

use bench::Idle;
use bench::perf::{Device, Latencies, Order, Outcome, Plan};
use front_end::{Backing, RingLayout};
use serde_json::{Value, json};

/// The percentiles that are reported, with their names in JSON.
pub(crate) const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

/// The results as one JSON object.
pub(crate) fn json(plan: &Plan, outcome: &Outcome) -> Value {
    let stretch = |s: &bench::perf::Stretch| json!({"at_s": s.at_s, "iops": s.iops, "longest_gap_ns": s.longest_gap_ns});
    let longest = outcome.longest_gap().copied().unwrap_or_default();
    let of = |latencies: &Latencies| json!({"completed": latencies.completed, "lat_ns": latencies_json(latencies)});
    let gaps = outcome.longest_gaps.iter().map(|(at_s, ns)| json!({"at_s": at_s, "ns": ns}));
    json!({
        "elapsed_s": outcome.elapsed.as_secs_f64(),
        "completed": outcome.all.completed,
        "errors": outcome.errors,
        "mismatches": outcome.mismatches,
        "first_problem": outcome.first_problem,
        "outstanding": outcome.outstanding,
        "unsubmitted": outcome.unsubmitted,
        "server_closed": outcome.closed,
        "iops": outcome.iops(),
        "bw_bytes": outcome.iops() * f64::from(plan.block_bytes),
        "lat_ns": latencies_json(&outcome.all),
        "read": of(&outcome.reads),
        "write": of(&outcome.writes),
        "longest_gap_ns": longest.1,
        "longest_gap_at_s": longest.0,
        "timeline": outcome.timeline.iter().map(stretch).collect::<Vec<_>>(),
        "longest_gaps": gaps.collect::<Vec<_>>(),
        "options": options(plan, outcome),
    })
}

fn latencies_json(latencies: &Latencies) -> Value {
    let ns = &latencies.ns;
    let mut object = json!({"min": ns.min, "mean": ns.mean});
    for (name, percent) in PERCENTILES {
        object[name] = ns.percentile(percent).into();
    }
    object["max"] = ns.max.into();
    object
}

fn options(plan: &Plan, outcome: &Outcome) -> Value {
    let (device, scsi_target) = match plan.device {
        Device::Blk => ("blk", None),
        Device::Scsi { target } => ("scsi", Some(target)),
    };
    json!({
        "socket": plan.socket.display().to_string(),
        "device": device,
        "scsi_target": scsi_target,
        "rw": rw(plan),
        "rwmixread": plan.reads,
        "bs": plan.block_bytes,
        "iodepth": plan.depth,
        "numjobs": plan.queues,
        "threads": plan.threads,
        "cpus_allowed": plan.cores,
        "runtime_s": plan.runtime.as_secs_f64(),
        "ramp_time_s": plan.ramp.as_secs_f64(),
        "verify": plan.verify,
        "rate_iops": plan.rate,
        "offset": outcome.range.0,
        "size": outcome.range.1,
        "disk_bytes": outcome.disk_bytes,
        "randseed": plan.seed,
        "rings": if plan.rings == RingLayout::Packed { "packed" } else { "split" },
        "ring_size": plan.ring_size,
        "indirect": plan.indirect,
        "event_idx": plan.event_idx,
        "mem": if plan.backing == Backing::Hugepages { "hugetlb" } else { "memfd" },
        "mem_size": plan.ram_bytes,
        "interrupts": plan.idle == Idle::Sleep,
        "timeout_s": plan.limit.as_secs_f64(),
        "clock": if outcome.counter { "tsc" } else { "monotonic" },
    })
}

/// The results as text.
pub(crate) fn text(plan: &Plan, outcome: &Outcome) -> String {
    let mut text = format!("{}: {}\n", plan.socket.display(), title(plan));
    let seconds = outcome.elapsed.as_secs_f64();
    let rate = outcome.iops() * f64::from(plan.block_bytes) / f64::from(1 << 20);
    line(
        &mut text,
        &format!(
            "{} IOPS, {rate:.1} MiB/s: {} requests in {seconds:.2} s",
            count(outcome.iops()),
            outcome.all.completed,
        ),
    );
    let mixed = outcome.reads.completed > 0 && outcome.writes.completed > 0;
    if mixed {
        latency(&mut text, "reads", &outcome.reads);
        latency(&mut text, "writes", &outcome.writes);
    } else {
        latency(&mut text, "latency", &outcome.all);
    }
    if let Some(&(at_s, ns)) = outcome.longest_gap() {
        line(&mut text, &format!("longest gap {}, {at_s:.3} s after the start", time(ns as f64)));
    }
    text
}

/// A line that describes the load.
pub(crate) fn title(plan: &Plan) -> String {
    let mut title = rw(plan).to_owned();
    if (1..100).contains(&plan.reads) {
        write!(title, " ({} % reads)", plan.reads).expect("a String takes all");
    }
    let bytes = match plan.block_bytes {
        bytes if bytes % (1 << 20) == 0 => format!("{} MiB", bytes >> 20),
        bytes if bytes % 1024 == 0 => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} B"),
    };
    let queues =
        if plan.queues == 1 { "1 queue".into() } else { format!("{} queues", plan.queues) };
    write!(title, ", {bytes}, depth {}, {queues}", plan.depth).expect("a String takes all");
    if let Device::Scsi { target } = plan.device {
        write!(title, ", scsi target {target}").expect("a String takes all");
    }
    let details = [
        (plan.rings == RingLayout::Packed, "packed"),
        (plan.indirect, "indirect"),
        (plan.event_idx, "event-idx"),
        (plan.backing == Backing::Hugepages, "hugetlb"),
        (plan.idle == Idle::Sleep, "interrupts"),
        (plan.verify, "verified"),
    ];
    for (_, name) in details.iter().filter(|(on, _)| *on) {
        title.push_str(", ");
        title.push_str(name);
    }
    if let Some(rate) = plan.rate {
        write!(title, ", {} IOPS a queue", count(rate)).expect("a String takes all");
    }
    title
}

fn rw(plan: &Plan) -> &'static str {
    match (plan.order, plan.reads) {
        (Order::Random, 100) => "randread",
        (Order::Random, 0) => "randwrite",
        (Order::Random, _) => "randrw",
        (Order::Sequential, 0) => "write",
        (Order::Sequential, _) => "read",
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str("  ");
    text.push_str(line);
    text.push('\n');
}

fn latency(text: &mut String, name: &str, latencies: &Latencies) {
    let ns = &latencies.ns;
    let [min, max] = [ns.min, ns.max].map(|ns| time(ns as f64));
    line(text, &format!("{name}: min {min}, mean {}, max {max}", time(ns.mean)));
    let percentiles = PERCENTILES
        .map(|(name, percent)| format!("{name} {}", time(ns.percentile(percent) as f64)));
    line(text, &format!("  {}", percentiles.join(", ")));
}

/// A time in the unit that gives one to three digits before the point.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{} µs", three_digits(ns / 1e3)),
        ns if ns < 1e9 => format!("{} ms", three_digits(ns / 1e6)),
        ns => format!("{} s", three_digits(ns / 1e9)),
    }
}

/// A number; a large one in thousands or millions.
pub(crate) fn count(n: f64) -> String {
    match n {
        n if n < 1e3 => three_digits(n),
        n if n < 1e6 => format!("{}k", three_digits(n / 1e3)),
        n => format!("{}M", three_digits(n / 1e6)),
    }
}

fn three_digits(n: f64) -> String {
    let digits = match n {
        0.0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{n:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_counts_have_three_digits() {
        let times = [(7.0, "7 ns"), (999.4, "999 ns"), (1234.0, "1.23 µs"), (45_678.0, "45.7 µs")];
        times.iter().for_each(|(ns, text)| assert_eq!(time(*ns), *text));
        assert_eq!([time(987_654.0), time(12e6), time(3.21e9)], ["988 µs", "12.0 ms", "3.21 s"]);
        assert_eq!([count(0.0), count(12.34), count(56_789.0)], ["0", "12.3", "56.8k"]);
        assert_eq!([count(10.26e6), count(9.999e3)], ["10.3M", "10.0k"]);
    }

    #[test]
    fn a_title_names_options_that_differ_from_the_default() {
        let mut plan = Plan::new("/tmp/s".into());
        assert_eq!(title(&plan), "randread, 4 KiB, depth 1, 1 queue");
        (plan.reads, plan.block_bytes, plan.queues) = (70, 512, 4);
        (plan.indirect, plan.rings, plan.rate) = (true, RingLayout::Packed, Some(5e4));
        plan.device = Device::Scsi { target: 3 };
        assert_eq!(
            title(&plan),
            "randrw (70 % reads), 512 B, depth 1, 4 queues, scsi target 3, packed, indirect, 50.0k \
             IOPS a queue"
        );
    }
}
