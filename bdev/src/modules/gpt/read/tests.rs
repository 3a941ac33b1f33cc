use super::*;
use crate::modules::error::{ErrorDisk, ErrorOptions, InjectedError, InjectedOp, Injection};
use crate::modules::malloc::{Malloc, MallocOptions};

fn malloc(num_blocks: u64, block_size: u32) -> Arc<dyn Bdev> {
    Malloc::create(MallocOptions { name: "m".into(), num_blocks, block_size, uuid: None }).unwrap()
}

#[test]
fn bdevs_that_cannot_hold_a_table_are_not_read() {
    for (num_blocks, block_size) in [(1, 512), (63, 512), (7, 4096), (8, 32 << 10), (4, 64 << 10)] {
        let found = read(&malloc(num_blocks, block_size), Duration::ZERO);
        assert!(matches!(found, Ok(Found::Nothing)));
    }
    let found = read(&malloc(64, 512), Duration::from_secs(60));
    assert!(matches!(found, Ok(Found::Nothing)), "nothing is stored on it");
}

fn faulty(error: InjectedError) -> (Arc<ErrorDisk>, Arc<dyn Bdev>) {
    let options = ErrorOptions { name: "EE".into(), base: malloc(64, 512), uuid: None };
    let disk = ErrorDisk::create(options).unwrap();
    let injection = Injection { op: InjectedOp::Read, error, count: u32::MAX, queue_depth: 0 };
    disk.inject(injection).unwrap();
    (Arc::clone(&disk), disk)
}

#[test]
fn a_failed_read_is_an_error() {
    let (_, bdev) = faulty(InjectedError::Failure);
    let text = read(&bdev, Duration::from_secs(60)).err().unwrap().to_string();
    assert_eq!(text, "EE: cannot read the partition table: Input/output error (os error 5)");
}

#[test]
fn reads_without_an_answer_are_left_to_a_thread() {
    let (disk, bdev) = faulty(InjectedError::Pending);
    let Ok(Found::NoAnswer(reads)) = read(&bdev, Duration::ZERO) else { panic!("it answers") };
    drop(bdev);
    assert!(reads.upgrade().is_some());
    disk.abort_pending();
    while reads.strong_count() > 0 || Arc::strong_count(&disk) > 1 {
        thread::yield_now();
    }
}
