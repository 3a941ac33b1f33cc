//! A logical unit: its state, and the execution of commands.

use crate::cdb::{self, Command};
use crate::copy::Copies;
use crate::facts::{Facts, Port, UNMAP_DESCRIPTORS_MAX};
use crate::gate::{Gate, State};
use crate::inquiry;
use crate::mode::Modes;
use crate::nexus::{Attention, Nexus, Nexuses};
use crate::plan::{Failure, Flush, Op, Outcome, Plan};
use crate::reply::{Buffers, Range, Reply};
use crate::report::{self, LbaQuery};
use crate::reservation::{Refused, Reservations};
use crate::sense::{Code, Format, Key, SENSE_BYTES_MAX, Sense, Status};
use crate::table::Access;

mod execute;

/// Bytes of the longest parameter list that is asked for: UNMAP with 256 descriptors.
pub const PARAMETERS_MAX: usize = 8 + 16 * UNMAP_DESCRIPTORS_MAX as usize;

/// What the caller has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Answer with the [`Reply`].
    Done,
    /// Fetch this many bytes of data-out, and call [`LogicalUnit::with_parameters`]. They are at
    /// most [`PARAMETERS_MAX`], and the data-out buffer has them.
    Parameters {
        /// The number of bytes.
        bytes: u32,
    },
    /// Do this I/O, and answer with the `Outcome` of it. If it is `Op::Unmap`, its ranges are in
    /// the [`Reply`].
    Io(Plan),
    /// Find out which blocks are mapped, and call [`report::lba_status`].
    LbaStatus(LbaQuery),
}

/// Why a command is not executed.
enum Stop {
    Sense(Sense),
    Status(Status),
}

impl From<Sense> for Stop {
    fn from(sense: Sense) -> Self {
        Self::Sense(sense)
    }
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Conflict => Self::Status(Status::ReservationConflict),
            Refused::Sense(sense) => Self::Sense(sense),
        }
    }
}

/// A logical unit. One lock for all nexuses and queues is expected around it; after its
/// construction it does not allocate.
#[derive(Clone, Debug)]
pub struct LogicalUnit {
    facts: Facts,
    modes: Modes,
    nexuses: Nexuses,
    reservations: Reservations,
    copies: Copies,
    /// START STOP UNIT has stopped it.
    stopped: bool,
    generation: u64,
}

impl LogicalUnit {
    /// A logical unit after power on.
    #[must_use]
    pub fn new(facts: Facts) -> Self {
        Self {
            modes: Modes::new(&facts),
            facts,
            nexuses: Nexuses::default(),
            reservations: Reservations::default(),
            copies: Copies::default(),
            stopped: false,
            generation: 0,
        }
    }

