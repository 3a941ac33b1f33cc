//! What the configuration reader of `vhost-app` needs from its methods.

/// The subsystems, as in `vhost-app/src/methods`.
pub(crate) const SUBSYSTEMS: [(&str, &[&str]); 3] =
    [("bdev", &[]), ("vhost_blk", &[]), ("nvmf", &[])];
