//! Scripts of front ends, decoded from an input: messages with fds of any kind, guests that use their rings,
//! connections that come and go.
//!
//! The fuzz target runs a script against a target in its own process; an end-to-end test of `vhost-app` includes this
//! file and runs it against the server.
#![expect(
    clippy::cast_possible_truncation,
    reason = "cuts numbers of the input to the fields of messages"
)]

use crate::input::Input;

/// Front ends at a time.
pub const FRONTS: usize = 3;
/// The front end's address of its guest's memory.
pub const USER: u64 = 0x7000_0000;
/// Bytes of it.
pub const RAM_BYTES: u64 = 0x1_0000;
/// Rings that scripts use correctly.
pub const RINGS: usize = 2;
/// Descriptors of each.
pub const RING_SIZE: u16 = 8;
/// The places of a ring's parts: descriptors, available and used ring, in sequence.
pub const RING_BYTES: u64 = 0x3000;

const LOG_ALL: u64 = 1 << 26;
const PACKED: u64 = 1 << 34;

/// Message numbers.
pub mod request {
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}
use request as r;

/// An fd that is sent with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fd {
    /// The front end's own guest memory.
    Ram,
    /// A memory file of so many bytes.
    Memory(u64),
    /// An eventfd.
    Event,
    /// The end of a pipe.
    Pipe,
    /// A Unix socket.
    Socket,
    /// A file on a disk.
    File,
    /// The area from the last answer to GET_INFLIGHT_FD.
    Area,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its number.
    pub request: u32,
    /// An acknowledgement is requested.
    pub need_reply: bool,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its fds.
    pub fds: Vec<Fd>,
}

/// One step of the script. The first number is the front end's, below [`FRONTS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Messages, one after the other.
    Say(usize, Vec<Message>),
    /// The guest offers a request in a ring: type, and sector.
    Offer(usize, usize, u32, u64),
    /// The guest writes into its memory.
    Poke(usize, u64, Vec<u8>),
    /// The memory file is truncated.
    Cut(usize, u64),
    /// The front end disconnects. It connects (again) when it next sends something.
    Leave(usize),
    /// The disk completes one of its I/Os, by number, or all.
    Complete(Option<u8>),
    /// The reactors run so many poll iterations, and the control thread processes the results.
    Iterations(u8),
    /// An operator's action.
    Operate(u8),
}

/// The next step.
pub fn step(input: &mut Input<'_>) -> Step {
    let kind = input.u8();
    let front = usize::from(kind >> 4) % FRONTS;
    match kind & 0xf {
        0 | 1 => Step::Say(front, set_up(input)),
        2 => Step::Say(front, vec![kick(ring(input), true)]),
        3 => Step::Say(front, vec![plain(r::GET_VRING_BASE, words(&[ring(input) as u32, 0]))]),
        4 => {
            let request = input.pick(&[r::RESET_DEVICE, r::RESET_OWNER]);
            let need_reply = input.flag();
            Step::Say(front, vec![Message { need_reply, ..plain(request, vec![]) }])
        }
        5..9 => Step::Say(front, vec![aware(input)]),
        9 => Step::Say(front, vec![raw(input)]),
        10 => {
            let kind = input.pick(&[0, 1, 4, 8, 11, 13]);
            Step::Offer(front, ring(input), kind, input.u8().into())
        }
        11 => {
            let at = u64::from(input.u16());
            let len = usize::from(input.u8() % 17);
            Step::Poke(front, at, input.bytes(len).to_vec())
        }
        12 => Step::Complete(Some(input.u8()).filter(|n| n & 1 == 0)),
        13 => Step::Iterations(input.u8() % 4),
        14 if input.u8() < 8 => Step::Cut(front, u64::from(input.u16()) & !0xfff),
        14 => Step::Leave(front),
        _ => Step::Operate(input.u8()),
    }
}

fn ring(input: &mut Input<'_>) -> usize {
    match input.u8() {
        0xff => 127,
        0xfe => 128,
        n => usize::from(n) % RINGS,
    }
}

/// A message without fds that requests no acknowledgement.
#[must_use]
pub fn plain(request: u32, payload: Vec<u8>) -> Message {
    Message { request, need_reply: false, payload, fds: vec![] }
}

