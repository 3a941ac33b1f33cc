//! How the program ends if it does not start.

use std::io::{self, Write};

/// Why the program ends without starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 for help and version, 2 for a line that cannot be parsed, 1 for options that cannot be
    /// satisfied.
    pub(crate) code: u8,
    /// What to print: to stdout if `code` is 0, to stderr otherwise.
    pub(crate) text: String,
}

impl Exit {
    pub(super) fn failed(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    pub(super) fn usage(text: impl Into<String>) -> Self {
        Self { code: 2, text: text.into() }
    }

    /// Prints the text. Ignores write errors: the reader of a pipe may have exited (`vhost -h |
    /// head`).
    pub(crate) fn print(&self) {
        let text = self.text.trim_end();
        let _ = if self.code == 0 {
            writeln!(io::stdout(), "{text}")
        } else {
            writeln!(io::stderr(), "{text}")
        };
    }
}
