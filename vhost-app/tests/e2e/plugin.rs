//! The plugin of SPDK's client (`clients/vhost_rpc.py`), through the real client: each subcommand and
//! option that it adds, what they print, and how they fail.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use bench::{Load, LoadOptions};
use front_end::{FrontEnd, GuestRam, Options, QueueOptions};
use serde_json::{Value, json};

use crate::support::harness::{self, Launch, Vhost};

/// What the plugin adds to the client.
const OWN: [&str; 5] = [
    "bdev_nbd_create",
    "bdev_nbd_delete",
    "vhost_get_controller_stats",
    "vhost_get_reactor_turns",
    "vhost_move_queue",
];

/// How a run of the client ended.
struct Ended {
    code: Option<i32>,
    printed: String,
    errors: String,
}

impl Ended {
    /// What it has printed, after a success.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.printed, self.errors);
        assert_eq!(self.errors, "");
        self.printed
    }

    /// The result that it has printed.
    #[track_caller]
    fn result(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// The server has refused the request: the client exits with 1, and prints code and text.
    #[track_caller]
    fn is_refused(&self, code: i64, text: &str) {
        assert_eq!(self.code, Some(1), "{}{}", self.printed, self.errors);
        let (_, response) = self.printed.split_once("response:\n").unwrap();
        let response: Value = serde_json::from_str(response).unwrap();
        assert_eq!(response, json!({"code": code, "message": text}));
    }

    /// The client has refused the command line: it exits with 2, and says why.
    #[track_caller]
    fn is_misused(&self, why: &str) {
        assert_eq!((self.code, self.printed.as_str()), (Some(2), ""));
        assert!(self.errors.contains(why), "{}", self.errors);
    }
}

/// Runs the client with a command line, and with an input that has commands.
fn run_with_input(vhost: &Vhost, line: &str, input: &str) -> Ended {
    let mut client = vhost.spdk_client();
    let streams = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
    let [stdin, stdout, stderr] = streams;
    let client = client.args(line.split_ascii_whitespace()).stdin(stdin);
    let mut child = client.stdout(stdout).stderr(stderr).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), printed: text(output.stdout), errors: text(output.stderr) }
}

/// Runs the client with the plugin.
fn run(vhost: &Vhost, line: &str) -> Ended {
    run_with_input(vhost, &format!("--plugin vhost_rpc {line}"), "")
}

/// A null disk in the controller `vhost.0`.
fn controller(vhost: &Vhost) {
    if !vhost.bdev_names().contains(&"N".to_owned()) {
        vhost.null("N");
    }
    vhost.ok("vhost_create_blk_controller", json!({"ctrlr": "vhost.0", "dev_name": "N"}));
}

fn connect(vhost: &Vhost) -> FrontEnd {
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    FrontEnd::connect(&vhost.socket("vhost.0"), ram, Options::default()).unwrap()
}

/// Which of the server's methods are subcommands in a help text of the client.
fn listed(methods: &[String], help: &str) -> Vec<String> {
    let first_words: Vec<&str> =
        help.lines().filter_map(|line| line.split_ascii_whitespace().next()).collect();
    let is_listed = |method: &&String| first_words.contains(&method.as_str());
    methods.iter().filter(is_listed).cloned().collect()
}

/// Whoever adds a method that SPDK's client does not know adds it to the plugin, too.
#[test]
fn each_method_of_the_server_is_a_subcommand() {
    let vhost = Vhost::start(&[]);
    let methods = vhost.ok("rpc_get_methods", json!({}));
    let mut methods: Vec<String> = serde_json::from_value(methods).unwrap();
    methods.sort();
    let with = run(&vhost, "--help").ok();
    assert_eq!(listed(&methods, &with), methods);
    // And nothing that SPDK's client has by itself.
    let without = run_with_input(&vhost, "--help", "").ok();
    let known = listed(&methods, &without);
    methods.retain(|method| !known.contains(method));
    assert_eq!(methods, OWN);
}

