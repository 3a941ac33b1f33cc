//! Parked I/Os keep their order.

use super::disk::Manual;
use super::scene::{DISCARD, LAYOUTS, Scene};

/// Returns the offsets submitted so far, in sectors.
fn seen(disk: &Manual) -> Vec<u64> {
    disk.state().seen.iter().map(|(_, offset, _)| offset / 512).collect()
}

/// Three requests of two ranges each. The second ranges are parked together.
#[test]
fn parked_ios_are_submitted_oldest_first() {
    for packed in LAYOUTS {
        let disk = Manual::create();
        let mut scene = Scene::started_on(packed, 32, disk.clone());
        for n in 0..3 {
            scene.send_ranges(DISCARD, &[(n, 1, 0), (100 + n, 1, 0)]);
        }
        scene.visit();
        assert_eq!(seen(&disk), [0, 1, 2]);
        disk.state().complete_all();
        disk.state().room = Some(0);
        scene.visit();
        assert_eq!(seen(&disk), [0, 1, 2], "there is no room for the second ranges");
        for n in 0..3 {
            disk.state().room = Some(1);
            scene.visit();
            assert_eq!(seen(&disk)[3..], [100, 101, 102][..=n], "{packed}");
            scene.visit();
        }
        disk.state().complete_all();
        scene.settle();
        assert_eq!(scene.answers().iter().map(|answer| answer.0).collect::<Vec<_>>(), [0, 1, 2]);
    }
}
