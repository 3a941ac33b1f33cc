//! The resources of the server: fds, threads, mappings and memory as the kernel reports them, and
//! sessions and fds as the server reports them.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::servers::Server;
use front_end::LIMIT;
use serde_json::{Value, json};

use crate::neighbours::{NEIGHBOURS, name as neighbour};
use crate::new_vms;

/// Limit on additional threads: idle threads of `closer`.
const IDLE_THREADS: usize = 2;
/// Limit on additional anonymous mappings: the stacks of these threads and of ended ones (libc
/// caches 40 MiB, 20 stacks with a guard page each), and the allocator's.
const ANONYMOUS: usize = 64;
/// Limit on additional memory after the warm-up, because the allocator caches freed memory.
const RSS_KIB: usize = 32 << 10;

/// The resources of a process at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    fds: usize,
    threads: usize,
    /// Mappings of files, including guests' memory.
    files: usize,
    anonymous: usize,
    rss_kib: usize,
}

impl Footprint {
    /// The current resources of process `pid`.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let count = |what| -> Result<usize> {
            let dir = format!("/proc/{pid}/{what}");
            Ok(fs::read_dir(&dir).with_context(|| dir.clone())?.count())
        };
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("maps")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("status")?;
        let (files, anonymous) = mappings(&maps);
        let rss_kib = rss_kib(&status).context("a process without VmRSS")?;
        Ok(Self { fds: count("fd")?, threads: count("task")?, files, anonymous, rss_kib })
    }

    /// Memory in use.
    pub(crate) fn rss_mib(&self) -> usize {
        self.rss_kib >> 10
    }

    /// The same resources with the memory of `warm`.
    pub(crate) fn with_rss_of(self, warm: &Self) -> Self {
        Self { rss_kib: warm.rss_kib, ..self }
    }

    /// The same resources without a limit on memory.
    pub(crate) fn with_any_rss(self) -> Self {
        Self { rss_kib: usize::MAX - RSS_KIB, ..self }
    }

    /// The resources that exceed those of `before` by more than their limits.
    pub(crate) fn grown(&self, before: &Self) -> Vec<String> {
        let bounds = [
            ("fds", self.fds, before.fds, 0),
            ("threads", self.threads, before.threads, IDLE_THREADS),
            ("mappings of files", self.files, before.files, 0),
            ("anonymous mappings", self.anonymous, before.anonymous, ANONYMOUS),
            ("KiB of memory", self.rss_kib, before.rss_kib, RSS_KIB),
        ];
        let over = bounds.iter().filter(|(_, now, before, more)| *now > before + more);
        let words = |(what, now, before, more): &(&str, usize, usize, usize)| {
            format!("{now} {what}, {before} before; at most {more} more are allowed")
        };
        over.map(words).collect()
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fds, threads, files, anonymous, rss_kib } = self;
        write!(
            f,
            "{fds} fds, {threads} threads, {files} + {anonymous} mappings, {} MiB",
            rss_kib >> 10
        )
    }
}

/// Waits until the server's resources do not exceed `before`, and it reports only the neighbours'
/// sessions. Returns the resources, and a description of those that were released last.
pub(crate) fn come_back(server: &Server, before: &Footprint) -> Result<(Footprint, String)> {
    let start = Instant::now();
    let mut last = String::from("nothing");
    loop {
        let shown = server.call("vhost_get_controller_stats", json!({}))?;
        let mut wrong = left_behind(&shown);
        let now = Footprint::of(server.process.pid())?;
        wrong.extend(now.grown(before));
        if wrong.is_empty() {
            return Ok((now, last));
        }
        last = wrong.join("; ");
        if start.elapsed() > LIMIT {
            bail!("resources were not released within {LIMIT:?}: {last}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The problems in the answer of `vhost_get_controller_stats`: everything but the neighbours' sessions.
fn left_behind(shown: &Value) -> Vec<String> {
    let controllers = shown.as_array().into_iter().flatten();
    controllers.filter_map(|controller| is_alone(controller).err()).map(|e| e.to_string()).collect()
}

fn is_alone(controller: &Value) -> Result<()> {
    let name = controller["ctrlr"].as_str().context("a controller without a name")?;
    let of_neighbour = (0..NEIGHBOURS).any(|n| name == neighbour(n));
    ensure!(of_neighbour || name == new_vms::NAME, "controller {name} is left");
    let sessions = controller["sessions"].as_array().context("a controller without sessions")?;
    ensure!(sessions.len() == usize::from(of_neighbour), "{name}: {} sessions", sessions.len());
    let pinned = sessions.iter().find(|session| session["quarantined_bytes"] != 0);
    ensure!(pinned.is_none(), "{name}: memory is in quarantine");
    let fds = &controller["fds"];
    ensure!(fds["closing"] == 0 && fds["stuck"] == false, "{name}: fds {fds}");
    Ok(())
}

/// Counts mappings of files, and anonymous mappings.
fn mappings(maps: &str) -> (usize, usize) {
    let of_file = |line: &&str| line.split_ascii_whitespace().nth(4).is_some_and(|i| i != "0");
    let files = maps.lines().filter(of_file).count();
    (files, maps.lines().count() - files)
}

fn rss_kib(status: &str) -> Option<usize> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_files_have_an_inode() {
        let maps = "7f00-7f01 rw-s 00000000 00:01 1034 /memfd:guest (deleted)\n\
                    7f02-7f03 rw-p 00000000 00:00 0\n\
                    7f04-7f05 rw-p 00000000 00:00 0 [stack]\n";
        assert_eq!(mappings(maps), (1, 2));
        assert_eq!(rss_kib("VmHWM:\t 9 kB\nVmRSS:\t   1234 kB\n"), Some(1234));
    }

    #[test]
    fn resources_that_are_not_released_are_named() {
        let session = json!({"quarantined_bytes": 0});
        let controller = |name: &str, sessions: &[&Value], closing| {
            let fds = json!({"open": 9, "closing": closing, "stuck": false});
            json!({"ctrlr": name, "sessions": sessions, "fds": fds})
        };
        let neighbour = controller("neighbour.0", &[&session], 0);
        assert_eq!(left_behind(&json!([neighbour, controller("new-vm", &[], 0)])), [""; 0]);
        let pinned = json!({"quarantined_bytes": 4096});
        let wrong = json!([
            controller("neighbour.0", &[], 0),
            controller("neighbour.1", &[&pinned], 0),
            controller("new-vm", &[&session], 0),
            controller("new-vm", &[], 1),
            controller("soak.0", &[], 0),
        ]);
        assert_eq!(left_behind(&wrong).len(), 5);
    }

    #[test]
    fn resources_beyond_their_limits_are_named() {
        let before = Footprint { fds: 5, threads: 3, files: 7, anonymous: 9, rss_kib: 100 };
        let idle = Footprint { threads: 5, rss_kib: 100 + RSS_KIB, ..before };
        assert_eq!(idle.grown(&before), [""; 0]);
        let leaks = [
            Footprint { fds: 6, ..before },
            Footprint { threads: 6, ..before },
            Footprint { files: 8, ..before },
            Footprint { anonymous: 10 + ANONYMOUS, ..before },
            Footprint { rss_kib: 101 + RSS_KIB, ..before },
        ];
        for leak in leaks {
            assert_eq!(leak.grown(&before).len(), 1, "{leak}");
        }
    }
}
