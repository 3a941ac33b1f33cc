//! The real `vhost` in a control group with less memory than the system has: a malloc disk that
//! does not fit is refused, and existing disks are not affected. With the sandbox,
//! wherever the cgroups are mounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::harness::{Launch, Refusal, Vhost};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 256 * MIB;

/// A control group, which is removed when the value is dropped.
struct Group(PathBuf);

impl Group {
    /// Below the test's own group, in the hierarchy mounted at `root`; or why there is none.
    fn new(root: &str, own: &str, limit_file: &str) -> Result<Self, String> {
        let parent = Path::new(root).join(own.trim_start_matches('/'));
        let dir = parent.join(format!("vhost-test-{}", std::process::id()));
        let says = |what: &Path, e: std::io::Error| format!("{}: {e}", what.display());
        fs::create_dir(&dir).map_err(|e| says(&dir, e))?;
        let group = Self(dir);
        let limit = group.0.join(limit_file);
        // The group must have this file: writing must not create it.
        if !limit.exists() {
            return Err(format!("{}: the group has no memory controller", limit.display()));
        }
        fs::write(&limit, LIMIT.to_string()).map_err(|e| says(&limit, e))?;
        Ok(group)
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The test's own group, by the prefix of its line in /proc/self/cgroup.
fn own_group(is_it: impl Fn(&str) -> bool) -> Result<String, String> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let line = text.lines().find(|line| is_it(line)).ok_or("no such hierarchy")?;
    Ok(line.splitn(3, ':').nth(2).unwrap().to_owned())
}

/// The mount point of a whole hierarchy.
fn mounted(is_it: impl Fn(&str) -> bool) -> Result<String, String> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = text.lines().find(|line| is_it(line)).ok_or("no such hierarchy is mounted")?;
    Ok(line.split(' ').nth(1).unwrap().to_owned())
}

fn malloc(vhost: &Vhost, name: &str, mib: u64) -> Result<Value, Refusal> {
    let blocks = mib * MIB / 512;
    vhost.rpc("bdev_malloc_create", json!({"name": name, "num_blocks": blocks, "block_size": 512}))
}

fn free_hugepages() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    line.map_or(0, |number| number.trim().parse().unwrap())
}

/// A hierarchy with a group.
struct Hierarchy {
    mounted_at: String,
    group: Group,
}

impl Hierarchy {
    fn version_1() -> Result<Self, String> {
        let mounted_at = mounted(|line| {
            let mut words = line.split(' ').skip(2);
            words.next() == Some("cgroup")
                && words.next().is_some_and(|options| options.split(',').any(|o| o == "memory"))
        })?;
        let own = own_group(|line| line.split(':').nth(1) == Some("memory"))?;
        let group = Group::new(&mounted_at, &own, "memory.limit_in_bytes")?;
        Ok(Self { mounted_at, group })
    }

    fn version_2() -> Result<Self, String> {
        let mounted_at = mounted(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
        let own = own_group(|line| line.starts_with("0::"))?;
        let group = Group::new(&mounted_at, &own, "memory.max")?;
        Ok(Self { mounted_at, group })
    }
}

fn a_disk_that_does_not_fit_is_refused(group: &Group, launch: Launch) {
    let vhost = launch.start();
    vhost.wait_for_log("sandbox: no new privileges");
    group.take(vhost.pid());
    assert!(malloc(&vhost, "fits", 64).is_ok());
    let refused = Refusal::new(-12, "Cannot allocate memory");
    assert_eq!(malloc(&vhost, "large", 1024), Err(refused.clone()), "more than the limit");
    assert_eq!(malloc(&vhost, "rest", 200), Err(refused), "more than what is left of it");
    assert!(malloc(&vhost, "fits too", 64).is_ok());
    assert_eq!(vhost.bdev_names(), ["fits", "fits too"]);
    assert_eq!(vhost.stop(), 0);
}

/// With the hierarchy mounted where it is, and outside /sys, where the sandbox has to allow it.
fn a_disk_that_does_not_fit_is_refused_in(hierarchy: Result<Hierarchy, String>) {
    let Hierarchy { mounted_at, group } = match hierarchy {
        Ok(hierarchy) => hierarchy,
        Err(reason) => return test_report::skipped("memory-groups", &reason),
    };
    if free_hugepages() > 0 {
        let reason = "malloc disks use free hugepages, which a memory group does not count";
        return test_report::skipped("memory-groups", reason);
    }
    a_disk_that_does_not_fit_is_refused(&group, Launch::new());

    let elsewhere = tempfile::tempdir().unwrap();
    let script = r#"mount --move "$1" "$2" && shift 2 && exec "$@""#;
    let to = elsewhere.path().to_str().unwrap();
    let through = ["unshare", "--mount", "sh", "-c", script, "sh", &mounted_at, to];
    let tried = Command::new(through[0]).args(&through[1..]).arg("true").output();
    match tried {
        Ok(output) if output.status.success() => {
            a_disk_that_does_not_fit_is_refused(&group, Launch::new().through(&through));
        }
        tried => test_report::skipped("mount-namespace", &format!("{tried:?}")),
    }
}

#[test]
fn a_disk_that_does_not_fit_is_refused_in_version_1() {
    a_disk_that_does_not_fit_is_refused_in(Hierarchy::version_1());
}

#[test]
fn a_disk_that_does_not_fit_is_refused_in_version_2() {
    a_disk_that_does_not_fit_is_refused_in(Hierarchy::version_2());
}
