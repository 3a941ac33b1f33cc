//! Mode pages (SPC-4 and SBC-3, mode parameters), MODE SENSE and MODE SELECT.

use crate::cdb::ModeQuery;
use crate::facts::Facts;
use crate::reply::Reply;
use crate::sense::{Code, Format, Sense};

/// Bytes of the longest page.
const PAGE_BYTES_MAX: usize = 32;
/// All pages.
const ALL_PAGES: u8 = 0x3f;
/// All subpages.
const ALL_SUBPAGES: u8 = 0xff;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
/// SPF, byte 0 of a page: it has a subpage code, and a header of four bytes (SPC-4).
const SPF: u8 = 0x40;

/// A page that there is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Page {
    /// PAGE CODE.
    code: u8,
    /// SUBPAGE CODE.
    subpage: u8,
    /// PAGE LENGTH.
    length: u8,
}

/// The pages of SPDK's disks, in their order, with SPDK's lengths. Those other than Caching and
/// Control are all zero: this disk has none of their functions, but guests may ask for them.
const PAGES: [Page; 9] = [
    // Read-Write Error Recovery, Disconnect-Reconnect, Verify Error Recovery.
    Page::new(0x01, 0, 10),
    Page::new(0x02, 0, 14),
    Page::new(0x07, 0, 10),
    Page::new(CACHING, 0, 18),
    Page::new(CONTROL, 0, 10),
    // Control Extension.
    Page::new(CONTROL, 1, 28),
    // XOR Control, Power Condition, Informational Exceptions Control.
    Page::new(0x10, 0, 22),
    Page::new(0x1a, 0, 10),
    Page::new(0x1c, 0, 10),
];

impl Page {
    const fn new(code: u8, subpage: u8, length: u8) -> Self {
        Self { code, subpage, length }
    }

    /// The first byte: SPF and PAGE CODE.
    const fn first(self) -> u8 {
        if self.subpage == 0 { self.code } else { self.code | SPF }
    }

    /// Bytes before those that PAGE LENGTH counts.
    const fn header(self) -> usize {
        if self.subpage == 0 { 2 } else { 4 }
    }

    /// Bytes of the page.
    fn bytes(self) -> usize {
        self.header() + usize::from(self.length)
    }

    /// Whether MODE SENSE asks for it (SPC-4, page code and subpage code usage).
    fn is_wanted(self, query: &ModeQuery) -> bool {
        (query.page == ALL_PAGES || query.page == self.code)
            && (query.subpage == ALL_SUBPAGES || query.subpage == self.subpage)
    }

    /// The page that begins a list of MODE SELECT, if it is known and has its length. PS is
    /// reserved there.
    fn of_list(list: &[u8], at: u16) -> Result<Self, Sense> {
        let too_short = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);
        let (first, subpage, length, length_at) = match list {
            [first, subpage, high, low, ..] if first & SPF != 0 => {
                (*first, *subpage, u16::from_be_bytes([*high, *low]), 2)
            }
            [first, length, ..] if first & SPF == 0 => (*first, 0, u16::from(*length), 1),
            _ => return Err(too_short),
        };
        let known = PAGES.iter().find(|page| page.first() == first && page.subpage == subpage);
        let page = known.ok_or(Sense::in_list(at, None))?;
        if u16::from(page.length) != length {
            return Err(Sense::in_list(at.saturating_add(length_at), None));
        }
        Ok(*page)
    }
}

/// WCE, byte 2 of the caching page (SBC-3, Caching mode page).
const WCE: u8 = 0x04;
/// D_SENSE, byte 2 of the control page (SPC-4, Control mode page).
const D_SENSE: u8 = 0x04;
/// QUEUE ALGORITHM MODIFIER, byte 3 of the control page: commands are reordered freely.
const UNRESTRICTED: u8 = 0x10;
/// SWP, byte 4 of the control page.
const SWP: u8 = 0x08;
/// TAS, byte 5 of the control page: a command that another nexus aborts ends with TASK ABORTED.
const TAS: u8 = 0x40;

/// Which values MODE SENSE returns: the PC field (SPC-4, MODE SENSE(6)).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    Changeable,
    Default,
}

