#![expect(unsafe_code, reason = "submits I/O")]

use std::cell::Cell;

use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::contract::Bdev;
use crate::control::method::{Call, LocalFuture, Method};
use crate::control::module::{BdevModule, Description};
use crate::control::test_host::{TestHost, run};
use crate::io::{Completion, Io, Op, Status, Submit, Tag};

fn host() -> Rc<TestHost> {
    TestHost::new([])
}

fn error_params(base: &str) -> Value {
    json!({ "base_name": base })
}

fn delay_params(name: &str, base: &str) -> Value {
    json!({
        "name": name, "base_bdev_name": base, "avg_read_latency": 1, "p99_read_latency": 2,
        "avg_write_latency": 3, "p99_write_latency": 4,
    })
}

fn named(name: &str) -> Value {
    json!({ "name": name })
}

fn errno(errno: i32) -> Answer {
    Err(MethodError::errno(errno))
}

#[test]
fn names_of_modules_and_methods_are_unique() {
    let modules = crate::modules::all();
    let mut names: Vec<_> = modules.iter().map(|module| module.name()).collect();
    names.extend(modules.iter().flat_map(|m| Rc::clone(m).methods()).map(|method| method.name));
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}

#[test]
fn a_name_and_a_uuid_are_unique_also_while_the_bdev_is_created() {
    let host = host();
    let registry = host.registry();
    let uuid = Uuid::from_u128(7);
    let reserved = registry.reserve("A".into(), Some(uuid)).ok().unwrap();
    for (name, other) in [("A", None), ("B", Some(uuid)), (&*uuid.to_string(), None)] {
        assert_eq!(registry.reserve(name.into(), other).err(), Some(libc::EEXIST), "{name}");
    }
    assert!(registry.bdev("A").is_none() && host.config().is_empty());
    drop(reserved);
    host.null("A", 7);
    assert_eq!(registry.bdev(&uuid.to_string()).unwrap().name(), "A");
    let taken = host.call("bdev_delay_create", delay_params("A", "nope"));
    assert_eq!(taken, errno(libc::EEXIST));
}

#[test]
fn a_wrapper_waits_for_its_base_and_holds_its_name() {
    let host = host();
    assert_eq!(host.call("bdev_error_create", error_params("A")), Ok(true.into()));
    assert_eq!(host.call("bdev_error_create", error_params("A")), errno(libc::EEXIST));
    assert!(host.names().is_empty());
    host.null("A", 1);
    assert_eq!(host.names(), ["EE_A", "A"], "in the order of the calls");
    assert_eq!(host.claim_type("A"), Some("exclusive_write"));
    assert_eq!(host.claim_type("EE_A"), None);
    assert_eq!(host.driver_specific("EE_A"), json!({"error_disk": {"base_bdev": "A"}}));
}

#[test]
fn a_base_has_one_wrapper_and_the_next_waiting_one_follows() {
    let host = host();
    host.call("bdev_delay_create", delay_params("D", "A")).unwrap();
    host.call("bdev_error_create", error_params("A")).unwrap();
    host.null("A", 1);
    assert_eq!(host.names(), ["D", "A"], "the first request gets the base");
    assert_eq!(host.call("bdev_delay_create", delay_params("E", "A")), errno(libc::EPERM));
    host.call("bdev_delay_delete", named("D")).unwrap();
    assert_eq!(host.names(), ["EE_A", "A"]);
    assert_eq!(host.call("bdev_delay_create", delay_params("E", "A")), errno(libc::EPERM));
    assert_eq!(host.config().len(), 2, "a failed request is not kept");
}

#[test]
fn bdevs_on_a_deleted_bdev_are_deleted_first_and_a_delay_waits_again() {
    let host = host();
    host.null("A", 1);
    host.call("bdev_delay_create", delay_params("D", "A")).unwrap();
    host.call("bdev_error_create", error_params("D")).unwrap();
    let update = json!({"delay_bdev_name": "D", "latency_type": "avg_read", "latency_us": 9});
    host.call("bdev_delay_update_latency", update).unwrap();
    assert_eq!(host.call("bdev_null_delete", named("D")), errno(libc::ENODEV));
    host.call("bdev_null_delete", named("A")).unwrap();
    assert_eq!(*host.retired.borrow(), ["EE_D", "D", "A"]);
    assert!(host.names().is_empty());
    let methods = |host: &TestHost| -> Vec<Value> {
        host.config().iter().map(|call| call[0].clone()).collect()
    };
    // The p99 latency is below the average now, which takes a second call to restore.
    assert_eq!(methods(&host), ["bdev_delay_create", "bdev_delay_update_latency"]);
    host.null("A", 2);
    assert_eq!(host.names(), ["D", "A"]);
    assert_eq!(host.driver_specific("D")["delay"]["avg_read_latency"], 9);
    host.call("bdev_null_delete", named("A")).unwrap();
    host.call("bdev_delay_delete", named("D")).unwrap();
    assert!(host.config().is_empty());
}