/// The options that are not given are not sent, so that the server's defaults count.
#[test]
fn the_requests_have_the_given_parameters_and_no_others() {
    let vhost = Vhost::start(&[]);
    for (line, params) in [
        ("vhost_delete_controller c", json!({"ctrlr": "c"})),
        ("vhost_delete_controller --force c", json!({"ctrlr": "c", "force": true})),
        ("vhost_delete_controller c --timeout-ms 0", json!({"ctrlr": "c", "timeout_ms": 0})),
        (
            "vhost_delete_controller -f --timeout-ms 90000 c",
            json!({"ctrlr": "c", "timeout_ms": 90_000, "force": true}),
        ),
        (
            "vhost_create_scsi_controller s --packed-ring",
            json!({"ctrlr": "s", "packed_ring": true}),
        ),
        (
            "vhost_create_scsi_controller s --packed-ring --delay --cpumask 0x2",
            json!({"ctrlr": "s", "cpumask": "0x2", "delay": true, "packed_ring": true}),
        ),
        (
            "vhost_scsi_controller_remove_target s 3 --timeout-ms 0",
            json!({"ctrlr": "s", "scsi_target_num": 3, "timeout_ms": 0}),
        ),
        ("bdev_nbd_create N nbd://h/x", json!({"name": "N", "uri": "nbd://h/x"})),
        (
            "bdev_nbd_create N nbd://h/x -b 4096 -r -u U --reconnect-delay-sec 0 --connections 2",
            json!({"name": "N", "uri": "nbd://h/x", "block_size": 4096, "uuid": "U",
                "reconnect_delay_sec": 0, "connections": 2, "readonly": true}),
        ),
        ("bdev_nbd_delete N", json!({"name": "N"})),
        ("vhost_move_queue c 3 1", json!({"ctrlr": "c", "queue": 3, "core": 1})),
        (
            "vhost_move_queue c 3 1 --session 7",
            json!({"ctrlr": "c", "queue": 3, "core": 1, "session": 7}),
        ),
        ("vhost_get_controller_stats", Value::Null),
        ("vhost_get_controller_stats -n c", json!({"name": "c"})),
        ("vhost_get_reactor_turns", Value::Null),
        ("vhost_get_reactor_turns --reset", json!({"reset": true})),
    ] {
        let printed = run(&vhost, &format!("--dry-run {line}")).ok();
        let request: Value =
            serde_json::from_str(printed.strip_prefix("Request:\n").unwrap()).unwrap();
        assert_eq!(request["method"], line.split(' ').next().unwrap());
        assert_eq!(request["params"], params, "{line}");
    }
}

#[test]
fn a_controller_is_deleted_in_time_or_by_force() {
    let vhost = Vhost::start(&[]);
    controller(&vhost);
    let front_end = connect(&vhost);
    let busy = "Device or resource busy";
    run(&vhost, "vhost_delete_controller vhost.0 --timeout-ms 0").is_refused(-32602, busy);
    run(&vhost, "vhost_delete_controller --timeout-ms 10 vhost.0").is_refused(-32602, busy);
    assert!(vhost.socket("vhost.0").exists());
    assert_eq!(run(&vhost, "vhost_delete_controller vhost.0 --force").ok(), "");
    assert!(!vhost.socket("vhost.0").exists());
    drop(front_end);
    run(&vhost, "vhost_delete_controller vhost.0").is_refused(-32602, "No such device");

    // As without the plugin.
    controller(&vhost);
    assert_eq!(run(&vhost, "vhost_delete_controller vhost.0").ok(), "");
    assert!(!vhost.socket("vhost.0").exists());

    run(&vhost, "vhost_delete_controller").is_misused("required: ctrlr");
    for bad in ["-1", "1.5", "soon"] {
        let line = format!("vhost_delete_controller vhost.0 --timeout-ms {bad}");
        let why = format!("--timeout-ms: expected a non-negative integer, got '{bad}'");
        run(&vhost, &line).is_misused(&why);
    }
}

/// Without the added options, the client's own requests are sent.
#[test]
fn options_of_scsi_controllers_are_added() {
    let vhost = Vhost::start(&[]);
    vhost.null("N");
    for line in
        ["vhost_create_scsi_controller s --delay", "vhost_scsi_controller_remove_target s 3"]
    {
        let printed = run(&vhost, &format!("--dry-run {line}")).ok();
        assert_eq!(printed, run_with_input(&vhost, &format!("--dry-run {line}"), "").ok());
    }
    assert_eq!(run(&vhost, "vhost_create_scsi_controller s --packed-ring").ok(), "");
    let saved = vhost.ok("framework_get_config", json!({"name": "vhost_scsi"}));
    assert_eq!(saved[0]["params"]["packed_ring"], true);
    assert_eq!(run(&vhost, "vhost_scsi_controller_add_target s -1 N").result(), json!(0));
    let remove = "vhost_scsi_controller_remove_target s 0 --timeout-ms 70000";
    assert_eq!(run(&vhost, remove).ok(), "");
    run(&vhost, remove).is_refused(-32602, "Device or resource busy");
    run(&vhost, &remove.replace("70000", "-1")).is_misused("expected a non-negative integer");
}

