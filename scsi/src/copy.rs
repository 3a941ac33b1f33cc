//! EXTENDED COPY, with list identifiers of one byte, and RECEIVE COPY RESULTS (SPC-4). What is
//! copied stays within the logical unit: another one is not reachable.

use arrayvec::ArrayVec;

use crate::facts::Facts;
use crate::gate::Gate;
use crate::nexus::Nexus;
use crate::plan::{Flush, Op, Plan};
use crate::reply::{Range, Reply};
use crate::sense::{Code, Key, Sense};

/// Target descriptors of a list at most: a source and a destination, as in LIO.
const TARGETS_MAX: u8 = 2;
/// Segment descriptors of a list at most, as in LIO: a command is one plan.
const SEGMENTS_MAX: u8 = 1;
/// Bytes of all descriptors of a list at most, as in LIO.
const DESCRIPTORS_BYTES_MAX: u32 = 1024;
/// Copies whose results are held. The oldest makes room for the next.
const COPIES_MAX: u8 = 16;

/// Bytes before the descriptors.
const HEADER_BYTES: usize = 16;
/// Bytes of a target descriptor.
const TARGET_BYTES: usize = 32;
/// Bytes of a segment descriptor from block device to block device.
const SEGMENT_BYTES: usize = 28;
/// Type codes: identification descriptor; from block device to block device.
const IDENTIFICATION: u8 = 0xe4;
const BLOCKS: u8 = 0x02;

/// Service actions of RECEIVE COPY RESULTS.
pub(crate) mod action {
    pub(crate) const COPY_STATUS: u8 = 0;
    pub(crate) const OPERATING_PARAMETERS: u8 = 3;
}

/// The plan of a parameter list of EXTENDED COPY. There is nothing to do if it has no segment, or
/// one of no blocks.
///
/// # Errors
/// ILLEGAL REQUEST for the list, COPY ABORTED for the segment, or DATA PROTECT.
pub(crate) fn plan(list: &[u8], facts: &Facts, gate: Gate, buffer: u64) -> Result<Plan, Sense> {
    let List { identifier, targets, segments } = List::split(list)?;
    let reachable = reachable(targets, facts)?;
    let segment = segment(segments, HEADER_BYTES + targets.len())?;
    let mut plan = Plan {
        op: Op::Copy { from: 0, list: identifier },
        range: Range { lba: 0, blocks: 0 },
        flush: Flush::No,
        exclusive: false,
        transfer: list.len() as u64,
        overrun: false,
        buffer,
    };
    let Some(Segment { source, destination, from, to }) = segment else { return Ok(plan) };
    for index in [source, destination] {
        match reachable.get(usize::from(index)) {
            Some(true) => {}
            Some(false) => return Err(aborted(Code::COPY_TARGET_NOT_REACHABLE)),
            None => return Err(aborted(Code::UNREACHABLE_COPY_TARGET)),
        }
    }
    if !facts.contain(from, to.blocks) || !facts.contain(to.lba, to.blocks) {
        return Err(aborted(Code::NONE));
    }
    if gate.is_protected() {
        return Err(Sense::new(Key::DataProtect, Code::WRITE_PROTECTED));
    }
    if gate.is_write_through() && facts.write_cache {
        plan.flush = Flush::After;
    }
    (plan.op, plan.range) = (Op::Copy { from, list: identifier }, to);
    Ok(plan)
}

const fn aborted(code: Code) -> Sense {
    Sense::new(Key::CopyAborted, code)
}

/// The parts of a parameter list.
struct List<'a> {
    /// LIST IDENTIFIER, if the result is to be held.
    identifier: Option<u8>,
    targets: &'a [u8],
    segments: &'a [u8],
}

/// PARAMETER LIST LENGTH ERROR.
const LIST_LENGTH: Sense = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);

