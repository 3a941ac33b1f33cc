use std::sync::Mutex;

use serde_json::{Value, json};

use super::module::CREATE;
use super::*;
use crate::control::Host;
use crate::control::method::{Answer, MethodError};
use crate::control::test_host::TestHost;
use crate::io::Completion;

fn params(count: u32, size_mb: u64) -> Value {
    json!({ "base_bdev": "A", "split_count": count, "split_size_mb": size_mb })
}

fn failed(count: u32, reason: &str) -> Answer {
    let text = format!("Failed to create {count} split bdevs from 'A': {reason}");
    Err(MethodError::invalid_params(text))
}

#[test]
fn parts_follow_one_another_and_share_a_claim() {
    let host = TestHost::new([]);
    host.null("A", 1);
    host.null("B", 2);
    // 131,072 blocks: the last two remain unused.
    assert_eq!(host.call(CREATE, params(3, 0)), Ok(json!(["Ap0", "Ap1", "Ap2"])));
    assert_eq!(host.names(), ["A", "B", "Ap0", "Ap1", "Ap2"]);
    let bdev = |name| host.registry().bdev(name).unwrap();
    assert_eq!(bdev("Ap1").num_blocks(), 43_690);
    assert_eq!(bdev("Ap1").uuid().to_string(), "52bd28ad-f802-5227-9f32-e826771b3439");
    let about = json!({ "split": { "base_bdev": "A", "offset_blocks": 87_380 } });
    assert_eq!(host.driver_specific("Ap2"), about);
    assert_eq!(host.claim_type("A"), Some("exclusive_write"));
    assert_eq!(host.claim_type("Ap0"), None);
    assert_eq!(host.config()[2..], [json!([CREATE, params(3, 0)])]);
    let base = json!({ "base_name": "A" });
    assert_eq!(host.call("bdev_error_create", base), Err(MethodError::errno(libc::EPERM)));
    host.call("bdev_null_resize", json!({ "name": "A", "new_size": 100 })).unwrap();
    assert_eq!(*host.resized.borrow(), ["A"], "a part keeps its size");
    host.call("bdev_error_create", json!({ "base_name": "Ap1" })).unwrap();
    let split = json!({ "base_bdev": "A" });
    assert_eq!(host.call("bdev_split_delete", split.clone()), Ok(true.into()));
    assert_eq!(*host.retired.borrow(), ["Ap0", "EE_Ap1", "Ap1", "Ap2"]);
    assert_eq!((host.names(), host.claim_type("A")), (vec!["A".into(), "B".into()], None));
    let unknown = Err(MethodError::invalid_params("No such file or directory"));
    assert_eq!(host.call("bdev_split_delete", split), unknown);
}

#[test]
fn an_invalid_split_is_refused_and_not_kept() {
    let host = TestHost::new([]);
    let invalid = "Invalid argument";
    host.null("A", 1);
    for (count, size_mb) in [(0, 0), (2, 65), (131_073, 0), (1, 1 << 44), (1, u64::MAX)] {
        assert_eq!(host.call(CREATE, params(count, size_mb)), failed(count, invalid));
    }
    assert_eq!(host.config().len(), 1);
    host.null("Ap1", 2);
    assert_eq!(host.call(CREATE, params(2, 0)), failed(2, "File exists"), "a name is taken");
    host.call("bdev_null_delete", json!({ "name": "Ap1" })).unwrap();
    host.call("bdev_error_create", json!({ "base_name": "A" })).unwrap();
    assert_eq!(host.call(CREATE, params(2, 0)), failed(2, "Operation not permitted"));
    host.call("bdev_error_delete", json!({ "name": "EE_A" })).unwrap();
    assert_eq!(host.call(CREATE, params(4, 30)), Ok(json!(["Ap0", "Ap1"])), "as many as fit");
    assert_eq!(host.call(CREATE, params(1, 0)), failed(1, "File exists"));
    host.call("bdev_split_delete", json!({ "base_bdev": "A" })).unwrap();
    assert_eq!(host.call(CREATE, params(1025, 0)), failed(1025, invalid), "too many parts");
    assert!(host.call(CREATE, params(1024, 0)).is_ok());
    let wrong = host.call(CREATE, json!({ "base_bdev": "A" }));
    assert_eq!(wrong, Err(MethodError::invalid_params("Invalid parameters")));
    // 1 MiB is not a whole number of such blocks.
    let large = json!({ "name": "L", "num_blocks": 8, "block_size": 2 << 20 });
    host.call("bdev_null_create", large).unwrap();
    let split = json!({ "base_bdev": "L", "split_count": 1, "split_size_mb": 1 });
    assert!(host.call(CREATE, split).unwrap_err().text.ends_with(invalid));
}

