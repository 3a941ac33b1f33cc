//! The kernel's limit on the fds in one message.

/// The maximum number of fds that one call receives: the kernel's limit for one message (`SCM_MAX_FD`). A
/// call does not read past a message with fds.
pub const FDS_MAX: usize = 253;
