//! Commands of several I/Os, durable writes, write protection, and failures of the disk.

use std::sync::Arc;

use bdev::{Features, Op};
use front_end::Segment;
use front_end::scsi::{Command, Layout, cdb, code, lun};

use super::data_path::malloc;
use super::disk::{ALL, Fault, TestDisk};
use super::world::{Guest, Scene};

const BLOCK: usize = 512;

fn blocks(disk: &TestDisk) -> Vec<u8> {
    disk.state().data.chunks(BLOCK).map(|block| block[0]).collect()
}

#[test]
fn write_same_repeats_one_block() {
    for (features, zeroes) in [(ALL, Op::WriteZeroes), (Features::default(), Op::Write)] {
        let disk = TestDisk::with("d", 400, 512, features);
        let mut scene = Scene::new(Arc::clone(&disk) as _, Guest::default());
        let block: Vec<u8> = (0..BLOCK).map(|n| n as u8 | 1).collect();
        scene.good(0, cdb::write_same(0, 10, 300), &block, 0);
        let data = disk.state().data.clone();
        assert!(data[10 * BLOCK..310 * BLOCK].chunks(BLOCK).all(|other| other == block));
        assert!(data[..10 * BLOCK].iter().chain(&data[310 * BLOCK..]).all(|byte| *byte == 0));
        assert!(disk.state().take_seen().iter().all(|(op, ..)| *op == Op::Write));
        // A block of zeroes is not written again and again.
        scene.good(0, cdb::ten(0x41, 0, 20, 30), &[0; BLOCK], 0);
        let seen = disk.state().take_seen();
        assert_eq!(seen, [(zeroes, 20 * 512, 30 * 512)]);
        assert!(disk.state().data[20 * BLOCK..50 * BLOCK].iter().all(|byte| *byte == 0));
        // To the end, without data.
        scene.good(0, cdb::write_same(cdb::NO_DATA, 300, 0), &[], 0);
        assert!(disk.state().data[300 * BLOCK..].iter().all(|byte| *byte == 0));
        assert!(disk.state().data[299 * BLOCK..300 * BLOCK].iter().all(|byte| *byte != 0));
        disk.state().take_seen();
        for (cdb, data, sense) in [
            (cdb::write_same(0, 0, 1), 511, (5, 0x24, 0)),
            (cdb::write_same(0, 0, 1), 1024, (5, 0x24, 0)),
            (cdb::write_same(0, 399, 2), 512, (5, 0x21, 0)),
        ] {
            let (response, _) = scene.command(0, cdb, &vec![1; data], 0);
            assert_eq!(response.sense(), Some(sense), "{data}");
        }
        assert_eq!(disk.state().take_seen(), []);
    }
}

/// UNMAP of WRITE SAME allows the disk to unmap, but what is read afterwards is zero.
#[test]
fn write_same_may_unmap() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    scene.good(0, cdb::write(0, 64), &[1; 64 * BLOCK], 0);
    disk.state().seen.clear();
    scene.good(0, cdb::write_same(cdb::UNMAP, 8, 8), &[0; BLOCK], 0);
    scene.good(0, cdb::write_same(cdb::UNMAP | cdb::NO_DATA, 24, 8), &[], 0);
    scene.good(0, cdb::write_same(0, 40, 8), &[0; BLOCK], 0);
    let seen = disk.state().seen.clone();
    let may_unmap: Vec<_> = seen.iter().map(|seen| (seen.op, seen.may_unmap)).collect();
    assert_eq!(may_unmap, [true, true, false].map(|may| (Op::WriteZeroes, may)));
    let zeroes: Vec<_> = (0..64).filter(|n| blocks(&disk)[*n] == 0).collect();
    assert_eq!(zeroes, [8..16, 24..32, 40..48].into_iter().flatten().collect::<Vec<_>>());
}

