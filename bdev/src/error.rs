//! Why a device could not be made, opened or changed.

/// Why a device could not be made, opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a parameter is out of range, with the reason
    #[error("{0}")]
    Invalid(String),
    /// not enough memory
    #[error("not enough memory: {0}")]
    NoMemory(String),
    /// the device or its base does not exist
    #[error("no such device: {0}")]
    NoDevice(String),
    /// in use
    #[error("busy: {0}")]
    Busy(String),
    /// the operation is not supported on this device
    #[error("not supported: {0}")]
    Unsupported(String),
    /// a system call failed, with what it was about
    #[error("{what}: {source}")]
    System {
        /// The thing, such as a file name.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// The errno that SPDK's RPC answers with, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid(_) => libc::EINVAL,
            Self::NoMemory(_) => libc::ENOMEM,
            Self::NoDevice(_) => libc::ENODEV,
            Self::Busy(_) => libc::EBUSY,
            Self::Unsupported(_) => libc::EOPNOTSUPP,
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}
