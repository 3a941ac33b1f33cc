//! Controllers that get their sockets later.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bdev::{Null, NullOptions};
use vhost_blk::Blk;
use vhost_target::{ControllerSpec, Error, Mode, Offer, Target, Transport};

/// A transport without sockets, which records its calls, and fails if it is told to.
#[derive(Debug, Default)]
struct Recorder {
    calls: Mutex<Vec<&'static str>>,
    fails: Mutex<bool>,
}

impl Recorder {
    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Transport for Recorder {
    fn listen(&self, _: &Path, _: Offer, _: &closer::Account) -> io::Result<()> {
        self.calls.lock().unwrap().push("listen");
        if *self.fails.lock().unwrap() { Err(io::ErrorKind::AddrInUse.into()) } else { Ok(()) }
    }
    fn unlisten(&self, _: &Path) {
        self.calls.lock().unwrap().push("unlisten");
    }
}

fn spec(name: &str) -> ControllerSpec {
    let options = NullOptions { name: "n".into(), num_blocks: 8, block_size: 512, uuid: None };
    ControllerSpec {
        name: name.into(),
        socket: format!("/{name}").into(),
        device: Blk::new(Null::create(options).unwrap(), false),
        cores: None,
        packed_ring: false,
    }
}

fn target() -> Arc<Target> {
    Target::in_steps(1, Mode::Poll, Arc::new(|| {})).unwrap().0
}

fn delete(target: &Arc<Target>, name: &str, transport: &Recorder) {
    let deletion = target.begin_delete(name, false).unwrap();
    let progress = deletion.progress();
    assert_eq!((progress.connected, progress.draining), (0, 0));
    deletion.finish(transport);
    assert!(target.controller(name).is_none());
}

#[test]
fn the_socket_is_opened_once_and_by_the_start() {
    let (target, transport) = (target(), Recorder::default());
    target.create_delayed_controller(spec("c")).unwrap();
    assert!(target.controller("c").unwrap().delayed);
    let again = target.create_delayed_controller(spec("c"));
    assert!(matches!(again, Err(Error::Exists(_))), "the name is taken");
    assert!(transport.calls().is_empty());
    target.start_controller("c", &transport).unwrap();
    assert!(!target.controller("c").unwrap().delayed);
    target.start_controller("c", &transport).unwrap();
    assert_eq!(transport.calls(), ["listen"]);
    delete(&target, "c", &transport);
    assert_eq!(transport.calls(), ["unlisten"]);
    let absent = target.start_controller("c", &transport);
    assert!(matches!(absent, Err(Error::NoController(_))));
}

#[test]
fn a_start_that_fails_can_be_repeated() {
    let (target, transport) = (target(), Recorder::default());
    target.create_delayed_controller(spec("c")).unwrap();
    *transport.fails.lock().unwrap() = true;
    assert!(matches!(target.start_controller("c", &transport), Err(Error::Listen(..))));
    assert!(target.controller("c").unwrap().delayed);
    *transport.fails.lock().unwrap() = false;
    target.start_controller("c", &transport).unwrap();
    assert_eq!(transport.calls(), ["listen", "listen"]);
    // A controller that is created with its socket does not stay without it.
    *transport.fails.lock().unwrap() = true;
    assert!(matches!(target.create_controller(spec("d"), &transport), Err(Error::Listen(..))));
    assert!(target.controller("d").is_none());
}

#[test]
fn a_delayed_controller_is_deleted_without_touching_the_path_of_its_socket() {
    let (target, transport) = (target(), Recorder::default());
    target.create_delayed_controller(spec("c")).unwrap();
    let deletion = target.begin_delete("c", false).unwrap();
    let refused = target.start_controller("c", &transport);
    assert!(matches!(refused, Err(Error::Busy(_))), "it is being deleted");
    drop(deletion);
    delete(&target, "c", &transport);
    target.create_delayed_controller(spec("c")).unwrap();
    target.remove_controllers(&transport);
    assert!(transport.calls().is_empty());
}