#[test]
fn a_split_waits_for_its_base_and_goes_with_it() {
    let host = TestHost::new([]);
    assert_eq!(host.call(CREATE, params(2, 0)), Ok(json!([])));
    assert_eq!(host.call(CREATE, params(2, 0)), failed(2, "File exists"));
    assert_eq!(host.config(), [json!([CREATE, params(2, 0)])]);
    host.null("A", 1);
    assert_eq!(host.names(), ["Ap0", "Ap1", "A"]);
    host.call("bdev_null_delete", json!({ "name": "A" })).unwrap();
    assert_eq!(*host.retired.borrow(), ["Ap0", "Ap1", "A"]);
    assert!(host.config().is_empty(), "as in SPDK");
    host.call(CREATE, params(2, 0)).unwrap();
    host.call("bdev_split_delete", json!({ "base_bdev": "A" })).unwrap();
    host.null("A", 1);
    assert_eq!(host.names(), ["A"]);
}

/// A base that records the offsets of I/Os, and takes none.
struct Full(Arc<Mutex<Vec<(Op, u64)>>>);

impl Channel for Full {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        self.0.lock().unwrap().push((io.op, io.offset));
        Submit::Full(io)
    }

    fn poll(&mut self, _done: &mut [Completion]) -> usize {
        0
    }
}

#[test]
fn an_io_is_shifted_by_the_offset_and_returned_unchanged() {
    let host = TestHost::new([]);
    host.null("A", 1);
    let part = Part::create("p".into(), host.registry().bdev("A").unwrap(), 8, 8).unwrap();
    let seen = Arc::<Mutex<Vec<_>>>::default();
    let base = BdevChannel::on(Box::new(Full(Arc::clone(&seen))), part.wrapped.base());
    let mut channel = PartChannel { base, offset: 4096, size: 4096, _part: part };
    for (io, at) in [
        (Io::rw(Op::Read, Tag(1), 512, 0, &[]), 4608),
        (Io::plain(Op::Unmap, Tag(2), 0, 4096), 4096),
        (Io::plain(Op::Flush, Tag(3), 0, 0), 0),
    ] {
        // SAFETY: the I/O has no segments.
        let Submit::Full(back) = (unsafe { channel.submit(io) }) else { panic!("{io:?}") };
        assert_eq!((back.tag, back.offset), (io.tag, io.offset));
        assert_eq!(seen.lock().unwrap().pop(), Some((io.op, at)));
    }
    for io in [
        Io::plain(Op::WriteZeroes, Tag(0), 512, 4096),
        Io::plain(Op::Unmap, Tag(0), u64::MAX - 511, 512),
    ] {
        // SAFETY: the I/O has no segments.
        let submit = unsafe { channel.submit(io) };
        assert!(matches!(submit, Submit::Done(Status::IoError)), "{io:?}");
    }
    assert!(seen.lock().unwrap().is_empty());
}

#[test]
fn a_part_lies_within_its_base() {
    let host = TestHost::new([]);
    host.null("A", 1);
    let base = host.registry().bdev("A").unwrap();
    for (offset, blocks, is) in [
        (0, 131_072, true),
        (131_071, 1, true),
        (1, 131_072, false),
        (9, 0, false),
        (u64::MAX, 1, false),
    ] {
        assert_eq!(Part::create("p".into(), Arc::clone(&base), offset, blocks).is_ok(), is);
    }
}