#[test]
fn a_served_bdev_gets_no_wrapper_and_a_wrapped_one_is_not_served() {
    let host = host();
    host.null("A", 1);
    let bdev = host.registry().bdev("A").unwrap();
    let serve = |name| host.registry().claim(&bdev, ClaimKind::Served, name);
    let (one, two) = (serve("c").ok().unwrap(), serve("d").ok().unwrap());
    assert_eq!(host.claim_type("A"), None, "as with SPDK's vhost");
    drop(one);
    assert_eq!(host.call("bdev_error_create", error_params("A")), errno(libc::EPERM));
    assert_eq!(host.config().len(), 1);
    drop(two);
    host.call("bdev_error_create", error_params("A")).unwrap();
    assert_eq!(serve("c").err().map(|other| other.owner), Some("error".into()));
}

#[test]
fn claims_on_a_bdev_end_with_it_also_if_it_is_created_anew() {
    let host = host();
    host.null("A", 1);
    host.call("bdev_delay_create", delay_params("D", "A")).unwrap();
    let bdev = host.registry().bdev("D").unwrap();
    let served = host.registry().claim(&bdev, ClaimKind::Served, "c").ok().unwrap();
    drop(bdev);
    host.call("bdev_null_delete", named("A")).unwrap();
    host.null("A", 1);
    assert_eq!(host.names(), ["D", "A"]);
    host.call("bdev_error_create", error_params("D")).unwrap();
    drop(served);
    assert_eq!(host.claim_type("D"), Some("exclusive_write"), "a claim of the new bdev stays");
}

#[test]
fn pending_io_ends_when_a_base_is_deleted() {
    let host = host();
    host.null("A", 1);
    host.call("bdev_error_create", error_params("A")).unwrap();
    let pending = json!({"name": "EE_A", "io_type": "all", "error_type": "pending", "num": 1});
    host.call("bdev_error_inject_error", pending).unwrap();
    let mut channel = host.registry().bdev("EE_A").unwrap().open(1).unwrap();
    let unmap = Io::plain(Op::Unmap, Tag(0), 0, 512);
    // SAFETY: the I/O has no segments.
    assert!(matches!(unsafe { channel.submit(unmap) }, Submit::Queued));
    let mut done = [Completion { tag: Tag(9), status: Status::Ok }];
    assert_eq!(channel.poll(&mut done), 0);
    let mut deletion = host.begin("bdev_null_delete", named("A"));
    assert_eq!(run(&mut deletion), None, "the channel is open");
    assert_eq!(channel.poll(&mut done), 1);
    assert_eq!(done, [Completion { tag: Tag(0), status: Status::IoError }]);
    drop(channel);
    assert_eq!(run(deletion), Some(Ok(true.into())));
}

#[test]
fn without_auto_examine_waiting_bdevs_are_created_only_on_named_bases() {
    let host = host();
    host.registry().set_auto_examine(false);
    for base in ["A", "B", "C"] {
        host.call("bdev_error_create", error_params(base)).unwrap();
    }
    host.registry().examine("A").unwrap();
    assert_eq!(host.registry().examine("A"), Err(libc::EEXIST));
    ["A", "B", "C"].iter().zip(1..).for_each(|(name, uuid)| host.null(name, uuid));
    assert_eq!(host.names(), ["EE_A", "A", "B", "C"]);
    // Examined by its UUID.
    host.registry().examine(&Uuid::from_u128(2).to_string()).unwrap();
    let dynamic: Rc<dyn Host> = Rc::clone(&host) as _;
    run(settle(&dynamic)).unwrap();
    assert_eq!(host.names(), ["EE_A", "EE_B", "A", "B", "C"]);
    // A wrapper on an existing bdev is created at once.
    host.call("bdev_delay_create", delay_params("D", "C")).unwrap();
    assert_eq!(host.names(), ["EE_A", "EE_B", "A", "B", "C", "D"]);
}

#[test]
fn a_new_size_is_reported_for_all_bdevs_on_a_bdev() {
    let host = host();
    host.null("A", 1);
    host.call("bdev_delay_create", delay_params("D", "A")).unwrap();
    host.call("bdev_null_resize", json!({"name": "A", "new_size": 100})).unwrap();
    assert_eq!(*host.resized.borrow(), ["D", "A"]);
    assert_eq!(host.config()[0][1]["num_blocks"], 204_800);
}

/// Creates its bdev on base "A" when `ready` is set, and records the bdevs that it examined.
struct Slow {
    ready: Cell<bool>,
    fails: Cell<bool>,
    seen: std::cell::RefCell<Vec<String>>,
}

struct SlowRequest(Rc<Slow>);

struct SlowEntry(Arc<dyn Bdev>, #[expect(dead_code, reason = "held")] crate::Claim);

impl BdevModule for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        vec![Method::new("bdev_slow_create", move |host, params| {
            let request = Rc::new(SlowRequest(Rc::clone(&self)));
            async move {
                let made = attach(&host, params.method(), request).await;
                made.map(|made| made.len().into()).map_err(MethodError::errno)
            }
        })]
    }

    fn examine<'a>(
        &'a self,
        _host: &'a Rc<dyn Host>,
        bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        self.seen.borrow_mut().push(bdev.name().to_owned());
        Box::pin(std::future::ready(()))
    }
}

