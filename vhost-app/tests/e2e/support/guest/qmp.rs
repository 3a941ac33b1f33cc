//! QEMU's control socket: commands, their answers, and the events that come in between.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::LIMIT;

/// A connection on which one command at a time is under way.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// An answer that came when an event was waited for, or was looked for.
    answer: Option<Value>,
}

impl Qmp {
    /// Connects as soon as QEMU listens, if it `runs` until then.
    pub(super) fn connect(path: &Path, mut runs: impl FnMut() -> bool) -> Result<Self> {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= deadline || !runs() => return Err(e),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let stream = BufReader::new(stream);
        let mut qmp = Self { stream, events: VecDeque::new(), answer: None };
        qmp.message()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and waits for its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(command, arguments)?;
        self.answer()
    }

    /// Sends a command.
    pub(super) fn send(&mut self, command: &str, arguments: Value) -> Result<()> {
        let request = json!({"execute": command, "arguments": arguments});
        // At once: QEMU quits at the last brace, and a write after that would fail.
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes())
    }

    /// Waits for the answer to what was sent.
    pub(super) fn answer(&mut self) -> Result<Value> {
        while self.answer.is_none() {
            self.sort_next()?;
        }
        let mut message = self.answer.take().unwrap_or_default();
        match message.get("error") {
            Some(error) => Err(std::io::Error::other(error.to_string())),
            None => Ok(message["return"].take()),
        }
    }

    /// Whether the answer can be read without waiting.
    pub(super) fn has_answer(&mut self) -> Result<bool> {
        while self.answer.is_none() && self.can_read()? {
            self.sort_next()?;
        }
        Ok(self.answer.is_some())
    }

    /// The next event that nobody has seen: its name and its data.
    pub(super) fn event(&mut self) -> Result<(String, Value)> {
        while self.events.is_empty() {
            self.sort_next()?;
        }
        let mut event = self.events.pop_front().unwrap_or_default();
        let name = event["event"].as_str().unwrap_or_default().to_owned();
        Ok((name, event["data"].take()))
    }

    fn can_read(&mut self) -> Result<bool> {
        if !self.stream.buffer().is_empty() {
            return Ok(true);
        }
        self.stream.get_ref().set_nonblocking(true)?;
        let there = self.stream.fill_buf().map(|bytes| !bytes.is_empty());
        self.stream.get_ref().set_nonblocking(false)?;
        match there {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            there => there,
        }
    }

    fn sort_next(&mut self) -> Result<()> {
        let message = self.message()?;
        if message.get("event").is_some() {
            self.events.push_back(message);
        } else {
            self.answer = Some(message);
        }
        Ok(())
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