#[test]
fn a_queue_is_moved() {
    let vhost = Launch::new().mask(harness::two_cores()).start();
    // The load reads what it has written.
    vhost.ok("bdev_malloc_create", json!({"name": "N", "num_blocks": 16384, "block_size": 512}));
    controller(&vhost);
    let mut front_end = connect(&vhost);
    let queues = front_end.start_new(4, QueueOptions::default()).unwrap();
    // Once each has answered, each is attached.
    let load = Load::start(queues, LoadOptions::default()).unwrap();
    load.wait_for(1000).unwrap();
    // How many queues are on each core.
    let places = || {
        let stats = vhost.ok("vhost_get_controller_stats", json!({}));
        let mut places = BTreeMap::<u64, u64>::new();
        for queue in stats[0]["sessions"][0]["queues"].as_array().unwrap() {
            *places.entry(queue["core"].as_u64().unwrap()).or_default() += 1;
        }
        places
    };
    for queue in 0..4 {
        assert_eq!(run(&vhost, &format!("vhost_move_queue vhost.0 {queue} 1")).ok(), "");
    }
    assert_eq!(places(), BTreeMap::from([(1, 4)]));
    let shown = run(&vhost, "vhost_get_controllers -n vhost.0").result();
    let session = &shown[0]["sessions"][0]["id"];
    let line = format!("vhost_move_queue vhost.0 2 0 --session {session}");
    assert_eq!(run(&vhost, &line).ok(), "");
    assert_eq!(places(), BTreeMap::from([(0, 1), (1, 3)]));

    for (line, text) in [
        ("nope 0 1", "No such device"),
        ("vhost.0 0 99", "Invalid argument"),
        ("vhost.0 99 1", "No such file or directory"),
        ("vhost.0 0 1 --session 4000000000", "No such file or directory"),
    ] {
        run(&vhost, &format!("vhost_move_queue {line}")).is_refused(-32602, text);
    }
    run(&vhost, "vhost_move_queue vhost.0 0").is_misused("required: core");
    run(&vhost, "vhost_move_queue vhost.0 -1 0").is_misused("expected a non-negative integer");
    let (summary, _) = load.stop().unwrap();
    assert_eq!((summary.errors, summary.mismatches, summary.outstanding), (0, 0, 0));
    front_end.disconnect().unwrap();
}

#[test]
fn controllers_and_reactors_are_shown() {
    let vhost = Vhost::start(&[]);
    controller(&vhost);
    let stats = run(&vhost, "vhost_get_controller_stats").result();
    assert_eq!(stats, vhost.ok("vhost_get_controller_stats", json!({})));
    assert_eq!(stats.as_array().unwrap().len(), 1);
    assert_eq!(run(&vhost, "vhost_get_controller_stats -n vhost.0").result(), stats);
    let refusal = vhost.err("vhost_get_controller_stats", json!({"name": "c"}));
    let refused = run(&vhost, "vhost_get_controller_stats --name c");
    refused.is_refused(refusal.code, &refusal.message);

    for line in ["vhost_get_reactor_turns", "vhost_get_reactor_turns -r"] {
        let reactors = run(&vhost, line).result();
        assert_eq!(reactors.as_array().unwrap().len(), 1);
        assert!(reactors[0]["longest_turn_us"].is_number());
    }
    run(&vhost, "vhost_get_reactor_turns now").is_misused("unrecognized arguments: now");
}

/// The client reads commands from its input, and can send them as a batch.
#[test]
fn the_subcommands_are_usable_in_scripts() {
    let vhost = Vhost::start(&[]);
    let commands = ["vhost_delete_controller vhost.0 --force", "vhost_get_reactor_turns --reset"];
    for (options, warns) in [("", false), ("-b", true)] {
        let line = format!("{options} --plugin vhost_rpc");
        controller(&vhost);
        let _front_end = connect(&vhost);
        let script = commands.join("\n");
        let ended = run_with_input(&vhost, &line, &script);
        assert_eq!((ended.code, ended.errors.contains("WARNING")), (Some(0), warns));
        assert!(ended.printed.contains("longest_turn_us"), "{}", ended.printed);
        assert!(!vhost.socket("vhost.0").exists());
        let again = run_with_input(&vhost, &line, &script);
        assert_eq!(again.code, Some(1), "{}{}", again.printed, again.errors);
    }
}
