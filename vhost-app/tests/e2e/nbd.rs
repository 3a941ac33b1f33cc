//! Disks of NBD servers: how they are created by RPC and served, and what happens when the server
//! dies, hangs, or is not an NBD server.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::support::harness::{self, Launch, Refusal, Vhost, wait_until};
use crate::support::nbdkit::Nbdkit;
use crate::support::verified_load::{end, goes_on, guest};

const BYTES: u64 = 32 << 20;

fn create(vhost: &Vhost, server: &Nbdkit, name: &str) {
    let params = json!({"name": name, "uri": server.uri()});
    assert_eq!(vhost.ok("bdev_nbd_create", params), name);
}

fn is_connected(vhost: &Vhost, name: &str) -> bool {
    let shown = vhost.bdev(name);
    shown["driver_specific"]["nbd"]["connected"].as_bool().unwrap()
}

#[test]
fn a_disk_is_created_shown_and_saved() {
    let server = Nbdkit::unix(BYTES);
    let vhost = Launch::new().args(&["--network", "off"]).start();
    let uri = server.uri();
    let whole = json!({"name": "N0", "uri": uri, "block_size": 4096, "readonly": true,
        "uuid": "12345678-1234-4234-8234-123456789abc", "reconnect_delay_sec": 5, "connections": 2});
    assert_eq!(vhost.ok("bdev_nbd_create", whole), "N0");
    create(&vhost, &server, "N1");
    let shown = vhost.ok("bdev_get_bdevs", json!({}));
    assert_eq!(shown[0]["product_name"], "NBD Disk");
    assert_eq!(shown[0]["uuid"], "12345678-1234-4234-8234-123456789abc");
    assert_eq!(
        (&shown[0]["block_size"], &shown[0]["num_blocks"]),
        (&json!(4096), &json!(BYTES / 4096))
    );
    assert_eq!(shown[0]["supported_io_types"]["write"], false);
    assert_eq!(
        (&shown[1]["block_size"], &shown[1]["num_blocks"]),
        (&json!(512), &json!(BYTES / 512))
    );
    let about = |connections| json!({"uri": uri, "connected": true, "connections": connections});
    assert_eq!(shown[0]["driver_specific"]["nbd"], about(2));
    assert_eq!(shown[1]["driver_specific"]["nbd"], about(4));

    let saved = vhost.spdk_rpc(&["save_config"]).unwrap();
    assert_eq!(vhost.stop(), 0);
    let vhost = Launch::new().config(&saved).start();
    assert_eq!(vhost.ok("bdev_get_bdevs", json!({}))[1]["uuid"], shown[1]["uuid"]);
    assert_eq!(vhost.spdk_rpc(&["save_config"]).unwrap(), saved);
    let path = vhost.dir().join("checked.json");
    std::fs::write(&path, &saved).unwrap();
    let checked = Launch::new().args(&["--check", path.to_str().unwrap()]).run_to_end();
    assert_eq!(checked.code, Some(0), "{}", checked.log);
    vhost.malloc("M0");
    let no_device = Refusal::new(-19, "No such device");
    for name in ["N2", "M0"] {
        assert_eq!(vhost.err("bdev_nbd_delete", json!({ "name": name })), no_device);
    }
    assert_eq!(vhost.ok("bdev_nbd_delete", json!({"name": "N0"})), true);
    assert_eq!(vhost.bdev_names(), ["N1", "M0"]);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn what_cannot_be_created_is_refused() {
    let server = Nbdkit::unix(BYTES);
    let vhost = Launch::new().args(&["--network", "off"]).start();
    let refused = |key: &str, value: Value| {
        let mut params = json!({"name": "N1", "uri": server.uri()});
        params[key] = value;
        vhost.err("bdev_nbd_create", params)
    };
    create(&vhost, &server, "N0");
    assert_eq!(refused("name", json!("N0")), Refusal::new(-17, "File exists"));
    let decode = Refusal::new(-32603, "spdk_json_decode_object failed");
    assert_eq!(refused("block_size", json!("x")), decode);
    let invalid = Refusal::new(-22, "Invalid argument");
    for (key, value) in [
        ("name", json!("")),
        ("uri", json!("x")),
        ("uri", json!("nbds://localhost/")),
        ("block_size", json!(1000)),
        ("connections", json!(0)),
        ("connections", json!(17)),
    ] {
        assert_eq!(refused(key, value.clone()), invalid, "{key} {value}");
    }
    let nowhere = json!("nbd+unix:///?socket=/no/such/socket");
    assert_eq!(refused("uri", nowhere), Refusal::new(-2, "No such file or directory"));
    let not_permitted = Refusal::new(-1, "Operation not permitted");
    assert_eq!(refused("uri", json!("nbd://127.0.0.1:1/")), not_permitted);
    vhost.wait_for_log("start vhost with --network on");
    assert_eq!(vhost.bdev_names(), ["N0"]);
    assert_eq!(vhost.stop(), 0);

    let vhost = Launch::new().args(&["--network", "on"]).start();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let params = json!({"name": "N", "uri": format!("nbd://{closed}/")});
    assert_eq!(vhost.err("bdev_nbd_create", params), Refusal::new(-111, "Connection refused"));
    assert_eq!(vhost.stop(), 0);
}

/// Four rings on two reactors.
fn a_load_outlives_its_server(mut server: Nbdkit, connections: u32, args: &[&str]) {
    let vhost = Launch::new().mask(harness::two_cores()).args(args).start();
    let params = json!({"name": "N0", "uri": server.uri(), "connections": connections});
    vhost.ok("bdev_nbd_create", params);
    let load = guest(&vhost, "N0", 4);
    goes_on(&vhost, "N0");
    for _ in 0..3 {
        server.kill();
        wait_until("the bdev notices", || !is_connected(&vhost, "N0"));
        server.serve_again();
        goes_on(&vhost, "N0");
    }
    wait_until("the log has all connects", || vhost.log().matches("connected to nbd").count() == 4);
    end(load);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn a_load_outlives_its_server_on_reactors_that_poll() {
    a_load_outlives_its_server(Nbdkit::unix(BYTES), 4, &[]);
}

#[test]
fn a_load_outlives_its_server_on_reactors_that_sleep() {
    a_load_outlives_its_server(Nbdkit::unix(BYTES), 4, &["--interrupt-mode"]);
}

/// The reactors share the connection.
#[test]
fn a_load_on_one_connection_outlives_its_server() {
    a_load_outlives_its_server(Nbdkit::unix(BYTES), 1, &["--interrupt-mode"]);
}

#[test]
fn a_load_outlives_its_server_over_tcp() {
    a_load_outlives_its_server(Nbdkit::tcp(BYTES), 4, &["--network", "on"]);
}

#[test]
fn io_fails_after_the_reconnect_delay() {
    let mut server = Nbdkit::unix(BYTES);
    let vhost = Vhost::start(&[]);
    let params = json!({"name": "N0", "uri": server.uri(), "reconnect_delay_sec": 1});
    vhost.ok("bdev_nbd_create", params);
    let load = guest(&vhost, "N0", 1);
    goes_on(&vhost, "N0");
    server.kill();
    vhost.wait_for_log("I/O fails until there is one");
    wait_until("I/O fails", || vhost.log().contains("N0: write of"));
    server.serve_again();
    wait_until("it is connected", || is_connected(&vhost, "N0"));
    goes_on(&vhost, "N0");
    let (summary, _) = load.1.stop().unwrap();
    assert!(summary.errors > 0 && summary.mismatches == 0 && summary.outstanding == 0);
    assert_eq!(vhost.stop(), 0);
}

/// The disk of a neighbour goes on, and so do RPCs, while a server hangs, is away, or never answers.
#[test]
fn a_server_that_hangs_holds_up_only_its_own_disk() {
    let server = Nbdkit::unix(BYTES);
    let vhost = Vhost::start(&[]);
    create(&vhost, &server, "N0");
    vhost.malloc("M0");
    let (neighbour, victim) = (guest(&vhost, "M0", 1), guest(&vhost, "N0", 1));
    goes_on(&vhost, "N0");
    server.signal("STOP");
    goes_on(&vhost, "M0");

    let silent = vhost.dir().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let mut hangs = vhost.connect();
    let uri = format!("nbd+unix:///?socket={}", silent.display());
    hangs.send("bdev_nbd_create", json!({"name": "N1", "uri": uri}));
    goes_on(&vhost, "M0");
    vhost.null("Null0");
    assert!(!hangs.has_answer(), "the server has not answered");

    // The server does not answer, and its disk is deleted all the same.
    vhost.ok("bdev_nbd_delete", json!({"name": "N0"}));
    let (summary, _) = victim.1.stop().unwrap();
    assert!(summary.errors > 0 && summary.mismatches == 0 && summary.outstanding == 0);
    server.signal("CONT");
    goes_on(&vhost, "M0");
    let timed_out = Refusal::new(-110, "Connection timed out");
    assert_eq!(hangs.receive().1.unwrap_err(), timed_out);
    end(neighbour);
    assert_eq!(vhost.stop(), 0);
}

#[test]
fn the_process_ends_while_a_server_hangs() {
    let server = Nbdkit::unix(BYTES);
    let vhost = Vhost::start(&[]);
    create(&vhost, &server, "N0");
    let _victim = guest(&vhost, "N0", 2);
    goes_on(&vhost, "N0");
    server.signal("STOP");
    assert_eq!(vhost.stop(), 0);
    server.signal("CONT");
}
