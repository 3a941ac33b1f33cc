//! Status codes and sense data (SAM-5 and SPC-4).

/// The status of a command (SAM-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Success.
    Good = 0x00,
    /// Failure; sense data says why.
    CheckCondition = 0x02,
    /// The logical unit cannot take the command now.
    Busy = 0x08,
    /// A reservation of another nexus forbids the command.
    ReservationConflict = 0x18,
    /// The command was aborted through another nexus.
    TaskAborted = 0x40,
}

/// The sense key (SPC-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Key {
    /// Nothing to report.
    NoSense = 0x0,
    /// The logical unit is not ready.
    NotReady = 0x2,
    /// The medium failed.
    MediumError = 0x3,
    /// The device failed.
    HardwareError = 0x4,
    /// The command is invalid.
    IllegalRequest = 0x5,
    /// Something has changed that the initiator must know.
    UnitAttention = 0x6,
    /// The medium is write-protected.
    DataProtect = 0x7,
    /// EXTENDED COPY failed at a copy source or destination.
    CopyAborted = 0xa,
    /// The command was aborted; it may be repeated.
    AbortedCommand = 0xb,
    /// The data is not what was expected.
    Miscompare = 0xe,
}

/// An additional sense code and its qualifier (SPC-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u8, pub u8);

impl Code {
    /// NO ADDITIONAL SENSE INFORMATION
    pub const NONE: Self = Self(0x00, 0x00);
    /// LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED
    pub const INITIALIZING_COMMAND_REQUIRED: Self = Self(0x04, 0x02);
    /// UNREACHABLE COPY TARGET
    pub const UNREACHABLE_COPY_TARGET: Self = Self(0x08, 0x04);
    /// WRITE ERROR
    pub const WRITE_ERROR: Self = Self(0x0c, 0x00);
    /// THIRD PARTY DEVICE FAILURE
    pub const THIRD_PARTY_DEVICE_FAILURE: Self = Self(0x0d, 0x01);
    /// COPY TARGET DEVICE NOT REACHABLE
    pub const COPY_TARGET_NOT_REACHABLE: Self = Self(0x0d, 0x02);
    /// UNRECOVERED READ ERROR
    pub const UNRECOVERED_READ_ERROR: Self = Self(0x11, 0x00);
    /// PARAMETER LIST LENGTH ERROR
    pub const PARAMETER_LIST_LENGTH_ERROR: Self = Self(0x1a, 0x00);
    /// MISCOMPARE DURING VERIFY OPERATION
    pub const MISCOMPARE_DURING_VERIFY: Self = Self(0x1d, 0x00);
    /// INVALID COMMAND OPERATION CODE
    pub const INVALID_OPERATION_CODE: Self = Self(0x20, 0x00);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE
    pub const LBA_OUT_OF_RANGE: Self = Self(0x21, 0x00);
    /// INVALID FIELD IN CDB
    pub const INVALID_FIELD_IN_CDB: Self = Self(0x24, 0x00);
    /// LOGICAL UNIT NOT SUPPORTED
    pub const LOGICAL_UNIT_NOT_SUPPORTED: Self = Self(0x25, 0x00);
    /// INVALID FIELD IN PARAMETER LIST
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = Self(0x26, 0x00);
    /// INVALID RELEASE OF PERSISTENT RESERVATION
    pub const INVALID_RELEASE: Self = Self(0x26, 0x04);
    /// TOO MANY TARGET DESCRIPTORS
    pub const TOO_MANY_TARGET_DESCRIPTORS: Self = Self(0x26, 0x06);
    /// UNSUPPORTED TARGET DESCRIPTOR TYPE CODE
    pub const UNSUPPORTED_TARGET_DESCRIPTOR_TYPE: Self = Self(0x26, 0x07);
    /// TOO MANY SEGMENT DESCRIPTORS
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: Self = Self(0x26, 0x08);
    /// UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE: Self = Self(0x26, 0x09);
    /// INLINE DATA LENGTH EXCEEDED
    pub const INLINE_DATA_LENGTH_EXCEEDED: Self = Self(0x26, 0x0b);
    /// WRITE PROTECTED
    pub const WRITE_PROTECTED: Self = Self(0x27, 0x00);
    /// SPACE ALLOCATION FAILED WRITE PROTECT
    pub const SPACE_ALLOCATION_FAILED: Self = Self(0x27, 0x07);
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
    pub const POWER_ON: Self = Self(0x29, 0x00);
    /// BUS DEVICE RESET FUNCTION OCCURRED
    pub const BUS_DEVICE_RESET: Self = Self(0x29, 0x03);
    /// I_T NEXUS LOSS OCCURRED
    pub const NEXUS_LOSS: Self = Self(0x29, 0x07);
    /// MODE PARAMETERS CHANGED
    pub const MODE_PARAMETERS_CHANGED: Self = Self(0x2a, 0x01);
    /// RESERVATIONS PREEMPTED
    pub const RESERVATIONS_PREEMPTED: Self = Self(0x2a, 0x03);
    /// RESERVATIONS RELEASED
    pub const RESERVATIONS_RELEASED: Self = Self(0x2a, 0x04);
    /// REGISTRATIONS PREEMPTED
    pub const REGISTRATIONS_PREEMPTED: Self = Self(0x2a, 0x05);
    /// CAPACITY DATA HAS CHANGED
    pub const CAPACITY_CHANGED: Self = Self(0x2a, 0x09);
    /// COMMANDS CLEARED BY ANOTHER INITIATOR
    pub const COMMANDS_CLEARED: Self = Self(0x2f, 0x00);
    /// SAVING PARAMETERS NOT SUPPORTED
    pub const SAVING_NOT_SUPPORTED: Self = Self(0x39, 0x00);
    /// REPORTED LUNS DATA HAS CHANGED
    pub const REPORTED_LUNS_CHANGED: Self = Self(0x3f, 0x0e);
    /// INTERNAL TARGET FAILURE
    pub const INTERNAL_TARGET_FAILURE: Self = Self(0x44, 0x00);
    /// INSUFFICIENT REGISTRATION RESOURCES
    pub const INSUFFICIENT_REGISTRATION_RESOURCES: Self = Self(0x55, 0x04);
}

