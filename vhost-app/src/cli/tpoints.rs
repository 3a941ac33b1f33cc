//! Trace point groups, which SPDK's applications record.

/// The groups of an SPDK vhost process, each with its bit.
pub(crate) const TPOINT_GROUPS: [(&str, u32); 10] = [
    ("scsi", 2),
    ("bdev", 3),
    ("thread", 10),
    ("nvme_pcie", 11),
    ("nvme_tcp", 13),
    ("bdev_nvme", 14),
    ("sock", 15),
    ("blob", 16),
    ("bdev_raid", 17),
    ("scheduler", 18),
];

/// Whether SPDK accepts this value of `--tpoint-group`: groups, separated by commas, each with an
/// optional mask or list of trace points.
pub(super) fn is_group_list(text: &str) -> bool {
    text.split(',').all(|item| {
        let (group, points) = item.split_once(':').unwrap_or((item, "0x1"));
        let is_mask =
            points.strip_prefix("0x").is_some_and(|hex| u64::from_str_radix(hex, 16).is_ok());
        let is_name = |name: &str| {
            !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let known = group == "all" || TPOINT_GROUPS.iter().any(|(name, _)| *name == group);
        known && (is_mask || points.split('+').all(is_name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_groups_are_checked() {
        for good in ["bdev", "all", "bdev,sock", "bdev:0x3", "bdev:BDEV_IO_START+BDEV_IO_DONE,blob"]
        {
            assert!(is_group_list(good), "{good}");
        }
        for bad in ["", "nonsense", "bdev,", "bdev:", "bdev:0xzz:", "bdev:A++B", "vhost"] {
            assert!(!is_group_list(bad), "{bad}");
        }
    }
}
