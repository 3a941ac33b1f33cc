//! Records which tests were skipped or retried, and why.
//!
//! A test that returns early, or that tries again, passes like any other. With this crate it writes
//! a line to the file that the environment variable `VHOST_SKIPS` names, which `ci/run` lists at
//! its end, and to standard error. `VHOST_REQUIRE` lists what the machine must provide, separated
//! by commas: a test that would be skipped for lack of one of these fails instead.
//!
//! `skip` in `ci/lib.sh` does the same for scripts. A line has `skipped` or `retried`, the test,
//! and the reason, separated by tabs.

use std::env;
use std::fs::File;
use std::io::Write;
use std::panic::Location;
use std::thread;

/// Records that the calling test is skipped, or ends early, because the machine lacks `need`: a
/// name for `VHOST_REQUIRE`, such as `io-uring`. The caller returns next.
///
/// # Panics
/// `VHOST_REQUIRE` lists `need`.
#[track_caller]
pub fn skipped(need: &str, reason: &str) {
    let required = env::var("VHOST_REQUIRE").unwrap_or_default();
    assert!(!requires(&required, need), "VHOST_REQUIRE names {need}: {reason}");
    write("skipped", Location::caller(), &format!("no {need}: {reason}"));
}

/// Records that the calling test has failed for a `reason` that is no fault of what it tests, and
/// is retried.
#[track_caller]
pub fn retried(reason: &str) {
    write("retried", Location::caller(), reason);
}

fn requires(required: &str, need: &str) -> bool {
    required.split(',').any(|name| name.trim() == need)
}

fn write(what: &str, caller: &Location<'_>, reason: &str) {
    let line = line(what, thread::current().name(), caller.file(), reason);
    eprint!("{line}");
    let Some(path) = env::var_os("VHOST_SKIPS") else { return };
    // In one write, as tests of several processes append to the file.
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|e| panic!("VHOST_SKIPS={}: {e}", path.display()));
}

/// The harness names a test's thread after the test, but with a single thread it runs tests on the
/// main thread: then the file's name is used.
fn line(what: &str, thread: Option<&str>, file: &str, reason: &str) -> String {
    let test = thread.filter(|name| *name != "main").unwrap_or(file);
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("{what}\t{test}\t{reason}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_names_are_required() {
        assert!(requires("io-uring,block-device", "block-device"));
        assert!(requires(" hugepages , io-uring", "hugepages"));
        assert!(!requires("", "io-uring"));
        assert!(!requires("block-devices", "block-device"));
    }

    #[test]
    fn a_line_names_the_test_and_is_one_line() {
        let of = |thread| line("skipped", thread, "tests/a.rs", "mount:\n\tno such file\n");
        assert_eq!(of(Some("kicks::b")), "skipped\tkicks::b\tmount: no such file\n");
        assert_eq!(of(Some("main")), "skipped\ttests/a.rs\tmount: no such file\n");
        assert_eq!(of(None), of(Some("main")));
    }
}