#[test]
fn verify_compares_what_it_is_to_compare() {
    let (mut scene, disk) = Scene::of(400, Guest::default());
    let written: Vec<u8> = (0..200 * BLOCK).map(|n| (n / 3) as u8).collect();
    scene.good(0, cdb::write(100, 200), &written, 0);
    disk.state().seen.clear();
    scene.good(0, cdb::verify(0, 100, 200), &[], 0);
    assert!(disk.state().take_seen().iter().all(|(op, ..)| *op == Op::Read));
    scene.good(0, cdb::verify(cdb::COMPARE, 100, 200), &written, 0);
    for at in [0, 1, BLOCK - 1, BLOCK, 65 * BLOCK + 3, 64 * BLOCK, 200 * BLOCK - 1] {
        let mut other = written.clone();
        other[at] ^= 0x80;
        let (response, _) = scene.command(0, cdb::verify(cdb::COMPARE, 100, 200), &other, 0);
        assert_eq!(response.sense(), Some((0xe, 0x1d, 0)), "{at}");
    }
    // The data is shorter than what is to be compared.
    let (response, _) = scene.command(0, cdb::verify(cdb::COMPARE, 100, 2), &written[..BLOCK], 0);
    assert_eq!(response.sense(), Some((5, 0x24, 0)));
    let (response, _) = scene.command(0, cdb::verify(0, 399, 2), &[], 0);
    assert_eq!(response.sense(), Some((5, 0x21, 0)));
}

#[test]
fn write_and_verify_reads_back_what_is_durable() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    let written: Vec<u8> = (0..3 * BLOCK).map(|n| (n / 7) as u8).collect();
    scene.good(0, cdb::write_and_verify(0, 5, 3), &written, 0);
    let range = (5 * 512, 3 * 512);
    let expected = [(Op::Write, range.0, range.1), (Op::Flush, 0, 0), (Op::Read, range.0, range.1)];
    assert_eq!(disk.state().take_seen(), expected);
    scene.good(0, cdb::write_and_verify(cdb::COMPARE, 5, 3), &written, 0);
    assert_eq!(disk.state().take_seen(), expected);
    assert!(disk.state().data[5 * BLOCK..8 * BLOCK] == written);
    // A buffer that is too short: whole blocks are written, and verified.
    let (response, _) = scene.command(0, cdb::write_and_verify(0, 9, 3), &[4; 700], 0);
    assert_eq!((response.response, response.residual), (code::OVERRUN, 188));
    assert_eq!(blocks(&disk)[9..12], [4, 0, 0]);
}

#[test]
fn compare_and_write_writes_only_what_is_equal() {
    let (mut scene, disk) = Scene::of(300, Guest::default());
    for (lba, count) in [(0, 1), (7, 2), (20, 255)] {
        let old = blocks(&disk)[lba as usize];
        let len = usize::from(count) * BLOCK;
        let both = [vec![old; len], vec![old + 3; len]].concat();
        scene.good(0, cdb::compare_and_write(0, lba, count), &both, 0);
        assert!(disk.state().data[lba as usize * BLOCK..][..len].iter().all(|b| *b == old + 3));
        // The data is what is written now, but for one byte.
        for at in [0, len / 2 + 1, len - 1] {
            let mut both = [vec![old + 3; len], vec![9; len]].concat();
            both[at] ^= 1;
            let (response, _) = scene.command(0, cdb::compare_and_write(0, lba, count), &both, 0);
            assert_eq!(response.sense(), Some((0xe, 0x1d, 0)));
            assert_eq!(response.information(), Some(at as u32));
            assert!(disk.state().data[lba as usize * BLOCK..][..len].iter().all(|b| *b == old + 3));
        }
    }
    let before = disk.state().data.clone();
    disk.state().seen.clear();
    scene.good(0, cdb::compare_and_write(0, 0, 0), &[], 0);
    for (lba, count, len, sense) in [
        (299, 2, 4 * BLOCK, (5, 0x21, 0)),
        (0, 2, 2 * BLOCK, (5, 0x24, 0)),
        (0, 1, BLOCK, (5, 0x24, 0)),
    ] {
        let cdb = cdb::compare_and_write(0, lba, count);
        let (response, _) = scene.command(0, cdb, &vec![0; len], 0);
        assert_eq!(response.sense(), Some(sense), "{lba} {count}");
    }
    assert_eq!(disk.state().take_seen(), []);
    assert!(disk.state().data == before);
    // The data is in pieces that end anywhere.
    let both: Vec<Segment> = [vec![before[0]; 300], vec![before[0]; 212], vec![8; 1], vec![8; 511]]
        .map(|piece| scene.vm.buffer(&piece))
        .into();
    let command = Command::new(lun(0, 0), 0, cdb::compare_and_write(0, 0, 1));
    assert!(scene.run(command.with_data_out(&both)).response.is_good());
    assert!(disk.state().data[..BLOCK].iter().all(|byte| *byte == 8));
}

