//! Commands of any size in any layout: what is transferred, residuals, responses and addresses.

use std::sync::Arc;

use bdev::{
    Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection,
    Latency, Malloc, MallocOptions, Null, NullOptions, Op,
};
use front_end::scsi::{Command, Layout, Response, cdb, code, lun, peripheral_lun};
use front_end::{Buffer, Segment};

use super::disk::TestDisk;
use super::world::{Guest, Scene};

const BLOCK: usize = 512;

pub(super) fn malloc(name: &str, block_size: u32, num_blocks: u64) -> Arc<dyn Bdev> {
    let options = MallocOptions { name: name.into(), num_blocks, block_size, uuid: None };
    Malloc::create(options).unwrap()
}

/// Returns bytes of which none repeats at the distance of a block.
fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|n| ((n + seed) * 31 + n / 251) as u8).collect()
}

/// Rings of each kind.
fn guests() -> Vec<Guest> {
    let mut guests = vec![];
    for packed in [false, true] {
        for indirect in [false, true] {
            let size = if indirect { 16 } else { 1024 };
            guests.push(Guest { packed, indirect, size, ..Guest::default() });
        }
    }
    guests
}

#[test]
fn the_disk_is_found_and_described() {
    let mut scene = Scene::new(malloc("Malloc0", BLOCK as u32, 100), Guest::default());
    let data = scene.good(0, cdb::inquiry(None, 96), &[], 96);
    assert_eq!((data[0], data[2]), (0, 6), "a disk, SPC-4");
    assert_eq!(&data[8..32], b"INTEL   Malloc disk     ");
    let serial = scene.good(0, cdb::inquiry(Some(0x80), 64), &[], 64);
    assert!(serial[4..].starts_with(b"Malloc0"));
    let luns = scene.good(0, cdb::report_luns(0, 16), &[], 16);
    assert_eq!(luns, [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let capacity = scene.good(0, cdb::read_capacity(32), &[], 32);
    assert_eq!((&capacity[..8], &capacity[8..12]), (&99_u64.to_be_bytes()[..], &[0, 0, 2, 0][..]));
}

#[test]
fn a_new_nexus_gets_one_unit_attention() {
    let mut scene = Scene::empty(1, Guest::default());
    scene.add(0, &malloc("m", 512, 100));
    let good = scene.good(0, cdb::inquiry(None, 36), &[], 36);
    assert_eq!(good[0], 0, "INQUIRY is not affected");
    let (response, data) = scene.command(0, cdb::read(0, 1), &[], BLOCK);
    assert_eq!(response.sense(), Some((6, 0x29, 0)));
    assert_eq!((response.response, response.residual), (code::OK, BLOCK as u32));
    assert!(data.iter().all(|byte| *byte == 0));
    scene.good(0, cdb::read(0, 1), &[], BLOCK);
}

#[test]
fn data_of_all_sizes_is_written_and_read_in_all_layouts() {
    for guest in guests() {
        let mut scene = Scene::new(malloc("m", 512, 4096), guest);
        let (mut layouts, mut seed) =
            (vec![Layout::Separate, Layout::Stream(u32::MAX), Layout::Stream(4096)], 0);
        layouts.extend([Layout::Cut(50), Layout::Cut(1), Layout::Stream(300)]);
        for blocks in [1, 2, 3, 7, 8, 16, 31] {
            for layout in layouts.iter().copied() {
                let len = blocks * BLOCK;
                let lba = (seed * 37) as u32 % 4000;
                let written = pattern(seed, len);
                seed += 1;
                let (out, to) = ([scene.vm.buffer(&written)], [scene.vm.zeroed(len)]);
                let lun = lun(0, 0);
                let write = Command::new(lun, 0, cdb::write(lba, blocks as u16));
                let tag = scene.vm.submit(0, write.with_data_out(&out), layout);
                let done = scene.wait(tag);
                assert!(done.response.is_good(), "{done:?} {layout:?} {guest:?}");
                assert_eq!((done.response.residual, done.used_len), (0, 108));
                let read = Command::new(lun, 0, cdb::read(lba, blocks as u16));
                let tag = scene.vm.submit(0, read.with_data_in(&to), layout);
                let done = scene.wait(tag);
                assert!(done.response.is_good(), "{done:?} {layout:?} {guest:?}");
                assert_eq!((done.response.residual, done.used_len), (0, 108 + len as u32));
                assert!(scene.vm.bytes(to[0]) == written, "{blocks} {layout:?} {guest:?}");
            }
        }
    }
}

/// Large transfers, up to the maximum that Block Limits names.
#[test]
fn large_transfers_are_complete() {
    let mut scene = Scene::new(malloc("m", 512, 20_000), Guest::default());
    for blocks in [255_u16, 256, 257, 1024, 4095, 8192] {
        let len = usize::from(blocks) * BLOCK;
        let written = pattern(blocks.into(), len);
        scene.good(0, cdb::write(1, blocks), &written, 0);
        assert!(scene.good(0, cdb::read(1, blocks), &[], len) == written, "{blocks}");
    }
    let (response, _) = scene.command(0, cdb::read(0, 8193), &[], 8193 * BLOCK);
    assert_eq!(response.sense(), Some((5, 0x24, 0)), "more than the maximum");
}

#[test]
fn every_cdb_length_reads_and_writes() {
    let mut scene = Scene::new(malloc("m", 512, 100), Guest::default());
    let writes = [
        cdb::of(&[0x0a, 0, 0, 5, 1]),
        cdb::write(5, 1),
        cdb::of(&[0xaa, 0, 0, 0, 0, 5, 0, 0, 0, 1]),
        cdb::sixteen(0x8a, 0, 5, 1),
    ];
    let reads = [
        cdb::of(&[0x08, 0, 0, 5, 1]),
        cdb::read(5, 1),
        cdb::of(&[0xa8, 0, 0, 0, 0, 5, 0, 0, 0, 1]),
        cdb::sixteen(0x88, 0, 5, 1),
    ];
    for (n, write) in writes.into_iter().enumerate() {
        let written = pattern(n, BLOCK);
        scene.good(0, write, &written, 0);
        for read in reads {
            assert!(scene.good(0, read, &[], BLOCK) == written);
        }
    }
}

/// The CDB says how much is transferred.
#[test]
fn the_cdb_says_how_much_is_transferred() {
    for guest in guests() {
        for layout in [Layout::Separate, Layout::Stream(700)] {
            let (mut scene, disk) = Scene::of(64, guest);
            disk.state().data.fill(7);
            // A buffer that is longer than the transfer.
            let out = [scene.vm.buffer(&[1; 8 * BLOCK])];
            let write = Command::new(lun(0, 0), 0, cdb::write(2, 1)).with_data_out(&out);
            let tag = scene.vm.submit(0, write, layout);
            let done = scene.wait(tag);
            assert!(done.response.is_good(), "{done:?}");
            assert_eq!((done.response.residual, done.used_len), (7 * 512, 108));
            let state = disk.state().data.clone();
            assert_eq!(state[2 * BLOCK..3 * BLOCK], [1; BLOCK]);
            assert!(state[3 * BLOCK..].iter().all(|byte| *byte == 7), "one block was written");
            let to = [scene.vm.buffer(&[9; 8 * BLOCK])];
            let read = Command::new(lun(0, 0), 0, cdb::read(1, 3)).with_data_in(&to);
            let tag = scene.vm.submit(0, read, layout);
            let done = scene.wait(tag);
            assert!(done.response.is_good(), "{done:?}");
            assert_eq!((done.response.residual, done.used_len), (5 * 512, 108 + 3 * 512));
            let read = scene.vm.bytes(to[0]);
            assert!(read[..3 * BLOCK] == [&[7; BLOCK][..], &[1; BLOCK], &[7; BLOCK]].concat());
            if layout == Layout::Separate {
                assert!(read[3 * BLOCK..].iter().all(|byte| *byte == 9), "it was not touched");
            }
            // Buffers that are shorter than the transfer: whole blocks only.
            let out = [scene.vm.buffer(&[2; 2 * BLOCK + 100])];
            let write = Command::new(lun(0, 0), 0, cdb::write(40, 8)).with_data_out(&out);
            let tag = scene.vm.submit(0, write, layout);
            let done = scene.wait(tag);
            let Response { response, status, residual, sense_len, .. } = done.response;
            assert_eq!((response, status, sense_len), (code::OVERRUN, 0, 0));
            assert_eq!(residual, 100);
            let data = disk.state().data.clone();
            assert!(data[40 * BLOCK..42 * BLOCK].iter().all(|byte| *byte == 2));
            assert!(data[42 * BLOCK..].iter().all(|byte| *byte == 7));
            let to = [scene.vm.buffer(&[9; BLOCK + 511])];
            let read = Command::new(lun(0, 0), 0, cdb::read(40, 8)).with_data_in(&to);
            let tag = scene.vm.submit(0, read, layout);
            let done = scene.wait(tag);
            assert_eq!((done.response.response, done.response.residual), (code::OVERRUN, 511));
            assert_eq!(done.used_len, 108 + 512);
            let read = scene.vm.bytes(to[0]);
            assert!(read[..BLOCK].iter().all(|byte| *byte == 2));
            assert_eq!(disk.state().wrong, None);
        }
    }
}

#[test]
fn data_of_commands_without_io_is_cut_and_counted() {
    let mut scene = Scene::new(malloc("m", 512, 100), Guest::default());
    for (allocation, buffer, written, residual, response) in [
        (96, 96, 96, 0, code::OK),
        (36, 96, 36, 60, code::OK),
        (5, 36, 5, 31, code::OK),
        (96, 36, 36, 0, code::OVERRUN),
        (255, 300, 96, 204, code::OK),
        (0, 36, 0, 36, code::OK),
    ] {
        let to = [scene.vm.buffer(&vec![9; buffer])];
        let inquiry = Command::new(lun(0, 0), 0, cdb::inquiry(None, allocation));
        let done = scene.run(inquiry.with_data_in(&to));
        let what = format!("{allocation} {buffer}");
        assert_eq!((done.response.status, done.response.response), (0, response), "{what}");
        assert_eq!(done.response.residual, residual, "{what}");
        assert_eq!(done.used_len, 108 + written as u32, "{what}");
        assert!(scene.vm.bytes(to[0])[written..].iter().all(|byte| *byte == 9), "{what}");
    }
    // A buffer in the wrong direction.
    let out = [scene.vm.buffer(&[1; 512])];
    let done = scene.run(Command::new(lun(0, 0), 0, cdb::read(0, 1)).with_data_out(&out));
    assert_eq!((done.response.response, done.response.residual), (code::OVERRUN, 512));
    let to = [scene.vm.buffer(&[9; 512])];
    let done = scene.run(Command::new(lun(0, 0), 0, cdb::write(0, 1)).with_data_in(&to));
    assert_eq!((done.response.response, done.response.residual), (code::OVERRUN, 512));
    assert!(scene.vm.bytes(to[0]).iter().all(|byte| *byte == 9));
    let done = scene.run(Command::new(lun(0, 0), 0, cdb::test_unit_ready()).with_data_in(&to));
    assert!(done.response.is_good() && done.response.residual == 512);
}

/// A command may have data in both directions (INOUT).
#[test]
fn a_command_with_both_buffers_uses_one() {
    let (mut scene, disk) = Scene::of(8, Guest::default());
    let (out, to) = ([scene.vm.buffer(&[1; 512])], [scene.vm.buffer(&[9; 512])]);
    let write = Command::new(lun(0, 0), 0, cdb::write(0, 1));
    assert!(scene.run(write.with_data_out(&out).with_data_in(&to)).response.is_good());
    assert!(scene.vm.bytes(to[0]).iter().all(|byte| *byte == 9));
    assert!(disk.state().data[..512].iter().all(|byte| *byte == 1));
    let read = Command::new(lun(0, 0), 0, cdb::read(0, 1));
    assert!(scene.run(read.with_data_out(&out).with_data_in(&to)).response.is_good());
    assert!(scene.vm.bytes(to[0]).iter().all(|byte| *byte == 1));
}

/// Every field of the response is written.
#[test]
fn every_field_of_the_response_is_written() {
    let (mut scene, disk) = Scene::of(8, Guest::default());
    let good = scene.command(0, cdb::test_unit_ready(), &[], 0).0;
    let fields = (good.sense_len, good.residual, good.status_qualifier, good.status, good.response);
    assert_eq!(fields, (0, 0, 0, 0, code::OK));
    assert_eq!(good.sense, [0; 96]);
    let bad = scene.command(5, cdb::read(0, 1), &[], 512).0;
    let fields = (bad.sense_len, bad.residual, bad.status_qualifier, bad.status, bad.response);
    assert_eq!(fields, (0, 512, 0, 0, code::BAD_TARGET));
    let failed = scene.command(0, cdb::read(8, 1), &[], 512).0;
    assert_eq!((failed.sense_len, failed.residual, failed.status_qualifier), (18, 512, 0));
    assert_eq!((failed.status, failed.response), (2, code::OK));
    assert_eq!(failed.sense(), Some((5, 0x21, 0)));
    assert_eq!(failed.sense[18..], [0; 78]);
    let unknown = scene.command(0, cdb::of(&[0xc1]), &[3; 100], 0).0;
    assert_eq!((unknown.sense(), unknown.residual), (Some((5, 0x20, 0)), 100));
    assert_eq!(disk.state().seen, []);
}

/// Up to 1,024 segments of data.
#[test]
fn chains_of_many_segments_are_served() {
    for guest in guests() {
        let mut scene = Scene::new(malloc("m", 512, 4096), guest);
        for segments in [129, 130, 131, 513, 1000] {
            // Segments that do not begin where others end, of 512 bytes and of other lengths.
            for len in [512, 16] {
                let total = segments * len / 512 * 512;
                let written = pattern(segments, segments * len);
                let buffers = |bytes: &[u8]| -> Vec<Segment> {
                    bytes
                        .chunks(len)
                        .map(|piece| {
                            let segment = scene.vm.buffer(piece);
                            let _gap = scene.vm.zeroed(3);
                            segment
                        })
                        .collect()
                };
                let (out, to) = (buffers(&written), buffers(&vec![0; segments * len]));
                let blocks = (total / 512) as u16;
                let write = Command::new(lun(0, 0), 0, cdb::write(3, blocks));
                let done = scene.run(write.with_data_out(&out));
                assert!(done.response.is_good(), "{done:?}");
                let read = Command::new(lun(0, 0), 0, cdb::read(3, blocks));
                let done = scene.run(read.with_data_in(&to));
                assert!(done.response.is_good(), "{done:?}");
                assert_eq!(done.response.residual as usize, segments * len - total);
                let read: Vec<u8> = to.iter().flat_map(|to| scene.vm.bytes(*to)).collect();
                assert!(read[..total] == written[..total], "{segments} of {len}, {guest:?}");
            }
        }
    }
}

/// More long chains than a queue has room for at a time.
#[test]
fn long_chains_wait_for_one_another() {
    let guest = Guest { indirect: true, ..Guest::default() };
    let (mut scene, disk) = Scene::of(4096, guest);
    disk.state().holds = true;
    let buffers: Vec<Vec<Segment>> =
        (0..12).map(|n| (0..200).map(|_| scene.vm.buffer(&[n + 1; 512])).collect()).collect();
    let mut tags = vec![];
    for (n, out) in (0_u32..).zip(&buffers) {
        let write = Command::new(lun(0, 0), 0, cdb::write(200 * n, 200)).with_data_out(out);
        tags.push(scene.vm.submit(0, write, Layout::Separate));
    }
    scene.world.settle();
    assert!(disk.state().flying() < 12);
    disk.state().release();
    for tag in tags {
        assert!(scene.wait(tag).response.is_good());
    }
    let data = &disk.state().data;
    assert!((0..12).all(|n| data[n * 200 * 512..][..200 * 512].iter().all(|b| *b == n as u8 + 1)));
}

#[test]
fn logical_units_that_do_not_exist_are_refused() {
    let (mut scene, disk) = Scene::of(8, Guest::default());
    let mut bad = vec![[0; 8], lun(1, 0), lun(7, 0), lun(8, 0), lun(255, 0)];
    // The well-known logical unit of REPORT LUNS.
    bad.push([0xc1, 1, 0, 0, 0, 0, 0, 0]);
    bad.push([2, 0, 0x40, 0, 0, 0, 0, 0]);
    for lun in bad {
        let to = [scene.vm.buffer(&[9; 36])];
        let inquiry = Command::new(lun, 0, cdb::inquiry(None, 36)).with_data_in(&to);
        let done = scene.run(inquiry);
        assert_eq!(done.response.response, code::BAD_TARGET, "{lun:?}");
        assert_eq!((done.response.residual, done.used_len), (36, 108));
        assert!(scene.vm.bytes(to[0]).iter().all(|byte| *byte == 9));
    }
    // Other logical units of the target. The last is an extended address within.
    for lun in [lun(0, 1), lun(0, 0x3fff), peripheral_lun(0, 1), [1, 0, 0xc1, 1, 0, 0, 0, 0]] {
        let to = [scene.vm.zeroed(36)];
        let of = |cdb| Command::new(lun, 0, cdb);
        let done = scene.run(of(cdb::inquiry(None, 36)).with_data_in(&to));
        assert!(done.response.is_good());
        assert_eq!(scene.vm.bytes(to[0])[0], 0x7f, "{lun:?}");
        let done = scene.run(of(cdb::read(0, 1)).with_data_in(&to));
        assert_eq!(done.response.sense(), Some((5, 0x25, 0)));
        let done = scene.run(of(cdb::report_luns(0, 16)).with_data_in(&to));
        assert!(done.response.is_good());
        assert_eq!(scene.vm.bytes(to[0])[3], 8);
        let done = scene.run(of(cdb::request_sense(18)).with_data_in(&to));
        assert!(done.response.is_good());
        assert_eq!(scene.vm.bytes(to[0])[12], 0x25);
    }
    for lun in [lun(0, 0), peripheral_lun(0, 0)] {
        assert!(scene.run(Command::new(lun, 0, cdb::test_unit_ready())).response.is_good());
    }
    assert_eq!(disk.state().seen, []);
}

#[test]
fn malformed_chains_are_returned() {
    for packed in [false, true] {
        let (mut scene, disk) = Scene::of(8, Guest { packed, ..Guest::default() });
        let vm = &scene.vm;
        let mut header = vec![0; 51];
        header[..4].copy_from_slice(&lun(0, 0)[..4]);
        header[19..].copy_from_slice(&cdb::write(0, 1));
        let readable = Buffer::readable(vm.buffer(&header));
        let data = Buffer::readable(vm.buffer(&[1; 512]));
        let response = |len| Buffer::writable(vm.buffer(&vec![0xee; len]));
        let short = Buffer::readable(Segment::new(readable.segment.gpa, 50));
        let outside = Segment::new(1 << 40, 512);
        let cases = [
            ("no response", vec![readable, data], code::UNWRITTEN, 0),
            ("a short response", vec![readable, data, response(107)], code::UNWRITTEN, 0),
            ("a short header", vec![short, response(108)], code::FAILURE, 108),
            ("no header", vec![response(200)], code::FAILURE, 108),
            (
                "data outside of memory",
                vec![readable, Buffer::readable(outside), response(108)],
                code::UNWRITTEN,
                0,
            ),
            (
                "a response outside of memory",
                vec![readable, data, Buffer::writable(outside)],
                code::UNWRITTEN,
                0,
            ),
            ("readable after writable", vec![readable, response(108), data], code::UNWRITTEN, 0),
        ];
        for (n, (what, chain, code, len)) in cases.into_iter().enumerate() {
            if what.contains("a response outside") {
                // There is no memory to look at.
                scene.vm.queues[0].submit_raw(99, &chain).unwrap_or_else(|e| panic!("{e}"));
                scene.world.settle();
                assert!(scene.vm.queues[0].poll().is_err());
                continue;
            }
            scene.vm.queues[0].submit_raw(1000 + n as u64, &chain).unwrap();
            let done = scene.wait(1000 + n as u64);
            assert_eq!((done.response.response, done.used_len), (code, len), "{what}");
        }
        assert!(scene.command(0, cdb::test_unit_ready(), &[], 0).0.is_good());
        assert_eq!(disk.state().seen, []);
    }
}

#[test]
fn a_chain_of_too_many_segments_is_returned() {
    let guest = Guest { indirect: true, ..Guest::default() };
    let (mut scene, disk) = Scene::of(4096, guest);
    let to: Vec<_> = (0..1100).map(|_| scene.vm.buffer(&[9; 16])).collect();
    let read = Command::new(lun(0, 0), 0, cdb::read(0, 1)).with_data_in(&to);
    let done = scene.run(read);
    assert_eq!((done.used_len, done.response.response), (0, code::UNWRITTEN));
    assert_eq!(disk.state().seen, []);
    scene.good(0, cdb::read(0, 1), &[], 512);
}

/// Blocks of 4,096 bytes, and buffers at odd addresses.
#[test]
fn large_blocks_and_unaligned_buffers_work() {
    let mut scene = Scene::new(malloc("m", 4096, 64), Guest::default());
    let written = pattern(1, 3 * 4096);
    for offset in [0, 1, 511] {
        let _unaligned = scene.vm.zeroed(offset);
        let (out, to) = ([scene.vm.buffer(&written)], [scene.vm.zeroed(written.len())]);
        let write = Command::new(lun(0, 0), 0, cdb::write(5, 3)).with_data_out(&out);
        assert!(scene.run(write).response.is_good());
        let read = Command::new(lun(0, 0), 0, cdb::read(5, 3)).with_data_in(&to);
        assert!(scene.run(read).response.is_good());
        assert!(scene.vm.bytes(to[0]) == written);
    }
    let (response, _) = scene.command(0, cdb::write(0, 1), &[1; 512], 0);
    assert_eq!((response.response, response.residual), (code::OVERRUN, 512));
}

#[test]
fn every_kind_of_bdev_is_served() {
    let null = NullOptions { name: "n".into(), num_blocks: 64, block_size: 512, uuid: None };
    let null: Arc<dyn Bdev> = Null::create(null).unwrap();
    let mut scene = Scene::new(null, Guest::default());
    scene.good(0, cdb::write(0, 8), &[1; 4096], 0);
    scene.good(0, cdb::read(0, 8), &[], 4096);
    scene.good(0, cdb::synchronize_cache(), &[], 0);

    let latency =
        |us| Latency { avg_read_us: us, p99_read_us: us, avg_write_us: us, p99_write_us: us };
    let options = DelayOptions {
        name: "d".into(),
        base: malloc("m", 512, 64),
        latency: latency(500),
        uuid: None,
    };
    let mut scene = Scene::new(Delay::create(options).unwrap(), Guest::default());
    let written = pattern(3, 4096);
    scene.good(0, cdb::write(0, 8), &written, 0);
    assert!(scene.good(0, cdb::read(0, 8), &[], 4096) == written);

    let options = ErrorOptions { name: "e".into(), base: malloc("m", 512, 64), uuid: None };
    let disk = ErrorDisk::create(options).unwrap();
    let mut scene = Scene::new(Arc::clone(&disk) as _, Guest::default());
    let inject = |op, error| {
        disk.inject(Injection { op, error, count: 1, queue_depth: 0 }).unwrap();
    };
    inject(InjectedOp::Read, InjectedError::Failure);
    let (response, _) = scene.command(0, cdb::read(7, 1), &[], 512);
    assert_eq!((response.sense(), response.information()), (Some((3, 0x11, 0)), Some(7)));
    assert_eq!(response.residual, 512);
    inject(InjectedOp::Write, InjectedError::NoMemory);
    scene.good(0, cdb::write(0, 8), &written, 0);
    assert!(scene.good(0, cdb::read(0, 8), &[], 4096) == written);
}

/// A channel without room: the requests wait, and keep their order.
#[test]
fn requests_wait_for_room_in_order() {
    for packed in [false, true] {
        let (mut scene, disk) = Scene::of(64, Guest { packed, ..Guest::default() });
        disk.state().room = Some(0);
        let out = [scene.vm.buffer(&[1; 512])];
        let command = |n: u32| Command::new(lun(0, 0), 0, cdb::write(n, 1)).with_data_out(&out);
        let tags: Vec<_> =
            (0..10).map(|n| scene.vm.submit(0, command(n), Layout::Separate)).collect();
        scene.world.settle();
        assert_eq!(disk.state().seen, []);
        disk.state().room = Some(3);
        scene.world.settle();
        assert_eq!(disk.state().seen.len(), 3);
        disk.state().room = None;
        for tag in tags {
            assert!(scene.wait(tag).response.is_good());
        }
        let expected: Vec<_> = (0..10).map(|n| (Op::Write, n * 512, 512)).collect();
        assert_eq!(disk.state().take_seen(), expected);
    }
}

/// A target whose I/O hangs does not affect another one in the same queue.
#[test]
fn a_hanging_target_affects_no_other() {
    for room in [None, Some(2)] {
        let (mut scene, hanging) = Scene::of(64, Guest { size: 256, ..Guest::default() });
        let other = TestDisk::create("other", 64);
        scene.add(3, &(Arc::clone(&other) as _));
        scene.vm.attentions(&mut scene.world, 3);
        hanging.state().holds = true;
        hanging.state().room = room;
        let out = [scene.vm.buffer(&[1; 512])];
        let to = |target| Command::new(lun(target, 0), 0, cdb::write(0, 1)).with_data_out(&out);
        let tags: Vec<_> = (0..40).map(|_| scene.vm.submit(0, to(0), Layout::Separate)).collect();
        scene.world.settle();
        for _ in 0..20 {
            assert!(scene.run(to(3)).response.is_good());
        }
        hanging.state().room = None;
        hanging.state().release();
        for tag in tags {
            assert!(scene.wait(tag).response.is_good());
        }
        assert_eq!((hanging.state().wrong.clone(), other.state().wrong.clone()), (None, None));
    }
}
