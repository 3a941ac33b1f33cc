//! The reasons for which a device could not be created, opened or changed.

/// The reason for which a device could not be created, opened or changed.
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
    /// the device is in use
    #[error("busy: {0}")]
    Busy(String),
    /// the operation is not supported on this device
    #[error("not supported: {0}")]
    Unsupported(String),
    /// a system call failed
    #[error("{what}: {source}")]
    System {
        /// The object, such as a file name.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Error {
    /// Makes the error of a system call, or of what reports errors as system calls do. `errno` is
    /// positive.
    #[must_use]
    pub fn of_errno(what: impl Into<String>, errno: i32) -> Self {
        Self::System { what: what.into(), source: std::io::Error::from_raw_os_error(errno) }
    }

    /// Returns the positive errno that SPDK's RPC returns for this error.
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
