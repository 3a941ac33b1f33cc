//! How much memory the system, and the control group we are in, can spare.

use std::fs;
use std::path::{Path, PathBuf};

use crate::io::Error;

/// What has to be left over. The kernel's figure is an estimate, and a process that is killed for
/// lack of memory takes every disk with it.
const SPARE: u64 = 64 << 20;

/// Checks that `size` bytes can be had, and some more.
///
/// # Errors
/// [`Error::NoMemory`] with both numbers. If the kernel does not tell, that is no error.
pub(crate) fn check(size: u64) -> Result<(), Error> {
    let Some(available) = [system(), control_group()].into_iter().flatten().min() else {
        return Ok(());
    };
    if size.saturating_add(SPARE) > available {
        return Err(Error::NoMemory(format!(
            "{size} bytes wanted, {} available",
            available.saturating_sub(SPARE)
        )));
    }
    Ok(())
}

fn system() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = field(&text, "MemAvailable:")?;
    kib.checked_mul(1024)
}

/// The least that any group from ours to the root leaves, with version 2 of control groups.
fn control_group() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let own: PathBuf = root.join(path);
    own.ancestors().take_while(|dir| dir.starts_with(root)).filter_map(left_in).min()
}

/// `None` if the group has no limit.
fn left_in(dir: &Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let left = number("memory.max")?.saturating_sub(number("memory.current")?);
    // File pages that nobody uses are given up before anybody is killed.
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    Some(left.saturating_add(field(&stat, "inactive_file").unwrap_or(0)))
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if words.next() == Some(name) { words.next()?.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_system_has_is_refused() {
        let available = system().unwrap();
        assert!(available > 0);
        assert!(matches!(check(available), Err(Error::NoMemory(_))));
        assert!(matches!(check(u64::MAX), Err(Error::NoMemory(_))));
    }

    #[test]
    fn a_group_without_a_limit_has_none_and_one_with_a_limit_says_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "700\n");
        assert_eq!(left_in(dir.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_in(dir.path()), Some(300));
        write("memory.stat", "anon 5\ninactive_file 50\n");
        assert_eq!(left_in(dir.path()), Some(350));
    }
}
