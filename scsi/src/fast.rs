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
    let (write, extent, fua) = match *command {
        Command::Read { extent, fua } => (false, extent, fua),
        Command::Write { extent, fua } => (true, extent, fua),
        _ => return Fast::Slow,
    };
    if gate.is_slow(write) {
        return Fast::Slow;
    }
    let plan = if write {
        medium::write(extent, fua, facts, gate, buffers)
    } else {
        medium::read(extent, fua, facts, gate, buffers)
    };
    plan.map_or_else(Fast::Failed, Fast::Io)
}
