//! INQUIRY: standard data and vital product data.

use crate::facts::{Facts, Port, UNMAP_DESCRIPTORS_MAX, Unmap};
use crate::reply::Reply;
use crate::sense::Sense;

/// VERSION: SPC-4. SPDK's disks say SPC-3, without the commands of either.
const VERSION: u8 = 0x06;
/// Bytes of standard data, as of SPDK's.
const STANDARD_BYTES: usize = 96;
/// Version descriptors (SPC-4): SAM-5, SPC-4, SBC-3. Block Limits of 64 bytes need the
/// last.
const VERSIONS: [u16; 3] = [0x00a0, 0x0460, 0x04c0];

/// Page codes (SPC-4 and SBC-3, vital product data).
mod page {
    pub(super) const SUPPORTED: u8 = 0x00;
    pub(super) const SERIAL: u8 = 0x80;
    pub(super) const IDENTIFICATION: u8 = 0x83;
    pub(super) const NETWORK: u8 = 0x85;
    pub(super) const EXTENDED: u8 = 0x86;
    pub(super) const MODE_POLICY: u8 = 0x87;
    pub(super) const PORTS: u8 = 0x88;
    pub(super) const BLOCK_LIMITS: u8 = 0xb0;
    pub(super) const CHARACTERISTICS: u8 = 0xb1;
    pub(super) const PROVISIONING: u8 = 0xb2;
}

/// Standard data (SPC-4, INQUIRY), or a page of vital product data.
pub(crate) fn inquiry(
    facts: &Facts,
    port: Port,
    vital: bool,
    page: u8,
    reply: &mut Reply,
) -> Result<(), Sense> {
    if vital {
        return vital_data(facts, port, page, reply);
    }
    if page != 0 {
        return Err(Sense::in_cdb(2, None));
    }
    // HISUP and response data format 2; 3PC; MULTIP; CMDQUE. SPDK's disks have no 3PC.
    reply.put(&[0, 0, VERSION, 0x12, 0, 0x08, 0x10, 0x02]);
    reply.put(&facts.identity.vendor);
    reply.put(&facts.identity.product);
    reply.put(&facts.identity.revision);
    reply.put_padded(std::iter::empty(), 20, b' ');
    reply.put(&[0, 0]);
    VERSIONS.iter().for_each(|version| reply.put(&version.to_be_bytes()));
    reply.pad_to(STANDARD_BYTES);
    reply.set(4, &[u8::try_from(STANDARD_BYTES - 5).unwrap_or(0)]);
    Ok(())
}

/// Standard data of a logical unit that does not exist: qualifier 011b and type 1Fh, 36 bytes
/// (SPC-4, INQUIRY).
pub(crate) fn absent(reply: &mut Reply) {
    reply.put(&[0x7f, 0, VERSION, 0x12, 31]);
    reply.pad_to(36);
}

/// SPC-4, vital product data parameters.
fn vital_data(facts: &Facts, port: Port, page: u8, reply: &mut Reply) -> Result<(), Sense> {
    reply.put(&[0, page, 0, 0]);
    match (page, facts.unmap) {
        (page::SUPPORTED, unmap) => {
            reply.put(&[page::SUPPORTED, page::SERIAL, page::IDENTIFICATION, page::NETWORK]);
            reply.put(&[page::EXTENDED, page::MODE_POLICY, page::PORTS]);
            reply.put(&[page::BLOCK_LIMITS, page::CHARACTERISTICS]);
            if unmap.is_some() {
                reply.put(&[page::PROVISIONING]);
            }
        }
        (page::SERIAL, _) => facts.identity.serial().for_each(|byte| reply.put(&[byte])),
        (page::IDENTIFICATION, _) => identification(facts, port, reply),
        // Management Network Addresses: none.
        (page::NETWORK, _) => {}
        (page::EXTENDED, _) => {
            // HEADSUP and SIMPSUP (SPC-4, Extended INQUIRY Data).
            reply.put(&[0, 0x05]);
            reply.pad_to(64);
        }
        // Mode Page Policy: all pages and subpages are shared by all nexuses.
        (page::MODE_POLICY, _) => reply.put(&[0x3f, 0xff, 0, 0]),
        (page::PORTS, _) => ports(port, reply),
        (page::BLOCK_LIMITS, _) => block_limits(facts, reply),
        (page::CHARACTERISTICS, _) => {
            reply.put(&facts.rotation.to_be_bytes());
            reply.pad_to(64);
        }
        (page::PROVISIONING, Some(Unmap { zeroes, .. })) => {
            // SBC-3: LBPU, LBPWS, LBPWS10 and LBPRZ; thin provisioning.
            reply.put(&[0, 0xe0 | if zeroes { 0x04 } else { 0 }, 2, 0]);
        }
        _ => return Err(Sense::in_cdb(2, None)),
    }
    let length = u16::try_from(reply.len().saturating_sub(4)).unwrap_or(u16::MAX);
    reply.set(2, &length.to_be_bytes());
    Ok(())
}

