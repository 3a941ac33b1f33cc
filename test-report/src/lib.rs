//! Records which tests were skipped or retried, and why.
//!
//! The test runner reports a test that returns early or retries as passed. With this crate, the
//! test also writes a line to standard error and to the file that the environment variable
//! `VHOST_SKIPS` names; `ci/run` prints that file when it ends. `VHOST_REQUIRE` lists features that
//! the machine must have, separated by commas. A test that needs a missing one of these fails.
//!
//! `skip` in `ci/lib.sh` does the same for scripts. A line consists of `skipped` or `retried`, the
//! test's name, and the reason, separated by tabs.

use std::env;
use std::fs::File;
use std::io::Write;
use std::panic::Location;
use std::thread;

/// Records that the calling test is skipped, or returns early, because the machine lacks `need`, a
/// name for `VHOST_REQUIRE` such as `io-uring`. The caller must return next.
///
/// # Panics
/// `VHOST_REQUIRE` lists `need`.
#[track_caller]
pub fn skipped(need: &str, reason: &str) {
    let required = env::var("VHOST_REQUIRE").unwrap_or_default();
    assert!(!requires(&required, need), "VHOST_REQUIRE names {need}: {reason}");
    write("skipped", Location::caller(), &format!("no {need}: {reason}"));
}

/// Records that the calling test retries, because an attempt failed for a `reason` outside of the
/// code under test.
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
    // With a single write, because several processes append to the file.
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|e| panic!("VHOST_SKIPS={}: {e}", path.display()));
}

/// The test's name is the name of its thread. On the main thread, where the harness runs tests if
/// it uses one thread, it is the file's name.
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
