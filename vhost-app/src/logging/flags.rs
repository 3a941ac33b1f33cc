//! The log flags, and the modules that each covers.

use std::ffi::{CStr, CString};

/// The flags of SPDK's `vhost`, sorted by name, with the modules whose INFO and DEBUG lines they
/// enable. A flag also enables events whose target is the flag's name. Flags without modules are
/// names of SPDK components that this program does not have.
pub(super) const FLAGS: [(&str, &[&str]); 72] = [
    ("accel", &[]),
    ("accel_ae4dma", &[]),
    ("accel_ioat", &[]),
    ("aio", &["bdev::modules::file"]),
    ("app_config", &["vhost::config_file"]),
    ("app_rpc", &["vhost"]),
    ("bdev", &["bdev"]),
    ("bdev_concat", &[]),
    ("bdev_ftl", &[]),
    ("bdev_malloc", &["bdev::modules::malloc"]),
    ("bdev_null", &["bdev::modules::null"]),
    ("bdev_nvme", &[]),
    ("bdev_raid", &[]),
    ("bdev_raid0", &[]),
    ("bdev_raid1", &[]),
    ("bdev_raid_sb", &[]),
    ("bdev_rbd", &["rbd"]),
    ("blob", &[]),
    ("blob_esnap", &[]),
    ("blob_rw", &[]),
    ("fsdev", &[]),
    ("fsdev_aio", &[]),
    ("ftl_core", &[]),
    ("ftl_init", &[]),
    ("gpt_parse", &[]),
    ("ioat", &[]),
    ("iscsi_init", &[]),
    ("json_util", &["rpc::decode"]),
    ("keyring", &[]),
    ("log_rpc", &[]),
    ("lvol", &[]),
    ("lvol_rpc", &[]),
    ("nbd", &[]),
    ("notify_rpc", &[]),
    ("nvme", &[]),
    ("nvme_auth", &[]),
    ("nvme_cuse", &[]),
    ("opal", &[]),
    ("reactor", &["reactor"]),
    ("rpc", &["rpc"]),
    ("rpc_client", &[]),
    ("scsi", &["scsi"]),
    ("sock", &[]),
    ("sock_posix", &[]),
    ("spdk_aio_mgr_io", &[]),
    ("thread", &[]),
    ("trace", &[]),
    ("uring", &["bdev::modules::file"]),
    ("vbdev_delay", &["bdev::modules::delay"]),
    ("vbdev_gpt", &["bdev::modules::gpt"]),
    ("vbdev_lvol", &[]),
    ("vbdev_opal", &[]),
    ("vbdev_passthru", &["bdev::modules::passthru"]),
    ("vbdev_split", &["bdev::modules::split"]),
    ("vbdev_zone_block", &[]),
    ("vfio_pci", &[]),
    ("vfio_user", &[]),
    ("vhost", &["dpdk", "rte_vhost", "vhost", "vhost_blk", "vhost_scsi", "vhost_target"]),
    ("vhost_blk", &["vhost_blk", "vhost_target"]),
    ("vhost_blk_data", &["vhost_blk::request"]),
    ("vhost_ring", &["vhost_target::queue", "virtqueue"]),
    ("vhost_rpc", &["rpc"]),
    ("vhost_scsi", &["vhost_scsi", "vhost_target"]),
    ("vhost_scsi_data", &["vhost_scsi::request_queue"]),
    ("vhost_scsi_queue", &["vhost_scsi::request_queue", "vhost_scsi::control_queue"]),
    ("virtio", &[]),
    ("virtio_blk", &["virtio_user"]),
    ("virtio_dev", &[]),
    ("virtio_pci", &[]),
    ("virtio_user", &["virtio_user"]),
    ("virtio_vfio_user", &[]),
    ("vmd", &[]),
];

/// Longer patterns match nothing: to match some patterns takes time that grows with the square of
/// their length.
const PATTERN_MAX: usize = 128;

/// Whether `-L` and `log_set_flag` accept this pattern.
pub(crate) fn is_flag(pattern: &str) -> bool {
    matching(pattern) != 0
}

/// The flags that a pattern matches, a bit each: a shell pattern, whose case is ignored, or `all`.
pub(super) fn matching(pattern: &str) -> u128 {
    if pattern.eq_ignore_ascii_case("all") {
        return u128::MAX >> (128 - FLAGS.len());
    }
    if pattern.len() > PATTERN_MAX {
        return 0;
    }
    let Ok(pattern) = CString::new(pattern) else { return 0 };
    let matches = |flag: &str| CString::new(flag).is_ok_and(|flag| fnmatch(&pattern, &flag));
    (0..).zip(FLAGS).filter(|(_, (flag, _))| matches(flag)).map(|(bit, _)| 1 << bit).sum()
}

fn fnmatch(pattern: &CStr, text: &CStr) -> bool {
    // SAFETY: `fnmatch` reads two strings that end in a zero byte, and keeps neither.
    unsafe { libc::fnmatch(pattern.as_ptr(), text.as_ptr(), libc::FNM_CASEFOLD) == 0 }
}

/// Whether flags whose bits are set cover events of this target.
pub(super) fn cover(bits: u128, target: &str) -> bool {
    let is_in = |module: &&str| {
        target.strip_prefix(*module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    bits != 0
        && (0..).zip(FLAGS).any(|(bit, (flag, modules)): (u32, _)| {
            bits & (1 << bit) != 0 && (flag == target || modules.iter().any(is_in))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(pattern: &str) -> Vec<&'static str> {
        let bits = matching(pattern);
        let set = (0..).zip(FLAGS).filter(|(bit, _): &(u32, _)| bits & (1 << bit) != 0);
        set.map(|(_, (flag, _))| flag).collect()
    }

    #[test]
    fn patterns_match_as_in_a_shell_and_ignore_case() {
        assert_eq!(matched("nvme"), ["nvme"]);
        assert_eq!(matched("VHOST_BLK"), ["vhost_blk"]);
        assert_eq!(matched("vhost_blk*"), ["vhost_blk", "vhost_blk_data"]);
        assert_eq!(matched("bdev_raid?"), ["bdev_raid0", "bdev_raid1"]);
        assert_eq!(matched("[v-z]md"), ["vmd"]);
        assert_eq!(matched("All").len(), FLAGS.len());
        assert_eq!(matched("*").len(), FLAGS.len());
        assert_eq!(matched(&"*".repeat(PATTERN_MAX)).len(), FLAGS.len());
        let long = "*".repeat(PATTERN_MAX + 1);
        for bad in ["", "nope", "vhost_", "a\0b", &long] {
            assert!(!is_flag(bad), "{bad:?}");
        }
        assert!(FLAGS.is_sorted());
        FLAGS.iter().for_each(|(flag, _)| assert_eq!(matched(flag), [*flag]));
    }
}
