//! Random operations on a store whose power is cut between any two writes: see `disk` for what a cut
//! may lose. After each cut the store loads, has no contradictions, and every volume reads what was
//! flushed, or something written since; no data of other volumes.
//!
//! `LVS_SIM_SEEDS` is the number of seeds and `LVS_SIM_FIRST` the first one: see `ci/lvs-sim`.

mod disk;
mod model;
mod operations;
mod random;

use std::panic::{AssertUnwindSafe, catch_unwind};

use blobstore::check::{Severity, check};
use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::StoreOptions;
use futures_util::FutureExt;
use uuid::Uuid;

use self::disk::Disk;
use self::model::Model;
use self::operations::Run;
use self::random::Random;

use crate::medium::now;

const SIZE: usize = 1 << 20;
/// Power cuts of one seed.
const CUTS: u64 = 3;
/// Operations between two cuts, if none comes before.
const OPERATIONS: u64 = 40;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn nothing_flushed_is_lost_whenever_the_power_is_cut() {
    let first = number("LVS_SIM_FIRST", 0);
    let mut cuts = [0; 2];
    for seed in first..first + number("LVS_SIM_SEEDS", 2000) {
        let result = catch_unwind(AssertUnwindSafe(|| simulate(seed, &mut cuts)));
        assert!(result.is_ok(), "seed {seed} failed: LVS_SIM_FIRST={seed} LVS_SIM_SEEDS=1");
    }
    println!("{} cuts in operations, {} in recoveries", cuts[0], cuts[1]);
    assert!(cuts.iter().all(|cuts| *cuts > 0) || number("LVS_SIM_SEEDS", 2000) < 100);
}

fn simulate(seed: u64, cuts: &mut [u64; 2]) {
    let mut random = Random::new(seed);
    let (unmap, zeroes) =
        [(false, false), (true, false), (true, true)][usize::try_from(random.below(3)).unwrap()];
    let mut disk = Disk::new(SIZE, unmap, zeroes);
    if random.chance(20) {
        // Sometimes over an older store.
        if random.chance(50) {
            disk = older_store(disk);
        }
        disk = cut_create(disk, &mut random);
    }
    let created = now(create(disk)).unwrap();
    let end = created.store().super_block().metadata_clusters() * 4096;
    let disk = created.into_store().into_device();
    disk.set_metadata(end);
    let mut model = Model::default();
    let mut lvs = now(Lvs::load(disk, false)).unwrap();
    for _ in 0..CUTS {
        let limit = 1 << random.below(8);
        lvs.store().device().cut_after(1 + random.below(limit));
        let mut run = Run::new(lvs, model, &mut random);
        for _ in 0..OPERATIONS {
            if !run.step() {
                cuts[0] += 1;
                break;
            }
        }
        let (cut, candidates) = run.end();
        let disk = cut.into_store().into_device().power_up(&mut random);
        assert_readable(&disk);
        lvs = recover(disk, &mut random, &mut cuts[1]);
        model = choose(&lvs, candidates);
        model.compare(&lvs).unwrap();
        if random.chance(20) {
            // A cut in an unload leaves the store as it was.
            lvs.store().device().cut_after(1 + random.below(8));
            let ended = lvs.store_mut().unload().now_or_never();
            assert!(ended.is_none_or(|unloaded| unloaded.is_ok()));
            let disk = lvs.into_store().into_device().power_up(&mut random);
            lvs = recover(disk, &mut random, &mut cuts[1]);
            model.compare(&lvs).unwrap();
        }
        if random.chance(50) {
            now(lvs.store_mut().unload()).unwrap();
            assert_whole(lvs.store().device());
            lvs = now(lvs.reload()).unwrap();
            model.compare(&lvs).unwrap();
        }
    }
}

async fn create(disk: Disk) -> blobstore::Result<Lvs<Disk>> {
    let options =
        StoreOptions { cluster_size: 4096, pages_per_hundred_clusters: 40, ..Default::default() };
    Lvs::create(disk, "store", Uuid::from_u128(1), options).await
}

/// A store with a volume that has a cluster.
fn older_store(disk: Disk) -> Disk {
    let mut lvs = now(create(disk)).unwrap();
    let uuid = Uuid::from_u128(2);
    let new = NewVolume { name: "old", uuid, clusters: 3, thin: true, clear: Clear::Default };
    let id = now(lvs.create_volume(new)).unwrap();
    now(lvs.store_mut().allocate(id, &[0])).unwrap();
    now(lvs.store_mut().unload()).unwrap();
    lvs.into_store().into_device()
}

/// The power is cut while the store is made: it is not there, or it is whole. So is an older one.
fn cut_create(disk: Disk, random: &mut Random) -> Disk {
    disk.cut_after(1 + random.below(14));
    drop(create(disk.clone()).now_or_never());
    let disk = disk.power_up(random);
    if let Ok(lvs) = now(Lvs::load(disk.clone(), true)) {
        assert!(lvs.volumes().all(|volume| volume.name == Some("old")));
        assert_eq!(lvs.store().broken(), []);
        for volume in lvs.volumes() {
            assert_eq!(volume.blob.allocated(), 1);
        }
    }
    disk
}

/// Loads the store, with further cuts at times.
fn recover(mut disk: Disk, random: &mut Random, cuts: &mut u64) -> Lvs<Disk> {
    while random.chance(40) {
        disk.cut_after(1 + random.below(8));
        *cuts += u64::from(Lvs::load(disk.clone(), false).now_or_never().is_none());
        disk = disk.power_up(random);
    }
    let lvs = now(Lvs::load(disk, false)).expect("the store loads");
    assert_eq!(lvs.store().broken(), []);
    assert!(lvs.volumes().all(|volume| volume.blob.damage().is_none()));
    lvs
}

fn choose(lvs: &Lvs<Disk>, candidates: Vec<Model>) -> Model {
    let mut reasons = Vec::new();
    for candidate in candidates {
        match candidate.shape(lvs) {
            None => return candidate,
            Some(reason) => reasons.push(reason),
        }
    }
    panic!("the store is none that may be: {reasons:#?}");
}

/// What a cut has left has no error that a load must tolerate, and no state in which SPDK could not
/// open a volume: an extent page that is shorter than those after it need.
fn assert_readable(disk: &Disk) {
    for finding in now(check(disk)).unwrap() {
        let tolerated = finding.severity < Severity::Error && !finding.text.contains("resize");
        assert!(tolerated, "{finding}");
    }
}

fn assert_whole(disk: &Disk) {
    let found = now(check(disk)).unwrap();
    let bad: Vec<String> = (found.iter())
        .filter(|finding| finding.severity > Severity::Note)
        .map(ToString::to_string)
        .collect();
    assert_eq!(bad, [""; 0]);
}
