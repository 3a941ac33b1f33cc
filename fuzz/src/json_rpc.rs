//! Fuzzes the RPC server: bytes on its socket, and methods with typical parameters.
//!
//! The whole of `rpc` runs on a socket of this process. Invariants:
//!
//! * Answers are JSON in printable ASCII, in sequence: objects, and lists of them for batches, with an id and either
//!   a result or an error.
//! * The same bytes get the same answers, however they are split.
//! * Text that is one JSON value, within the limits, does not get a parse error; text that is not JSON never runs a
//!   method.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use rpc::{DecodeFailure, Params, Phase, Phases, Registry, RpcError, Server};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::LocalSet;

use crate::input::Input;

/// Below all limits on size and tokens.
const TEXT_MAX: usize = 4096;
const PARSE_ERROR: i64 = -32700;

struct Stage {
    runtime: Runtime,
    local: LocalSet,
    path: String,
    /// Kept, as dropping it stops listening.
    _server: Server,
    calls: Rc<Cell<u64>>,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

/// Parameters like those of `bdev_malloc_create` and similar methods.
#[derive(Deserialize)]
struct Strict {
    name: String,
    num_blocks: u64,
    #[serde(default)]
    block_size: u32,
    uuid: Option<String>,
    #[serde(default)]
    readonly: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Read,
    Write,
    All,
}

/// Parameters like those of `bdev_error_inject_error`, of limits and of lists.
#[derive(Deserialize)]
struct Loose {
    io_type: Option<Kind>,
    #[serde(default)]
    latency_us: i64,
    ratio: Option<f64>,
    #[serde(default)]
    cores: Vec<u32>,
    #[serde(default)]
    nested: Vec<Strict>,
}

/// The texts from which structured inputs are made.
const NAMES: [&str; 20] = [
    "jsonrpc",
    "method",
    "params",
    "id",
    "name",
    "num_blocks",
    "block_size",
    "uuid",
    "readonly",
    "io_type",
    "latency_us",
    "ratio",
    "cores",
    "nested",
    "strict",
    "loose",
    "fails",
    "older",
    "rpc_get_methods",
    "current",
];
const VALUES: [&str; 30] = [
    "\"\\u00e9\\u007f\"",
    "\"\u{e9}\"",
    "null",
    "true",
    "false",
    "0",
    "-0",
    "1",
    "512",
    "1e2",
    "512.0",
    "1.5",
    "-1",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-1e-400",
    "1e-2147483649",
    "\"\"",
    "\"2.0\"",
    "\"read\"",
    "\"strict\"",
    "\"loose\"",
    "\"fails\"",
    "\"\\u0000\"",
    "\"\\ud83d\\ude00\"",
    "{}",
    "[]",
    "\"00000000-0000-0000-0000-000000000000\"",
];

fn registry(calls: &Rc<Cell<u64>>) -> Registry {
    let mut registry = Registry::new();
    let count = Rc::clone(calls);
    registry.register("strict", Phases::Both, move |params: Params| {
        count.set(count.get() + 1);
        std::future::ready(params.decode::<Strict>(DecodeFailure::INTERNAL).map(|strict| {
            let Strict { name, num_blocks, block_size, uuid, readonly } = strict;
            json!([name, num_blocks, block_size, uuid, readonly])
        }))
    });
    let count = Rc::clone(calls);
    registry.register("loose", Phases::Runtime, move |params: Params| {
        count.set(count.get() + 1);
        std::future::ready(params.decode_relaxed::<Loose>(DecodeFailure::PARAMS).map(|loose| {
            let kind = loose.io_type.map(|kind| kind as u8);
            json!({"kind": kind, "us": loose.latency_us, "ratio": loose.ratio, "cores": loose.cores,
                "nested": loose.nested.len()})
        }))
    });
    let count = Rc::clone(calls);
    registry.register("fails", Phases::Startup, move |params: Params| {
        count.set(count.get() + 1);
        let none = params.none("'fails' requires no parameters");
        std::future::ready(none.and(Err::<Value, _>(RpcError::errno(17))))
    });
    registry.alias("older", "strict");
    registry.set_phase(Phase::Runtime);
    registry
}

impl Stage {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let local = LocalSet::new();
        let calls = Rc::default();
        let path =
            format!("{}/fuzz-rpc-{}.sock", std::env::temp_dir().display(), std::process::id());
        let server = local.block_on(&runtime, async {
            Server::bind(&path, Rc::new(registry(&calls))).expect("a socket")
        });
        Self { runtime, local, path, _server: server, calls }
    }

