//! What `vhost-app`'s reader of configurations asks its methods for.

/// Subsystems that there are, as `vhost-app/src/methods` has them.
pub(crate) const SUBSYSTEMS: [(&str, &[&str]); 3] =
    [("bdev", &[]), ("vhost_blk", &[]), ("nvmf", &[])];