/// The mode parameters that MODE SELECT can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Modes {
    /// WCE: the write cache, if the disk has one, is used.
    pub(crate) write_cache: bool,
    /// D_SENSE: sense data has descriptor format.
    pub(crate) descriptor: bool,
    /// SWP: nothing may be written.
    pub(crate) protected: bool,
}

impl Modes {
    pub(crate) fn new(facts: &Facts) -> Self {
        Self { write_cache: facts.write_cache, descriptor: false, protected: false }
    }

    pub(crate) fn format(&self) -> Format {
        if self.descriptor { Format::Descriptor } else { Format::Fixed }
    }

    /// The bytes of a page.
    fn page(&self, page: Page, values: Values, facts: &Facts) -> [u8; PAGE_BYTES_MAX] {
        let shown = match values {
            Values::Current => *self,
            Values::Default => Self::new(facts),
            Values::Changeable => {
                Self { write_cache: facts.write_cache, descriptor: true, protected: true }
            }
        };
        let fixed = values != Values::Changeable;
        let when = |set: bool, bit: u8| if set { bit } else { 0 };
        let mut bytes = [0; PAGE_BYTES_MAX];
        bytes[0] = page.first();
        if page.subpage == 0 {
            bytes[1] = page.length;
        } else {
            [bytes[1], bytes[3]] = [page.subpage, page.length];
        }
        match (page.code, page.subpage) {
            (CACHING, 0) => bytes[2] = when(shown.write_cache, WCE),
            (CONTROL, 0) => {
                bytes[2] = when(shown.descriptor, D_SENSE);
                bytes[3] = when(fixed, UNRESTRICTED);
                bytes[4] = when(shown.protected, SWP);
                bytes[5] = when(fixed, TAS);
            }
            _ => {}
        }
        bytes
    }
}

/// MODE SENSE (SPC-4): header, block descriptor and pages.
pub(crate) fn sense(
    modes: &Modes,
    facts: &Facts,
    query: &ModeQuery,
    reply: &mut Reply,
) -> Result<(), Sense> {
    let values = match query.control {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::illegal(Code::SAVING_NOT_SUPPORTED)),
    };
    if query.page != ALL_PAGES && !PAGES.iter().any(|page| page.code == query.page) {
        return Err(Sense::in_cdb(2, Some(5)));
    }
    // With all pages, only subpages 0 and FFh are defined (SPC-4).
    let subpages = query.page != ALL_PAGES || matches!(query.subpage, 0 | ALL_SUBPAGES);
    if !subpages || !PAGES.iter().any(|page| page.is_wanted(query)) {
        return Err(Sense::in_cdb(3, None));
    }
    // SBC-3, DEVICE-SPECIFIC PARAMETER: WP and DPOFUA.
    let device = if facts.read_only || modes.protected { 0x90 } else { 0x10 };
    let descriptor = match (query.no_blocks, query.long_lba) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
    if query.long {
        reply.put(&[0, 0, 0, device, u8::from(query.long_lba), 0, 0, descriptor]);
    } else {
        reply.put(&[0, 0, device, descriptor]);
    }
    put_block_descriptor(facts, descriptor, reply);
    for page in PAGES.iter().filter(|page| page.is_wanted(query)) {
        let bytes = modes.page(*page, values, facts);
        reply.put_padded(bytes.into_iter(), page.bytes(), 0);
    }
    // MODE DATA LENGTH counts what follows it.
    if query.long {
        let length = u16::try_from(reply.len().saturating_sub(2)).unwrap_or(u16::MAX);
        reply.set(0, &length.to_be_bytes());
    } else {
        reply.set(0, &[u8::try_from(reply.len().saturating_sub(1)).unwrap_or(u8::MAX)]);
    }
    Ok(())
}

/// SBC-3, LBA mode parameter block descriptors. In the short one a number of blocks that needs more
/// than 32 bits is all ones.
fn put_block_descriptor(facts: &Facts, length: u8, reply: &mut Reply) {
    match length {
        8 => {
            let blocks = u32::try_from(facts.blocks).unwrap_or(u32::MAX);
            let [_, a, b, c] = facts.block_bytes.to_be_bytes();
            reply.put(&blocks.to_be_bytes());
            reply.put(&[0, a, b, c]);
        }
        16 => {
            reply.put(&facts.blocks.to_be_bytes());
            reply.put(&[0; 4]);
            reply.put(&facts.block_bytes.to_be_bytes());
        }
        _ => {}
    }
}

