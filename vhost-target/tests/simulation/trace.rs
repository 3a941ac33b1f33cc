//! The last actions of a simulation, which are printed when it fails.

use std::collections::VecDeque;

/// The number of actions that a failure prints.
const TRACE: usize = 60;

/// The last actions. They are printed when the test fails.
pub(crate) struct Trace {
    seed: u64,
    pub(crate) step: usize,
    loud: bool,
    lines: VecDeque<String>,
}

impl Trace {
    /// With `loud`, every action is printed at once.
    pub(crate) fn new(seed: u64, loud: bool) -> Self {
        Self { seed, step: 0, loud, lines: VecDeque::new() }
    }

    pub(crate) fn add(&mut self, line: String) {
        if self.lines.len() == TRACE {
            self.lines.pop_front();
        }
        self.lines.push_back(format!("{:4} {line}", self.step));
        if self.loud {
            eprintln!("{:4} {line}", self.step);
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines: Vec<&str> = self.lines.iter().map(String::as_str).collect();
            eprintln!("{}\nreplay with SIM_SEED={}", lines.join("\n"), self.seed);
        }
    }
}
