//! Clients that disconnect, send invalid bytes, or exceed limits, over a real socket.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use crate::fixture::{Fixture, run, run_with_paused_clock};
use rpc::{CONNECTIONS_MAX, OUTSTANDING_MAX, REQUEST_MAX};
use serde_json::{Value, json};

const PARSE_ERROR: &str =
    r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}"#;

/// SPDK loses both the error and the answers before it.
#[test]
fn a_parse_error_is_answered_after_earlier_requests() {
    run(async {
        let fixture = Fixture::new();
        for garbage in
            ["x", "/* no comments */", "}", "{\"a\" 1}", "[1,]", "{\"method\":\"echo\",}"]
        {
            let mut client = fixture.client().await;
            client
                .send(r#"{"method":"echo","id":1}{"method":"fail","id":2}"#.to_owned() + garbage)
                .await;
            assert!(client.line().await.unwrap().contains(r#""id":1,"result""#));
            assert!(client.line().await.unwrap().contains(r#""id":2,"error""#));
            assert_eq!(client.line().await.unwrap(), PARSE_ERROR, "{garbage}");
            assert_eq!(client.line().await, None);
        }
    });
}

#[test]
fn requests_after_invalid_bytes_do_not_run_and_earlier_answers_arrive_whole() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"big","id":1,"params":[3000000]} x {"method":"note"}"#).await;
        client.send(vec![b' '; 100_000]).await;
        assert!(client.line().await.unwrap().len() > 3_000_000);
        assert_eq!(client.line().await.unwrap(), PARSE_ERROR);
        assert_eq!(client.line().await, None);
        assert_eq!(*fixture.probe.started.borrow(), ["big"]);
    });
}

/// In SPDK each of these connections keeps its slot for ever.
#[test]
fn a_connection_closed_by_an_error_releases_its_slot() {
    run(async {
        let fixture = Fixture::new();
        let count = CONNECTIONS_MAX + 6;
        for _ in 0..count {
            let mut client = fixture.client().await;
            client.send(r#"{"method":"wait","id":1} x"#).await;
            assert_eq!(client.line().await.unwrap(), PARSE_ERROR);
            assert_eq!(client.line().await, None);
        }
        fixture.client().await.sync().await;
        fixture.probe.until(|probe| probe.gone.get() == count).await;
        // The calls continue, and their late answers are dropped.
        fixture.release(count);
        fixture.probe.until(|probe| probe.started.borrow().len() == 2 * count).await;
        fixture.client().await.sync().await;
    });
}

#[test]
fn a_client_that_stays_silent_after_an_error_releases_its_slot() {
    run_with_paused_clock(async {
        let fixture = Fixture::new();
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut client = fixture.client().await;
            client.send("x").await;
            assert_eq!(client.line().await.as_deref(), Some(PARSE_ERROR));
            assert_eq!(client.line().await, None);
            silent.push(client);
        }
        fixture.client().await.sync().await;
    });
}

/// The limit on discarded bytes is 1 GiB, because a client may write all of its request before it
/// reads.
#[test]
fn a_client_that_writes_without_end_after_an_error_is_disconnected() {
    run(async {
        let fixture = Fixture::new();
        let mut stream = UnixStream::connect(fixture.path()).unwrap();
        let writing = tokio::task::spawn_blocking(move || {
            let mut written = 0;
            while let Ok(count) = stream.write(&[b'x'; 1 << 16]) {
                written += count;
            }
            written
        });
        let written = writing.await.unwrap();
        // Some of the bytes may be in the socket's buffer.
        assert!((1 << 30..(1 << 30) + (1 << 23)).contains(&written), "{written}");
    });
}

#[test]
fn clients_that_disconnect_release_their_slots_while_their_requests_continue() {
    run(async {
        let fixture = Fixture::new();
        let count = CONNECTIONS_MAX + 6;
        for index in 0..count {
            let mut client = fixture.client().await;
            client.send(r#"{"method":"wait","id":1}"#).await;
            fixture.probe.until(|probe| probe.started.borrow().len() == index + 1).await;
        }
        fixture.probe.until(|probe| probe.gone.get() == count).await;
        fixture.client().await.sync().await;
        fixture.release(count);
        fixture.probe.until(|probe| probe.started.borrow().len() == 2 * count).await;
    });
}

#[test]
fn the_next_client_waits_for_a_slot() {
    run(async {
        let fixture = Fixture::new();
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut client = fixture.client().await;
            client.sync().await;
            clients.push(client);
        }
        let mut late = fixture.client().await;
        late.send(r#"{"method":"note","id":1}"#).await;
        for client in &mut clients {
            client.sync().await;
        }
        assert!(fixture.probe.started.borrow().is_empty());
        clients.pop();
        assert!(late.line().await.is_some());
    });
}

#[test]
fn a_half_closed_client_gets_its_answers_even_late_ones() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"wait","id":1}{"method":"echo","id":2}"#).await;
        client.half_close().await;
        assert!(client.line().await.unwrap().contains(r#""id":2"#));
        fixture.client().await.sync().await;
        assert_eq!(fixture.probe.gone.get(), 0);
        fixture.release(1);
        assert!(client.line().await.unwrap().contains(r#""id":1,"result":"waited""#));
        assert_eq!(client.line().await, None);

        // A client that closes the other half has disconnected.
        let mut client = fixture.client().await;
        client.send(r#"{"method":"wait","id":1}"#).await;
        client.half_close().await;
        fixture.probe.until(|probe| probe.started.borrow().len() == 3).await;
        drop(client);
        fixture.probe.until(|probe| probe.gone.get() == 1).await;
    });
}

#[test]
fn requests_of_a_client_that_sends_and_disconnects_run() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"note","id":1}"#.repeat(1000)).await;
        drop(client);
        fixture.probe.until(|probe| probe.started.borrow().len() == 1000).await;
    });
}

