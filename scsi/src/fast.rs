//! The fast path: READ and WRITE without the lock of the logical unit.

use crate::cdb::Command;
use crate::facts::Facts;
use crate::gate::Gate;
use crate::medium;
use crate::plan::Plan;
use crate::reply::Buffers;
use crate::sense::Sense;

/// The result of the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fast {
    /// The I/O to do. Its range may be empty: then the command is done.
    Io(Plan),
    /// `LogicalUnit::start` must decide.
    Slow,
    /// CHECK CONDITION with this sense data, in the gate's format.
    Failed(Sense),
}

/// Checks a READ or WRITE without the logical unit. Other commands are slow.
#[must_use]
#[inline]
pub fn fast(command: &Command, facts: &Facts, gate: Gate, buffers: Buffers) -> Fast {
    let write = match command {
        Command::Read { .. } => false,
        Command::Write { .. } => true,
        _ => return Fast::Slow,
    };
    if gate.is_slow(write) {
        return Fast::Slow;
    }
    match medium::plan(command, facts, gate, buffers) {
        Ok(Some(plan)) => Fast::Io(plan),
        Ok(None) => Fast::Slow,
        Err(sense) => Fast::Failed(sense),
    }
}
