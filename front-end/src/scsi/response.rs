//! The answer to a command (`struct virtio_scsi_req_cmd`, device-writable part).

/// Bytes of the sense data in a response: the default of `sense_size`.
pub const SENSE_BYTES: usize = 96;
/// Bytes of a response.
pub(crate) const RESPONSE_BYTES: u32 = 108;
/// Memory that the device has not written: no response begins with it.
pub(super) const UNWRITTEN: u8 = 0xee;

/// Values of [`Response::response`], and of the answer to a task management function.
pub mod code {
    /// Also FUNCTION_COMPLETE.
    pub const OK: u8 = 0;
    /// The command wanted more data than its buffers hold.
    pub const OVERRUN: u8 = 1;
    /// The command was ended by a task management function.
    pub const ABORTED: u8 = 2;
    /// There is no such target.
    pub const BAD_TARGET: u8 = 3;
    /// The command was ended by a reset.
    pub const RESET: u8 = 4;
    /// The command may be sent again.
    pub const BUSY: u8 = 5;
    /// Any other failure.
    pub const FAILURE: u8 = 9;
    /// FUNCTION_SUCCEEDED: there is such a command.
    pub const SUCCEEDED: u8 = 10;
    /// FUNCTION_REJECTED: the function is not supported.
    pub const REJECTED: u8 = 11;
    /// INCORRECT_LUN: the target has no such logical unit.
    pub const INCORRECT_LUN: u8 = 12;
    /// The device has written no answer. Not of the specification.
    pub const UNWRITTEN: u8 = super::UNWRITTEN;
}

/// The answer to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The number of valid bytes of sense data.
    pub sense_len: u32,
    /// The number of bytes of the data buffers that were not transferred.
    pub residual: u32,
    /// The status qualifier of SAM.
    pub status_qualifier: u16,
    /// The status of SAM: 0 GOOD, 2 CHECK CONDITION, 8 BUSY, 0x18 RESERVATION CONFLICT.
    pub status: u8,
    /// One of [`code`].
    pub response: u8,
    /// The sense data.
    pub sense: [u8; SENSE_BYTES],
}

impl Response {
    /// Decodes a response.
    #[must_use]
    pub fn of(bytes: &[u8; RESPONSE_BYTES as usize]) -> Self {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        Self {
            sense_len: word(0),
            residual: word(4),
            status_qualifier: u16::from_le_bytes([bytes[8], bytes[9]]),
            status: bytes[10],
            response: bytes[11],
            sense: std::array::from_fn(|n| bytes[12 + n]),
        }
    }

    /// Returns whether the device has written the response.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.response != code::UNWRITTEN
    }

    /// Returns whether the command has succeeded, with or without a residual.
    #[must_use]
    pub fn is_good(&self) -> bool {
        (self.response, self.status, self.sense_len) == (code::OK, 0, 0)
    }

    /// Returns the sense key, the additional sense code and its qualifier, of either format.
    /// `None`: there is no sense data.
    #[must_use]
    pub fn sense(&self) -> Option<(u8, u8, u8)> {
        let sense = &self.sense;
        match sense[0] & 0x7f {
            _ if self.sense_len < 8 => None,
            0x70 if self.sense_len >= 14 => Some((sense[2] & 0xf, sense[12], sense[13])),
            0x72 => Some((sense[1] & 0xf, sense[2], sense[3])),
            _ => None,
        }
    }

    /// Returns the INFORMATION field of fixed-format sense data, if it is valid.
    #[must_use]
    pub fn information(&self) -> Option<u32> {
        let [first, _, _, a, b, c, d, ..] = self.sense;
        (self.sense_len >= 14 && first == 0xf0).then(|| u32::from_be_bytes([a, b, c, d]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let mut bytes = [0; RESPONSE_BYTES as usize];
        bytes[..12].copy_from_slice(&[18, 0, 0, 0, 0, 2, 0, 0, 7, 1, 2, 0]);
        bytes[12..30]
            .copy_from_slice(&[0xf0, 0, 0x15, 0, 0, 1, 2, 10, 0, 0, 0, 0, 0x24, 3, 0, 0, 0, 0]);
        let response = Response::of(&bytes);
        assert_eq!((response.residual, response.status_qualifier), (512, 0x107));
        assert_eq!((response.response, response.status), (code::OK, 2));
        assert_eq!(response.sense(), Some((5, 0x24, 3)));
        assert_eq!(response.information(), Some(0x102));
        assert!(!response.is_good());
        bytes[0] = 8;
        bytes[12..16].copy_from_slice(&[0x72, 6, 0x29, 1]);
        assert_eq!(Response::of(&bytes).sense(), Some((6, 0x29, 1)));
        bytes[0] = 0;
        assert_eq!(Response::of(&bytes).sense(), None);
    }
}
