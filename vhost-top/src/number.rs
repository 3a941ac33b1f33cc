//! Numbers as text with three digits, and their conversion.

/// Exact up to 2^53; above it, the last digits do not matter to a display.
pub(crate) fn to_f64(number: u64) -> f64 {
    number as f64
}

/// A number; a large one in thousands, millions or billions.
pub(crate) fn count(n: f64) -> String {
    match n {
        n if n < 999.5 => three_digits(n),
        n if n < 999.5e3 => format!("{}k", three_digits(n / 1e3)),
        n if n < 999.5e6 => format!("{}M", three_digits(n / 1e6)),
        n => format!("{}G", three_digits(n / 1e9)),
    }
}

/// A whole number below a thousand without a fraction.
pub(crate) fn whole(n: u64) -> String {
    if n < 1000 { n.to_string() } else { count(to_f64(n)) }
}

/// A number of bytes in the largest unit that fits.
pub(crate) fn bytes(n: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| n >> shift > 0);
    unit.map_or(format!("{n} B"), |(shift, unit)| {
        format!("{} {unit}", three_digits(to_f64(n) / to_f64(1 << shift)))
    })
}

fn three_digits(n: f64) -> String {
    let digits = match n {
        0.0 => 0,
        n if n < 9.995 => 2,
        n if n < 99.95 => 1,
        _ => 0,
    };
    format!("{n:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.0, 0.5, 12.34, 999.4, 999.6, 56_789.0, 10.26e6, 3e9].map(count);
        assert_eq!(shown, ["0", "0.50", "12.3", "999", "1.00k", "56.8k", "10.3M", "3.00G"]);
        assert_eq!([whole(7), whole(4096)], ["7", "4.10k"]);
        assert_eq!([bytes(0), bytes(1023), bytes(3 << 29)], ["0 B", "1023 B", "1.50 GiB"]);
    }
}
