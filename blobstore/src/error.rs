//! What an operation on a blobstore can fail with.

use thiserror::Error;

/// An I/O error of the device below a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("I/O error of the device: errno {errno}")]
pub struct DeviceError {
    /// A positive errno.
    pub errno: i32,
}

/// Why an operation failed. The texts are for operators.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The super block is not one, or contradicts itself or the device.
    #[error("no valid blobstore: {0}")]
    NotAStore(&'static str),
    /// The store was made for another use: its type differs.
    #[error("the blobstore has another type")]
    OtherType,
    /// The name, or the relation, exists already.
    #[error("already exists")]
    Exists,
    /// There is no blob of this number or name.
    #[error("no such blob")]
    NotFound,
    /// A parameter is out of range, or the blob is of the wrong kind.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// Clusters, metadata pages, or the room of a mask are used up.
    #[error("no space left: {0}")]
    NoSpace(&'static str),
    /// The state of the blob forbids it.
    #[error("not permitted: {0}")]
    NotPermitted(&'static str),
    /// Claims of clusters are outstanding.
    #[error("claims of clusters are outstanding")]
    Busy,
    /// The map has changed since the claim was made. Claim again.
    #[error("the map has changed since the claim")]
    Stale,
    /// The store was opened for reading only.
    #[error("the store was opened read-only")]
    ReadOnly,
    /// An earlier change failed or was stopped half-way: load the store again.
    #[error("an earlier change of the metadata failed: the store must be loaded again")]
    Failed,
}

impl Error {
    /// The positive errno with which SPDK reports this.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Device(error) => error.errno,
            Self::NotAStore(_) => 84,
            Self::OtherType => 6,
            Self::Exists => 17,
            Self::NotFound => 2,
            Self::Invalid(_) => 22,
            Self::NoSpace(_) => 28,
            Self::NotPermitted(_) => 1,
            Self::Busy => 16,
            Self::Stale => 11,
            Self::ReadOnly => 30,
            Self::Failed => 5,
        }
    }
}

/// The result of an operation on a store.
pub type Result<T> = std::result::Result<T, Error>;