/// The association of a designator (SPC-4, Device Identification), shifted to its place.
mod of {
    pub(super) const UNIT: u8 = 0x00;
    pub(super) const PORT: u8 = 0x10;
    pub(super) const DEVICE: u8 = 0x20;
}

/// The designators of SPDK's disks, byte for byte: guests' names of disks are
/// made of them. Each has PIV set, and protocol identifier 6 (SAS).
fn identification(facts: &Facts, port: Port, reply: &mut Reply) {
    const BINARY: u8 = 0x61;
    const ASCII: u8 = 0x62;
    const UTF8: u8 = 0x63;
    const PIV: u8 = 0x80;
    let identity = &facts.identity;
    reply.put(&[BINARY, PIV | of::UNIT | 3, 0, 8]);
    reply.put(&identity.naa.to_be_bytes());
    reply.put(&[ASCII, PIV | of::UNIT | 1, 0, 56]);
    reply.put(&identity.vendor);
    reply.put(&identity.product);
    reply.put_padded(identity.name(), 32, b' ');
    // "Target N", and a NUL, padded to 12 bytes.
    let [hundreds, tens, ones] =
        [port.target / 100, port.target / 10 % 10, port.target % 10].map(|d| b'0' + d);
    let name = b"Target "
        .iter()
        .copied()
        .chain((port.target >= 100).then_some(hundreds))
        .chain((port.target >= 10).then_some(tens))
        .chain([ones]);
    reply.put(&[UTF8, PIV | of::DEVICE | 8, 0, 12]);
    reply.put_padded(name, 12, 0);
    reply.put(&[UTF8, PIV | of::PORT | 8, 0, 5]);
    reply.put(b"vhost");
    let [high, low] = port.relative.to_be_bytes();
    reply.put(&[BINARY, PIV | of::PORT | 4, 0, 4, 0, 0, high, low]);
    reply.put(&[BINARY, PIV | of::PORT | 5, 0, 4, 0, 0, 0, 0]);
    let [high, low] = port.group.to_be_bytes();
    reply.put(&[BINARY, PIV | of::UNIT | 6, 0, 4, 0, 0, high, low]);
}

/// SPC-4, SCSI Ports: the port through which the command came, byte for byte as SPDK has it. It
/// names protocol identifier 5 (iSCSI) here.
fn ports(port: Port, reply: &mut Reply) {
    let [high, low] = port.relative.to_be_bytes();
    // No initiator port; nine bytes of target port descriptors.
    reply.put(&[0, 0, high, low, 0, 0, 0, 0, 0, 0, 0, 9]);
    reply.put(&[0x53, 0x98, 0, 5]);
    reply.put(b"vhost");
}

/// SBC-3, Block Limits. WSNZ is 0: a WRITE SAME of 0 blocks goes to the end.
fn block_limits(facts: &Facts, reply: &mut Reply) {
    reply.put(&[0, facts.compare_blocks_max]);
    reply.put(&facts.granularity_blocks.to_be_bytes());
    reply.put(&facts.transfer_blocks_max.to_be_bytes());
    reply.put(&facts.transfer_blocks_optimal.to_be_bytes());
    // MAXIMUM PREFETCH LENGTH.
    reply.put(&[0; 4]);
    if let Some(unmap) = facts.unmap {
        reply.put(&unmap.blocks_max.to_be_bytes());
        let descriptors = unmap.descriptors_max.min(UNMAP_DESCRIPTORS_MAX);
        reply.put(&u32::from(descriptors).to_be_bytes());
        reply.put(&unmap.granularity_blocks.to_be_bytes());
        // UGAVALID and UNMAP GRANULARITY ALIGNMENT.
        let valid = if unmap.granularity_blocks != 0 { 1 << 31 } else { 0 };
        reply.put(&(valid | unmap.alignment_blocks & 0x7fff_ffff).to_be_bytes());
    } else {
        reply.put(&[0; 16]);
    }
    reply.put(&facts.write_same_blocks_max.to_be_bytes());
    reply.pad_to(64);
}
