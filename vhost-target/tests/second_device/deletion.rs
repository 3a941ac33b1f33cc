//! Deletions that are begun, cancelled and finished.

use vhost_target::Error;

use super::guest::World;
use crate::wire::NoSockets;

#[test]
fn a_dropped_deletion_is_cancelled() {
    let world = World::new();
    let _source = world.controller("c");
    let deletion = world.target.begin_delete("c", false).unwrap();
    assert!(world.target.is_deleting("c") && world.connect("c").is_none());
    let second = world.target.begin_delete("c", false).map(|_| ());
    assert!(matches!(second, Err(Error::Busy(_))));
    assert!(world.target.is_deleting("c"), "the second call has cancelled the first");
    drop(deletion);
    assert!(!world.target.is_deleting("c") && world.connect("c").is_some());
}

#[test]
fn a_deletion_ends_with_its_controller_and_spares_the_next_of_this_name() {
    let world = World::new();
    let _source = world.controller("c");
    let deletion = world.target.begin_delete("c", false).unwrap();
    world.target.remove_controllers(&NoSockets);
    assert!(world.target.controller_id("c").is_none());
    let _source = world.controller("c");
    let next = world.target.begin_delete("c", false).unwrap();
    drop(deletion);
    assert!(world.target.is_deleting("c"), "an earlier deletion has cancelled this one");
    drop(next);
    let deletion = world.target.begin_delete("c", false).unwrap();
    world.target.remove_controllers(&NoSockets);
    let _source = world.controller("c");
    deletion.finish(&NoSockets);
    assert!(world.connect("c").is_some(), "an earlier deletion has removed the controller");
}
