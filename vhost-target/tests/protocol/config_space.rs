//! GET_CONFIG and SET_CONFIG with different offsets, sizes, flags and contents (vhost-user, "Virtio
//! device config space"; virtio 1.2, section 5.2.4): the contents of replies, and the effect of
//! writes.

use vhost_target::Verdict;
use vhost_target::protocol::request::{GET_CONFIG, SET_CONFIG};

use crate::scene::{Front, NEED_REPLY, State, World};
use crate::{alone, words};

/// Returns the `struct virtio_blk_config` of this disk: 64 sectors of 512 bytes, all features.
fn space(wce: u8) -> [u8; 60] {
    let mut space = [0; 60];
    let fields: [(usize, &[u8]); 13] = [
        (0, &64_u64.to_le_bytes()),      // capacity
        (8, &131_072_u32.to_le_bytes()), // size_max
        (12, &126_u32.to_le_bytes()),    // seg_max
        (20, &512_u32.to_le_bytes()),    // blk_size
        (26, &1_u16.to_le_bytes()),      // min_io_size
        (32, &[wce]),                    // writeback; unused0 behind it
        (34, &128_u16.to_le_bytes()),    // num_queues
        (36, &32_768_u32.to_le_bytes()), // max_discard_sectors
        (40, &16_u32.to_le_bytes()),     // max_discard_seg
        (44, &1_u32.to_le_bytes()),      // discard_sector_alignment
        (48, &32_768_u32.to_le_bytes()), // max_write_zeroes_sectors
        (52, &16_u32.to_le_bytes()),     // max_write_zeroes_seg
        (56, &[1, 0, 0, 0]),             // write_zeroes_may_unmap; unused1
    ];
    for (at, bytes) in fields {
        space[at..at + bytes.len()].copy_from_slice(bytes);
    }
    space
}

/// Returns the contents of the reply to a read; `None` if the connection is closed.
fn read(front: &Front<'_>, offset: u32, size: u32, flags: u32, sent: usize) -> Option<Vec<u8>> {
    let head = words(&[offset, size, flags]);
    match front.send(GET_CONFIG, [head.clone(), vec![0xff; sent]].concat(), vec![]) {
        Verdict::Reply(payload) => {
            // "The back-end's payload size MUST match the front-end's request."
            assert_eq!(payload.len(), 12 + size as usize, "{offset}, {size}");
            assert_eq!(payload[..12], head, "as the front end sent it");
            Some(payload[12..].to_vec())
        }
        Verdict::Reject => None,
        other => panic!("{other:?}"),
    }
}

#[test]
#[rustfmt::skip]
fn contents_of_reads() {
    let _alone = alone();
    let world = World::in_steps();
    let front = world.front(State::New);
    let whole = space(1);
    let zeroes = |n: usize| vec![0; n];
    let rows: [(u32, u32, Vec<u8>); 21] = [
        // "offset: a 32-bit offset of virtio device's configuration space; size: config space access
        // size in bytes."
        (0, 60, whole.to_vec()),
        (0, 8, whole[..8].to_vec()),
        (20, 4, 512_u32.to_le_bytes().to_vec()),
        (32, 1, vec![1]),
        (34, 2, vec![128, 0]),
        (59, 1, vec![0]),
        (1, 59, whole[1..].to_vec()),
        (33, 3, vec![0, 128, 0]),
        // Bytes beyond the space, where later versions have fields, are zero.
        (56, 8, [vec![1], zeroes(7)].concat()),
        (0, 96, [whole.to_vec(), zeroes(36)].concat()),
        (0, 256, [whole.to_vec(), zeroes(196)].concat()),
        (34, 256, [whole[34..].to_vec(), zeroes(230)].concat()),
        (60, 12, zeroes(12)),
        (60, 256, zeroes(256)),
        (255, 1, zeroes(1)),
        // Beyond the largest offset of a message: old cloud-hypervisor sends the offset of the
        // config space on PCI.
        (0x100, 60, whole.to_vec()),
        (u32::MAX, 8, whole[..8].to_vec()),
        (1 << 31, 256, [whole.to_vec(), zeroes(196)].concat()),
        // No bytes are requested.
        (0, 0, vec![]),
        (20, 0, vec![]),
        (0x100, 0, vec![]),
    ];
    for (offset, size, want) in rows {
        // 0: sent by the front end. 1: a migration, or "writable" in rust-vmm. 2: a migration in
        // rust-vmm.
        for flags in [0, 1, 2, 3, u32::MAX] {
            let got = read(&front, offset, size, flags, size as usize);
            assert_eq!(got.as_ref(), Some(&want), "offset {offset}, size {size}, flags {flags}");
        }
    }
    front.end();
    // Sizes that contradict each other, or exceed VHOST_USER_MAX_CONFIG_SIZE.
    for (size, sent) in [(60, 59), (60, 0), (1, 0), (257, 257), (u32::MAX, 0), (u32::MAX, 300)] {
        let front = world.front(State::New);
        assert_eq!(read(&front, 0, size, 0, sent), None, "size {size}, {sent} bytes");
        front.end();
    }
}

