//! An RPC client for test guests: `guest_rpc METHOD [PARAMS]` calls a method of the server at
//! `/run/rpc.sock`.
//!
//! It prints the result, or the error and ends with status 1. `ci/nvme` builds it with `rustc`
//! alone, so it needs nothing but std, and knows no JSON: it prints what follows the answer's
//! `"result":` or `"error":`.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::exit;

/// Returns the value that begins with `text`: up to the bracket that ends it, or to the end.
fn value(text: &str) -> &str {
    let (mut depth, mut quoted, mut escaped) = (0_u32, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 0 => return &text[..at],
            b'}' | b']' => depth -= 1,
            b',' if depth == 0 => return &text[..at],
            _ => {}
        }
    }
    text
}

/// Returns whether all brackets of a text are closed.
fn is_whole(text: &str) -> bool {
    let inner = text.trim().strip_prefix('{');
    inner.is_some_and(|inner| {
        let mut rest = inner;
        loop {
            let end = value(rest).len();
            match rest.as_bytes().get(end) {
                Some(b',') => rest = &rest[end + 1..],
                Some(_) => return true,
                None => return false,
            }
        }
    })
}

fn call(method: &str, params: Option<&str>) -> Result<bool, Box<dyn Error>> {
    let mut socket = UnixStream::connect("/run/rpc.sock")?;
    let params = params.map(|params| format!(",\"params\":{params}")).unwrap_or_default();
    let request = format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\"{params}}}");
    socket.write_all(request.as_bytes())?;
    let mut answer = String::new();
    let mut bytes = [0; 4096];
    while !is_whole(&answer) {
        match socket.read(&mut bytes)? {
            0 => return Err(format!("the server has closed the connection: {answer}").into()),
            n => answer.push_str(std::str::from_utf8(&bytes[..n])?),
        }
    }
    for (key, good) in [("\"result\":", true), ("\"error\":", false)] {
        if let Some((_, text)) = answer.split_once(key) {
            println!("{}", value(text).trim());
            return Ok(good);
        }
    }
    Err(format!("neither a result nor an error: {answer}").into())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(method) = arguments.first() else {
        eprintln!("usage: guest_rpc METHOD [PARAMS]");
        exit(2);
    };
    match call(method, arguments.get(1).map(String::as_str)) {
        Ok(true) => {}
        Ok(false) => exit(1),
        Err(e) => {
            println!("{method}: {e}");
            exit(1);
        }
    }
}