    /// The server's answers to `pieces`, until it closes the connection.
    fn ask(&self, pieces: &[&[u8]]) -> Vec<u8> {
        self.local.block_on(&self.runtime, async {
            let mut stream = UnixStream::connect(&self.path).await.expect("it listens");
            for piece in pieces {
                // It closes the connection after input that is not JSON.
                if stream.write_all(piece).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            // Not earlier: the server does not answer a client that is gone.
            let _ = stream.write_all(b" \n").await;
            let mut answer = vec![];
            self.read(&mut stream, &mut answer).await;
            answer
        })
    }

    /// Reads until no more data comes; the server runs on this thread.
    async fn read(&self, stream: &mut UnixStream, answer: &mut Vec<u8>) {
        let mut idle = 0;
        let mut bytes = [0; 4096];
        while idle < 8 {
            match stream.try_read(&mut bytes) {
                Ok(0) => return,
                Ok(n) => {
                    answer.extend_from_slice(&bytes[..n]);
                    idle = 0;
                    continue;
                }
                Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => return,
                Err(_) => idle += 1,
            }
            tokio::task::yield_now().await;
        }
        // The rest, if its task ran late.
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(answer).await;
    }
}

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let how = input.u8();
    let cut = usize::from(input.u8());
    let text = if how & 1 == 0 { input.bytes(TEXT_MAX).to_vec() } else { structured(&mut input) };
    STAGE.with_borrow(|stage| {
        let before = stage.calls.get();
        let whole = stage.ask(&[&text]);
        let called = stage.calls.get() - before;
        let answers = answers(&whole);
        let value: Result<Value, _> = serde_json::from_slice(&text);
        let refused =
            answers.iter().flat_map(|answer| &answer.error).any(|e| e.code == PARSE_ERROR);
        // serde_json's `Value` cannot represent a number out of range, so nothing can be concluded.
        if value.is_ok() && depth(&text) < 60 {
            assert!(!refused, "JSON is no JSON: {}", String::from_utf8_lossy(&text));
        }
        let starts = text.iter().find(|byte| !byte.is_ascii_whitespace());
        if starts.is_some_and(|byte| !b"{[\"tfn-0123456789".contains(byte)) {
            assert!(called == 0 && answers.len() <= 1);
        }
        if how & 2 != 0 {
            let (first, second) = text.split_at(cut.min(text.len()));
            let (second, third) = second.split_at(second.len() / 2);
            let pieces = stage.ask(&[first, second, third]);
            assert_eq!(
                String::from_utf8_lossy(&whole),
                String::from_utf8_lossy(&pieces),
                "the same in pieces"
            );
        }
    });
}

/// An answer. Numbers of any size are echoed, so not all of it can be parsed here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    jsonrpc: String,
    #[serde(rename = "id")]
    _id: Box<RawValue>,
    result: Option<Box<RawValue>>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Failure {
    code: i64,
    #[serde(rename = "message")]
    _message: String,
}

/// Parses and checks the answers.
fn answers(bytes: &[u8]) -> Vec<Answer> {
    assert!(bytes.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\n')), "not ASCII");
    let mut answers = vec![];
    for text in serde_json::Deserializer::from_slice(bytes).into_iter::<Box<RawValue>>() {
        let text = text.expect("answers are JSON");
        if text.get().starts_with('[') {
            answers.extend(
                serde_json::from_str::<Vec<Answer>>(text.get()).expect("a batch of answers"),
            );
        } else {
            answers.push(serde_json::from_str(text.get()).expect("an answer"));
        }
    }
    for answer in &answers {
        assert_eq!(answer.jsonrpc, "2.0");
        assert!(answer.result.is_none() || answer.error.is_none(), "both");
    }
    answers
}

/// An upper bound of the nesting depth.
fn depth(text: &[u8]) -> usize {
    text.iter().filter(|byte| matches!(byte, b'{' | b'[')).count()
}

/// Text that is JSON, or nearly so.
fn structured(input: &mut Input<'_>) -> Vec<u8> {
    let mut text = String::new();
    let requests = input.u8() % 4 + 1;
    let batch = input.flag();
    if batch {
        text.push('[');
    }
    for n in 0..requests {
        if batch && n > 0 {
            text.push(',');
        }
        request(input, &mut text);
    }
    if batch {
        text.push(']');
    }
    // One byte is replaced.
    let (at, byte) = (usize::from(input.u16()), input.u8());
    let mut text = text.into_bytes();
    if byte != 0 && at < text.len() {
        text[at] = byte;
    }
    text.truncate(TEXT_MAX);
    text
}

fn request(input: &mut Input<'_>, text: &mut String) {
    let method = input.pick(&NAMES[14..]);
    text.push_str(&format!("{{\"method\":\"{method}\",\"params\":"));
    object(input, text, 0);
    if input.flag() {
        text.push_str(",\"jsonrpc\":\"2.0\"");
    }
    text.push_str(",\"id\":");
    text.push_str(input.pick(&VALUES));
    if input.u8() == 7 {
        member(input, text, true, 0);
    }
    text.push('}');
}

fn object(input: &mut Input<'_>, text: &mut String, depth: usize) {
    text.push('{');
    let count = input.u8() % 7;
    (0..count).for_each(|n| member(input, text, n > 0, depth));
    text.push('}');
}

fn member(input: &mut Input<'_>, text: &mut String, comma: bool, depth: usize) {
    if comma {
        text.push(',');
    }
    text.push_str(&format!("\"{}\":", input.pick(&NAMES)));
    match input.u8() {
        0..8 if depth < 4 => object(input, text, depth + 1),
        8..16 if depth < 4 => {
            text.push('[');
            object(input, text, depth + 1);
            text.push(']');
        }
        16..32 => text.push_str(&input.u64().to_string()),
        value => text.push_str(VALUES[usize::from(value) % VALUES.len()]),
    }
}
