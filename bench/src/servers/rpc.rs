//! A client of the JSON-RPC that SPDK and ours speak.

use std::fmt;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use front_end::LIMIT;
use serde_json::{Value, json};

use super::{Error, Result};

/// An RPC's error answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its code.
    pub code: i64,
    /// Its words.
    pub message: String,
}

impl Refusal {
    /// The code of a method that the server does not have.
    pub const NO_SUCH_METHOD: i64 = -32601;
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

/// A connection to an RPC socket.
#[derive(Debug)]
pub struct Rpc {
    stream: UnixStream,
}

impl Rpc {
    /// Connects; each answer is waited for at most [`LIMIT`].
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(path: &Path) -> Result<Self> {
        let doing = || format!("cannot connect to {}", path.display());
        let stream = UnixStream::connect(path).map_err(Error::system(doing()))?;
        stream.set_read_timeout(Some(LIMIT)).map_err(Error::system(doing()))?;
        Ok(Self { stream })
    }

    /// Sends a request without waiting for its answer. `Value::Null` means no parameters.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send(&mut self, method: &str, params: Value) -> Result<()> {
        let mut request = json!({"jsonrpc": "2.0", "id": 1, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        self.stream.write_all(request.to_string().as_bytes()).map_err(Error::system(method))
    }

    /// Waits for the answer to `method`, the only request that is outstanding.
    ///
    /// # Errors
    /// [`Error::Refused`], or there is no answer.
    pub fn receive(&mut self, method: &str) -> Result<Value> {
        // One answer is outstanding, so nothing of another is lost with the buffer.
        let answers = serde_json::Deserializer::from_reader(BufReader::new(&self.stream));
        let Some(answer) = answers.into_iter::<Value>().next() else {
            return Err(Error::Nonsense { method: method.into(), answer: "nothing".into() });
        };
        let mut answer = answer.map_err(Error::system(method))?;
        let error = &answer["error"];
        if error.is_null() {
            return Ok(answer["result"].take());
        }
        let code = error["code"].as_i64().unwrap_or(0);
        let message = error["message"].as_str().unwrap_or_default().to_owned();
        Err(Error::Refused { method: method.into(), refusal: Refusal { code, message } })
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    /// As [`Rpc::receive`].
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.send(method, params)?;
        self.receive(method)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn answered(text: &str) -> Result<Value> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(text.as_bytes()).unwrap();
        let mut rpc = Rpc { stream: ours };
        let answer = rpc.call("m", json!({"a": 1}));
        drop(rpc);
        let mut sent = String::new();
        theirs.read_to_string(&mut sent).unwrap();
        let sent: Value = serde_json::from_str(&sent).unwrap();
        assert_eq!(sent["params"], json!({"a": 1}));
        answer
    }

    #[test]
    fn answers_are_results_or_refusals() {
        let answer = answered(r#"{"id": 1, "result": [2, 3]}"#);
        assert_eq!(answer.unwrap(), json!([2, 3]));
        let text = r#"{"id": 1, "error": {"code": -32601, "message": "Method not found"}}"#;
        let error = answered(text).unwrap_err();
        assert_eq!(error.to_string(), "m: Method not found (-32601)");
        let Error::Refused { refusal, .. } = error else { panic!("{error}") };
        assert_eq!(refusal.code, Refusal::NO_SUCH_METHOD);
    }
}