/// Descriptors and lengths of UNMAP.
#[test]
fn unmap_accepts_what_it_announces() {
    let (mut scene, disk) = Scene::of(1000, Guest::default());
    disk.state().data.fill(5);
    let limits = scene.good(0, cdb::inquiry(Some(0xb0), 64), &[], 64);
    assert_eq!(limits[24..28], 256_u32.to_be_bytes(), "descriptors");
    for count in [1, 2, 255, 256] {
        disk.state().data.fill(5);
        disk.state().seen.clear();
        let ranges: Vec<_> = (0..count).map(|n| (3 * n, 2)).collect();
        let list = cdb::unmap_list(&ranges);
        scene.good(0, cdb::unmap(list.len() as u16), &list, 0);
        let expected: Vec<_> = ranges.iter().map(|(lba, _)| (Op::Unmap, lba * 512, 1024)).collect();
        assert_eq!(disk.state().take_seen(), expected);
        let is_unmapped = |n: u64| n < 3 * count && n % 3 < 2;
        let bytes = blocks(&disk);
        assert!((0..1000).all(|n| (bytes[n as usize] == 0) == is_unmapped(n)), "{count}");
    }
    let ranges: Vec<_> = (0..257).map(|n| (3 * n, 2)).collect();
    let list = cdb::unmap_list(&ranges);
    let (response, _) = scene.command(0, cdb::unmap(list.len() as u16), &list, 0);
    assert_eq!(response.status, 2, "{response:?}");
    assert_eq!(response.sense().unwrap().0, 5);
    assert_eq!(disk.state().take_seen(), []);
}

#[test]
fn unmap_with_odd_lengths_is_harmless() {
    let (mut scene, disk) = Scene::of(1000, Guest::default());
    let whole = cdb::unmap_list(&(0..257).map(|n| (n, 1)).collect::<Vec<_>>());
    for descriptors in (0..=64).chain(4080..=4112) {
        for buffer in [descriptors + 8, descriptors + 7, whole.len()] {
            let mut list = whole.clone();
            list[2..4].copy_from_slice(&(descriptors as u16).to_be_bytes());
            list.truncate(buffer);
            let cdb = cdb::unmap(buffer as u16);
            let (response, _) = scene.command(0, cdb, &list, 0);
            assert!(response.is_written());
            let sense = response.sense();
            assert!(sense.is_none_or(|(key, ..)| key == 5), "{descriptors} {buffer} {sense:?}");
            assert!(disk.state().take_seen().len() <= 256);
        }
    }
    // The list is shorter than its header, or than the CDB says.
    for (cdb, data) in [(0, 0), (0, 8), (4, 4), (8, 0), (24, 8), (65535, 24)] {
        let (response, _) = scene.command(0, cdb::unmap(cdb), &whole[..data], 0);
        assert!(response.is_good() || response.sense().unwrap().0 == 5, "{cdb} {data}");
    }
    scene.good(0, cdb::unmap(24), &cdb::unmap_list(&[(5, 0)]), 0);
    let (response, _) = scene.command(0, cdb::unmap(24), &cdb::unmap_list(&[(999, 2)]), 0);
    assert_eq!(response.sense(), Some((5, 0x21, 0)));
    let list = cdb::unmap_list(&[(u64::MAX, u32::MAX)]);
    let (response, _) = scene.command(0, cdb::unmap(24), &list, 0);
    assert_eq!(response.sense(), Some((5, 0x21, 0)));
    assert_eq!(disk.state().take_seen(), []);
}

