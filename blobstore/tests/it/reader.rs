//! Stores that this crate has written, read by another reader: `reader.py`, which knows only the
//! description of the format. The same reader must agree with SPDK on SPDK's own images.

use std::path::Path;
use std::process::Command;

use blobstore::BlobId;
use blobstore::format::Clear;
use blobstore::lvs::{Lvs, NewVolume};
use blobstore::store::StoreOptions;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::medium::{self, Memory, findings, hash, image, now, truth, write};

fn read(image: &[u8], external: Option<&[u8]>) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let reader = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py");
    let mut command = Command::new("python3");
    command.arg(reader);
    for (name, bytes) in [("image", Some(image)), ("external", external)] {
        if let Some(bytes) = bytes {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            command.arg(dir.path().join(name));
        }
    }
    let output = command.output().expect("python3 is needed");
    let error = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("reader.py: {error}"))
}

#[test]
fn the_reader_agrees_with_spdk() {
    let truth = truth();
    let base = image("lvs-esnap-base.img.zst");
    // Without lvs-chain, whose volume of 1200 MiB takes long.
    for (name, truth) in truth.as_object().unwrap() {
        if !name.starts_with("lvs-") || name == "lvs-chain" || truth["lvols"].is_null() {
            continue;
        }
        let file = image(truth["file"].as_str().unwrap());
        let found = read(&file, (name == "lvs-esnap").then_some(&base));
        assert_eq!(found["free_clusters"], truth["free_clusters"], "{name}");
        for (volume, wanted) in truth["lvols"].as_object().unwrap() {
            let found = found["lvols"][volume].as_object().unwrap();
            for (key, value) in found {
                let repaired = name == "lvs-snaprm-kept" && key == "num_allocated_clusters";
                assert!(wanted[key] == *value || repaired, "{name}/{volume}: {key} {value}");
            }
        }
    }
}

/// What the crate says, in the form of the reader's answer.
fn describe(lvs: &Lvs<Memory>) -> Value {
    let mut volumes = Map::new();
    for volume in lvs.volumes() {
        let (blob, flags) = (volume.blob, volume.blob.flags());
        let parent = match blob.parent() {
            blobstore::Parent::Blob(id) => lvs.volume(id).unwrap().name,
            _ => None,
        };
        let described = json!({
            "uuid": volume.uuid.unwrap().to_string(),
            "clusters": blob.clusters(),
            "num_allocated_clusters": blob.allocated(),
            "thin": flags.thin(),
            "read_only": flags.read_only(),
            "parent": parent,
            "sha256": hash(lvs.store(), blob.id()),
        });
        volumes.insert(volume.name.unwrap().to_owned(), described);
    }
    json!({
        "lvstore": lvs.name(),
        "uuid": lvs.uuid().to_string(),
        "clean": u32::from(lvs.store().super_block().clean),
        "free_clusters": lvs.store().free_clusters(),
        "lvols": volumes,
    })
}

fn create(lvs: &mut Lvs<Memory>, name: &str, clusters: u64, thin: bool) -> BlobId {
    let uuid = Uuid::from_u128(clusters.into());
    now(lvs.create_volume(NewVolume { name, uuid, clusters, thin, clear: Clear::Default })).unwrap()
}

const CLUSTER: u64 = 16 << 10;

/// All operations, in a fixed order, with contents that differ.
fn fixed_sequence(memory: Memory, check: &mut dyn FnMut(&Lvs<Memory>)) -> Lvs<Memory> {
    let uuid = Uuid::from_u128(99);
    let options = StoreOptions {
        cluster_size: 16 << 10,
        pages_per_hundred_clusters: 20,
        ..StoreOptions::default()
    };
    let mut lvs = now(Lvs::create(memory, "golden", uuid, options)).unwrap();
    let thick = create(&mut lvs, "thick", 20, false);
    let thin = create(&mut lvs, "thin", 1200, true);
    let data = |n: u8| vec![n; 4096];
    for (n, index) in [0, 3, 511, 512, 1199].into_iter().enumerate() {
        write(lvs.store_mut(), thin, index, 4096, data(u8::try_from(n).unwrap() + 1));
        write(lvs.store_mut(), thick, index % 20, 0, data(u8::try_from(n).unwrap() + 101));
    }
    check(&lvs);
    let s1 = now(lvs.snapshot(thin, "s1", Uuid::from_u128(1))).unwrap();
    write(lvs.store_mut(), thin, 3, 0, data(11));
    let s2 = now(lvs.snapshot(thin, "s2", Uuid::from_u128(2))).unwrap();
    write(lvs.store_mut(), thin, 4, 0, data(12));
    let c1 = now(lvs.clone_volume(s1, "c1", Uuid::from_u128(3))).unwrap();
    write(lvs.store_mut(), c1, 700, 8192, data(13));
    let c2 = now(lvs.clone_volume(s2, "c2", Uuid::from_u128(4))).unwrap();
    now(lvs.snapshot(thick, "s-thick", Uuid::from_u128(5))).unwrap();
    write(lvs.store_mut(), thick, 7, 0, data(14));
    check(&lvs);
    now(lvs.store_mut().resize(c1, 600)).unwrap();
    now(lvs.store_mut().resize(c1, 2000)).unwrap();
    write(lvs.store_mut(), c1, 1999, 0, data(15));
    now(lvs.store_mut().decouple(c2)).unwrap();
    now(lvs.delete(s2)).unwrap();
    now(lvs.store_mut().inflate(thick)).unwrap();
    now(lvs.store_mut().resize(thick, 30)).unwrap();
    now(lvs.rename(c2, "renamed")).unwrap();
    now(lvs.store_mut().set_read_only(c2)).unwrap();
    let long = vec![(b"long".to_vec(), Some(vec![7; 3900]))];
    now(lvs.store_mut().set_xattrs(thin, long)).unwrap();
    now(lvs.store_mut().release(thick, &[7])).unwrap();
    let gone = create(&mut lvs, "gone", 40, false);
    now(lvs.delete(gone)).unwrap();
    check(&lvs);
    now(lvs.store_mut().unload()).unwrap();
    check(&lvs);
    lvs
}

#[test]
fn another_reader_reads_what_this_crate_has_written() {
    let mut checks = 0;
    for memory in [Memory::new(vec![0; 32 << 20], 512), Memory::dirty(32 << 20, 4096)] {
        let lvs = fixed_sequence(memory, &mut |lvs| {
            let bytes = lvs.store().device().bytes.borrow();
            assert_eq!(read(&bytes, None), describe(lvs));
            checks += 1;
        });
        assert_eq!(findings(lvs.store().device()), [""; 0]);
        let thick = lvs.find("thick").unwrap().blob;
        let zeroed = medium::cluster(lvs.store(), thick.id(), 7);
        assert!(zeroed.iter().all(|byte| *byte == 0));
    }
    assert_eq!(checks, 8);
}

/// The metadata of the sequence is the same, byte for byte, as it was when the other reader and the
/// images of SPDK had agreed with it.
#[test]
fn the_metadata_is_the_same_as_ever() {
    let lvs = fixed_sequence(Memory::new(vec![0; 32 << 20], 512), &mut |_| {});
    let end = lvs.store().super_block().metadata_clusters() * CLUSTER;
    let bytes = lvs.store().device().bytes.borrow();
    let hash = Sha256::digest(&bytes[..usize::try_from(end).unwrap()]);
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hash, "bc8d7f4944eea71d88f62687872551841d56617e85e9f577cda2bfbf049028bb");
}
