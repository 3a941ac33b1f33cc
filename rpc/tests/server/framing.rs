//! The framing rules of SPDK's server, over a real socket.

use crate::fixture::{Fixture, run};
use serde_json::{Value, json};

#[test]
fn answers_are_one_line_with_keys_in_order() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"jsonrpc":"2.0","method":"echo","id":1.50,"params":{"a":[1]}}"#).await;
        assert_eq!(
            client.line().await.unwrap(),
            r#"{"jsonrpc":"2.0","id":1.50,"result":"{\"a\":[1]}"}"#
        );
        client.send("\n{\"method\":\"fail\",\"id\":\"\u{e9}\"}\n").await;
        assert_eq!(
            client.line().await.unwrap(),
            r#"{"jsonrpc":"2.0","id":"\u00E9","error":{"code":-17,"message":"File exists"}}"#
        );
        client.send(r#"{"method":"echo","id":2,"params":["é",null]}"#).await;
        assert_eq!(
            client.line().await.unwrap(),
            r#"{"jsonrpc":"2.0","id":2,"result":"[\"\u00E9\",null]"}"#
        );
    });
}

#[test]
fn requests_need_no_separator_and_may_come_in_pieces() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client
            .send(r#"{"method":"echo","id":1}{"method":"echo","id":2} {"method":"echo","id":3}"#)
            .await;
        for id in 1..=3 {
            let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
            assert_eq!(answer, json!({"jsonrpc": "2.0", "id": id, "result": null}));
        }
        let request = r#"  {"method":"echo","id":"piecemeal","params":{"k":"\u00e9é"}}"#;
        let mut other = fixture.client().await;
        for byte in request.as_bytes() {
            client.send([*byte]).await;
            // The server has read the byte by the time it answers somebody else.
            other.sync().await;
        }
        let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
        assert_eq!(answer["id"], "piecemeal");
        assert_eq!(answer["result"], r#"{"k":"\u00e9é"}"#);
    });
}

#[test]
fn invalid_requests_do_not_end_the_connection() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let invalid = json!({"code": -32600, "message": "Invalid request"});
        for (request, id) in [
            ("5\n", json!(null)),
            ("\"text\"", json!(null)),
            ("null", json!(null)),
            ("[]", json!(null)),
            (r#"{"id":1}"#, json!(null)),
            (r#"{"method":"echo","id":1,"x":1}"#, json!(null)),
            (r#"{"method":"echo","method":"echo","id":1}"#, json!(null)),
            (r#"{"jsonrpc":"1.0","method":"echo","id":1}"#, json!(null)),
            (r#"{"method":"echo","id":{}}"#, json!(null)),
            (r#"{"method":"echo","id":1,"params":5}"#, json!(1)),
        ] {
            let answer = client.ask(request).await;
            assert_eq!(answer, json!({"jsonrpc": "2.0", "id": id, "error": invalid}), "{request}");
        }
        let answer = client.ask(r#"{"method":"nope","id":1}"#).await;
        assert_eq!(answer["error"], json!({"code": -32601, "message": "Method not found"}));
        client.sync().await;
    });
}

#[test]
fn notifications_are_answered_only_if_they_fail() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"note","params":[1]}{"method":"note","id":null}"#).await;
        client.send(r#"{"method":"fail"}{"method":"nope","id":null}"#).await;
        for code in [-17, -32601] {
            let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
            assert_eq!((&answer["id"], &answer["error"]["code"]), (&Value::Null, &json!(code)));
        }
        client.sync().await;
        assert_eq!(*fixture.probe.started.borrow(), ["[1]", ""]);
    });
}

#[test]
fn a_batch_is_answered_once_in_the_order_of_completion() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client
            .send(
                r#"[{"method":"wait","id":1},{"method":"note"},7,{"method":"echo","id":2},
                    {"method":"fail"},{"method":"note","id":null}]{"method":"echo","id":3}"#,
            )
            .await;
        // The request after the batch overtakes it.
        let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
        assert_eq!(answer["id"], 3);
        fixture.release(1);
        let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
        assert_eq!(
            answer,
            json!([
                {"jsonrpc": "2.0", "id": null, "error": {"code": -32600, "message": "Invalid request"}},
                {"jsonrpc": "2.0", "id": 2, "result": null},
                {"jsonrpc": "2.0", "id": null, "error": {"code": -17, "message": "File exists"}},
                {"jsonrpc": "2.0", "id": 1, "result": "waited"},
            ])
        );
        // Nothing but notifications: no answer, not even an empty array.
        client.send(r#"[{"method":"note"},{"method":"note"}]"#).await;
        client.sync().await;
        assert_eq!(fixture.probe.started.borrow().len(), 6);
    });
}

#[test]
fn requests_start_in_order_and_slow_ones_are_overtaken() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client
            .send(
                r#"{"method":"note","id":1,"params":[1]}{"method":"wait","id":2,"params":[2]}
                   {"method":"note","id":3,"params":[3]}{"method":"wait","id":4,"params":[4]}"#,
            )
            .await;
        let mut ids = Vec::new();
        for released in [0, 0, 2, 0] {
            fixture.release(released);
            let answer: Value = serde_json::from_str(&client.line().await.unwrap()).unwrap();
            ids.push(answer["id"].as_u64().unwrap());
        }
        assert_eq!(ids, [1, 3, 2, 4]);
        assert_eq!(fixture.probe.started.borrow()[..4], ["[1]", "[2]", "[3]", "[4]"]);
    });
}

