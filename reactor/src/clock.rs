//! The time-stamp counter and its frequency.
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// Duration of a measurement. Its error is a few nanoseconds, less than 1 in 10^5.
const MEASURED_FOR: Duration = Duration::from_millis(10);
/// Readings of both clocks at each end of a measurement.
const READINGS: usize = 64;
/// Plausible frequencies of a time-stamp counter in Hz. A frequency outside the range is an error
/// of CPUID or of the hypervisor.
#[cfg(target_arch = "x86_64")]
const PLAUSIBLE: std::ops::RangeInclusive<u64> = 100_000_000..=20_000_000_000;

/// Reads the time-stamp counter.
#[cfg(target_arch = "x86_64")]
#[inline]
#[must_use]
pub fn read_tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux allows it in user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Returns nanoseconds of the monotonic clock, for processors without a time-stamp counter.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "2^64 ns are 584 years")]
pub fn read_tsc() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// The frequency of [`read_tsc`]: as CPUID reports it, otherwise measured once.
#[must_use]
pub fn ticks_per_second() -> u64 {
    static TICKS: OnceLock<u64> = OnceLock::new();
    *TICKS.get_or_init(|| reported().unwrap_or_else(|| measured(&mut System)))
}

#[cfg(not(target_arch = "x86_64"))]
fn reported() -> Option<u64> {
    Some(1_000_000_000)
}

#[cfg(target_arch = "x86_64")]
fn reported() -> Option<u64> {
    reported_by(|leaf| {
        let core::arch::x86_64::CpuidResult { eax, ebx, ecx, .. } =
            core::arch::x86_64::__cpuid(leaf);
        [eax, ebx, ecx]
    })
}

/// The counter's frequency as CPUID reports it. `cpuid` returns EAX, EBX and ECX of a leaf.
///
/// Leaf 0x16 is not used: it reports the nominal frequency in whole megahertz, and a measurement is
/// far more precise.
#[cfg(target_arch = "x86_64")]
fn reported_by(cpuid: impl Fn(u32) -> [u32; 3]) -> Option<u64> {
    /// The ratio of the counter to the core crystal, and the crystal's frequency.
    const CRYSTAL: u32 = 0x15;
    /// The highest hypervisor leaf, and the leaf with the counter's frequency in kHz. VMware
    /// introduced the latter, and other hypervisors have it too.
    const HYPERVISOR: u32 = 0x4000_0000;
    const HYPERVISOR_KHZ: u32 = 0x4000_0010;
    const IS_GUEST: u32 = 1 << 31;

    let [highest, ..] = cpuid(0);
    let [.., features] = cpuid(1);
    let by_hypervisor = || {
        let [highest, ..] = cpuid(HYPERVISOR);
        if features & IS_GUEST == 0 || !(HYPERVISOR_KHZ..HYPERVISOR + 0x100).contains(&highest) {
            return None;
        }
        Some(u64::from(cpuid(HYPERVISOR_KHZ)[0]) * 1000)
    };
    let by_crystal = || {
        let [denominator, numerator, hertz] =
            if highest < CRYSTAL { [0; 3] } else { cpuid(CRYSTAL) };
        (u64::from(hertz) * u64::from(numerator)).checked_div(denominator.into())
    };
    // The hypervisor's value takes precedence, because the hypervisor may scale the counter.
    let plausible = |ticks: &u64| PLAUSIBLE.contains(ticks);
    by_hypervisor().filter(plausible).or_else(|| by_crystal().filter(plausible))
}

/// The two clocks that a measurement compares.
trait Clocks {
    fn ticks(&mut self) -> u64;
    fn nanoseconds(&mut self) -> u64;
    fn sleep(&mut self, time: Duration);
}

struct System;

impl Clocks for System {
    fn ticks(&mut self) -> u64 {
        read_tsc()
    }

    fn nanoseconds(&mut self) -> u64 {
        static START: OnceLock<Instant> = OnceLock::new();
        let elapsed = START.get_or_init(Instant::now).elapsed();
        elapsed.as_nanos().try_into().expect("2^64 ns are 584 years")
    }

    fn sleep(&mut self, time: Duration) {
        thread::sleep(time);
    }
}

/// Measures the counter's frequency against the monotonic clock.
fn measured(clocks: &mut impl Clocks) -> u64 {
    let (first_ticks, first_ns) = reading(clocks);
    clocks.sleep(MEASURED_FOR);
    let (last_ticks, last_ns) = reading(clocks);
    let (ticks, ns) = (last_ticks.saturating_sub(first_ticks), last_ns.saturating_sub(first_ns));
    let ticks_per_second = u128::from(ticks) * 1_000_000_000 / u128::from(ns.max(1));
    // At least 1, because callers divide by it.
    u64::try_from(ticks_per_second).unwrap_or(u64::MAX).max(1)
}