#[test]
fn a_request_may_fill_the_buffer_but_not_more() {
    run(async {
        let fixture = Fixture::new();
        let frame = r#"{"method":"note","id":1,"params":[""]}"#;
        let request = |size: usize| {
            frame.replace(r#""""#, &format!("\"{}\"", "a".repeat(size - frame.len())))
        };
        let mut client = fixture.client().await;
        client.send(format!(" \n{}", request(REQUEST_MAX))).await;
        assert!(client.line().await.unwrap().contains("true"));
        // White space before a request does not count towards its length.
        client.send(vec![b' '; 2 * REQUEST_MAX]).await;
        client.sync().await;

        // A request of any length over the limit gets an error, even if the client writes all of it
        // before it reads. Earlier requests are answered first.
        for size in [REQUEST_MAX + 1, 1 << 20, 30 << 20] {
            let mut client = fixture.client().await;
            client.send(r#"{"method":"big","id":1,"params":[900000]}"#).await;
            client.send(request(size)).await;
            assert!(client.line().await.unwrap().len() > 900_000);
            let error = r#""error":{"code":-32600,"message":"Request too long: the limit is 262144 bytes"}"#;
            let expected = format!(r#"{{"jsonrpc":"2.0","id":null,{error}}}"#);
            assert_eq!(client.line().await, Some(expected), "{size}");
            assert_eq!(client.line().await, None);
        }
        assert_eq!(fixture.probe.started.borrow()[1..], ["big"; 3]);
        fixture.client().await.sync().await;
    });
}

#[test]
fn invalid_bytes_are_a_parse_error() {
    run(async {
        let fixture = Fixture::new();
        let cases: Vec<Vec<u8>> = vec![
            b"[".repeat(200_000),
            b"{\"a\":".repeat(50_000),
            [b"[".repeat(65), b"]".repeat(65)].concat(),
            format!("[{}1]", "1,".repeat(8191)).into_bytes(),
            b"{\"method\":\"\xff\",\"id\":1}".to_vec(),
            b"{\"method\":\"echo\",\"id\":\"\xed\xa0\x80\"}".to_vec(),
            b"{\"method\":\"echo\",\"id\":\"\xc0\x80\"}".to_vec(),
            br#"{"method":"echo","id":"\ud800"}"#.to_vec(),
            b"\0\0\0\0".to_vec(),
            b"{\"method\":\"ec\0ho\"}".to_vec(),
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            b"x".repeat(10_000_000),
        ];
        for bytes in cases {
            let mut client = fixture.client().await;
            client.send(&bytes).await;
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
            assert_eq!(client.line().await.as_deref(), Some(PARSE_ERROR), "{start}");
            assert_eq!(client.line().await, None, "{start}");
        }
        fixture.client().await.sync().await;
    });
}

#[test]
fn odd_but_valid_bytes_are_answered() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let nested = format!("{}{}", "[".repeat(63), "]".repeat(63));
        let long = "9".repeat(200_000);
        for (id, params) in [
            ("1e999999999999", "[1e999]"),
            ("-0", "[-1E-99999]"),
            (long.as_str(), "[]"),
            (r#""\u0000""#, r#"["\u0000"]"#),
            ("1", nested.as_str()),
        ] {
            let request = format!(r#"{{"method":"echo","id":{id},"params":{params}}}"#);
            client.send(request).await;
            let line = client.line().await.unwrap();
            assert!(line.starts_with(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"#)));
        }
        let answer = client.ask(r#"{"method":"ec\u0000ho","id":1}"#).await;
        assert_eq!(answer["error"]["code"], -32601);
    });
}

#[test]
fn a_client_that_does_not_read_starts_no_further_requests_and_delays_no_others() {
    run(async {
        let fixture = Fixture::new();
        let (mut deaf, total) = (fixture.client().await, 2000);
        let (requests, size) =
            (r#"{"method":"big","id":1,"params":[100000]}"#.repeat(total), 100_000);
        deaf.send(&requests[..requests.len() / 2]).await;
        let mut other = fixture.client().await;
        let started = || fixture.probe.started.borrow().len();
        let mut before = usize::MAX;
        while started() != before {
            before = started();
            for _ in 0..50 {
                other.sync().await;
            }
        }
        // A megabyte of answers waits in the server, and some of them in the kernel.
        assert!((10..100).contains(&started()), "{}", started());
        drop(other);
        let read = async {
            for _ in 0..total / 2 {
                assert!(deaf.line().await.unwrap().len() > size);
            }
        };
        read.await;
        assert_eq!(started(), total / 2);
    });
}

#[test]
fn requests_beyond_the_limit_wait_until_others_end() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"wait","id":1}"#.repeat(OUTSTANDING_MAX + 10)).await;
        fixture.probe.until(|probe| probe.started.borrow().len() == OUTSTANDING_MAX).await;
        for _ in 0..50 {
            fixture.client().await.sync().await;
        }
        assert_eq!(fixture.probe.started.borrow().len(), OUTSTANDING_MAX);
        fixture.release(OUTSTANDING_MAX + 10);
        for _ in 0..OUTSTANDING_MAX + 10 {
            assert!(client.line().await.is_some());
        }
        // The server detects the disconnect of a client with the maximum number of running
        // requests.
        client.send(r#"{"method":"wait","id":1}"#.repeat(OUTSTANDING_MAX + 10)).await;
        let all = 2 * (OUTSTANDING_MAX + 10) + OUTSTANDING_MAX;
        fixture.probe.until(|probe| probe.started.borrow().len() == all).await;
        drop(client);
        fixture.probe.until(|probe| probe.gone.get() == OUTSTANDING_MAX).await;
    });
}

#[test]
fn a_batch_of_many_slow_members_is_answered_whole() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let count = OUTSTANDING_MAX + 50;
        let member = r#"{"method":"wait","id":1}"#;
        client.send(format!("[{}]", vec![member; count].join(","))).await;
        fixture.probe.until(|probe| probe.started.borrow().len() == OUTSTANDING_MAX).await;
        fixture.release(count);
        let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
        assert_eq!(answer.as_array().unwrap().len(), count);
    });
}