impl<'a> List<'a> {
    fn split(list: &'a [u8]) -> Result<Self, Sense> {
        let ([identifier, usage, t0, t1, _, _, _, _, s0, s1, s2, s3, inline @ ..], descriptors) =
            list.split_first_chunk::<HEADER_BYTES>().ok_or(LIST_LENGTH)?;
        let targets = u16::from_be_bytes([*t0, *t1]);
        let segments = u32::from_be_bytes([*s0, *s1, *s2, *s3]);
        if u32::from(targets).saturating_add(segments) > DESCRIPTORS_BYTES_MAX {
            return Err(LIST_LENGTH);
        }
        let targets = usize::from(targets);
        if targets > usize::from(TARGETS_MAX) * TARGET_BYTES {
            return Err(Sense::illegal(Code::TOO_MANY_TARGET_DESCRIPTORS));
        }
        if !targets.is_multiple_of(TARGET_BYTES) {
            return Err(Sense::in_list(2, None));
        }
        if u32::from_be_bytes(*inline) != 0 {
            return Err(Sense::illegal(Code::INLINE_DATA_LENGTH_EXCEEDED));
        }
        let (targets, rest) = descriptors.split_at_checked(targets).ok_or(LIST_LENGTH)?;
        let segments = rest.get(..segments as usize).ok_or(LIST_LENGTH)?;
        // LIST ID USAGE: held until it is asked for; discarded; there is no identifier.
        let identifier = match usage >> 3 & 3 {
            0 => Some(*identifier),
            2 | 3 => None,
            _ => return Err(Sense::in_list(1, Some(4))),
        };
        Ok(Self { identifier, targets, segments })
    }
}

/// Whether each target is this logical unit, which is known by its NAA designator.
fn reachable(
    targets: &[u8],
    facts: &Facts,
) -> Result<ArrayVec<bool, { TARGETS_MAX as usize }>, Sense> {
    let mut reachable = ArrayVec::new();
    let (targets, _) = targets.as_chunks::<TARGET_BYTES>();
    let mut at = HEADER_BYTES;
    for target in targets {
        // LU ID TYPE and NUL of SPC-3, in the second byte, are obsolete.
        let [code, _, _, _, set, kind, _, length, designator @ .., a, b, c] = target;
        if *code != IDENTIFICATION {
            return Err(Sense::illegal(Code::UNSUPPORTED_TARGET_DESCRIPTOR_TYPE));
        }
        // DISK BLOCK LENGTH: 0 is that of the disk.
        let block_bytes = u32::from_be_bytes([0, *a, *b, *c]);
        if block_bytes != 0 && block_bytes != facts.block_bytes {
            return Err(Sense::in_list(u16::try_from(at + 29).unwrap_or(0), None));
        }
        // CODE SET, ASSOCIATION and DESIGNATOR TYPE: a binary NAA designator of a logical unit.
        let is_naa = (set & 0x0f, kind & 0x3f, *length) == (1, 3, 8);
        // It has a place for each.
        let _ =
            reachable.try_push(is_naa && designator.starts_with(&facts.identity.naa.to_be_bytes()));
        at += TARGET_BYTES;
    }
    Ok(reachable)
}

/// A segment descriptor from block device to block device.
struct Segment {
    /// The numbers of the target descriptors.
    source: u16,
    destination: u16,
    from: u64,
    to: Range,
}

/// The segment of a list, if it has one. The list begins at this byte of the parameter list.
fn segment(list: &[u8], at: usize) -> Result<Option<Segment>, Sense> {
    let Some(code) = list.first() else { return Ok(None) };
    if *code != BLOCKS {
        return Err(Sense::illegal(Code::UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE));
    }
    let (segment, more) = list.split_first_chunk::<SEGMENT_BYTES>().ok_or(LIST_LENGTH)?;
    let [_, _, l0, l1, s0, s1, d0, d1, _, _, n0, n1, lbas @ ..] = segment;
    if usize::from(u16::from_be_bytes([*l0, *l1])) != SEGMENT_BYTES - 4 {
        return Err(Sense::in_list(u16::try_from(at + 2).unwrap_or(0), None));
    }
    if !more.is_empty() {
        return Err(Sense::illegal(Code::TOO_MANY_SEGMENT_DESCRIPTORS));
    }
    let (from, to) = lbas.split_first_chunk().ok_or(LIST_LENGTH)?;
    let to = to.first_chunk().ok_or(LIST_LENGTH)?;
    Ok(Some(Segment {
        source: u16::from_be_bytes([*s0, *s1]),
        destination: u16::from_be_bytes([*d0, *d1]),
        from: u64::from_be_bytes(*from),
        to: Range {
            lba: u64::from_be_bytes(*to),
            blocks: u64::from(u16::from_be_bytes([*n0, *n1])),
        },
    }))
}