/// Reads both clocks at about the same time. A preemption between the readings would make them
/// differ. The counter is therefore read before and after the clock, and of several such readings,
/// the one with the smallest difference between its two counter values is used.
fn reading(clocks: &mut impl Clocks) -> (u64, u64) {
    let read_once = |_| [clocks.ticks(), clocks.nanoseconds(), clocks.ticks()];
    let closest = (0..READINGS).map(read_once).min_by_key(|[a, _, b]| b.wrapping_sub(*a));
    let [before, nanoseconds, after] = closest.expect("READINGS is not zero");
    (before + after.wrapping_sub(before) / 2, nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERTZ: u64 = 2_596_000_000;

    /// A simulated time. Each reading advances it a little, and a preemption advances it much.
    struct Scripted {
        ns: u64,
        readings: u64,
        /// A preemption of 5 ms occurs at each reading for which this returns true.
        preempted: fn(u64) -> bool,
    }

    impl Scripted {
        fn pass(&mut self) {
            self.readings += 1;
            self.ns += 20 + if (self.preempted)(self.readings) { 5_000_000 } else { 0 };
        }
    }

    impl Clocks for Scripted {
        fn ticks(&mut self) -> u64 {
            self.pass();
            let ticks = u128::from(self.ns) * u128::from(HERTZ) / 1_000_000_000;
            ticks.try_into().unwrap()
        }

        fn nanoseconds(&mut self) -> u64 {
            self.pass();
            self.ns
        }

        fn sleep(&mut self, time: Duration) {
            self.ns += u64::try_from(time.as_nanos()).unwrap();
        }
    }

    #[test]
    fn a_preemption_does_not_change_the_result() {
        type When = fn(u64) -> bool;
        let scripts: [(&str, When); 5] = [
            ("none", |_| false),
            ("in the first reading", |n| n == 2),
            ("in all readings but one, at each end", |n| (n - 1) / 3 % READINGS as u64 != 7),
            ("between the two ends", |n| n == 3 * READINGS as u64 + 1),
            ("in the last reading", |n| n == 6 * READINGS as u64),
        ];
        for (what, preempted) in scripts {
            let ticks = measured(&mut Scripted { ns: 1_000, readings: 0, preempted });
            let error = ticks.abs_diff(HERTZ);
            assert!(error < HERTZ / 100_000, "{what}: {ticks}");
        }
    }

    #[test]
    fn a_stopped_clock_does_not_cause_a_division_by_zero() {
        struct Stopped;
        impl Clocks for Stopped {
            fn ticks(&mut self) -> u64 {
                7
            }
            fn nanoseconds(&mut self) -> u64 {
                7
            }
            fn sleep(&mut self, _time: Duration) {}
        }
        assert_eq!(measured(&mut Stopped), 1);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_plausible_reported_frequency_is_used() {
        const GUEST: u32 = 1 << 31;
        type Leaves = [[u32; 3]; 5];
        let cpuid = |leaves: Leaves| {
            reported_by(move |leaf| match leaf {
                0 => leaves[0],
                1 => leaves[1],
                0x15 => leaves[2],
                0x4000_0000 => leaves[3],
                0x4000_0010 => leaves[4],
                other => panic!("leaf {other:#x}"),
            })
        };
        let crystal = [2, 216, 24_000_000];
        let vmware = [0x4000_0010, 0, 0];
        for (leaves, want) in [
            // Bare metal.
            ([[0x16, 0, 0], [0, 0, 0], crystal, [0; 3], [0; 3]], Some(2_592_000_000)),
            ([[0x16, 0, 0], [0, 0, 0], [2, 216, 0], [0; 3], [0; 3]], None),
            ([[0x16, 0, 0], [0, 0, 0], [0, 216, 24_000_000], [0; 3], [0; 3]], None),
            ([[0x14, 0, 0], [0, 0, 0], crystal, [0; 3], [0; 3]], None),
            // Some processors return such values for a leaf that does not exist.
            ([[0x16, 0, 0], [0, 0, 0], [0; 3], vmware, [3_000_000, 0, 0]], None),
            // Guests.
            (
                [[0x16, 0, 0], [0, 0, GUEST], crystal, vmware, [3_000_000, 0, 0]],
                Some(3_000_000_000),
            ),
            ([[0x10, 0, 0], [0, 0, GUEST], [0; 3], vmware, [2_596_000, 0, 0]], Some(HERTZ)),
            ([[0x16, 0, 0], [0, 0, GUEST], crystal, vmware, [0; 3]], Some(2_592_000_000)),
            (
                [[0x16, 0, 0], [0, 0, GUEST], crystal, [0x4000_0001, 0, 0], [9; 3]],
                Some(2_592_000_000),
            ),
            ([[0x10, 0, 0], [0, 0, GUEST], [0; 3], vmware, [7, 0, 0]], None),
            ([[0x10, 0, 0], [0, 0, GUEST], [0; 3], [u32::MAX, 0, 0], [3_000_000, 0, 0]], None),
        ] {
            assert_eq!(cpuid(leaves), want, "{leaves:x?}");
        }
    }

    /// The reported frequency is the real one.
    #[test]
    fn the_reported_frequency_matches_a_measurement() {
        let (reported, measured) = (ticks_per_second(), measured(&mut System));
        assert!(reported.abs_diff(measured) < reported / 1_000, "{reported}, measured {measured}");
    }
}
