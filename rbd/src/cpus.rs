//! Sets of CPUs as SPDK writes them.

use bdev::Error;

/// The number of CPUs that a set can name, as in SPDK.
const CPUS_MAX: usize = 1024;

/// Reads a mask (`0x5`) or a list (`[0,2-3]`) of CPUs.
///
/// # Errors
/// [`Error::Invalid`] if the text is neither, or the set is empty.
pub(crate) fn parse(text: &str) -> Result<Vec<usize>, Error> {
    let cpus = match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(list) => of_list(list),
        None => of_mask(text.trim_start_matches("0x")),
    };
    cpus.filter(|cpus| !cpus.is_empty()).ok_or_else(|| {
        Error::Invalid(format!(
            "core_mask: expected a mask such as 0x5 or a list such as [0,2-3], found {text:?}"
        ))
    })
}

fn of_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = vec![];
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

fn of_mask(digits: &str) -> Option<Vec<usize>> {
    if digits.len() > CPUS_MAX / 4 {
        return None;
    }
    let mut cpus = vec![];
    for (n, digit) in digits.chars().rev().enumerate() {
        let bits = digit.to_digit(16)?;
        cpus.extend((0..4).filter(|bit| bits >> bit & 1 == 1).map(|bit| 4 * n + bit));
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_lists() {
        let all = |text| parse(text).unwrap();
        assert_eq!(all("0x5"), [0, 2]);
        assert_eq!(all("10"), [4]);
        assert_eq!(all("[0,2-4]"), [0, 2, 3, 4]);
        for bad in ["", "0x", "0", "x", "[", "[]", "[1", "[3-1]", "[1024]", "[a]"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
