//! The 215 SCSI tests of libiscsi's `iscsi-test-cu`, on a logical unit behind a small iSCSI target.
//!
//! The same tests run in a guest on the device. Here they take seconds, and those for several
//! nexuses run, too. `ISCSI_TEST` names a single test, whose output is shown.

mod disk;
mod target;

use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use scsi::{Facts, Identity};

use self::target::Target;

/// The program of Debian's package libiscsi-bin.
const PROGRAM: &str = "iscsi-test-cu";

/// Tests that run at a time.
const THREADS: usize = 4;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    /// It, or a part of it, says that it is skipped.
    Skipped,
    Fail,
}

fn disk() -> Facts {
    let identity = Identity::of("Malloc disk", "Malloc0");
    let mut facts = Facts::new(512, (64 << 20) / 512, identity);
    facts.unmap = Some(facts.default_unmap());
    facts.write_cache = true;
    facts
}

/// What the program says, or `None` if it is not installed.
fn output(arguments: &[&str]) -> Option<String> {
    let output = Command::new(PROGRAM).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// All tests that the program has for SCSI.
fn tests() -> Option<Vec<String>> {
    let list = output(&["-l"])?;
    let names = list.lines().filter(|l| l.starts_with("SCSI.") && l.matches('.').count() == 2);
    Some(names.map(str::to_owned).collect())
}

/// Runs a test on a new disk, through as many targets as `paths`.
fn run(facts: Facts, test: &str, paths: u8) -> (Verdict, String) {
    let target = Target::new(facts);
    let urls: Vec<_> = (0..paths).map(|number| target.url(number)).collect();
    // Data may be lost, sanitizing is allowed, and the commands are shown.
    let mut arguments = vec!["-d", "-S", "-V", "-t", test];
    arguments.extend(urls.iter().map(String::as_str));
    let text = output(&arguments).expect("the program starts");
    let part = text.find("\nSuite:").map_or("", |at| &text[at..]);
    let row = part.lines().find(|line| line.trim_start().starts_with("tests "));
    let counts: Vec<_> = row.map_or(vec![], |row| row.split_whitespace().skip(1).collect());
    let verdict = match counts[..] {
        // Total, run, passed, failed.
        ["1", "1", "1", "0", ..] if part.contains("[SKIPPED]") => Verdict::Skipped,
        ["1", "1", "1", "0", ..] => Verdict::Pass,
        _ => Verdict::Fail,
    };
    (verdict, text)
}

/// Runs tests, several at a time since some of them wait. Each must have the expected verdict.
fn check(facts: Facts, paths: u8, tests: &[(&str, Verdict)]) {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((test, expected)) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (verdict, text) = run(facts, test, paths);
                    if verdict != *expected {
                        println!("{text}");
                        wrong.lock().expect("no panic").push(format!("{test}: {verdict:?}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no panic");
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("{} tests", tests.len());
}

/// The tests of the program, or none if it is not installed.
fn installed() -> Vec<String> {
    let tests = tests().unwrap_or_default();
    if tests.is_empty() {
        test_report::skipped(PROGRAM, "it is not installed: it is in Debian's libiscsi-bin");
    }
    tests
}

/// What the disk of these tests cannot pass, and why.
fn expected(test: &str) -> Verdict {
    let skipped = match test.split('.').nth(1).unwrap_or_default() {
        // The medium would have to be removable.
        "NoMedia" | "PreventAllow" | "StartStopUnit" => true,
        // A sanitize operation goes on after power on, and an atomic write never tears: neither
        // can be promised for any disk. The commands are not offered.
        "Sanitize" | "WriteAtomic16" => true,
        // These run on other disks, below.
        "MultipathIO" | "ReadOnly" => true,
        _ => LARGE_PHYSICAL_BLOCKS.contains(&test),
    };
    if skipped { Verdict::Skipped } else { Verdict::Pass }
}

/// Tests for disks with several logical blocks in a physical block.
const LARGE_PHYSICAL_BLOCKS: [&str; 5] = [
    "SCSI.CompareAndWrite.InvalidDataOutSize",
    "SCSI.WriteSame10.UnmapUnaligned",
    "SCSI.WriteSame10.InvalidDataOutSize",
    "SCSI.WriteSame16.UnmapUnaligned",
    "SCSI.WriteSame16.InvalidDataOutSize",
];

#[test]
fn a_disk_of_512_byte_blocks() {
    let tests = installed();
    let one = std::env::var("ISCSI_TEST").ok();
    let tests = tests.iter().filter(|test| one.as_ref().is_none_or(|one| one == *test));
    let tests: Vec<_> = tests.map(|test| (test.as_str(), expected(test))).collect();
    if let (Some(_), [(test, _)]) = (&one, &tests[..]) {
        println!("{}", run(disk(), test, 1).1);
    }
    check(disk(), 1, &tests);
}

#[test]
fn a_disk_of_large_physical_blocks() {
    if !installed().is_empty() {
        let facts = Facts { physical_exponent: 3, ..disk() };
        check(facts, 1, &LARGE_PHYSICAL_BLOCKS.map(|test| (test, Verdict::Pass)));
    }
}

#[test]
fn a_read_only_disk() {
    if !installed().is_empty() {
        let facts = Facts { read_only: true, ..disk() };
        check(facts, 1, &[("SCSI.ReadOnly.ReadOnlySBC", Verdict::Pass)]);
    }
}

#[test]
fn a_disk_behind_two_targets() {
    if !installed().is_empty() {
        let tests = ["Simple", "Reset", "CompareAndWrite", "CompareAndWriteAsync"];
        let tests = tests.map(|test| format!("SCSI.MultipathIO.{test}"));
        check(disk(), 2, &tests.each_ref().map(|test| (test.as_str(), Verdict::Pass)));
    }
}

/// The tests of medium access, on blocks of 4,096 bytes. The length of a CDB has nothing to do with
/// the block size.
#[test]
fn a_disk_of_4096_byte_blocks() {
    let tests = installed();
    let facts = Facts::new(4096, 70_000, disk().identity);
    let facts = Facts { unmap: Some(facts.default_unmap()), ..facts };
    let suites =
        ["Compare", "Extended", "GetLBA", "Read10", "Unmap", "Verify10", "Write10", "WriteSame"];
    let is_of_medium = |test: &&String| {
        let suite = test.split('.').nth(1).unwrap_or_default();
        suites.iter().any(|begin| suite.starts_with(begin))
    };
    let tests = tests.iter().filter(is_of_medium).map(|test| match test.as_str() {
        // It writes 2,048 blocks at once, more than MAXIMUM TRANSFER LENGTH.
        test @ "SCSI.ExtendedCopy.Simple" => (test, Verdict::Fail),
        test => (test, expected(test)),
    });
    check(facts, 1, &tests.collect::<Vec<_>>());
}
