//! Values of options: numbers, sizes, flags, addresses.

use crate::logging;

/// The value of an option that switches something on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Switch {
    /// `on`.
    On,
    /// `off`.
    Off,
}

/// Why a value of an option is invalid. clap puts the option and the value before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ValueError {
    /// Not a size, or larger than SPDK takes.
    #[error("expected a size in MiB, or a number with K, M or G, of less than 2 PiB")]
    Size,
    /// Negative, too large, or not a number.
    #[error("expected a non-negative integer")]
    NonNegative,
    /// Zero, negative, too large, or not a number.
    #[error("expected a positive integer")]
    Positive,
    /// Zero, negative, too large, or not a number; SPDK takes no hexadecimal here.
    #[error("expected a positive decimal integer")]
    PositiveDecimal,
    /// Too large, or not a number.
    #[error("expected an integer of at most 31 bits")]
    Integer,
    /// Not a power of two.
    #[error("expected a power of two, or 0")]
    PowerOfTwo,
    /// Neither a flag nor `all`.
    #[error("unknown log flag; log_get_flags lists the flags")]
    LogFlag,
    /// Not octal, or more than permission bits.
    #[error("expected permissions as an octal number of up to three digits, such as 660")]
    Mode,
    /// Not a PCI address.
    #[error("expected a PCI address, such as 0000:01:00.0")]
    PciAddress,
}

/// MiB of a number, or of a number with a unit, of which the first letter counts.
pub(super) fn mem_size(text: &str) -> Result<u32, ValueError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let mib = number.parse::<u64>().ok().and_then(|number| match unit.bytes().next() {
        None | Some(b'm' | b'M') => Some(number),
        Some(b'k' | b'K') => Some(number / 1024),
        Some(b'g' | b'G') => number.checked_mul(1024),
        Some(_) => None,
    });
    mib.and_then(|mib| i32::try_from(mib).ok()).map(i32::cast_unsigned).ok_or(ValueError::Size)
}

/// A non-negative integer in one of C's forms: decimal, hexadecimal after 0x, octal after 0.
pub(super) fn number(text: &str) -> Result<u64, ValueError> {
    let (digits, radix) = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    u64::from_str_radix(digits, radix)
        .ok()
        .filter(|&number| !digits.starts_with('+') && number <= i64::MAX as u64)
        .ok_or(ValueError::NonNegative)
}

pub(super) fn positive(text: &str) -> Result<u64, ValueError> {
    number(text).ok().filter(|&number| number > 0).ok_or(ValueError::Positive)
}

pub(super) fn positive_decimal(text: &str) -> Result<u64, ValueError> {
    match text.parse::<u64>() {
        Ok(number @ 1..) if number <= i64::MAX as u64 => Ok(number),
        _ => Err(ValueError::PositiveDecimal),
    }
}

pub(super) fn shm_id(text: &str) -> Result<i64, ValueError> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let size = number(digits).ok().and_then(|size| i32::try_from(size).ok());
    let size = size.ok_or(ValueError::Integer)?;
    Ok(i64::from(if negative { -size } else { size }))
}

/// Permission bits in octal, with or without a leading 0.
pub(super) fn mode(text: &str) -> Result<u32, ValueError> {
    let is_octal = text.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| is_octal && mode <= 0o777);
    mode.ok_or(ValueError::Mode)
}

pub(super) fn trace_entries(text: &str) -> Result<u64, ValueError> {
    let entries = number(text)?;
    if entries == 0 || entries.is_power_of_two() {
        return Ok(entries);
    }
    Err(ValueError::PowerOfTwo)
}

pub(super) fn log_flag(text: &str) -> Result<String, ValueError> {
    if logging::is_flag(text) { Ok(text.to_owned()) } else { Err(ValueError::LogFlag) }
}

/// `[domain:]bus:device[.function]`, where a dot may stand for a colon.
pub(super) fn pci_address(text: &str) -> Result<String, ValueError> {
    let parts: Vec<&str> = text.split([':', '.']).collect();
    let is_hex =
        |part: &&str| (1..=8).contains(&part.len()) && u32::from_str_radix(part, 16).is_ok();
    if (2..=4).contains(&parts.len()) && parts.iter().all(is_hex) {
        return Ok(text.to_owned());
    }
    Err(ValueError::PciAddress)
}
