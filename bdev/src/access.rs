//! What a file is opened for.

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Access {
    /// A disk that is written.
    ReadWrite,
    /// A disk that is only read.
    ReadOnly,
    /// A block device that nobody else mounts or opens like this (`O_EXCL`).
    Exclusive,
    /// A device of the kernel's NVMe driver, or an attribute that controls it: see
    /// [`is_nvme_control`](crate::is_nvme_control).
    NvmeControl,
    /// The data of Identify Controller of such a device: what is opened is a pipe with the data.
    NvmeController,
    /// The data of Identify Namespace, of the character device of a namespace; the same.
    NvmeNamespace,
    /// The log page SMART / Health Information of a controller; the same.
    NvmeHealth,
}

impl Access {
    /// Returns the value with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        use Access::*;
        let all = [
            ReadWrite,
            ReadOnly,
            Exclusive,
            NvmeControl,
            NvmeController,
            NvmeNamespace,
            NvmeHealth,
        ];
        all.into_iter().find(|access| *access as u8 == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_access_has_a_number() {
        for number in 0..7 {
            assert_eq!(Access::from_number(number).map(|access| access as u8), Some(number));
        }
        assert_eq!(Access::from_number(7), None);
    }
}