#[test]
fn an_answer_that_is_too_long_is_an_error() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let answer = client.ask(r#"{"method":"big","id":7,"params":[33554432]}"#).await;
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(7), &json!(-32603)));
        let member = r#"{"method":"big","id":1,"params":[20000000]}"#;
        let small = r#"{"method":"note","id":"x"}"#;
        let silent = r#"{"method":"note"}"#;
        let answer = client.ask(format!("[{small},{member},{member},{small},{silent}]")).await;
        assert_eq!(answer[0]["result"], true);
        assert_eq!(answer[1]["result"].as_str().unwrap().len(), 20_000_000);
        assert_eq!((&answer[2]["id"], &answer[2]["error"]["code"]), (&json!(1), &json!(-32603)));
        // Later members do not run, and get an error.
        let not_run = json!({
            "code": -32603,
            "message": "Not run: the answers to this batch are too long",
        });
        assert_eq!(answer[3], json!({"jsonrpc": "2.0", "id": "x", "error": not_run}));
        assert_eq!(answer[4], json!({"jsonrpc": "2.0", "id": null, "error": not_run}));
        assert_eq!(fixture.probe.started.borrow()[1..], ["", "big", "big"]);
    });
}

#[test]
fn while_paused_connects_succeed_and_requests_wait() {
    run(async {
        let fixture = Fixture::new();
        let mut running = fixture.client().await;
        running.send(r#"{"method":"wait","id":1}"#).await;
        fixture.probe.until(|probe| probe.started.borrow().len() == 1).await;
        fixture.server.pause();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"note","id":2}"#).await;
        // Running requests continue and are answered.
        fixture.release(1);
        assert!(running.line().await.unwrap().contains("waited"));
        // The request of a client that disconnects meanwhile runs later.
        let mut other = fixture.client().await;
        other.send(r#"{"method":"note","id":3}"#).await;
        drop(other);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(fixture.probe.started.borrow().len(), 2);
        fixture.server.resume();
        assert!(client.line().await.is_some());
        fixture.probe.until(|probe| probe.started.borrow().len() == 4).await;
    });
}

#[test]
fn a_panic_in_a_method_ends_its_connection_only() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = rpc::Registry::new();
        registry.register("now", rpc::Phases::Both, |_| async { panic!("now") });
        registry.register("later", rpc::Phases::Both, |_| async {
            tokio::task::yield_now().await;
            panic!("later")
        });
        registry.set_phase(rpc::Phase::Runtime);
        let path = dir.path().join("s");
        let server = rpc::Server::bind(&path, Rc::new(registry)).unwrap();
        let connect = async || tokio::net::UnixStream::connect(&path).await.unwrap();
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        for _ in 0..CONNECTIONS_MAX + 1 {
            let mut client = connect().await;
            client.write_all(br#"{"method":"now","id":1}"#).await.unwrap();
            assert_eq!(client.read(&mut [0; 10]).await.unwrap(), 0);
        }
        // A method that panics after a yield has no answer, but other answers of its client arrive.
        let mut client = connect().await;
        client.write_all(br#"{"method":"later","id":1}{"method":"nope","id":2}"#).await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert!(text.contains(r#""id":2"#) && text.lines().count() == 1, "{text}");
        server.shutdown().await;
    });
}

#[test]
fn a_panic_in_a_member_of_a_batch_is_an_error_among_its_answers() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let answer = client.ask(r#"[{"method":"panic","id":1},{"method":"echo","id":2}]"#).await;
        let error = json!({"code": -32603, "message": "Internal error"});
        assert_eq!(answer[0], json!({"jsonrpc": "2.0", "id": 1, "error": error}));
        assert_eq!(answer[1]["id"], 2);
    });
}
