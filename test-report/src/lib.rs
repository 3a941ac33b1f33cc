//! Tells CI which tests were skipped or repeated, and why.
//!
//! A test that returns early, or that tries again, passes like any other. With this it says so: a line
//! in the file that the environment variable `VHOST_SKIPS` names, which `ci/run` shows at its end,
//! and the same on standard error. What the machine must provide is listed in `VHOST_REQUIRE`, its
//! names separated by commas: a test that is skipped for one of them fails instead.
//!
//! `skip` in `ci/lib.sh` does the same for scripts. A line is `skipped` or `retried`, the test, and
//! the reason, separated by tabs.

use std::env;
use std::fs::File;
use std::io::Write;
use std::panic::Location;
use std::thread;

/// Says that the calling test is skipped, or ends early, as the machine lacks `need`: a name for
/// `VHOST_REQUIRE`, like `io-uring`. The caller returns next.
///
/// # Panics
/// `need` is required.
#[track_caller]
pub fn skipped(need: &str, reason: &str) {
    let required = env::var("VHOST_REQUIRE").unwrap_or_default();
    assert!(!requires(&required, need), "VHOST_REQUIRE names {need}: {reason}");
    write("skipped", Location::caller(), &format!("no {need}: {reason}"));
}

/// Says that the calling test has failed for a `reason` that is no fault of what it tests, and tries
/// again.
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
    // In one write, as tests of several processes append to it.
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|e| panic!("VHOST_SKIPS={}: {e}", path.display()));
}

/// The harness names a test's thread after the test, but runs it on the main thread where it may use
/// only one: then the file has to do.
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
