//! Values of options: sizes, times, rates and cores.

use std::num::{ParseFloatError, ParseIntError};
use std::time::Duration;

/// The longest time that an option takes: sums of such times do not overflow.
const YEAR_S: f64 = 31_536_000.0;

/// The number of cores in a mask of `sched_setaffinity` as libc has it.
const CORES_MAX: usize = 1024;

/// Why a value of an option is invalid. clap puts the option and the value before it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum ValueError {
    #[error("expected an integer: {0}")]
    Integer(#[from] ParseIntError),
    #[error("expected a number: {0}")]
    Number(#[from] ParseFloatError),
    #[error("unknown unit {0}; expected k, m, g or t")]
    Unit(String),
    #[error("the size does not fit into 64 bits")]
    TooLarge,
    #[error("expected a multiple of 512")]
    Sectors,
    #[error("expected a multiple of 512 from 512 to 1m")]
    BlockBytes,
    #[error("expected seconds from 0 to a year")]
    Seconds,
    #[error("expected a time longer than 0")]
    NoTime,
    #[error("expected a rate from 0.001 to 1e9")]
    Rate,
    #[error("expected a power of two up to 32768")]
    RingSize,
    #[error("invalid core {0}: {1}")]
    Core(String, #[source] ParseIntError),
    #[error("invalid range of cores {0}; core numbers are below {CORES_MAX}")]
    CoreRange(String),
    #[error("core {0} is named twice")]
    CoreTwice(usize),
    #[error("expected two cores")]
    TwoCores,
}

/// A list of distinct cores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cores(pub(crate) Vec<usize>);

/// A number of bytes: digits, and k, m, g or t for a power of 1024.
pub(crate) fn bytes(text: &str) -> Result<u64, ValueError> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| !c.is_ascii_digit());
    let power = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        unit => return Err(ValueError::Unit(unit.to_owned())),
    };
    let number: u64 = digits.parse()?;
    number.checked_mul(1 << (10 * power)).ok_or(ValueError::TooLarge)
}

pub(crate) fn sectors(text: &str) -> Result<u64, ValueError> {
    let bytes = bytes(text)?;
    if bytes.is_multiple_of(512) { Ok(bytes) } else { Err(ValueError::Sectors) }
}

pub(crate) fn block_bytes(text: &str) -> Result<u32, ValueError> {
    let bytes = u32::try_from(bytes(text)?).map_err(|_| ValueError::BlockBytes)?;
    let is_valid = (512..=1 << 20).contains(&bytes) && bytes.is_multiple_of(512);
    if is_valid { Ok(bytes) } else { Err(ValueError::BlockBytes) }
}

pub(crate) fn seconds(text: &str) -> Result<Duration, ValueError> {
    let seconds: f64 = text.trim_end_matches('s').parse()?;
    if (0.0..=YEAR_S).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(ValueError::Seconds)
    }
}

/// A time that is not zero.
pub(crate) fn limit(text: &str) -> Result<Duration, ValueError> {
    let limit = seconds(text)?;
    if limit.is_zero() { Err(ValueError::NoTime) } else { Ok(limit) }
}

pub(crate) fn rate(text: &str) -> Result<f64, ValueError> {
    let rate: f64 = text.parse()?;
    if (0.001..=1e9).contains(&rate) { Ok(rate) } else { Err(ValueError::Rate) }
}

pub(crate) fn ring_size(text: &str) -> Result<u16, ValueError> {
    let size: u16 = text.parse()?;
    if size.is_power_of_two() { Ok(size) } else { Err(ValueError::RingSize) }
}

/// Cores as `taskset` takes them: numbers and ranges, separated by commas.
pub(crate) fn cores(text: &str) -> Result<Cores, ValueError> {
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            text.trim().parse::<usize>().map_err(|e| ValueError::Core(part.to_owned(), e))
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CORES_MAX {
            return Err(ValueError::CoreRange(part.to_owned()));
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(ValueError::CoreTwice(core));
            }
            cores.push(core);
        }
    }
    Ok(Cores(cores))
}

pub(crate) fn two_cores(text: &str) -> Result<Cores, ValueError> {
    let cores = cores(text)?;
    if cores.0.len() == 2 { Ok(cores) } else { Err(ValueError::TwoCores) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        let cases = [("512", 512), ("4k", 4096), ("4K", 4096), ("1MiB", 1 << 20), ("2g", 2 << 30)];
        cases.iter().for_each(|(text, value)| assert_eq!(bytes(text), Ok(*value), "{text}"));
        assert!(["", "k", "-1", "1.5k", "4kk"].iter().all(|text| bytes(text).is_err()));
    }
}
