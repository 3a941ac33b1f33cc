//! The memory that is available to this process: in the system, and in its control groups.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// The memory that must remain free. The kernel's number is an estimate, and all disks are lost
/// when the kernel kills the process for lack of memory.
const SPARE: u64 = 64 << 20;

/// Checks that `size` bytes are available, and a reserve besides.
///
/// # Errors
/// [`Error::NoMemory`] with both numbers. It is not an error if the kernel reports no number.
pub(crate) fn check(size: u64) -> Result<(), Error> {
    let Some(available) = [system(), control_groups()].into_iter().flatten().min() else {
        return Ok(());
    };
    if size.saturating_add(SPARE) > available {
        return Err(Error::NoMemory(format!(
            "{size} bytes requested, {} available",
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

/// Returns the mount points of the cgroup hierarchies whose limits apply to a new
/// [`Malloc`](crate::Malloc) disk. A process that restricts which files it can open must leave
/// files beneath them readable.
#[must_use]
pub fn control_group_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hierarchies = [Version::One, Version::Two].into_iter();
    hierarchies.filter_map(|version| mount_of(version, &mounts)).map(|mount| mount.point).collect()
}

/// Returns the least memory that is left in this process's control group and its ancestors, in
/// either cgroup version.
fn control_groups() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(Path::new("/proc/self").join(name)).ok();
    least_left(&read("cgroup")?, &read("mountinfo")?)
}

/// As [`control_groups`], from the contents of the process's `cgroup` and `mountinfo` files.
fn least_left(groups: &str, mounts: &str) -> Option<u64> {
    let hierarchy = |version| {
        let (mount, group) = (mount_of(version, mounts)?, group_in(version, groups)?);
        let own = mount.directory_of(group);
        let all = own.ancestors().take_while(|dir| dir.starts_with(&mount.point));
        all.filter_map(|dir| left_in(version, dir, dir == own)).min()
    };
    [Version::One, Version::Two].into_iter().filter_map(hierarchy).min()
}

/// cgroup v1 or v2. The memory controller is in at most one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The mount point of a cgroup hierarchy, and the group that is mounted there: in a container it is
/// not the root group.
#[derive(Debug)]
struct Mount {
    point: PathBuf,
    root: PathBuf,
}

impl Mount {
    /// Returns the directory of a group. For a group outside of the mount, returns the mounted
    /// group, its nearest visible ancestor.
    fn directory_of(&self, group: &str) -> PathBuf {
        match Path::new(group).strip_prefix(&self.root) {
            Ok(below) if !group.split('/').any(|part| part == "..") => self.point.join(below),
            _ => self.point.clone(),
        }
    }
}

/// The mount of the hierarchy with the memory controller; proc(5) has the format of `mountinfo`.
fn mount_of(version: Version, mounts: &str) -> Option<Mount> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        let right = match version {
            Version::One => kind == "cgroup" && options.split(',').any(|o| o == "memory"),
            Version::Two => kind == "cgroup2",
        };
        let mut before = before.split(' ').skip(3);
        let (root, point) = (before.next()?, before.next()?);
        right.then(|| Mount { point: point.into(), root: root.into() })
    })
}

/// The process's group in the hierarchy with the memory controller; cgroups(7) has the format of
/// `cgroup`.
fn group_in(version: Version, groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
        let right = match version {
            Version::One => controllers.split(',').any(|c| c == "memory"),
            Version::Two => number == "0" && controllers.is_empty(),
        };
        right.then_some(group)
    })
}

/// Returns the memory that a group has left. `own`: it is the process's own group. `None`: the
/// group sets no limit for this process.
fn left_in(version: Version, dir: &Path, own: bool) -> Option<u64> {
    let text = |name: &str| fs::read_to_string(dir.join(name)).ok();
    let number = |name: &str| text(name)?.trim().parse::<u64>().ok();
    let stat = text("memory.stat").unwrap_or_default();
    let (limit, used, reclaimable) = match version {
        Version::One => {
            // Before Linux 5.11, a group need not limit its descendants.
            if !own && number("memory.use_hierarchy") == Some(0) {
                return None;
            }
            // The second number is the minimum over all ancestors, including those that a container
            // does not see.
            let limits = [
                number("memory.limit_in_bytes"),
                field(&stat, "hierarchical_memory_limit").filter(|_| own),
            ];
            (limits.into_iter().flatten().min()?, "memory.usage_in_bytes", "total_inactive_file")
        }
        Version::Two => (number("memory.max")?, "memory.current", "inactive_file"),
    };
    let left = limit.saturating_sub(number(used)?);
    // The kernel reclaims inactive file pages before it kills a process.
    Some(left.saturating_add(field(&stat, reclaimable).unwrap_or(0)))
}

