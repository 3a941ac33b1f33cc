//! SPDK's superblock, at byte 0 of every member.

use uuid::Uuid;

use crate::level::Level;

/// Bytes before the table of members.
pub(crate) const HEADER: usize = 256;
/// Bytes of a member's entry.
const ENTRY: usize = 64;
/// The bytes before a member's data.
pub(crate) const RESERVED: u64 = 1 << 20;
/// The longest name of an array.
pub(crate) const NAME_MAX: usize = 63;
/// The largest sequence number. Each change adds one, so a larger number is forged. The rest is
/// room to count on.
pub(crate) const SEQ_MAX: u64 = 1 << 63;

const SIGNATURE: &[u8; 8] = b"SPDKRAID";
const CRC: std::ops::Range<usize> = 16..20;

/// The state of a member in a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberState {
    Missing,
    Configured,
    Failed,
    Spare,
}

/// A member in a superblock. Sizes are in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SuperMember {
    pub(crate) uuid: Uuid,
    pub(crate) data_offset: u64,
    pub(crate) data_size: u64,
    pub(crate) state: MemberState,
    pub(crate) slot: u8,
}

/// A superblock. Sizes are in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    pub(crate) raid_size: u64,
    pub(crate) block_size: u32,
    pub(crate) level: Level,
    pub(crate) strip_size: u32,
    pub(crate) seq_number: u64,
    pub(crate) num_base_bdevs: u8,
    pub(crate) members: Vec<SuperMember>,
}

/// What the first bytes of a bdev are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Not a superblock.
    None,
    /// A superblock that is not used, with the reason.
    Invalid(&'static str),
    Valid(Superblock),
}

impl Superblock {
    /// Bytes of an encoded superblock.
    pub(crate) fn len(members: usize) -> usize {
        HEADER + members * ENTRY
    }

    /// The entry of a slot.
    pub(crate) fn member(&self, slot: usize) -> Option<&SuperMember> {
        self.members.iter().find(|member| usize::from(member.slot) == slot)
    }

    /// Returns the bytes, filled with zeroes to a multiple of the block size.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let len = Self::len(self.members.len());
        let block = usize::try_from(self.block_size).unwrap_or(1).max(1);
        let mut bytes = vec![0; len.next_multiple_of(block)];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, SIGNATURE);
        put(8, &1_u16.to_le_bytes());
        put(12, &u32::try_from(len).unwrap_or(0).to_le_bytes());
        put(24, self.uuid.as_bytes());
        put(40, &self.name.as_bytes()[..self.name.len().min(NAME_MAX)]);
        put(104, &self.raid_size.to_le_bytes());
        put(112, &self.block_size.to_le_bytes());
        put(116, &self.level.number().to_le_bytes());
        put(120, &self.strip_size.to_le_bytes());
        put(128, &self.seq_number.to_le_bytes());
        put(136, &[self.num_base_bdevs]);
        put(255, &[u8::try_from(self.members.len()).unwrap_or(u8::MAX)]);
        for (n, member) in self.members.iter().enumerate() {
            let at = HEADER + n * ENTRY;
            put(at, member.uuid.as_bytes());
            put(at + 16, &member.data_offset.to_le_bytes());
            put(at + 24, &member.data_size.to_le_bytes());
            put(at + 32, &(member.state as u32).to_le_bytes());
            put(at + 40, &[member.slot]);
        }
        let crc = checksum(&bytes[..len]);
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a superblock of a bdev with blocks of `block_size`.
    pub(crate) fn parse(bytes: &[u8], block_size: u32) -> Parsed {
        if bytes.get(..8) != Some(SIGNATURE) || bytes.len() < HEADER {
            return Parsed::None;
        }
        match Self::checked(bytes, block_size) {
            Ok(superblock) => Parsed::Valid(superblock),
            Err(reason) => Parsed::Invalid(reason),
        }
    }

    fn checked(bytes: &[u8], block_size: u32) -> Result<Self, &'static str> {
        let len = usize::try_from(u32_at(bytes, 12)).unwrap_or(usize::MAX);
        let count = usize::from(bytes[255]);
        if len != Self::len(count) || len > bytes.len() {
            return Err("its length is out of range");
        }
        if checksum(&bytes[..len]) != u32_at(bytes, CRC.start) {
            return Err("its checksum is wrong");
        }
        if u16::from_le_bytes([bytes[8], bytes[9]]) != 1 {
            return Err("its version is not known");
        }
        if u32_at(bytes, 112) != block_size {
            return Err("it is for another block size");
        }
        let level = Level::of_number(u32_at(bytes, 116)).ok_or("its level is not known")?;
        let name = &bytes[40..40 + NAME_MAX];
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| "its name is not UTF-8")?;
        let members = (0..count).map(|n| member_at(&bytes[HEADER + n * ENTRY..]));
        let superblock = Self {
            uuid: uuid_at(bytes, 24),
            name: name.to_owned(),
            raid_size: u64_at(bytes, 104),
            block_size,
            level,
            strip_size: u32_at(bytes, 120),
            seq_number: u64_at(bytes, 128),
            num_base_bdevs: bytes[136],
            members: members.collect::<Result<_, _>>()?,
        };
        superblock.check()?;
        Ok(superblock)
    }

    /// Checks what assembly relies on: a forged superblock must not lead to an access out of range.
    fn check(&self) -> Result<(), &'static str> {
        let slots = usize::from(self.num_base_bdevs);
        if self.name.is_empty() || self.uuid.is_nil() {
            return Err("it has no name or no UUID");
        }
        let range = self.level.members_min()..=self.level.members_max();
        if !range.contains(&slots) || self.members.len() != slots {
            return Err("its number of members is out of range");
        }
        if self.seq_number > SEQ_MAX {
            return Err("its sequence number is out of range");
        }
        let striped = self.level != Level::Raid1;
        if striped != self.strip_size.is_power_of_two() || (!striped && self.strip_size != 0) {
            return Err("its strip size is not valid");
        }
        let strip = u64::from(self.strip_size).saturating_mul(self.block_size.into());
        if strip > self.level.strip_max() {
            return Err("its strips are too large");
        }
        if (0..slots).any(|slot| self.member(slot).is_none()) {
            return Err("its slots are not valid");
        }
        Ok(())
    }
}

fn member_at(entry: &[u8]) -> Result<SuperMember, &'static str> {
    let state = match u32_at(entry, 32) {
        0 => MemberState::Missing,
        1 => MemberState::Configured,
        2 => MemberState::Failed,
        3 => MemberState::Spare,
        _ => return Err("a member's state is not known"),
    };
    Ok(SuperMember {
        uuid: uuid_at(entry, 0),
        data_offset: u64_at(entry, 16),
        data_size: u64_at(entry, 24),
        state,
        slot: entry[40],
    })
}

/// CRC32C as SPDK computes it here: from 0, without a final inversion, with the field as 0.
fn checksum(bytes: &[u8]) -> u32 {
    let [before, after] = [&bytes[..CRC.start], &bytes[CRC.end..]];
    // The crate inverts before and after.
    [before, &[0; 4], after].iter().fold(0, |crc, part| !crc32c::crc32c_append(!crc, part))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_slice(&bytes[at..at + 16]).unwrap_or_default()
}

#[cfg(test)]
mod tests;