/// MODE SELECT (SPC-4): the modes after it. The list is checked as a whole.
pub(crate) fn select(
    modes: &Modes,
    facts: &Facts,
    long: bool,
    list: &[u8],
) -> Result<Modes, Sense> {
    if list.is_empty() {
        return Ok(*modes);
    }
    let length_error = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);
    let (medium, long_lba, descriptor, header) = match (long, list) {
        (false, [_, medium, _, length, ..]) => (*medium, false, usize::from(*length), 4),
        (true, [_, _, medium, _, flags, _, high, low, ..]) => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            (*medium, flags & 1 != 0, length, 8)
        }
        _ => return Err(length_error),
    };
    if medium != 0 {
        return Err(Sense::in_list(if long { 2 } else { 1 }, None));
    }
    let rest = list.get(header..).ok_or(length_error)?;
    let blocks = rest.get(..descriptor).ok_or(length_error)?;
    check_block_descriptor(facts, long_lba, blocks, if long { 6 } else { 3 })?;
    let mut pages = rest.get(descriptor..).ok_or(length_error)?;
    let mut selected = *modes;
    while !pages.is_empty() {
        let at = u16::try_from(list.len().saturating_sub(pages.len())).unwrap_or(u16::MAX);
        let known = Page::of_list(pages, at)?;
        let (page, rest) = pages.split_at_checked(known.bytes()).ok_or(length_error)?;
        selected = select_page(&selected, facts, known, page, at)?;
        pages = rest;
    }
    Ok(selected)
}

/// One page: a bit that cannot be changed must have its current value (SPC-4, MODE SELECT).
fn select_page(
    modes: &Modes,
    facts: &Facts,
    known: Page,
    page: &[u8],
    at: u16,
) -> Result<Modes, Sense> {
    let current = modes.page(known, Values::Current, facts);
    let changeable = modes.page(known, Values::Changeable, facts);
    let differs = |i: usize| {
        let both = page.get(i).zip(current.get(i)).zip(changeable.get(i));
        both.is_some_and(|((new, old), mask)| (new ^ old) & !mask != 0)
    };
    if let Some(byte) = (known.header()..page.len()).find(|i| differs(*i)) {
        let byte = u16::try_from(byte).unwrap_or(u16::MAX);
        return Err(Sense::in_list(at.saturating_add(byte), None));
    }
    let bit = |byte: usize, bit: u8| page.get(byte).is_some_and(|byte| byte & bit != 0);
    Ok(match (known.code, known.subpage) {
        (CACHING, 0) => Modes { write_cache: bit(2, WCE), ..*modes },
        (CONTROL, 0) => Modes { descriptor: bit(2, D_SENSE), protected: bit(4, SWP), ..*modes },
        _ => *modes,
    })
}

/// The block descriptor: the number of blocks may be 0, all ones, or what it is (SBC-3);
/// the block size cannot be changed.
fn check_block_descriptor(
    facts: &Facts,
    long: bool,
    descriptor: &[u8],
    length_at: u16,
) -> Result<(), Sense> {
    let (blocks, all, bytes) = match descriptor {
        [] => return Ok(()),
        [a, b, c, d, _, f, g, h] if !long => {
            let blocks = u64::from(u32::from_be_bytes([*a, *b, *c, *d]));
            (blocks, u64::from(u32::MAX), u32::from_be_bytes([0, *f, *g, *h]))
        }
        [a, b, c, d, e, f, g, h, _, _, _, _, i, j, k, l] if long => {
            let blocks = u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            (blocks, u64::MAX, u32::from_be_bytes([*i, *j, *k, *l]))
        }
        _ => return Err(Sense::in_list(length_at, None)),
    };
    let at = if length_at == 3 { 4 } else { 8 };
    if blocks != 0 && blocks != all && blocks != facts.blocks {
        return Err(Sense::in_list(at, None));
    }
    if bytes != facts.block_bytes {
        return Err(Sense::in_list(at + if long { 12 } else { 5 }, None));
    }
    Ok(())
}
