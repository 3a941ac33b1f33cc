//! SCSI disks (SPC-4, SBC-3) as pure logic: a CDB in, a plan of block I/O or data and sense out.
//!
//! The crate has no threads, no rings, no clock and no I/O. It is called on a reactor: after a
//! [`LogicalUnit`] is built, nothing allocates, blocks or logs, each call takes bounded time, and
//! nothing that an initiator sends leads to a panic.
//!
//! [`table`] is data: all operation codes, and what is known of each before its fields are read.
//! [`cdb`] decodes a CDB by it. [`facts`] are what a disk says about itself. READ and WRITE then
//! take the fast path, [`fast`], which needs the facts and a [`Gate`] but no lock. All other
//! commands, and those that the gate stops, go to the target's [`LogicalUnit`]. The unit answers
//! into a [`Reply`], or returns a [`Plan`]; the [`Outcome`] of a plan that has been done is the
//! answer.
//!
//! `tests/libiscsi` runs libiscsi's tests on a logical unit, and says what is answered and why some
//! are skipped.
//!
//! Names are those of SAM-5, SPC-4 and SBC-3, which are cited by the name of a clause or command.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::expect_used, clippy::panic, clippy::unreachable)
)]

pub mod sense;

pub mod facts;
pub mod table;

pub mod cdb;

mod nexus;
mod reservation;

mod reply;

mod plan;

mod gate;
mod medium;

mod copy;

mod fast;

mod inquiry;
mod mode;
pub mod report;

mod unit;

pub use cdb::{Command, decode};
pub use facts::{Facts, Identity, Port, Unmap};
pub use fast::{Fast, fast};
pub use gate::Gate;
pub use nexus::{Attention, NEXUSES_MAX, Nexus};
pub use plan::{Failure, Flush, Op, Outcome, Plan};
pub use reply::{Buffers, REPLY_BYTES_MAX, Range, Reply, Transferred};
pub use reservation::{REGISTRATIONS_MAX, Type};
pub use sense::{Format, Sense, Status};
pub use unit::{LogicalUnit, PARAMETERS_MAX, Step, absent};
