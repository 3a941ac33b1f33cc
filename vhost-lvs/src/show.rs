//! Sizes and foreign text for the terminal.

/// A number of bytes in the largest unit, with one decimal where that is not exact.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let Some((shift, unit)) = units.into_iter().find(|(shift, _)| n >> shift > 0) else {
        return format!("{n} B");
    };
    let (whole, rest) = (n >> shift, n & ((1 << shift) - 1));
    match (u128::from(rest) * 10) >> shift {
        0 if rest == 0 => format!("{whole} {unit}"),
        tenth => format!("{whole}.{tenth} {unit}"),
    }
}

/// Text from a disk without what would control the terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_sizes_have_no_decimals() {
        let shown = [0, 1023, 4096, 3 << 29, (1 << 30) + 1, u64::MAX].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "4 KiB", "1.5 GiB", "1.0 GiB", "15.9 EiB"]);
    }
}
