//! The pages that a queue marks during a migration: those that it writes, and no others.

use std::sync::Arc;

use bdev::{Bdev, Malloc, MallocOptions};

use super::disk::{Manual, SECTORS};
use super::scene::{
    ADDRS, DATA, FAR, FLUSH, IN, LAYOUTS, OUT, PAGE, STATUSES, Scene, WRITE_ZEROES,
};

fn page(gpa: u64) -> u64 {
    gpa / PAGE
}

fn migrating(packed: bool, bdev: Arc<dyn Bdev>) -> Scene {
    // So large that the used ring spans several pages.
    let mut scene = Scene::on(packed, 1024, bdev);
    scene.migrate();
    scene.start().unwrap();
    scene
}

/// Asserts that exactly `pages` were marked, besides those of a request that was answered at
/// `places` of the used ring.
fn assert_dirty(scene: &mut Scene, places: std::ops::Range<u64>, pages: &[u64], what: &str) {
    let mut want = vec![page(STATUSES)];
    want.extend(pages);
    for place in places {
        let (at, len) = if scene.packed {
            (ADDRS.desc + 16 * (place % 1024), 16)
        } else {
            want.push(page(ADDRS.used));
            (ADDRS.used + 4 + 8 * (place % 1024), 8)
        };
        want.extend([page(at), page(at + len - 1)]);
    }
    want.sort_unstable();
    want.dedup();
    assert_eq!(scene.dirty(), want, "{what}, packed: {}", scene.packed);
}

#[test]
fn exactly_the_written_pages_are_marked() {
    for packed in LAYOUTS {
        let options = MallocOptions {
            name: "Malloc0".into(),
            num_blocks: SECTORS,
            block_size: 512,
            uuid: None,
        };
        let mut scene = migrating(packed, Malloc::create(options).unwrap());
        scene.visit();
        // The queue has written that it wants no kicks.
        let event = if packed { ADDRS.used } else { ADDRS.used + 4 + 8 * 1024 };
        let mut want = vec![page(ADDRS.used), page(event)];
        want.dedup();
        assert_eq!(scene.dirty(), want);
        scene.visit();
        assert_eq!(scene.dirty(), [0; 0]);
        let (mut place, mut read) = (0, 0);
        for n in 0..2000 {
            let at = DATA + (n * 3 % 64) * PAGE;
            let (kind, data, pages): (_, &[(u64, u32)], &[u64]) = match n % 5 {
                0 => (IN, &[(at, 512)], &[page(at)]),
                // A piece that ends at the end of a page, and one that begins just before the end
                // of one.
                1 => (
                    IN,
                    &[(at, 4096), (at + 2 * PAGE + 4095, 1024)],
                    &[page(at), page(at) + 2, page(at) + 3],
                ),
                2 => (OUT, &[(at, 512)], &[]),
                3 => (FLUSH, &[], &[]),
                _ => (IN, &[(FAR + at - DATA, 512)], &[page(FAR + at - DATA)]),
            };
            scene.send(kind, 0, data);
            scene.settle();
            read += scene.answers().len();
            let span = if packed { data.len() as u64 + 2 } else { 1 };
            assert_dirty(&mut scene, place..place + span, pages, &format!("request {n}"));
            place += span;
        }
        assert_eq!(read, 2000);
    }
}

#[test]
fn refused_requests_mark_their_status() {
    for packed in LAYOUTS {
        let mut scene = migrating(packed, Manual::create());
        scene.visit();
        scene.dirty();
        scene.send(99, 0, &[(DATA, 512)]);
        scene.settle();
        let span = if packed { 3 } else { 1 };
        assert_dirty(&mut scene, 0..span, &[], "unknown");
        scene.send_ranges(WRITE_ZEROES, &[(SECTORS, 1, 0)]);
        scene.settle();
        assert_dirty(&mut scene, span..2 * span, &[], "beyond the end");
        scene.send(IN, SECTORS, &[(DATA, 512)]);
        scene.settle();
        assert_dirty(&mut scene, 2 * span..3 * span, &[], "a read beyond the end");
    }
}