/// The field at fault: the sense-key specific data of ILLEGAL REQUEST (SPC-4, field pointer
/// sense key specific data).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The field is in the CDB, not in the parameter list.
    pub in_cdb: bool,
    /// The byte where it begins.
    pub byte: u16,
    /// Its most significant bit in that byte, if the field is not a whole number of bytes.
    pub bit: Option<u8>,
}

/// Which of the two formats sense data has: the D_SENSE bit, or the DESC bit of REQUEST SENSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Fixed format (SPC-4).
    Fixed,
    /// Descriptor format (SPC-4).
    Descriptor,
}

/// Sense data, before it has a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// The sense key.
    pub key: Key,
    /// The additional sense code.
    pub code: Code,
    /// The INFORMATION field: an LBA, or the offset of a difference.
    pub information: Option<u64>,
    /// The field at fault.
    pub field: Option<Field>,
}

/// Bytes of the longest sense data that [`Sense::encode`] writes.
pub const SENSE_BYTES_MAX: usize = 28;

/// Bytes of fixed format sense data (SPC-4: additional length 10).
const FIXED_BYTES: usize = 18;

impl Sense {
    /// Nothing to report.
    pub const NONE: Self = Self::new(Key::NoSense, Code::NONE);

    /// A key and a code, without more information.
    #[must_use]
    pub const fn new(key: Key, code: Code) -> Self {
        Self { key, code, information: None, field: None }
    }

    /// ILLEGAL REQUEST with this code.
    #[must_use]
    pub const fn illegal(code: Code) -> Self {
        Self::new(Key::IllegalRequest, code)
    }

    /// INVALID FIELD IN CDB: a field of whole bytes, or that whose most significant bit is given.
    #[must_use]
    pub const fn in_cdb(byte: u16, bit: Option<u8>) -> Self {
        Self::pointing(Code::INVALID_FIELD_IN_CDB, Field { in_cdb: true, byte, bit })
    }

    /// INVALID FIELD IN PARAMETER LIST.
    #[must_use]
    pub const fn in_list(byte: u16, bit: Option<u8>) -> Self {
        Self::pointing(Code::INVALID_FIELD_IN_PARAMETER_LIST, Field { in_cdb: false, byte, bit })
    }

    const fn pointing(code: Code, field: Field) -> Self {
        Self { field: Some(field), ..Self::illegal(code) }
    }

    /// The same, with an INFORMATION field.
    #[must_use]
    pub const fn with_information(self, information: u64) -> Self {
        Self { information: Some(information), ..self }
    }