/// Returns the number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        if words.next() == Some(name) { words.next()?.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// The value of an unlimited group in version 1.
    const NONE: &str = "9223372036854771712";

    #[test]
    fn more_memory_than_available_is_refused() {
        let available = system().unwrap();
        assert!(available > 0);
        assert!(matches!(check(available), Err(Error::NoMemory(_))));
        assert!(matches!(check(u64::MAX), Err(Error::NoMemory(_))));
    }

    /// A directory with files like the kernel's for control groups.
    struct Tree {
        dir: TempDir,
        mounts: String,
    }

    impl Tree {
        fn new() -> Self {
            // Other file systems are mounted too.
            let mounts = "24 29 0:22 / /proc rw,nosuid - proc proc rw\n\
                          31 30 0:27 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n";
            Self { dir: tempfile::tempdir().unwrap(), mounts: mounts.into() }
        }

        /// Mounts a hierarchy at `name`, with `root` as the group that is mounted.
        fn mount(&mut self, name: &str, root: &str, kind: &str, options: &str) {
            let point = self.dir.path().join(name);
            let point = point.display();
            // Optional fields come before the dash, any number of them.
            self.mounts += &format!(
                "32 30 0:28 {root} {point} rw,relatime shared:10 master:2 - {kind} x {options}\n"
            );
        }

        /// A group with its files.
        fn group(&self, path: &str, files: &[(&str, &str)]) {
            let dir = self.dir.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
        }

        fn one(&self, path: &str, limit: &str, usage: &str, more: &[(&str, &str)]) {
            self.group(path, &[("memory.limit_in_bytes", limit), ("memory.usage_in_bytes", usage)]);
            self.group(path, more);
        }

        fn two(&self, path: &str, limit: &str, usage: &str, more: &[(&str, &str)]) {
            self.group(path, &[("memory.max", limit), ("memory.current", usage)]);
            self.group(path, more);
        }

        fn left(&self, groups: &str) -> Option<u64> {
            least_left(groups, &self.mounts)
        }
    }

    #[test]
    fn version_1_from_our_group_to_the_root() {
        let mut tree = Tree::new();
        tree.mount("memory", "/", "cgroup", "rw,memory");
        let groups = "9:name=systemd:/x\n4:memory:/a/b\n1:cpu,cpuacct:/c\n0::/\n";
        assert_eq!(tree.left(groups), None, "no such files");
        tree.one("memory", NONE, "9000", &[]);
        tree.one("memory/a", NONE, "5000\n", &[]);
        tree.one("memory/a/b", "1000\n", "300\n", &[]);
        assert_eq!(tree.left(groups), Some(700));
        tree.one("memory/a", "5600", "5000", &[]);
        assert_eq!(tree.left(groups), Some(600), "an ancestor leaves less");
        // The group's own pages are not all: its usage includes that of its descendants.
        tree.group("memory/a", &[("memory.stat", "inactive_file 1\ntotal_inactive_file 50\n")]);
        assert_eq!(tree.left(groups), Some(650));
        tree.group("memory/a", &[("memory.use_hierarchy", "0\n")]);
        assert_eq!(tree.left(groups), Some(700), "it does not count what is below");
        tree.group("memory/a", &[("memory.use_hierarchy", "1\n")]);
        tree.group("memory/a/b", &[("memory.use_hierarchy", "0\n")]);
        assert_eq!(tree.left(groups), Some(650), "it counts itself");
        tree.one("memory/a/b", "1000", "2000", &[]);
        assert_eq!(tree.left(groups), Some(0), "a limit below what is used");
        assert_eq!(tree.left("4:memory:/a\n"), Some(650), "those beside and below do not matter");
    }

    #[test]
    fn version_2_from_our_group_to_the_root() {
        let mut tree = Tree::new();
        tree.mount("cgroup", "/", "cgroup2", "rw,nsdelegate");
        let groups = "0::/a/b\n";
        assert_eq!(tree.left(groups), None);
        tree.two("cgroup/a", "max", "5000", &[]);
        tree.two("cgroup/a/b", "max", "700", &[]);
        assert_eq!(tree.left(groups), None, "no limit");
        tree.two("cgroup/a/b", "1000\n", "700\n", &[]);
        assert_eq!(tree.left(groups), Some(300));
        tree.group("cgroup/a/b", &[("memory.stat", "anon 5\ninactive_file 50\n")]);
        assert_eq!(tree.left(groups), Some(350));
        tree.two("cgroup/a", "5100", "5000", &[]);
        assert_eq!(tree.left(groups), Some(100));
    }

    /// As in systemd's hybrid mode: version 2 is mounted, and has no memory controller.
    #[test]
    fn the_hierarchy_with_the_memory_controller_counts() {
        let mut tree = Tree::new();
        tree.mount("unified", "/", "cgroup2", "rw");
        tree.mount("cpu,memory", "/", "cgroup", "rw,cpu,memory");
        tree.group("unified/u", &[("cgroup.procs", "1")]);
        tree.one("cpu,memory/a", "1000", "1", &[]);
        let groups = "4:cpu,memory:/a\n0::/u\n";
        assert_eq!(tree.left(groups), Some(999));
        tree.two("unified/u", "500", "1", &[]);
        assert_eq!(tree.left(groups), Some(499));
    }

    #[test]
    fn containers_see_only_a_part_of_the_hierarchy() {
        let mut tree = Tree::new();
        tree.mount("memory", "/docker/1", "cgroup", "rw,memory");
        let stat = ("memory.stat", "cache 1\nhierarchical_memory_limit 1500\n");
        tree.one("memory", "2000", "1000", &[]);
        tree.one("memory/x", NONE, "1000", &[stat]);
        for (group, left) in [
            ("/docker/1/x", Some(500)),
            ("/docker/1", Some(1000)),
            // In a cgroup namespace: ancestors cannot be named, and a group that is not below the
            // mount is taken for the mounted one.
            ("/", Some(1000)),
            ("/../2", Some(1000)),
            ("/docker/1/../2", Some(1000)),
            ("/docker/12", Some(1000)),
        ] {
            assert_eq!(tree.left(&format!("4:memory:{group}\n")), left, "{group}");
        }
    }
}
