//! Requests, bytes and connections of one RPC client do not keep others from being served.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::support::harness::{LIMIT, Rpc, Vhost, wait_until};

/// Without time slices, 56 KB of requests delayed all other clients by 42 s.
#[test]
fn a_huge_batch_holds_up_nobody() {
    let vhost = Vhost::start(&[]);
    let mut first = vhost.connect();
    for n in 0..500 {
        let disk = json!({"name": format!("N{n}"), "num_blocks": 8, "block_size": 512});
        first.call("bdev_null_create", disk).unwrap();
    }
    let mut other = vhost.connect();
    let mut overtake = |first: &mut Rpc, what: &str| {
        // Each of these is sent after the batch and answered before it. Few, as on a busy machine a
        // batch of short calls may end in the time of some round trips.
        for _ in 0..2 {
            other.call("spdk_get_version", Value::Null).unwrap();
            assert!(!first.has_answer(), "{what}");
        }
    };
    let bdev = json!({"name": "bdev"});
    for (method, params) in [
        ("bdev_get_bdevs", json!({})),
        ("bdev_get_iostat", json!({})),
        ("framework_get_config", bdev),
        ("rpc_get_methods", json!({})),
    ] {
        let member = |id| json!({"method": method, "id": id, "params": params});
        let batch: Vec<Value> = (0..700).map(member).collect();
        first.send_raw(&serde_json::to_string(&batch).unwrap());
        overtake(&mut first, method);
        let answers: Vec<Value> = serde_json::from_str(&first.receive_line()).unwrap();
        assert_eq!(answers.len(), 700);
        let run = answers.iter().take_while(|answer| answer["error"].is_null()).count();
        for (id, answer) in answers.iter().enumerate() {
            assert_eq!(answer["id"], id);
            assert_eq!(answer["error"].is_null(), id < run, "{method}: 32 MiB of answers");
        }
        // The members after the one that did not fit were not run.
        if let Some(last) = answers.last().filter(|_| run + 1 < 700) {
            let text = last["error"]["message"].as_str().unwrap();
            assert!(text.starts_with("Not run"), "{text}");
        }
    }
    // Notifications get no answers; all are run, before the next request.
    let silent = vec![r#"{"method":"bdev_get_bdevs"}"#; 200].join(",");
    first.send_raw(&format!(r#"[{silent}]{{"method":"spdk_get_version","id":1}}"#));
    overtake(&mut first, "notifications");
    first.receive().1.unwrap();
}

#[test]
fn a_client_that_sends_without_end_holds_up_nobody() {
    let vhost = Vhost::start(&[]);
    let mut stream = UnixStream::connect(vhost.rpc_socket()).unwrap();
    let other_end = stream.try_clone().unwrap();
    let spaces = vec![b' '; 1 << 20];
    let sender = std::thread::spawn(move || while stream.write_all(&spaces).is_ok() {});
    for _ in 0..100 {
        vhost.ok("spdk_get_version", Value::Null);
        assert!(!sender.is_finished());
    }
    other_end.shutdown(std::net::Shutdown::Both).unwrap();
    sender.join().unwrap();
}

#[test]
fn a_request_that_is_too_long_is_told_so_whatever_its_size() {
    let vhost = Vhost::start(&[]);
    for size in [256 << 10, (256 << 10) + 1, 1 << 20, 64 << 20] {
        let mut client = vhost.connect();
        let request = format!(r#"{{"method":"spdk_get_version","id":"{}"}}"#, "x".repeat(size));
        client.send_raw(&request);
        let answer: Value = serde_json::from_str(&client.receive_line()).unwrap();
        assert_eq!(
            answer["error"],
            json!({"code": -32600, "message": "Request too long: the limit is 262144 bytes"}),
            "{size}"
        );
        assert_eq!(client.read_to_end(), "");
    }
    vhost.ok("spdk_get_version", Value::Null);
}

/// A TCP socket whose last close takes as long as its sender likes: there is unsent data, and its
/// peer does not read. Returns it with the peer.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65536]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    set_socket_linger(&stream, Some(Duration::from_secs(1_000_000))).unwrap();
    (stream, peer)
}

/// Sends bytes with such a socket while the server is stopped, so that our copy is closed before
/// the server's. Returns the peer.
fn send_lingering(vhost: &Vhost, client: &UnixStream, bytes: &[u8]) -> TcpStream {
    vhost.signal("STOP");
    wait_until("it has stopped", || vhost.is_stopped());
    let (stream, peer) = lingering();
    let fds = [stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(client, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    drop(stream);
    vhost.signal("CONT");
    peer
}

fn connect(vhost: &Vhost) -> UnixStream {
    let client = UnixStream::connect(vhost.rpc_socket()).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client
}

#[test]
fn fds_whose_close_waits_hold_up_nobody() {
    let vhost = Vhost::start(&[]);
    // With a request, which is answered.
    let mut client = connect(&vhost);
    let request = br#"{"method":"spdk_get_version","id":1}"#;
    let mut peers = vec![send_lingering(&vhost, &client, request)];
    assert!(client.read(&mut [0; 4096]).unwrap() > 0);
    vhost.ok("spdk_get_version", Value::Null);
    vhost.wait_for_log("closing file descriptors that an RPC client has sent");
    // After an error that ends the connection.
    let mut client = connect(&vhost);
    client.write_all(b"x").unwrap();
    peers.push(send_lingering(&vhost, &client, b" "));
    vhost.ok("spdk_get_version", Value::Null);
    drop(client);
    // In a connection that is closed before it is read.
    let client = connect(&vhost);
    vhost.ok("spdk_get_version", Value::Null);
    peers.push(send_lingering(&vhost, &client, b" "));
    drop(client);
    // In more connections than there are slots, all of them closed by the client.
    for _ in 0..70 {
        let client = connect(&vhost);
        peers.push(send_lingering(&vhost, &client, request));
    }
    vhost.ok("spdk_get_version", Value::Null);
    // In connections that are not accepted, as all slots are taken.
    let taken: Vec<_> = (0..64).map(|_| connect(&vhost)).collect();
    let waiting = connect(&vhost);
    peers.push(send_lingering(&vhost, &waiting, b" "));
    assert_eq!(vhost.stop(), 0);
    drop((taken, peers));
}

#[test]
fn a_server_without_fds_to_spare_takes_clients_as_soon_as_it_has_some() {
    let vhost = Vhost::start(&[]);
    vhost.ok("spdk_get_version", Value::Null);
    let limit = |most: &str| {
        let pid = vhost.pid().to_string();
        let prlimit = Command::new("prlimit").args(["--pid", &pid, most]).status().unwrap();
        assert!(prlimit.success());
    };
    limit("--nofile=10:");
    let mut waiting: Vec<_> = (0..3).map(|_| vhost.connect()).collect();
    for client in &mut waiting {
        client.send("spdk_get_version", Value::Null);
    }
    vhost.wait_for_log("cannot accept an RPC connection");
    limit("--nofile=4096:");
    for client in &mut waiting {
        client.receive().1.unwrap();
    }
    assert_eq!(vhost.log().matches("cannot accept an RPC connection").count(), 1);
}