#[test]
#[rustfmt::skip]
fn effects_of_writes() {
    let _alone = alone();
    let world = World::in_steps();
    let mut whole_off = vec![0xff; 60];
    whole_off[32] = 0;
    // Offset, contents, and `writeback` afterwards, if it had the other value before; `None`: it
    // keeps its value.
    let rows: [(u32, &[u8], Option<u8>); 16] = [
        // 5.2.6.1: "by writing respectively 0 and 1 to the writeback field".
        (32, &[0], Some(0)),
        (32, &[1], Some(1)),
        (32, &[2], None),
        (32, &[0xff], None),
        // "Back-ends MUST NOT accept SET_CONFIG for read-only configuration space fields". This
        // includes migrations: the fields describe this disk.
        (0, &[0xff; 8], None),
        (8, &[0xff; 24], None),
        (33, &[0xff; 27], None),
        (60, &[0xff; 196], None),
        // A write that covers other fields too sets writeback only.
        (0, &whole_off, Some(0)),
        (30, &[9, 9, 1, 9], Some(1)),
        (32, &[0, 9], Some(0)),
        (31, &[9], None),
        // Beyond the space.
        (0x100, &[0; 60], None),
        (0x100 + 32, &[0], None),
        (u32::MAX, &[0], None),
        // Nothing is written.
        (32, &[], None),
    ];
    for (offset, contents, want) in rows {
        for flags in [0, 1, 2, 3] {
            for need_reply in [0, NEED_REPLY] {
                let front = world.front(State::New);
                let before = want.map_or(1, |on| 1 - on);
                front.tell(SET_CONFIG, [words(&[32, 1, 0]), vec![before]].concat(), vec![]);
                assert_eq!(read(&front, 0, 60, 0, 60).unwrap(), space(before));
                let len = contents.len().try_into().unwrap();
                let payload = [words(&[offset, len, flags]), contents.to_vec()].concat();
                let verdict = front.send(SET_CONFIG | need_reply, payload, vec![]);
                assert!(matches!(verdict, Verdict::Done), "offset {offset}: {verdict:?}");
                let after = space(want.unwrap_or(before));
                let what = format!("offset {offset}, {contents:?}, flags {flags}");
                assert_eq!(read(&front, 0, 60, 0, 60).unwrap(), after, "{what}");
                front.end();
            }
        }
    }
    for (size, sent) in [(1, 0), (60, 59), (257, 257), (u32::MAX, 1), (u32::MAX - 11, 0)] {
        let front = world.front(State::New);
        let payload = [words(&[0, size, 0]), vec![0; sent]].concat();
        let verdict = front.send(SET_CONFIG, payload, vec![]);
        assert!(matches!(verdict, Verdict::Reject), "size {size}, {sent} bytes: {verdict:?}");
        front.end();
    }
}