#[test]
fn durable_reads_and_writes_flush() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    scene.good(0, cdb::ten(0x2a, cdb::FUA, 3, 1), &[1; BLOCK], 0);
    let (write, flush, read) =
        ((Op::Write, 3 * 512, 512), (Op::Flush, 0, 0), (Op::Read, 3 * 512, 512));
    assert_eq!(disk.state().take_seen(), [write, flush]);
    scene.good(0, cdb::ten(0x28, cdb::FUA, 3, 1), &[], BLOCK);
    assert_eq!(disk.state().take_seen(), [flush, read]);
    scene.good(0, cdb::synchronize_cache(), &[], 0);
    assert_eq!(disk.state().take_seen(), [flush]);
    // Without a write cache: MODE SELECT(6) of the caching page.
    let mut list = vec![0, 0, 0, 0, 0x08, 0x12];
    list.resize(4 + 20, 0);
    scene.good(0, cdb::of(&[0x15, 0x10, 0, 0, 24]), &list, 0);
    assert_eq!(disk.state().take_seen(), [flush], "what is in the cache becomes durable");
    scene.good(0, cdb::write(3, 1), &[2; BLOCK], 0);
    assert_eq!(disk.state().take_seen(), [write, flush]);
    scene.good(0, cdb::read(3, 1), &[], BLOCK);
    assert_eq!(disk.state().take_seen(), [read]);
    // A disk without a cache.
    let disk = TestDisk::with("d", 64, 512, Features::default());
    let mut scene = Scene::new(Arc::clone(&disk) as _, Guest::default());
    scene.good(0, cdb::ten(0x2a, cdb::FUA, 3, 1), &[1; BLOCK], 0);
    scene.good(0, cdb::synchronize_cache(), &[], 0);
    scene.good(0, cdb::ten(0x28, cdb::FUA, 3, 1), &[], BLOCK);
    assert_eq!(disk.state().take_seen(), [write, read]);
}

#[test]
fn a_read_only_disk_refuses_all_writes() {
    let disk = TestDisk::with("d", 64, 512, Features { read_only: true, ..ALL });
    let mut scene = Scene::new(Arc::clone(&disk) as _, Guest::default());
    let list = cdb::unmap_list(&[(0, 1)]);
    for (cdb, data) in [
        (cdb::write(0, 1), vec![1; BLOCK]),
        (cdb::write_and_verify(0, 0, 1), vec![1; BLOCK]),
        (cdb::write_same(0, 0, 1), vec![1; BLOCK]),
        (cdb::compare_and_write(0, 0, 1), vec![1; 2 * BLOCK]),
        (cdb::unmap(24), list),
    ] {
        let (response, _) = scene.command(0, cdb, &data, 0);
        assert_eq!(response.sense(), Some((7, 0x27, 0)), "{cdb:x?}");
    }
    scene.good(0, cdb::read(0, 1), &[], BLOCK);
    let mode = scene.good(0, cdb::of(&[0x1a, 0, 0x3f, 0, 255]), &[], 255);
    assert_eq!(mode[2] & 0x80, 0x80, "WP");
    assert_eq!(disk.state().take_seen(), [(Op::Read, 0, 512)]);
}

