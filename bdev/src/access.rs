//! What a file is opened for.

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// A disk that is written.
    ReadWrite,
    /// A disk that is only read.
    ReadOnly,
    /// The block device of an NVMe namespace, `/dev/nvmeXnY`, that nobody else mounts or opens like
    /// this (`O_EXCL`).
    Exclusive,
    /// A device of the kernel's NVMe driver, or an attribute that controls it: see
    /// [`is_nvme_control`](crate::is_nvme_control).
    NvmeControl,
    /// The data of Identify Controller of such a device: what is opened is a pipe with the data.
    NvmeController,
    /// The data of Identify Namespace, of the character device of a namespace, `/dev/ngXnY`; the
    /// same.
    NvmeNamespace,
    /// The log page SMART / Health Information of a controller; the same.
    NvmeHealth,
}

impl Access {
    /// Returns the value with this number, if the sandbox allows it.
    #[must_use]
    pub fn in_sandbox(number: u8) -> Option<Self> {
        use Access::*;
        let all = [ReadWrite, ReadOnly, Exclusive];
        all.into_iter().find(|access| *access as u8 == number)
    }

    /// Returns whether the sandbox allows it: it reaches no more than one disk. The others reach a
    /// whole controller, or make a connection.
    #[must_use]
    pub fn is_in_sandbox(self) -> bool {
        Self::in_sandbox(self as u8).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sandbox_allows_disks_only() {
        use Access::*;
        for access in [ReadWrite, ReadOnly, Exclusive] {
            assert_eq!(Access::in_sandbox(access as u8), Some(access));
        }
        for access in [NvmeControl, NvmeController, NvmeNamespace, NvmeHealth] {
            assert!(!access.is_in_sandbox());
        }
        assert_eq!(Access::in_sandbox(7), None);
    }
}