#[test]
fn a_request_that_holds_the_connection_ends_before_the_next_one_starts() {
    run(async {
        let fixture = Fixture::new();
        let members = [
            r#"{"method":"hold","id":1,"params":[1]}"#,
            r#"{"method":"note","id":2,"params":[2]}"#,
            r#"{"method":"hold","id":3,"params":[3]}"#,
        ];
        // One after the other, and as a batch with a request behind it.
        for sent in [members.concat(), format!("[{}]{}", members.join(","), members[1])] {
            let mut client = fixture.client().await;
            fixture.probe.started.borrow_mut().clear();
            client.send(sent).await;
            fixture.probe.until(|probe| probe.started.borrow().len() == 1).await;
            // Other clients are served meanwhile.
            fixture.client().await.sync().await;
            fixture.release(1);
            fixture.probe.until(|probe| probe.started.borrow().len() == 4).await;
            assert_eq!(*fixture.probe.started.borrow(), ["[1]", "done", "[2]", "[3]"]);
            fixture.release(1);
            fixture.probe.until(|probe| probe.started.borrow().len() >= 5).await;
            assert!(client.line().await.is_some());
        }
    });
}

/// What a client sent before it disconnected still runs, in order.
#[test]
fn requests_behind_one_that_holds_the_connection_run_after_their_client_has_gone() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client
            .send(r#"{"method":"hold","id":1,"params":[1]}{"method":"note","id":2,"params":[2]}"#)
            .await;
        fixture.probe.until(|probe| probe.started.borrow().len() == 1).await;
        drop(client);
        fixture.probe.until(|probe| probe.gone.get() == 1).await;
        assert_eq!(*fixture.probe.started.borrow(), ["[1]"]);
        fixture.release(1);
        fixture.probe.until(|probe| probe.started.borrow().len() == 3).await;
        assert_eq!(*fixture.probe.started.borrow(), ["[1]", "done", "[2]"]);
    });
}

#[test]
fn phases_and_in_process_calls() {
    run(async {
        use rpc::Phase::{Runtime, Startup};
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        let answer = client.ask(r#"{"method":"early","id":1}"#).await;
        assert_eq!(answer["error"]["code"], -1);
        let text = answer["error"]["message"].as_str().unwrap();
        assert!(text.starts_with("Method may only be called before framework is initialized. Use"));
        fixture.registry.set_phase(Startup);
        assert_eq!(client.ask(r#"{"method":"early","id":1}"#).await["result"], true);
        assert_eq!(
            client.ask(r#"{"method":"late","id":1}"#).await["error"],
            json!({"code": -1, "message": "Method may only be called after framework is \
                   initialized using framework_start_init RPC."})
        );

        let registry = &fixture.registry;
        assert_eq!(registry.call("late", None, Runtime).await, Ok(json!(true)));
        assert_eq!(registry.call("late", None, Startup).await.unwrap_err().code, -1);
        let params = Some(json!({"a": 1}));
        assert_eq!(registry.call("echo", params, Startup).await, Ok(json!(r#"{"a":1}"#)));
        assert_eq!(registry.call("echo", Some(Value::Null), Startup).await, Ok(Value::Null));
        assert_eq!(registry.call("nope", None, Startup).await.unwrap_err().code, -32601);
        let calls = registry.calls();
        assert!(calls.contains(&("early", 2, 1)) && calls.contains(&("late", 3, 2)), "{calls:?}");
        assert_eq!(registry.call("echo", Some(json!(1)), Startup).await.unwrap_err().code, -32600);
    });
}

#[test]
fn lists_methods_backwards_with_aliases_and_phase_and_allow_list() {
    run(async {
        let mut registry = rpc::Registry::new();
        for (name, phases) in
            [("a", rpc::Phases::Startup), ("b", rpc::Phases::Runtime), ("c", rpc::Phases::Both)]
        {
            registry.register(name, phases, |params: rpc::Params| async move {
                Ok(params.method().into())
            });
        }
        registry.alias("old_b", "b");
        let registry = std::rc::Rc::new(registry);
        let list = async |params, phase| {
            let names = registry.call("rpc_get_methods", Some(params), phase).await;
            names.map(|names| names.to_string())
        };
        use rpc::Phase::{Runtime, Startup};
        assert_eq!(list(json!({}), Startup).await.unwrap(), r#"["c","b","a","rpc_get_methods"]"#);
        assert_eq!(
            list(json!({"current": true, "include_aliases": true}), Runtime).await.unwrap(),
            r#"["old_b","c","b","rpc_get_methods"]"#
        );
        let error = list(json!({"current": 1}), Startup).await.unwrap_err();
        assert_eq!(error, rpc::RpcError::invalid_params("Invalid parameters"));
        assert_eq!(registry.call("old_b", None, Runtime).await, Ok(json!("b")));

        let mut registry = rpc::Registry::new();
        registry.register("a", rpc::Phases::Both, |_| async { Ok(json!(1)) });
        registry.register("b", rpc::Phases::Both, |_| async { Ok(json!(2)) });
        registry.allow_only(["b".into(), "rpc_get_methods".into()]);
        let registry = std::rc::Rc::new(registry);
        let error = registry.call("a", None, Runtime).await.unwrap_err();
        assert_eq!(error, rpc::RpcError::method_not_found());
        assert_eq!(registry.call("b", None, Runtime).await, Ok(json!(2)));
        let names = registry.call("rpc_get_methods", None, Runtime).await.unwrap();
        assert_eq!(names, json!(["b", "rpc_get_methods"]));
    });
}