#[test]
fn failures_of_the_disk_become_sense_data() {
    let (mut scene, disk) = Scene::of(64, Guest::default());
    let error = |key, code| (2, Some((key, code, 0)));
    let cases = [
        (Fault::Unknown, error(3, 0x0c), error(3, 0x11)),
        (Fault::Errno(libc::EIO), error(3, 0x0c), error(3, 0x11)),
        (Fault::Errno(libc::ENOSPC), (2, Some((7, 0x27, 7))), (2, Some((7, 0x27, 7)))),
        (Fault::Errno(libc::EDQUOT), (2, Some((7, 0x27, 7))), (2, Some((7, 0x27, 7)))),
        (Fault::Errno(libc::EROFS), error(7, 0x27), error(7, 0x27)),
        (Fault::Errno(libc::ENOMEM), (8, None), (8, None)),
        (Fault::Errno(libc::EAGAIN), (8, None), (8, None)),
        (Fault::Errno(libc::ECANCELED), error(0xb, 0), error(0xb, 0)),
        (Fault::Errno(libc::EBADE), (0x18, None), (0x18, None)),
        (Fault::Unsupported, error(5, 0x20), error(5, 0x20)),
    ];
    for (fault, on_write, on_read) in cases {
        disk.state().faults = vec![(Op::Write, fault), (Op::Read, fault)];
        let (response, _) = scene.command(0, cdb::write(5, 1), &[1; BLOCK], 0);
        assert_eq!((response.status, response.sense()), on_write, "{fault:?}");
        assert_eq!((response.response, response.residual), (code::OK, 512), "{fault:?}");
        let (response, _) = scene.command(0, cdb::read(5, 1), &[], BLOCK);
        assert_eq!((response.status, response.sense()), on_read, "{fault:?}");
        assert_eq!((response.response, response.residual), (code::OK, 512), "{fault:?}");
        disk.state().faults.clear();
        scene.good(0, cdb::read(5, 1), &[], BLOCK);
    }
    // Each I/O of a command of several.
    for (op, good, cdb, data) in [
        (Op::Write, 0, cdb::write_same(0, 0, 64), 1),
        (Op::Read, 0, cdb::compare_and_write(0, 0, 1), 2),
        (Op::Write, 0, cdb::compare_and_write(0, 0, 1), 2),
        (Op::Write, 0, cdb::write_and_verify(0, 0, 1), 1),
        (Op::Flush, 0, cdb::write_and_verify(0, 0, 1), 1),
        (Op::Read, 0, cdb::write_and_verify(0, 0, 1), 1),
        (Op::Flush, 0, cdb::ten(0x2a, cdb::FUA, 0, 1), 1),
        (Op::Flush, 0, cdb::synchronize_cache(), 0),
    ] {
        disk.state().data.fill(1);
        disk.state().faults = vec![(op, Fault::Errno(libc::EIO))];
        disk.state().good = good;
        let (response, _) = scene.command(0, cdb, &vec![1; data * BLOCK], 0);
        assert_eq!((response.status, response.response), (2, code::OK), "{op:?} {cdb:x?}");
        let key = response.sense().unwrap().0;
        assert!(matches!(key, 3 | 4), "{op:?} {cdb:x?}: {key}");
        disk.state().faults.clear();
    }
    let list = cdb::unmap_list(&[(0, 1), (4, 1), (8, 1)]);
    disk.state().faults = vec![(Op::Unmap, Fault::Errno(libc::EIO))];
    disk.state().good = 1;
    let (response, _) = scene.command(0, cdb::unmap(list.len() as u16), &list, 0);
    assert_eq!(response.sense().unwrap().0, 4, "the second range fails");
}

/// More commands of several I/Os at a time than a queue can do.
#[test]
fn commands_of_several_ios_wait_for_one_another() {
    let (mut scene, disk) = Scene::of(640, Guest::default());
    disk.state().holds = true;
    let buffers: Vec<_> = (0..20).map(|n| [scene.vm.buffer(&[n + 1; BLOCK])]).collect();
    let tags: Vec<_> = (0_u64..)
        .zip(&buffers)
        .map(|(n, out)| {
            let command = Command::new(lun(0, 0), 0, cdb::write_same(0, 32 * n, 32));
            scene.vm.submit(0, command.with_data_out(out), Layout::Separate)
        })
        .collect();
    scene.world.settle();
    // Commands that need no such state go on.
    disk.state().holds = false;
    scene.good(0, cdb::inquiry(None, 36), &[], 36);
    disk.state().release();
    for tag in tags {
        assert!(scene.wait(tag).response.is_good());
    }
    let bytes = blocks(&disk);
    assert!((0..640).all(|n| usize::from(bytes[n]) == n / 32 + 1));
}

/// Those of one target do not keep others from being done.
#[test]
fn commands_of_several_ios_of_a_hanging_target_affect_no_other() {
    let (mut scene, hanging) = Scene::of(640, Guest { size: 256, ..Guest::default() });
    scene.add(1, &malloc("m", 512, 64));
    scene.vm.attentions(&mut scene.world, 1);
    hanging.state().holds = true;
    let out = [scene.vm.buffer(&[1; BLOCK])];
    let same = |target| Command::new(lun(target, 0), 0, cdb::write_same(0, 0, 32));
    let tags: Vec<_> = (0..20)
        .map(|_| scene.vm.submit(0, same(0).with_data_out(&out), Layout::Separate))
        .collect();
    scene.world.settle();
    assert!(scene.run(same(1).with_data_out(&out)).response.is_good());
    hanging.state().release();
    for tag in tags {
        assert!(scene.wait(tag).response.is_good());
    }
}
