//! The pages that a queue marks during a migration: those that it writes, and no others.

use super::device::{Kind, TestDevice};
use super::scene::{ADDRS, DATA, FAR, LAYOUTS, PAGE, Scene};

/// So large that the used ring spans several pages.
const SIZE: u16 = 1024;

fn page(gpa: u64) -> u64 {
    gpa / PAGE
}

/// Returns the pages of `len` bytes at `gpa`, of which there are at most two.
fn pages(gpa: u64, len: u64) -> [u64; 2] {
    [page(gpa), page(gpa + len - 1)]
}

/// Returns the pages of the used ring that a request writes whose chain is at `place` and takes
/// `span` places.
fn used_pages(packed: bool, place: u64, span: u64) -> Vec<u64> {
    let size = u64::from(SIZE);
    if packed {
        let mut pages: Vec<_> =
            (place..place + span).map(|place| page(ADDRS.desc + 16 * (place % size))).collect();
        pages.dedup();
        return pages;
    }
    let mut used = vec![page(ADDRS.used)];
    used.extend(pages(ADDRS.used + 4 + 8 * (place % size), 8));
    used
}

pub(crate) fn pages_are_marked_that_a_request_writes_and_no_others<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::new(packed, SIZE, D::create());
        scene.migrate();
        scene.device.state().at_once = true;
        scene.start().unwrap();
        scene.visit();
        scene.dirty();
        scene.visit();
        assert_eq!(scene.dirty(), [0; 0], "an idle visit marks nothing");
        for n in 0..2000 {
            let at = DATA + (n * 3 % 64) * PAGE;
            let (kind, data) = match n % 4 {
                0 => (Kind::Read, vec![(at, 512)]),
                // A piece that ends at the end of a page, and one that begins just before the end
                // of one.
                1 => (Kind::Read, vec![(at, 4096), (at + 2 * PAGE + 4095, 1024)]),
                2 => (Kind::Write, vec![(at, 512)]),
                _ => (Kind::Read, vec![(FAR + at - DATA, 512)]),
            };
            let place = scene.places();
            let number = scene.submit(kind, n, &data);
            let span = scene.places() - place;
            let written = D::written(scene.sent(number));
            scene.settle();
            assert_eq!(scene.done(), [number]);
            let data = written.iter().flat_map(|&(gpa, len)| pages(gpa, len.into()));
            let mut expected: Vec<_> = data.chain(used_pages(packed, place, span)).collect();
            expected.sort_unstable();
            expected.dedup();
            assert_eq!(scene.dirty(), expected, "request {n}, packed: {packed}");
        }
    }
}

pub(crate) fn io_under_an_earlier_memory_table_marks_its_pages<D: TestDevice>() {
    for packed in LAYOUTS {
        let mut scene: Scene<D> = Scene::started(packed, SIZE);
        let sent = [FAR + 5 * PAGE, DATA].map(|gpa| scene.submit(Kind::Read, 0, &[(gpa, 512)]));
        let written = sent.map(|n| D::written(scene.sent(n))).concat();
        scene.settle();
        // The second region is mapped at another address now, and other memory is where it was.
        // Pages are marked by the guest-physical addresses at submission. The log is new, too.
        scene.migrate();
        let moved = scene.moved(FAR - 64 * PAGE);
        let retired = scene.publish(&moved);
        scene.visit();
        scene.dirty();
        let mut retired = Some(retired);
        for _ in 0..3 {
            retired = retired.and_then(|retired| retired.try_free());
            scene.visit();
        }
        assert!(retired.is_some(), "I/O uses the old view");
        scene.complete_all();
        let mut expected: Vec<_> = written.iter().map(|&(gpa, _)| page(gpa)).collect();
        expected.push(if packed { page(ADDRS.desc) } else { page(ADDRS.used) });
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(scene.dirty(), expected);
        for gpa in [FAR + 5 * PAGE, DATA] {
            assert!(expected.contains(&page(gpa)), "the device writes the data of a read");
        }
    }
}
