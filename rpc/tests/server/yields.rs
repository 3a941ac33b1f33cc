//! Long requests yield to other clients, over a real socket.
#![expect(clippy::unwrap_used, reason = "a helper fails its test by panicking")]

use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::fixture::{Fixture, RawClient, run, run_with_paused_clock};
use rpc::CONNECTIONS_MAX;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// Waits until a request of a second client is answered. Returns how many calls of the first client
/// had started by then.
async fn started_when_another_is_answered(fixture: &Fixture, first: &mut RawClient) -> usize {
    fixture.probe.until(|probe| !probe.started.borrow().is_empty()).await;
    fixture.client().await.sync().await;
    let started = fixture.probe.started.borrow().len();
    assert!(first.line().await.is_some());
    started
}

#[test]
fn a_batch_yields_between_its_members() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let member = r#"{"method":"note","id":1}"#;
        client.send(format!("[{}]", vec![member; 1000].join(","))).await;
        let started = started_when_another_is_answered(&fixture, &mut client).await;
        assert!(started < 100, "{started}");
        assert_eq!(fixture.probe.started.borrow().len(), 1000);
    });
}

#[test]
fn a_connection_yields_between_requests() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"note","id":1}"#.repeat(1000)).await;
        let started = started_when_another_is_answered(&fixture, &mut client).await;
        assert!(started < 100, "{started}");
        for _ in 1..1000 {
            assert!(client.line().await.is_some());
        }
    });
}

#[test]
fn a_long_answer_yields_to_other_clients_but_not_to_the_next_request_of_its_client() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"list","id":1,"params":[300000]}{"method":"note","id":2}"#).await;
        let mut other = fixture.client().await;
        for _ in 0..20 {
            other.sync().await;
        }
        assert!(fixture.probe.started.borrow().is_empty());
        for id in [1, 2] {
            let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
            assert_eq!(answer["id"], id);
        }
        // The same for a batch: its members start in order, and before the next request.
        let list = r#"{"method":"list","id":1,"params":[50000]}"#;
        let batch = format!(r#"[{list},{{"method":"note","id":2}},{list}]"#);
        client.send(format!(r#"{batch}{{"method":"echo","id":3}}"#)).await;
        let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
        let ids: Vec<_> = answer.as_array().unwrap().iter().map(|a| a["id"].clone()).collect();
        assert_eq!(ids, [1, 2, 1]);
        assert!(client.line().await.unwrap().contains(r#""id":3"#));
    });
}

/// A batch starts its next member when one waits for an event, although another one works and
/// yields at that time.
#[test]
fn a_member_that_waits_is_told_from_one_that_works() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"[{"method":"spin"},{"method":"hesitate"},{"method":"note"}]"#).await;
        let started = fixture.probe.until(|probe| !probe.started.borrow().is_empty());
        assert!(tokio::time::timeout(Duration::from_secs(10), started).await.is_ok());
    });
}

/// Answers in unfinished batches count as unsent.
#[test]
fn the_answers_in_unfinished_batches_are_bounded() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let batch = r#"[{"method":"big","id":1,"params":[600000]},{"method":"wait","id":2}]"#;
        client.send(batch.repeat(10)).await;
        fixture.probe.until(|probe| probe.started.borrow().len() == 4).await;
        for _ in 0..50 {
            fixture.client().await.sync().await;
        }
        assert_eq!(fixture.probe.started.borrow().len(), 4);
        fixture.release(10);
        for _ in 0..10 {
            assert!(client.line().await.unwrap().len() > 600_000);
        }
    });
}

#[test]
fn a_client_that_sends_without_end_does_not_delay_others() {
    run(async {
        let fixture = Fixture::new();
        for endless in [" ", "x"] {
            let mut stream = UnixStream::connect(fixture.path()).unwrap();
            let bytes = endless.repeat(200_000);
            let sender =
                std::thread::spawn(move || while stream.write_all(bytes.as_bytes()).is_ok() {});
            let mut other = fixture.client().await;
            for _ in 0..200 {
                other.sync().await;
            }
            assert!(endless == "x" || !sender.is_finished());
        }
        fixture.server.shutdown().await;
    });
}

fn send_with_fd(client: &RawClient, bytes: &[u8]) {
    let fds = [client.stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let part = [std::io::IoSlice::new(bytes)];
    sendmsg(&client.stream, &part, &mut control, SendFlags::empty()).unwrap();
}

#[test]
fn fds_are_closed_and_too_many_close_the_connection() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        for id in 0..16 {
            send_with_fd(&client, format!(r#"{{"method":"echo","id":{id}}}"#).as_bytes());
            assert!(client.line().await.unwrap().contains(&format!(r#""id":{id}"#)));
        }
        client.sync().await;
        send_with_fd(&client, br#"{"method":"note","id":1}"#);
        assert_eq!(client.line().await, None);
        assert!(fixture.probe.started.borrow().is_empty());
        fixture.client().await.sync().await;
    });
}

#[test]
fn the_client_that_is_idle_longest_is_disconnected_if_another_waits() {
    run_with_paused_clock(async {
        let fixture = Fixture::new();
        let mut clients = Vec::new();
        for index in 0..CONNECTIONS_MAX {
            let mut client = fixture.client().await;
            if index < 2 {
                client.send(r#"{"method":"wait","id":1}"#).await;
                fixture.probe.until(|probe| probe.started.borrow().len() == index + 1).await;
            } else {
                client.sync().await;
            }
            clients.push(client);
        }
        // While no client waits, none is disconnected.
        tokio::time::sleep(Duration::from_secs(3600)).await;
        for client in &mut clients[2..] {
            client.sync().await;
        }
        let begin = tokio::time::Instant::now();
        fixture.client().await.sync().await;
        assert!(begin.elapsed() >= Duration::from_secs(300));
        assert_eq!(clients[2].line().await, None, "the one that was idle longest");
        // Clients with a running request stay connected.
        fixture.release(2);
        for client in &mut clients[..2] {
            let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
            assert_eq!(answer["result"], json!("waited"));
        }
    });
}