    /// Writes the sense data to `buffer`, as much of it as fits. Returns the number of bytes
    /// written.
    pub fn encode(&self, format: Format, buffer: &mut [u8]) -> usize {
        let mut bytes = [0; SENSE_BYTES_MAX];
        let len = match format {
            Format::Fixed => self.fixed(&mut bytes),
            Format::Descriptor => self.descriptors(&mut bytes),
        };
        let mut written = 0;
        for (to, from) in buffer.iter_mut().zip(bytes).take(len) {
            *to = from;
            written += 1;
        }
        written
    }

    /// SPC-4, fixed format. The INFORMATION field has 32 bits: VALID is zero if the value needs
    /// more.
    fn fixed(&self, bytes: &mut [u8; SENSE_BYTES_MAX]) -> usize {
        bytes[0] = 0x70;
        bytes[2] = self.key as u8;
        if let Some(Ok(information)) = self.information.map(u32::try_from) {
            bytes[0] |= 0x80;
            [bytes[3], bytes[4], bytes[5], bytes[6]] = information.to_be_bytes();
        }
        bytes[7] = 10;
        [bytes[12], bytes[13]] = [self.code.0, self.code.1];
        [bytes[15], bytes[16], bytes[17]] = self.key_specific();
        FIXED_BYTES
    }

    /// SPC-4, descriptor format. The descriptors are information (type 0) and sense-key specific
    /// (type 2).
    fn descriptors(&self, bytes: &mut [u8; SENSE_BYTES_MAX]) -> usize {
        let mut list = arrayvec::ArrayVec::<u8, 20>::new();
        if let Some(information) = self.information {
            list.extend([0x00, 0x0a, 0x80, 0x00].into_iter().chain(information.to_be_bytes()));
        }
        if self.field.is_some() {
            let [a, b, c] = self.key_specific();
            list.extend([0x02, 0x06, 0, 0, a, b, c, 0]);
        }
        let header = [0x72, self.key as u8, self.code.0, self.code.1, 0, 0, 0, 0];
        let mut len = 0;
        for (to, from) in bytes.iter_mut().zip(header.iter().chain(&list)) {
            *to = *from;
            len += 1;
        }
        bytes[7] = u8::try_from(list.len()).unwrap_or(0);
        len
    }

    /// The field pointer: SKSV, C/D, BPV, bit pointer, field pointer. Zero if there is none.
    fn key_specific(&self) -> [u8; 3] {
        let Some(field) = self.field else { return [0; 3] };
        let [high, low] = field.byte.to_be_bytes();
        let bit = field.bit.map_or(0, |bit| 0x08 | bit & 7);
        [0x80 | if field.in_cdb { 0x40 } else { 0 } | bit, high, low]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(sense: Sense, format: Format) -> Vec<u8> {
        let mut bytes = [0xff; 96];
        let len = sense.encode(format, &mut bytes);
        assert!(bytes[len..].iter().all(|byte| *byte == 0xff));
        bytes[..len].to_vec()
    }

    #[test]
    fn a_field_pointer_is_in_both_formats() {
        let sense = Sense::in_cdb(1, Some(4));
        let fixed = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcc, 0, 1];
        assert_eq!(encoded(sense, Format::Fixed), fixed);
        let descriptor = [0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xcc, 0, 1, 0];
        assert_eq!(encoded(sense, Format::Descriptor), descriptor);
        let list = Sense::in_list(0x123, None);
        assert_eq!(encoded(list, Format::Fixed)[12..], [0x26, 0, 0, 0x80, 1, 0x23]);
    }

    #[test]
    fn information_beyond_32_bits_is_in_descriptor_format_only() {
        let sense = Sense::new(Key::MediumError, Code::UNRECOVERED_READ_ERROR);
        let small = encoded(sense.with_information(0x0102_0304), Format::Fixed);
        assert_eq!(small[..8], [0xf0, 0, 3, 1, 2, 3, 4, 10]);
        let large = sense.with_information(0x1_0000_0000);
        assert_eq!(encoded(large, Format::Fixed)[..8], [0x70, 0, 3, 0, 0, 0, 0, 10]);
        let descriptor = [0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(encoded(large, Format::Descriptor), descriptor);
    }

    #[test]
    fn a_short_buffer_gets_what_fits() {
        let sense = Sense { information: Some(7), ..Sense::in_cdb(2, None) };
        for format in [Format::Fixed, Format::Descriptor] {
            let whole = encoded(sense, format);
            assert!(whole.len() <= SENSE_BYTES_MAX);
            for len in 0..=whole.len() {
                let mut buffer = vec![0xff; len];
                assert_eq!(sense.encode(format, &mut buffer), len);
                assert_eq!(buffer, whole[..len]);
            }
        }
    }
}