/// What is known of a copy.
#[derive(Clone, Copy, Debug)]
struct Held {
    nexus: Nexus,
    list: u8,
    state: State,
    /// Bytes copied.
    bytes: u64,
}

/// COPY MANAGER STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    Running = 0,
    Done = 1,
    Failed = 2,
}

/// The copies that RECEIVE COPY RESULTS may ask for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Copies(ArrayVec<Held, { COPIES_MAX as usize }>);

impl Copies {
    /// A plan has been made. A copy with the same identifier is forgotten.
    pub(crate) fn begin(&mut self, nexus: Nexus, plan: &Plan) {
        self.put(nexus, plan, State::Running, 0);
    }

    /// A plan has been done, or has failed.
    pub(crate) fn end(&mut self, nexus: Nexus, plan: &Plan, facts: &Facts, is_done: bool) {
        let state = if is_done { State::Done } else { State::Failed };
        self.put(nexus, plan, state, if is_done { facts.bytes(plan.range.blocks) } else { 0 });
    }

    fn put(&mut self, nexus: Nexus, plan: &Plan, state: State, bytes: u64) {
        let Op::Copy { list: Some(list), .. } = plan.op else { return };
        self.0.retain(|held| (held.nexus, held.list) != (nexus, list));
        if self.0.is_full() {
            self.0.remove(0);
        }
        // There is room.
        let _ = self.0.try_push(Held { nexus, list, state, bytes });
    }

    /// Forgets the copies of a nexus, or all.
    pub(crate) fn forget(&mut self, nexus: Option<Nexus>) {
        self.0.retain(|held| nexus.is_some_and(|nexus| held.nexus != nexus));
    }

    /// Forgets the copies of a nexus that have ended. SPC-4 leaves it to the copy manager how long a
    /// result is held: here, until the initiator's next INQUIRY of standard data.
    pub(crate) fn forget_ended(&mut self, nexus: Nexus) {
        self.0.retain(|held| held.nexus != nexus || held.state == State::Running);
    }

    /// COPY STATUS. A result is told once.
    ///
    /// # Errors
    /// Nothing is known of this list identifier.
    pub(crate) fn status(
        &mut self,
        nexus: Nexus,
        list: u8,
        reply: &mut Reply,
    ) -> Result<(), Sense> {
        let is_asked = |held: &Held| (held.nexus, held.list) == (nexus, list);
        let held = self.0.iter().copied().find(is_asked).ok_or(Sense::in_cdb(2, None))?;
        if held.state != State::Running {
            self.0.retain(|held| !is_asked(held));
        }
        // SEGMENTS PROCESSED, then TRANSFER COUNT UNITS and TRANSFER COUNT: bytes, or MiB.
        let segments = u8::from(held.state == State::Done);
        let (units, count) = match u32::try_from(held.bytes) {
            Ok(bytes) => (0, bytes),
            Err(_) => (2, u32::try_from(held.bytes >> 20).unwrap_or(u32::MAX)),
        };
        reply.put(&[0, 0, 0, 8, held.state as u8, 0, segments, units]);
        reply.put(&count.to_be_bytes());
        Ok(())
    }
}

/// OPERATING PARAMETERS.
pub(crate) fn parameters(facts: &Facts, reply: &mut Reply) {
    // AVAILABLE DATA, then SNLID: a list without an identifier is supported.
    reply.put(&[0, 0, 0, 42, 1, 0, 0, 0]);
    reply.put(&[0, TARGETS_MAX, 0, SEGMENTS_MAX]);
    reply.put(&DESCRIPTORS_BYTES_MAX.to_be_bytes());
    // MAXIMUM SEGMENT LENGTH: as many blocks as a segment can name.
    let bytes = u32::try_from(facts.bytes(u64::from(u16::MAX))).unwrap_or(u32::MAX);
    reply.put(&bytes.to_be_bytes());
    // No inline data, no held data, no stream devices.
    reply.pad_to(34);
    // TOTAL CONCURRENT COPIES, and those with an identifier.
    reply.put(&[0, COPIES_MAX, COPIES_MAX]);
    // DATA SEGMENT GRANULARITY is a power of two.
    reply.put(&[u8::try_from(facts.block_bytes.trailing_zeros()).unwrap_or(0)]);
    reply.pad_to(43);
    reply.put(&[2, BLOCKS, IDENTIFICATION]);
}
