//! A process that is started, paused, continued and ended, and what the kernel tells about it.

use std::fs::{self, File};
use std::io;
use std::ops::{AddAssign, Sub};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use front_end::LIMIT;
use rustix::process::{Pid, Signal, kill_process};

use super::{Error, Result};

/// Lines of its log that are shown of a process that failed.
const LOG_LINES: usize = 12;

/// A command that runs `program` and that the kernel kills when this process ends, however it does.
///
/// `setpriv` (util-linux) asks for that signal and then becomes the program, so that the process id
/// is the program's.
#[must_use]
pub fn setpriv(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    command
}

/// A process of which this one is the parent. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    paused: bool,
}

impl Process {
    /// Starts `command`, whose output goes to the file `log`.
    ///
    /// # Errors
    /// There is no such program, or no such directory.
    pub fn start(name: &str, mut command: Command, log: PathBuf) -> Result<Self> {
        let doing = || format!("cannot start {name}");
        let file = File::create(&log).map_err(Error::system(doing()))?;
        let again = file.try_clone().map_err(Error::system(doing()))?;
        command.stdout(file).stderr(again);
        let child = command.spawn().map_err(Error::system(doing()))?;
        Ok(Self { name: name.into(), child, log, paused: false })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// The process ends before ([`Error::Ended`]), or [`LIMIT`] passes.
    pub fn wait_until(
        &mut self,
        what: &'static str,
        mut ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.ended() {
                let (name, log) = (self.name.clone(), self.log());
                return Err(Error::Ended { name, status: status.to_string(), log });
            }
            if start.elapsed() > LIMIT {
                return Err(Error::Silent { name: self.name.clone(), what, limit: LIMIT });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Stops it with SIGSTOP, and waits until it has stopped.
    ///
    /// # Errors
    /// It is gone.
    pub fn pause(&mut self) -> Result<()> {
        if !self.paused {
            self.signal(Signal::STOP)?;
            self.paused = true;
            let stat = format!("/proc/{}/stat", self.pid());
            self.wait_until("stop", || {
                fs::read_to_string(&stat).is_ok_and(|stat| state(&stat) == Some('T'))
            })?;
        }
        Ok(())
    }

    /// Continues it.
    ///
    /// # Errors
    /// It is gone.
    pub fn resume(&mut self) -> Result<()> {
        if self.paused {
            self.signal(Signal::CONT)?;
            self.paused = false;
        }
        Ok(())
    }

    /// Ids of its threads.
    ///
    /// # Errors
    /// It is gone.
    pub fn threads(&self) -> Result<Vec<u32>> {
        let dir = format!("/proc/{}/task", self.pid());
        let entries = fs::read_dir(&dir).map_err(Error::system(dir))?;
        let tid = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        Ok(entries.filter_map(tid).collect())
    }

    /// Ends it with SIGTERM, and waits until it has ended.
    ///
    /// # Errors
    /// It is gone, or does not end within [`LIMIT`].
    pub fn terminate(mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let start = Instant::now();
        while self.ended().is_none() {
            if start.elapsed() > LIMIT {
                return Err(Error::Silent { name: self.name.clone(), what: "end", limit: LIMIT });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).map_err(Error::system(format!("cannot signal {}", self.name)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL ends a stopped process too; one that has ended already is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The state letter of a line of /proc/PID/stat; the name before it may hold anything.
fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// What the kernel has accounted to a thread, or to several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTimes {
    /// Time on a CPU.
    pub cpu: Duration,
    /// Time in which it could have run and another ran.
    pub waiting: Duration,
    /// How often it was made to stop running.
    pub preemptions: u64,
}

impl AddAssign for ThreadTimes {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.waiting += other.waiting;
        self.preemptions += other.preemptions;
    }
}

impl Sub for ThreadTimes {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            waiting: self.waiting.saturating_sub(before.waiting),
            preemptions: self.preemptions.saturating_sub(before.preemptions),
        }
    }
}

/// What the kernel has accounted to thread `tid` of process `pid`.
///
/// # Errors
/// There is no such thread, or the kernel has no schedstat.
pub fn thread_times(pid: u32, tid: u32) -> Result<ThreadTimes> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/task/{tid}/{file}");
        fs::read_to_string(&path).map_err(Error::system(path))
    };
    let parsed = parse_times(&read("schedstat")?, &read("status")?);
    parsed.ok_or_else(|| Error::System {
        doing: "schedstat or status of a thread".into(),
        source: io::ErrorKind::InvalidData.into(),
    })
}

fn parse_times(schedstat: &str, status: &str) -> Option<ThreadTimes> {
    let mut fields = schedstat.split_ascii_whitespace().map(str::parse);
    let mut ns = || Some(Duration::from_nanos(fields.next()?.ok()?));
    let (cpu, waiting) = (ns()?, ns()?);
    let switches = status.lines().find_map(|l| l.strip_prefix("nonvoluntary_ctxt_switches:"))?;
    Some(ThreadTimes { cpu, waiting, preemptions: switches.trim().parse().ok()? })
}

/// How much of `core` the host has taken so far; `None` if the kernel does not tell.
#[must_use]
pub fn core_steal(core: usize) -> Option<Duration> {
    parse_steal(&fs::read_to_string("/proc/stat").ok()?, core)
}

fn parse_steal(stat: &str, core: usize) -> Option<Duration> {
    let name = format!("cpu{core} ");
    let fields = stat.lines().find_map(|line| line.strip_prefix(&name))?;
    // user nice system idle iowait irq softirq steal …, in hundredths of a second.
    let steal: u64 = fields.split_ascii_whitespace().nth(7)?.parse().ok()?;
    Some(Duration::from_millis(steal * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_s_times_are_read() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t42\n";
        let times = parse_times("1500 20 3\n", status).unwrap();
        let (cpu, waiting) = (Duration::from_nanos(1500), Duration::from_nanos(20));
        assert_eq!(times, ThreadTimes { cpu, waiting, preemptions: 42 });
        assert_eq!(parse_times("1500", status), None);
        assert_eq!(parse_times("1 2 3", "Name:\tx\n"), None);
    }

    #[test]
    fn steal_is_that_of_the_core() {
        let stat = "cpu  1 1 1 1 1 1 1 99 0 0\ncpu1 1 2 3 4 5 6 7 8 0 0\ncpu11 0 0 0 0 0 0 0 5\n";
        assert_eq!(parse_steal(stat, 1), Some(Duration::from_millis(80)));
        assert_eq!(parse_steal(stat, 11), Some(Duration::from_millis(50)));
        assert_eq!(parse_steal(stat, 2), None);
    }

    #[test]
    fn a_process_is_paused_continued_and_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = setpriv("sleep".as_ref());
        command.arg("1000");
        let mut process = Process::start("sleep", command, dir.path().join("log")).unwrap();
        let stat = format!("/proc/{}/stat", process.pid());
        let now = || state(&fs::read_to_string(&stat).unwrap());
        process.pause().unwrap();
        assert_eq!(now(), Some('T'));
        process.resume().unwrap();
        process.wait_until("start", || now() != Some('T')).unwrap();
        drop(process);
        assert!(!Path::new(&stat).exists());
    }

    #[test]
    fn a_process_that_ends_early_is_shown_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = setpriv("sh".as_ref());
        command.args(["-c", "echo no such option; exit 2"]);
        let mut process = Process::start("it", command, dir.path().join("log")).unwrap();
        let error = process.wait_until("socket", || false).unwrap_err();
        assert!(error.to_string().contains("no such option"), "{error}");
        assert!(matches!(error, Error::Ended { status, .. } if status.contains('2')));
    }
}
