//! Where and when something was measured, in words for a report.

use std::fs;
use std::process::Command;

/// The date and time, UTC.
#[must_use]
pub fn date() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_default()
}

/// CPUs, memory, kernel and load of this machine.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let value = |line: &str| line.split_once(':').map(|(_, value)| value.trim().to_owned());
    let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(value);
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let virtual_cpus = if cpuinfo.contains(" hypervisor") { "virtual " } else { "" };
    let meminfo = read("/proc/meminfo");
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|t| t.trim().trim_end_matches(" kB").parse::<f64>().ok());
    format!(
        "{cpus} {virtual_cpus}CPUs ({}), {:.0} GiB, Linux {}, {} free hugepages, load average {}",
        model.unwrap_or_else(|| "unknown".into()),
        kib.unwrap_or(0.0) / f64::from(1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").trim(),
        read("/proc/loadavg").split(' ').next().unwrap_or("unknown"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        let machine = machine();
        assert!(!machine.starts_with("0 ") && !machine.contains(" 0 GiB"), "{machine}");
        assert!(!machine.contains("unknown"), "{machine}");
        assert!(date().ends_with(" UTC"));
    }
}
