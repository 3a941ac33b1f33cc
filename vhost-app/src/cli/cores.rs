//! Sets of cores as SPDK and DPDK write them: masks, lists, and maps from cores to CPUs.

/// Limit on core numbers, which bounds the parser's work. DPDK's own limit is 128 or less.
const CORES_MAX: usize = 1024;

/// Limit on the text of a set of cores, which bounds the parser's work: RPC clients send such
/// texts. It is twice the length of a list of all cores.
const TEXT_MAX: usize = 16 * 1024;

/// A logical core of `--lcores` and the CPUs that its thread may run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lcore {
    /// The core's number.
    pub(crate) id: usize,
    /// Ascending, at least one.
    pub(crate) cpus: Vec<usize>,
}

/// Parses a mask (`0x1d`, `1d`) or a list (`[0,2-4]`) of cores. Returns them in ascending order, or
/// `None` if the text is invalid or names no core.
pub(crate) fn parse_cores(text: &str) -> Option<Vec<usize>> {
    if text.len() > TEXT_MAX {
        return None;
    }
    let cores = match text.strip_prefix('[') {
        Some(list) => core_set(list.strip_suffix(']')?)?,
        None => mask(text)?,
    };
    (!cores.is_empty()).then_some(cores)
}

fn mask(text: &str) -> Option<Vec<usize>> {
    let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
    if digits.is_empty() {
        return None;
    }
    let mut cores = Vec::new();
    for (index, digit) in digits.chars().rev().enumerate() {
        let digit = digit.to_digit(16)?;
        cores.extend((0..4).filter(|bit| digit & (1 << bit) != 0).map(|bit| index * 4 + bit));
    }
    cores.iter().all(|&core| core < CORES_MAX).then_some(cores)
}

/// Parses `0,2-4`. Returns ascending numbers without repetition.
fn core_set(text: &str) -> Option<Vec<usize>> {
    // A table has a bounded size, even if the text repeats a range many times.
    let mut named = [false; CORES_MAX];
    for item in text.split(',').map(str::trim) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last) = (core_number(first)?, core_number(last)?);
        named[first.min(last)..=first.max(last)].fill(true);
    }
    Some((0..CORES_MAX).filter(|&core| named[core]).collect())
}

fn core_number(text: &str) -> Option<usize> {
    let text = text.trim();
    let is_decimal = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&core| is_decimal && core < CORES_MAX)
}

/// Parses DPDK's core map: a list of `cores` or `cores@cpus`. Each side is a number, a range, or a
/// list of those in parentheses. Each core of an item may run on each CPU of the item.
pub(super) fn parse_lcores(text: &str) -> Option<Vec<Lcore>> {
    let mut lcores: Vec<Lcore> = Vec::new();
    for item in split_outside_parentheses(text) {
        let (ids, cpus) = match item.split_once('@') {
            Some((ids, cpus)) => (lcore_side(ids)?, Some(lcore_side(cpus)?)),
            None => (lcore_side(item)?, None),
        };
        for id in ids {
            if lcores.iter().any(|lcore| lcore.id == id) {
                return None;
            }
            lcores.push(Lcore { id, cpus: cpus.clone().unwrap_or_else(|| vec![id]) });
        }
    }
    lcores.sort_unstable_by_key(|lcore| lcore.id);
    (!lcores.is_empty()).then_some(lcores)
}

fn lcore_side(text: &str) -> Option<Vec<usize>> {
    let text = text.trim();
    match text.strip_prefix('(') {
        Some(list) => core_set(list.strip_suffix(')')?),
        None => core_set(text),
    }
}

fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_lists() {
        for (text, cores) in [
            ("0x1", vec![0]),
            ("3", vec![0, 1]),
            ("F0", vec![4, 5, 6, 7]),
            ("0Xa", vec![1, 3]),
            ("0x80000000000000000001", vec![0, 79]),
            ("[0]", vec![0]),
            ("[0,2-4]", vec![0, 2, 3, 4]),
            ("[4-2, 3 ,3]", vec![2, 3, 4]),
        ] {
            assert_eq!(parse_cores(text), Some(cores), "{text}");
        }
        let long = format!("0x{}", "f".repeat(10_000));
        let all = vec!["0-1023"; 2000].join(",");
        assert_eq!(parse_cores(&format!("[{all}]")).unwrap().len(), 1024);
        // 36 million numbers in a request of the maximum size.
        let many = format!("[{}]", vec!["0-1023"; 36_000].join(","));
        assert!(many.len() < 256 * 1024);
        assert_eq!(parse_cores(&many), None);
        for text in ["", "0x", "0x0", "g", "[0-99999]", "[-1]", "[+1]", "[1", "1]", &long] {
            assert_eq!(parse_cores(text), None, "{text}");
        }
    }
}