impl Waiting for SlowRequest {
    fn module(&self) -> &'static str {
        "slow"
    }

    fn name(&self) -> Option<&str> {
        Some("S")
    }

    fn uuid(&self) -> Option<Uuid> {
        None
    }

    fn base(&self) -> &'static str {
        "A"
    }

    fn config(&self) -> Vec<Call> {
        vec![]
    }

    fn wake<'a>(
        self: Rc<Self>,
        _host: &'a Rc<dyn Host>,
        Base { bdev, claim }: Base,
    ) -> LocalFuture<'a, Result<Vec<Rc<dyn Entry>>, Error>> {
        Box::pin(async move {
            std::future::poll_fn(|_| match self.0.ready.get() {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            })
            .await;
            if self.0.fails.get() {
                return Err(Error::Invalid("requested by the test".into()));
            }
            let options = crate::ErrorOptions { name: "S".into(), base: bdev, uuid: None };
            Ok(vec![Rc::new(SlowEntry(crate::ErrorDisk::create(options)?, claim)) as _])
        })
    }
}

impl Entry for SlowEntry {
    fn module(&self) -> &'static str {
        "slow"
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.0)
    }

    fn describe(&self) -> Description {
        Description::default()
    }

    fn config(&self) -> Vec<Call> {
        vec![]
    }
}

fn slow(ready: bool) -> (Rc<TestHost>, Rc<Slow>) {
    let seen = std::cell::RefCell::default();
    let slow = Rc::new(Slow { ready: Cell::new(ready), fails: Cell::new(false), seen });
    (TestHost::new([Rc::clone(&slow) as _]), slow)
}

#[test]
fn while_a_bdev_is_created_its_base_is_claimed_and_examination_is_under_way() {
    let (host, slow) = slow(false);
    host.null("A", 1);
    let mut create = host.begin("bdev_slow_create", Value::Null);
    assert!(run(create.as_mut()).is_none());
    assert!(host.registry().is_examining());
    assert_eq!(host.claim_type("A"), Some("exclusive_write"));
    assert_eq!(host.call("bdev_error_create", error_params("A")), errno(libc::EPERM));
    let before = host.changes.get();
    slow.ready.set(true);
    assert_eq!(run(create), Some(Ok(1.into())));
    assert_eq!(host.names(), ["A", "S"]);
    assert!(!host.registry().is_examining() && host.changes.get() > before);
}

#[test]
fn deleting_a_base_while_a_bdev_is_created_on_it_deletes_that_bdev() {
    let (host, slow) = slow(false);
    host.null("A", 1);
    let mut create = host.begin("bdev_slow_create", Value::Null);
    assert!(run(create.as_mut()).is_none());
    let id = host.registry().id("A").unwrap();
    // A task that waits for the base's last user waits for the create call.
    let gone = host.registry().remove(&[id]);
    assert_eq!(gone.len(), 1);
    slow.ready.set(true);
    assert_eq!(run(create), Some(errno(libc::ENODEV)));
    assert!(host.names().is_empty() && host.registry().ids().is_empty());
}

#[test]
fn a_request_that_failed_on_a_base_waits_for_another() {
    let (host, slow) = slow(true);
    host.call("bdev_slow_create", Value::Null).unwrap();
    slow.fails.set(true);
    host.null("A", 1);
    assert_eq!(host.names(), ["A"]);
    assert_eq!(host.claim_type("A"), None);
    slow.fails.set(false);
    host.null("B", 2);
    assert_eq!(host.names(), ["A", "B"], "not tried again on the same one");
    host.call("bdev_null_delete", named("A")).unwrap();
    host.null("A", 3);
    assert_eq!(host.names(), ["S", "B", "A"]);
    // With the base there, the create call fails and leaves no bdev.
    let (host, slow) = self::slow(true);
    slow.fails.set(true);
    host.null("A", 1);
    assert_eq!(host.call("bdev_slow_create", Value::Null), errno(libc::EINVAL));
    assert_eq!(host.registry().ids().len(), 1);
}

#[test]
fn modules_examine_each_new_bdev_once_unless_it_is_claimed() {
    let (host, slow) = slow(true);
    host.call("bdev_error_create", error_params("A")).unwrap();
    host.null("A", 1);
    host.null("B", 2);
    assert_eq!(*slow.seen.borrow(), ["EE_A", "B"], "the claimed one is not examined");
    host.registry().set_auto_examine(false);
    host.null("C", 3);
    assert_eq!(slow.seen.borrow().len(), 2);
    host.call("bdev_error_delete", named("EE_A")).unwrap();
    assert_eq!(slow.seen.borrow().len(), 2);
    host.registry().examine("A").unwrap();
    host.null("D", 4);
    assert_eq!(*slow.seen.borrow(), ["EE_A", "B", "A"]);
}