/// Numbers as a payload encodes them.
#[must_use]
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// A kick fd for a ring, or none: then the ring has to be polled.
#[must_use]
pub fn kick(ring: usize, fd: bool) -> Message {
    let number = ring as u64 & 0xff | if fd { 0 } else { 0x100 };
    let fds = if fd { vec![Fd::Event] } else { vec![] };
    Message { fds, ..plain(r::SET_VRING_KICK, longs(&[number])) }
}

/// All that a ring needs before it is kicked, with the features in `offered`.
fn set_up(input: &mut Input<'_>) -> Vec<Message> {
    let options = input.u8();
    let ring = ring(input);
    let mut features = 1 << 32 | 1 << 30;
    for (bit, feature) in
        [(1, PACKED), (2, LOG_ALL), (4, 1 << 28), (8, 1 << 29), (16, 1 << 9), (32, 1 << 11)]
    {
        features |= if options & bit != 0 { feature } else { 0 };
    }
    let mut messages = well_behaved(ring, features);
    if options & 64 != 0 {
        messages.push(kick(ring, true));
    }
    messages
}

/// The messages of a correct front end, except for the kick.
#[must_use]
pub fn well_behaved(ring: usize, features: u64) -> Vec<Message> {
    let number = ring as u32;
    let base = if features & PACKED != 0 { 1 << 15 } else { 0 };
    let memory = [words(&[1, 0]), longs(&[0, RAM_BYTES, USER, 0])].concat();
    let at = USER + RING_BYTES * (ring % RINGS) as u64;
    let addrs = [words(&[number, 0]), longs(&[at, at + 0x2000, at + 0x1000, 0])].concat();
    vec![
        plain(r::SET_FEATURES, longs(&[features])),
        Message { fds: vec![Fd::Ram], ..plain(r::SET_MEM_TABLE, memory) },
        plain(r::SET_VRING_NUM, words(&[number, RING_SIZE.into()])),
        plain(r::SET_VRING_BASE, words(&[number, base])),
        plain(r::SET_VRING_ADDR, addrs),
        Message {
            fds: vec![Fd::Event],
            ..plain(r::SET_VRING_CALL, longs(&[u64::from(number) & 0xff]))
        },
    ]
}

/// A message with a typical payload.
fn aware(input: &mut Input<'_>) -> Message {
    let which = input.u8();
    let need_reply = which & 0x80 != 0;
    let ring = ring(input) as u32;
    let value = match input.u8() {
        0xff => input.u64(),
        value => u64::from(value) << (value & 15),
    };
    let (request, payload, fds) = match which % 20 {
        0 => (r::SET_FEATURES, longs(&[1 << 32 | value << 26]), vec![]),
        1 => return Message { need_reply, ..mem_table(input) },
        2 | 3 => {
            let request = if which % 20 == 2 { r::ADD_MEM_REG } else { r::REM_MEM_REG };
            let payload = [longs(&[0]), region(input)].concat();
            (request, payload, if which & 0x40 != 0 { vec![fd(input)] } else { vec![Fd::Ram] })
        }
        4 => (r::SET_LOG_BASE, longs(&[value, u64::from(input.u8()) << 3]), vec![fd(input)]),
        5 => (r::SET_VRING_NUM, words(&[ring, value as u32]), vec![]),
        6 => {
            let at = |input: &mut Input<'_>| USER + u64::from(input.u16());
            let parts = [at(input), at(input), at(input), value];
            (r::SET_VRING_ADDR, [words(&[ring, 0]), longs(&parts)].concat(), vec![])
        }
        7 => (r::SET_VRING_BASE, words(&[ring, value as u32]), vec![]),
        8 => (r::GET_VRING_BASE, words(&[ring, 0]), vec![]),
        9 => (r::SET_VRING_KICK, longs(&[ring.into()]), vec![fd(input)]),
        10 => (r::SET_VRING_CALL, longs(&[ring.into()]), vec![fd(input)]),
        11 => (r::SET_VRING_CALL, longs(&[u64::from(ring) | 0x100]), vec![]),
        12 => (r::SET_VRING_ENABLE, words(&[ring, value as u32]), vec![]),
        13 => (r::SET_BACKEND_REQ_FD, vec![], vec![fd(input)]),
        14 | 15 => {
            let request = if which % 20 == 14 { r::GET_CONFIG } else { r::SET_CONFIG };
            let (offset, len) = (u32::from(input.u8()), input.u8());
            let contents = [input.u8()].repeat(len.into());
            (request, [words(&[offset, len.into(), value as u32 & 1]), contents].concat(), vec![])
        }
        16 | 17 => {
            let (queues, size) = (input.u16() % 130, input.u16() % 1100);
            let counts = [queues.to_le_bytes(), size.to_le_bytes(), [0; 2], [0; 2]].concat();
            let payload = [longs(&[value, u64::from(input.u8()) << 4]), counts].concat();
            let set = which % 20 == 17;
            let fds = if set { vec![fd(input)] } else { vec![] };
            (if set { r::SET_INFLIGHT_FD } else { r::GET_INFLIGHT_FD }, payload, fds)
        }
        18 => return Message { need_reply, ..kick(ring as usize, false) },
        _ => (r::SET_OWNER, vec![], vec![]),
    };
    Message { request, need_reply, payload, fds }
}

