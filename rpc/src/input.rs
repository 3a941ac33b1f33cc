//! Bytes received and not yet understood.

use std::io;

use crate::request::Request;
use crate::scan::{self, Scan, Scanner};
use crate::stream::Stream;

/// Bytes of one request; a longer one is refused. SPDK's number.
pub const REQUEST_MAX: usize = 256 * 1024;

/// Bytes asked of the socket at a time.
pub(crate) const READ_SIZE: usize = 16 * 1024;

/// Bytes received and not yet understood.
pub(crate) struct Input {
    bytes: Vec<u8>,
    /// Where the value being scanned starts.
    start: usize,
    /// How far it is scanned.
    scanned: usize,
    scanner: Scanner,
}

/// What the bytes are.
pub(crate) enum Next {
    Request(Request),
    /// There is no whole request yet.
    Incomplete,
    /// There is no whole request in [`REQUEST_MAX`] bytes.
    TooLong,
    /// No JSON.
    Invalid,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, scanned: 0, scanner: Scanner::new() }
    }

    /// The next request. [`Next::Incomplete`] means that there is room to read more.
    pub(crate) fn next(&mut self) -> Next {
        if self.scanner.is_idle() {
            // Space before a request is no part of it.
            let space = self.bytes[self.scanned..].iter().take_while(|b| scan::is_space(**b));
            self.scanned += space.count();
            self.start = self.scanned;
        }
        match self.scanner.feed(&self.bytes[self.scanned..]) {
            Scan::Incomplete => {
                self.scanned = self.bytes.len();
                match self.bytes.len() - self.start {
                    REQUEST_MAX.. => Next::TooLong,
                    _ => Next::Incomplete,
                }
            }
            Scan::Invalid => Next::Invalid,
            Scan::Complete(count) => {
                let value = self.start..self.scanned + count;
                self.scanner = Scanner::new();
                self.start = value.end;
                self.scanned = value.end;
                let text = std::str::from_utf8(&self.bytes[value]).ok();
                match text.map(Request::parse) {
                    Some(Ok(request)) => Next::Request(request),
                    _ => Next::Invalid,
                }
            }
        }
    }

    /// Reads once, after [`Next::Incomplete`]; 0 is the end of the stream.
    pub(crate) fn read(&mut self, stream: &mut Stream) -> io::Result<usize> {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        let filled = self.bytes.len();
        if filled == 0 {
            // An idle client keeps no buffer.
            self.bytes = Vec::new();
        }
        self.bytes.resize(filled + READ_SIZE.min(REQUEST_MAX - filled), 0);
        let read = stream.try_read(&mut self.bytes[filled..]);
        self.bytes.truncate(filled + *read.as_ref().unwrap_or(&0));
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        read
    }
}