    /// Begins a command that came from `nexus` through `port`. `reply` is emptied first; whoever
    /// gets [`Step::Done`] answers with it.
    ///
    /// The checks are in the order of SAM-5's status precedence: unit attention, reservation
    /// conflict, then the CDB.
    pub fn start(
        &mut self,
        nexus: Nexus,
        port: Port,
        cdb: &[u8],
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Step {
        reply.begin(self.modes.format(), buffers);
        let step = self
            .check(nexus, cdb)
            .and_then(|command| self.execute(nexus, port, &command, buffers, reply));
        self.finish(step, reply)
    }

    /// Continues a command for which [`LogicalUnit::start`] has returned [`Step::Parameters`], with
    /// the same arguments and the fetched bytes.
    pub fn with_parameters(
        &mut self,
        nexus: Nexus,
        port: Port,
        cdb: &[u8],
        list: &[u8],
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Step {
        reply.begin(self.modes.format(), buffers);
        let step = self
            .check_without_attention(nexus, cdb)
            .and_then(|command| self.execute_list(nexus, port, &command, list, buffers, reply));
        self.finish(step, reply)
    }

    fn finish(&self, step: Result<Step, Stop>, reply: &mut Reply) -> Step {
        match step {
            Ok(step) => return step,
            Err(Stop::Sense(sense)) => reply.fail(sense),
            Err(Stop::Status(status)) => reply.end(status),
        }
        Step::Done
    }

    fn check(&mut self, nexus: Nexus, cdb: &[u8]) -> Result<Command, Stop> {
        let entry = cdb::entry(cdb);
        if !self.nexuses.knows(nexus) {
            let full = |()| Stop::Status(Status::Busy);
            self.nexuses.attach(nexus, Some(Attention::PowerOn)).map_err(full)?;
            self.changed();
        }
        if !entry.is_ok_and(|entry| !entry.is_affected_by_attention())
            && let Some(attention) = self.nexuses.take(nexus)
        {
            self.changed();
            return Err(attention.sense().into());
        }
        self.check_without_attention(nexus, cdb)
    }

    fn check_without_attention(&self, nexus: Nexus, cdb: &[u8]) -> Result<Command, Stop> {
        let entry = cdb::entry(cdb)?;
        if !entry.is_offered(&self.facts) {
            return Err(Sense::illegal(Code::INVALID_OPERATION_CODE).into());
        }
        if !self.reservations.allow(nexus, entry, cdb::bytes(cdb)[4]) {
            return Err(Stop::Status(Status::ReservationConflict));
        }
        let command = cdb::decode_as(entry, cdb)?;
        if self.stopped && needs_started(&command) {
            return Err(NOT_STARTED.into());
        }
        Ok(command)
    }

    /// The next step of a command with a plan: none if there is nothing to do.
    fn plan(&self, plan: Plan, reply: &mut Reply) -> Step {
        let nothing = match plan.op {
            Op::Flush => !self.facts.write_cache,
            Op::Unmap => reply.ranges.is_empty(),
            _ => plan.range.blocks == 0,
        };
        if !nothing {
            return Step::Io(plan);
        }
        reply.transferred = Outcome::of(&plan, &self.facts, Ok(())).transferred;
        Step::Done
    }

    /// A flush, as the end of a command that has these buffers and used none.
    fn flush(buffers: Buffers) -> Plan {
        Plan {
            op: Op::Flush,
            range: Range { lba: 0, blocks: 0 },
            flush: Flush::No,
            exclusive: false,
            transfer: 0,
            overrun: false,
            buffer: buffers.longest(),
        }
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }
}

/// State that the caller asks for, and events that it reports.
impl LogicalUnit {
    /// The facts, with the present number of blocks.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Changes whenever a gate, or [`LogicalUnit::is_write_cache_enabled`], may have changed.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the fast path needs for a nexus.
    #[must_use]
    pub fn gate(&self, nexus: Nexus) -> Gate {
        Gate::new(&State {
            attention: self.nexuses.is_pending(nexus),
            may_read: self.reservations.allow_access(nexus, Access::Read),
            may_write: self.reservations.allow_access(nexus, Access::Write),
            stopped: self.stopped,
            protected: self.facts.read_only || self.modes.protected,
            write_through: self.facts.write_cache && !self.modes.write_cache,
            format: self.modes.format(),
        })
    }

    /// Whether reservations allow a command that was started before and has not begun its I/O.
    #[must_use]
    pub fn still_allows(&self, nexus: Nexus, cdb: &[u8]) -> bool {
        cdb::entry(cdb).is_ok_and(|entry| self.reservations.allow(nexus, entry, cdb::bytes(cdb)[4]))
    }

    /// Whether the write cache is used: MODE SELECT changes it. While it is not, plans flush what
    /// they write.
    #[must_use]
    pub fn is_write_cache_enabled(&self) -> bool {
        self.modes.write_cache
    }

    /// A nexus begins. With `power_on` its first command gets that unit attention; a caller that
    /// continues a session of another process leaves it out. An unknown nexus that sends a command
    /// is attached with it.
    ///
    /// Returns false if there is no place: its commands get BUSY.
    pub fn attach(&mut self, nexus: Nexus, power_on: bool) -> bool {
        self.changed();
        self.nexuses.attach(nexus, power_on.then_some(Attention::PowerOn)).is_ok()
    }

    /// Establishes a unit attention for all nexuses: the inventory of LUNs has changed, or the
    /// like.
    pub fn tell_all(&mut self, attention: Attention) {
        self.nexuses.tell_if(attention, |_| true);
        self.changed();
    }

    /// Establishes a unit attention for one nexus.
    pub fn tell(&mut self, nexus: Nexus, attention: Attention) {
        self.nexuses.tell(nexus, attention);
        self.changed();
    }

    /// A plan of `Op::Copy` of a nexus has been done, or has failed: RECEIVE COPY RESULTS may ask for
    /// it. Plans without a list identifier, and other plans, change nothing.
    pub fn copied(&mut self, nexus: Nexus, plan: &Plan, result: Result<(), Failure>) {
        self.copies.end(nexus, plan, &self.facts, result.is_ok());
    }

    /// LOGICAL UNIT RESET (SAM-5): modes and RESERVE are as after power on, the unit is
    /// started, and all nexuses are told. Registrations stay.
    pub fn reset(&mut self) {
        self.modes = Modes::new(&self.facts);
        self.stopped = false;
        self.reservations.end_reserved(None);
        self.copies.forget(None);
        self.tell_all(Attention::Reset);
    }

    /// I_T NEXUS RESET (SAM-5): RESERVE ends, and the nexus is told.
    pub fn nexus_reset(&mut self, nexus: Nexus) {
        self.reservations.end_reserved(Some(nexus));
        self.tell(nexus, Attention::NexusLoss);
    }

    /// A nexus is lost: its session ended. Its registration stays (SPC-4, persistent reservations).
    /// When the last one is lost, a stopped unit is started: the next virtual machine is to find it
    /// ready.
    pub fn nexus_lost(&mut self, nexus: Nexus) {
        self.reservations.end_reserved(Some(nexus));
        self.copies.forget(Some(nexus));
        self.nexuses.detach(nexus);
        self.stopped &= !self.nexuses.is_empty();
        self.changed();
    }

    /// A nexus will not come back: as [`LogicalUnit::nexus_lost`], and its registration ends.
    pub fn nexus_removed(&mut self, nexus: Nexus) {
        self.reservations.unregister(nexus, &mut self.nexuses);
        self.nexus_lost(nexus);
    }

    /// The disk has another size.
    pub fn resized(&mut self, blocks: u64) {
        self.facts.blocks = blocks.max(1);
        self.tell_all(Attention::CapacityChanged);
    }
}

/// PARAMETER LIST LENGTH ERROR.
const LIST_LENGTH: Sense = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);

/// The sense data of a stopped unit (SBC-3, START STOP UNIT).
const NOT_STARTED: Sense = Sense::new(Key::NotReady, Code::INITIALIZING_COMMAND_REQUIRED);

/// Whether a stopped unit refuses a command: medium access, and TEST UNIT READY.
fn needs_started(command: &Command) -> bool {
    matches!(
        command,
        Command::TestUnitReady
            | Command::Read { .. }
            | Command::Write { .. }
            | Command::WriteAndVerify { .. }
            | Command::Verify { .. }
            | Command::PreFetch { .. }
            | Command::SynchronizeCache { .. }
            | Command::WriteSame { .. }
            | Command::CompareAndWrite { .. }
            | Command::OrWrite { .. }
            | Command::Unmap { .. }
            | Command::ExtendedCopy { .. }
            | Command::GetLbaStatus { .. }
    )
}

/// Sense data as data-in.
fn put_sense(sense: Sense, descriptor: bool, reply: &mut Reply) {
    let format = if descriptor { Format::Descriptor } else { Format::Fixed };
    let mut bytes = [0; SENSE_BYTES_MAX];
    let len = sense.encode(format, &mut bytes);
    reply.put_padded(bytes.into_iter(), len, 0);
}

/// Answers a command to a LUN that does not exist, of a target that does (SAM-5, incorrect
/// logical unit numbers): INQUIRY says that nothing is there, REPORT LUNS says what is, and REQUEST
/// SENSE returns the sense data with which all others fail.
pub fn absent(cdb: &[u8], buffers: Buffers, reply: &mut Reply) {
    reply.begin(Format::Fixed, buffers);
    let unsupported = Sense::illegal(Code::LOGICAL_UNIT_NOT_SUPPORTED);
    let allocation = match cdb::decode(cdb) {
        Ok(Command::Inquiry { vital, page, allocation }) => {
            if vital || page != 0 {
                Err(Sense::in_cdb(if vital { 1 } else { 2 }, vital.then_some(0)))
            } else {
                inquiry::absent(reply);
                Ok(allocation)
            }
        }
        Ok(Command::ReportLuns { select, allocation }) => {
            report::luns(select, allocation, reply).map(|()| allocation)
        }
        Ok(Command::RequestSense { descriptor, allocation }) => {
            put_sense(unsupported, descriptor, reply);
            Ok(allocation)
        }
        _ => Err(unsupported),
    };
    match allocation {
        Ok(allocation) => reply.finish(allocation, buffers),
        Err(sense) => reply.fail(sense),
    }
}
