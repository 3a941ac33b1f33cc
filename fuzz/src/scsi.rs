//! Commands of guests to a SCSI disk, on the crate that decodes and answers them.
//!
//! Invariants: those of `check` in the crate's tests. Each answer has a valid status, and sense data
//! if and only if that is CHECK CONDITION; data-in is not longer than the allocation length and the
//! buffer; plans stay on the disk, in their buffer, and write nothing on a read-only disk; the fast
//! path agrees with the logical unit.

use scsi::{Attention, Buffers, Facts, Failure, Identity, Nexus, PARAMETERS_MAX};

#[path = "../../scsi/tests/common/check.rs"]
mod check;

use self::check::Stage;
use crate::input::Input;

const FAILURES: [Failure; 8] = [
    Failure::Medium(None),
    Failure::Medium(Some(u64::MAX)),
    Failure::Miscompare(u64::MAX),
    Failure::NoSpace,
    Failure::Busy,
    Failure::Aborted,
    Failure::Reservation,
    Failure::Device,
];

fn disk(input: &mut Input) -> Facts {
    let flags = input.u8();
    let block_bytes = input.pick(&[512, 4096, 1, 1 << 20]);
    let blocks = input.pick(&[1000, 1, 1 << 33, u64::MAX]);
    let mut facts = Facts::new(block_bytes, blocks, Identity::of("Malloc disk", "Malloc0"));
    facts.unmap = (flags & 1 != 0).then(|| facts.default_unmap());
    facts.read_only = flags & 2 != 0;
    facts.write_cache = flags & 4 != 0;
    if flags & 8 != 0 {
        (facts.compare_blocks_max, facts.transfer_blocks_max) = (0, 0);
    }
    facts
}

fn event(input: &mut Input, stage: &mut Stage, nexus: Nexus) {
    match input.u8() % 6 {
        0 => stage.lu.reset(),
        1 => stage.lu.nexus_lost(nexus),
        2 => stage.lu.nexus_reset(nexus),
        3 => stage.lu.nexus_removed(nexus),
        4 => stage.lu.resized(input.u64()),
        _ => stage.lu.tell_all(Attention::LunsChanged),
    }
}

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut stage = Stage::new(disk(&mut input));
    for nexus in 0..3 {
        stage.lu.attach(Nexus(nexus), false);
    }
    let mut list = [0; PARAMETERS_MAX];
    while !input.is_empty() {
        let control = input.u8();
        let nexus = Nexus((control & 3).into());
        if control & 0xf0 == 0xf0 {
            event(&mut input, &mut stage, nexus);
            continue;
        }
        let length = input.pick(&[6, 10, 12, 16, 32, 3]);
        let cdb = input.bytes(length);
        let len = if control & 4 != 0 { input.u64() } else { u64::from(input.u16()) };
        let buffers = if control & 8 != 0 {
            Buffers { data_in: len, data_out: 0 }
        } else {
            Buffers { data_in: 0, data_out: len }
        };
        list.fill(0);
        if control & 0x10 != 0 {
            let length = input.u8().into();
            let bytes = input.bytes(length);
            list[..bytes.len()].copy_from_slice(bytes);
        }
        stage.command(nexus, cdb, buffers, &list, input.pick(&FAILURES));
    }
}
