//! Random CDBs with random buffers: no panic, no allocation, and no answer without a valid status.
//!
//! `SCSI_CDBS` sets the number of CDBs, `SCSI_SEED` the seed.
#![expect(unsafe_code, reason = "an allocator that counts")]

#[path = "common/check.rs"]
mod check;
mod common;
#[path = "common/random.rs"]
mod random;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use check::Stage;
use common::facts;
use proptest::prelude::*;
use random::{Guests, Random, random_failure};
use scsi::{Buffers, Facts, Nexus};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, with a count of allocations of each thread.
struct Counting;

// SAFETY: every call goes to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are those of this method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the memory comes from `alloc`, so from the system's allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The disks: with everything, read-only without unmap, and large blocks without a write cache.
fn disks() -> [Facts; 3] {
    let mut large = Facts::new(4096, 1 << 40, facts().identity);
    large.unmap = Some(large.default_unmap());
    [facts(), Facts { read_only: true, unmap: None, ..facts() }, large]
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_cdbs() {
    let (count, seed) = (number("SCSI_CDBS", 1_000_000), number("SCSI_SEED", 1));
    println!("SCSI_CDBS={count} SCSI_SEED={seed}");
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for (disk, share) in disks().into_iter().zip([2, 1, 1]) {
        let mut guests = Guests::new(disk);
        let before = ALLOCATIONS.get();
        for _ in 0..count * share / 4 {
            guests.step(&mut random);
        }
        assert_eq!(ALLOCATIONS.get(), before, "something allocated");
        let reached = &guests.stage.reached;
        println!("{reached:?}");
        let enough = count / 1000;
        assert!(reached.good > enough && reached.check > enough && reached.other > enough);
        assert!(reached.plans > enough && reached.fast > enough);
        assert!(disk.read_only || reached.copies > enough / 100);
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    /// Any bytes at all, on any disk, after any commands.
    #[test]
    fn any_cdb(
        disk in 0..3_usize,
        commands in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..40), any::<u64>(), any::<u64>(), 0..3_u64),
            1..20,
        ),
        seed in any::<u64>(),
    ) {
        let mut stage = Stage::new(disks()[disk]);
        let mut random = Random(seed | 1);
        for (cdb, data_in, data_out, nexus) in &commands {
            let (data_in, data_out) = (data_in >> (seed % 64), data_out >> (seed / 64 % 64));
            let buffers = Buffers { data_in, data_out };
            stage.command(Nexus(*nexus), cdb, buffers, cdb, random_failure(&mut random));
        }
    }

    /// Commands that are almost valid, in a sequence that shrinks.
    #[test]
    fn any_sequence(disk in 0..3_usize, seeds in prop::collection::vec(any::<u64>(), 1..40)) {
        let mut guests = Guests::new(disks()[disk]);
        for seed in &seeds {
            guests.step(&mut Random(seed | 1));
        }
    }
}
