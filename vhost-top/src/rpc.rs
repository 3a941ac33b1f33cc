//! A client of SPDK's JSON-RPC on a Unix socket. No call waits longer than [`LIMIT`].

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::{Value, json};

/// The time from a request to the end of its answer. A server that takes longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);

/// Limit on an answer, twice what SPDK sends at most. A socket of another program cannot fill the
/// memory.
const ANSWER_MAX: u64 = 64 << 20;

/// The code of a method that the server does not have.
const NO_SUCH_METHOD: i64 = -32601;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The connection cannot be made.
    #[error("cannot connect to {}: {cause} (is the server running? -s names its RPC socket)", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },
    /// The answer is late.
    #[error("{method}: no answer within {} s", LIMIT.as_secs())]
    Late {
        /// The method.
        method: String,
    },
    /// The connection ended before the answer, or carried something else.
    #[error("{method}: no valid answer: {cause}")]
    Broken {
        /// The method.
        method: String,
        /// What was wrong.
        cause: String,
    },
    /// The server's error answer.
    #[error("{method}: {message} ({code})")]
    Refused {
        /// The method.
        method: String,
        /// JSON-RPC's code.
        code: i64,
        /// The server's text.
        message: String,
    },
    /// The server serves no controllers.
    #[error("the server has no method {0}: it is not a vhost server")]
    NotVhost(&'static str),
}

impl Error {
    /// Whether the server does not have the method.
    pub(crate) fn is_no_such_method(&self) -> bool {
        matches!(self, Self::Refused { code: NO_SUCH_METHOD, .. })
    }

    /// Whether the connection is still in order.
    pub(crate) fn is_answer(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::NotVhost(_))
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Rpc {
    stream: UnixStream,
    id: u64,
}

impl Rpc {
    /// Connects. A server that accepts no connections fails it after [`LIMIT`].
    pub(crate) fn connect(path: &Path) -> Result<Self, Error> {
        let stream = connect(path).map_err(|cause| Error::Connect { path: path.into(), cause })?;
        Ok(Self { stream, id: 0 })
    }

    /// Calls a method and waits for its answer. `Value::Null` means no parameters. After an error
    /// that [is no answer](Error::is_answer), the connection is unusable.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Result<Value, Error> {
        self.id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.id, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        let broken = |cause: String| Error::Broken { method: method.to_owned(), cause };
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                Error::Late { method: method.to_owned() }
            }
            _ => broken(error.to_string()),
        };
        self.stream.write_all(request.to_string().as_bytes()).map_err(failed)?;
        // One answer is outstanding, so the buffer holds nothing of another one.
        let timed = Timed { stream: &self.stream, deadline: Instant::now() + LIMIT };
        let reader = BufReader::new(timed.take(ANSWER_MAX));
        let mut answers = serde_json::Deserializer::from_reader(reader).into_iter::<Answer>();
        let answer = match answers.next() {
            None => return Err(broken("the connection was closed".to_owned())),
            Some(Err(error)) => return Err(failed(error.into())),
            Some(Ok(answer)) => answer,
        };
        if answer.id != self.id {
            return Err(broken(format!("it has the id {}", answer.id)));
        }
        match answer.error {
            None => Ok(answer.result),
            Some(Refusal { code, message }) => {
                Err(Error::Refused { method: method.to_owned(), code, message })
            }
        }
    }
}

/// `UnixStream::connect` with a limit: the system waits while the server's backlog is full.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket =
        net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(LIMIT))?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    result: Value,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    code: i64,
    message: String,
}

/// Reads until a deadline. The stream's own limit would begin again with each piece of an answer.
struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(text: &str) -> Result<Value, Error> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(text.as_bytes()).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rpc = Rpc { stream: ours, id: 0 };
        let answer = rpc.call("m", json!({"a": 1}));
        drop(rpc);
        let mut sent = String::new();
        theirs.read_to_string(&mut sent).unwrap();
        let sent: Value = serde_json::from_str(&sent).unwrap();
        assert_eq!((&sent["method"], &sent["params"]), (&json!("m"), &json!({"a": 1})));
        answer
    }

    #[test]
    fn answers_are_results_or_refusals() {
        assert_eq!(answered(r#"{"id": 1, "result": [2]} "#).unwrap(), json!([2]));
        let text = r#"{"id": 1, "error": {"code": -32601, "message": "Method not found"}}"#;
        let error = answered(text).unwrap_err();
        assert_eq!(error.to_string(), "m: Method not found (-32601)");
        assert!(error.is_no_such_method() && error.is_answer());
    }

    #[test]
    fn what_is_no_answer_breaks_the_connection() {
        for text in ["", "{", "x", r#"{"id": 7, "result": 1}"#, "[1]"] {
            let error = answered(text).unwrap_err();
            assert!(matches!(error, Error::Broken { .. }) && !error.is_answer(), "{text}: {error}");
        }
        let error = Rpc::connect(Path::new("/nowhere/s")).unwrap_err().to_string();
        assert!(error.starts_with("cannot connect to /nowhere/s: No such file"), "{error}");
    }

    #[test]
    fn a_deadline_ends_a_read() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_millis(1);
        let error = Timed { stream: &ours, deadline }.read(&mut [0]).unwrap_err();
        let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
}
