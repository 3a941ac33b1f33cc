//! Who uses a block device, for the text of a refusal.

use std::fs;
use std::path::Path;

use crate::sysfs::Sysfs;

/// Returns who uses a block device or one of its partitions: a mounted file system, swap, or a
/// device that is built on it, such as of LVM or RAID. `None`: nobody that the kernel names.
pub(crate) fn user_of(sysfs: &Sysfs, block: &str) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let dir = sysfs.block(block);
    let partitions = fs::read_dir(&dir).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.starts_with(block).then(|| (name, entry.path()))
    });
    let mut all = vec![(block.to_owned(), dir.clone())];
    all.extend(partitions);
    all.iter().find_map(|(name, dir)| user_of_one(name, dir, &mounts, &swaps))
}

fn user_of_one(name: &str, dir: &Path, mounts: &str, swaps: &str) -> Option<String> {
    let number = fs::read_to_string(dir.join("dev")).unwrap_or_default();
    if let Some(place) = mounted_at(mounts, number.trim(), name) {
        return Some(format!("/dev/{name} is mounted at {place}"));
    }
    let device = format!("/dev/{name}");
    if swaps.lines().any(|line| line.split_whitespace().next() == Some(&device)) {
        return Some(format!("{device} is used for swap"));
    }
    let holders = fs::read_dir(dir.join("holders")).into_iter().flatten().flatten();
    let holder = holders.map(|entry| entry.path()).next()?;
    let kernel_name = holder.file_name()?.to_str()?;
    Some(match fs::read_to_string(holder.join("dm/name")) {
        Ok(mapped) => format!("{device} is used by {kernel_name} ({})", mapped.trim()),
        Err(_) => format!("{device} is used by {kernel_name}"),
    })
}

/// Returns where a device is mounted, by the text of `/proc/self/mountinfo` (proc(5)): the third
/// field is the device's number, the fifth the mount point, and the source comes after ` - `.
fn mounted_at(mounts: &str, number: &str, name: &str) -> Option<String> {
    mounts.lines().find_map(|line| {
        let (fields, source) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(2);
        let (of, place) = (fields.next()?, fields.nth(1)?);
        // Some file systems, such as btrfs, have another number than their device.
        let is_source = source.split(' ').nth(1) == Some(&format!("/dev/{name}"));
        (of == number && !number.is_empty() || is_source).then(|| place.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::tree;

    const MOUNTS: &str = "\
        25 1 259:1 / /data rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw\n\
        26 1 0:44 / /pool rw - btrfs /dev/nvme0n2 rw\n";

    #[test]
    fn mounts_are_found_by_number_or_by_source() {
        assert_eq!(mounted_at(MOUNTS, "259:1", "x").as_deref(), Some("/data"));
        assert_eq!(mounted_at(MOUNTS, "259:2", "nvme0n2").as_deref(), Some("/pool"));
        assert_eq!(mounted_at(MOUNTS, "259:2", "nvme0n3"), None);
        assert_eq!(mounted_at(MOUNTS, "", "nvme0n3"), None);
    }

    #[test]
    fn swap_and_holders_are_named() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        let block = sysfs.block("nvme0n1");
        let user = |swaps| user_of_one("nvme0n1", &block, MOUNTS, swaps);
        assert_eq!(user(""), None);
        let swaps = "Filename Type\n/dev/nvme0n1 partition 1 0 -2\n";
        assert_eq!(user(swaps).unwrap(), "/dev/nvme0n1 is used for swap");
        fs::create_dir_all(block.join("holders/dm-0/dm")).unwrap();
        fs::write(block.join("holders/dm-0/dm/name"), "vg-lv\n").unwrap();
        assert_eq!(user("").unwrap(), "/dev/nvme0n1 is used by dm-0 (vg-lv)");
    }

    #[test]
    fn partitions_count() {
        let dir = tree();
        let sysfs = Sysfs::at(dir.path());
        assert_eq!(user_of(&sysfs, "nvme0n1"), None);
        fs::create_dir_all(sysfs.block("nvme0n1").join("nvme0n1p1/holders/md0")).unwrap();
        assert_eq!(user_of(&sysfs, "nvme0n1").unwrap(), "/dev/nvme0n1p1 is used by md0");
    }
}