fn mem_table(input: &mut Input<'_>) -> Message {
    let count = input.u8() % 10;
    let regions: Vec<u8> = (0..count).flat_map(|_| region(input)).collect();
    let fds = (0..count).map(|_| if input.flag() { fd(input) } else { Fd::Ram }).collect();
    let payload = [words(&[count.into(), 0]), regions].concat();
    Message { fds, ..plain(r::SET_MEM_TABLE, payload) }
}

/// Address, size, user address, offset.
fn region(input: &mut Input<'_>) -> Vec<u8> {
    let gpa = u64::from(input.u8()) << 12;
    let mut region = [gpa, RAM_BYTES, USER + gpa, 0];
    match input.u8() {
        n @ 0..4 => region[usize::from(n)] = input.u64(),
        n @ 4..32 => region[1] = u64::from(n) << 12,
        n @ 32..64 => region[3] = u64::from(n - 32) << 11,
        _ => {}
    }
    longs(&region)
}

fn fd(input: &mut Input<'_>) -> Fd {
    match input.u8() % 10 {
        0 | 1 => Fd::Ram,
        2 => Fd::Memory(u64::from(input.u16()) << 4),
        3 | 4 => Fd::Event,
        5 => Fd::Pipe,
        6 | 7 => Fd::Socket,
        8 => Fd::File,
        _ => Fd::Area,
    }
}

/// Any bytes with any message number.
fn raw(input: &mut Input<'_>) -> Message {
    let request = match input.u8() {
        0xff => input.u32(),
        request => u32::from(request % 44),
    };
    let options = input.u8();
    let len = usize::from(input.u8());
    let payload = input.bytes(len).to_vec();
    let fds = (0..options % 12).map(|_| fd(input)).collect();
    Message { request, need_reply: options & 0x80 != 0, payload, fds }
}

/// The writes of a guest that offers a request in a ring: places in its memory and bytes. `nth` counts the requests
/// of the ring from 0; they use its first three descriptors.
#[must_use]
pub fn offered(ring: usize, nth: u16, kind: u32, sector: u64) -> Vec<(u64, Vec<u8>)> {
    let at = RING_BYTES * (ring % RINGS) as u64;
    let header = 0x8000 + 0x100 * (ring % RINGS) as u64;
    let (data, status) = (header + 0x1000, header + 16);
    let write = if matches!(kind, 0 | 8) { 2 } else { 0 };
    let desc = |addr: u64, len: u32, flags: u16, next: u16| {
        let rest = [flags.to_le_bytes(), next.to_le_bytes()].concat();
        [&addr.to_le_bytes()[..], &len.to_le_bytes(), &rest].concat()
    };
    let descs = [desc(header, 16, 1, 1), desc(data, 512, 1 | write, 2), desc(status, 1, 2, 0)];
    vec![
        (header, [longs(&[u64::from(kind), sector]), vec![0xee]].concat()),
        (at, descs.concat()),
        (at + 0x1004 + 2 * u64::from(nth % RING_SIZE), vec![0, 0]),
        (at + 0x1002, nth.wrapping_add(1).to_le_bytes().to_vec()),
    ]
}

/// The place of the status of that request.
#[must_use]
pub fn status_at(ring: usize) -> u64 {
    0x8000 + 0x100 * (ring % RINGS) as u64 + 16
}
