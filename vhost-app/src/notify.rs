//! What the process tells the service manager that has started it: sd_notify(3).
//!
//! The socket is connected before the sandbox starts, which may refuse to connect to it later, and
//! before other threads start. It never blocks: a service manager that does not read delays nobody.

use std::fmt::{self, Display};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use vhost_target::{Core, ReactorInfo};

use crate::process;

/// Interval of attempts to send while the service manager does not read.
const RETRY: Duration = Duration::from_millis(100);

/// Reports per watchdog time. The service manager's documentation recommends to report at half of
/// that time.
const FEEDS: u32 = 2;

/// Checks per watchdog time while a reactor makes no progress.
const LOOKS: u32 = 16;

/// The service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Notifier {
    socket: io::Result<Option<UnixDatagram>>,
    /// Time after which the service manager ends a process that has not reported.
    watchdog: Option<Duration>,
}

/// Why the process does not report that it is alive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoProgress {
    core: Core,
    tid: u64,
}

impl Display for NoProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { core, tid } = self;
        write!(f, "the reactor on core {} (thread {tid}) has finished no poll iteration", core.0)
    }
}

impl Notifier {
    /// Connects to the service manager that the environment names, and removes its variables from
    /// the environment. The process must have one thread.
    pub(crate) fn from_environment() -> Self {
        let [path, usec, pid] =
            ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"].map(process::take_variable);
        let text = |value: Option<std::ffi::OsString>| value.and_then(|v| v.into_string().ok());
        let socket = path.map(|path| connect(path.as_bytes())).transpose();
        Self { socket, watchdog: watchdog(text(usec), text(pid), std::process::id()) }
    }

    /// Logs why the service manager cannot be reached.
    pub(crate) fn report(&self) {
        if let Err(e) = &self.socket {
            warn!("cannot connect to the service manager (NOTIFY_SOCKET): {e}");
        }
    }

    /// Sends `message`, unless the service manager does not read.
    pub(crate) fn send(&self, message: &str) -> io::Result<()> {
        match &self.socket {
            Ok(Some(socket)) => socket.send(message.as_bytes()).map(drop),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Sends `message` as soon as the service manager reads.
    pub(crate) async fn send_surely(&self, message: &str) {
        loop {
            match self.send(message) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY).await,
                Err(e) => return warn!("cannot notify the service manager: {e}"),
                Ok(()) => return,
            }
        }
    }

    /// Reports at half of the watchdog's time that the process is alive, as long as all reactors
    /// make progress. That this task runs shows that the control thread does. Returns at once if
    /// there is no watchdog.
    pub(crate) async fn feed_watchdog(&self, reactors: impl Fn() -> Vec<ReactorInfo>) {
        let (Ok(Some(_)), Some(limit)) = (&self.socket, self.watchdog) else { return };
        let mut progress = Progress::new(&reactors());
        let (mut fed, mut failed) = (Instant::now(), false);
        loop {
            tokio::time::sleep(limit / FEEDS).await;
            if let Some(stuck) = progress.missing(&reactors()) {
                let elapsed = fed.elapsed().as_millis();
                error!("{stuck} for {elapsed} ms: not reporting to the service manager's watchdog");
                let _ = self.send(&format!("STATUS={stuck}"));
                while progress.missing(&reactors()).is_some() {
                    tokio::time::sleep(limit / LOOKS).await;
                }
                info!("all reactors make progress again");
                let _ = self.send("STATUS=All reactors make progress again");
            }
            progress = Progress::new(&reactors());
            match self.send("WATCHDOG=1") {
                Ok(()) => failed = false,
                Err(e) if !std::mem::replace(&mut failed, true) => {
                    warn!("cannot report to the service manager's watchdog: {e}");
                }
                Err(_) => {}
            }
            fed = Instant::now();
        }
    }
}

/// A datagram socket that is connected to `address`: a path, or an abstract name after `@`.
fn connect(address: &[u8]) -> io::Result<UnixDatagram> {
    let address = match address {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(address))?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "unknown kind of address")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The watchdog's time, if there is a watchdog for the process `own`.
fn watchdog(usec: Option<String>, pid: Option<String>, own: u32) -> Option<Duration> {
    let usec = usec?.parse().ok().filter(|&usec| usec > 0)?;
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(own));
    ours.then(|| Duration::from_micros(usec))
}

/// What the reactors had done at one time.
struct Progress(Vec<Done>);

/// Counters of a reactor. The first moves in each microsecond of polling, the second with each
/// sleep.
#[derive(PartialEq, Eq)]
struct Done {
    iterations: u64,
    sleeps: u64,
}

impl Done {
    fn of(reactor: &ReactorInfo) -> Self {
        Self { iterations: reactor.iterations, sleeps: reactor.sleeps }
    }
}

impl Progress {
    fn new(reactors: &[ReactorInfo]) -> Self {
        Self(reactors.iter().map(Done::of).collect())
    }

    /// A reactor that has done nothing since, although it is not asleep.
    fn missing(&self, now: &[ReactorInfo]) -> Option<NoProgress> {
        let stuck =
            |(before, now): &(&Done, &ReactorInfo)| !now.asleep && **before == Done::of(now);
        let (_, reactor) = self.0.iter().zip(now).find(stuck)?;
        Some(NoProgress { core: reactor.core, tid: reactor.tid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reactor(core: usize, iterations: u64, sleeps: u64, asleep: bool) -> ReactorInfo {
        ReactorInfo {
            core: Core(core),
            tid: 7,
            busy_ticks: 0,
            idle_ticks: 0,
            iterations,
            sleeps,
            // Does not say whether the reactor sleeps now.
            in_interrupt: true,
            asleep,
            queues: 1,
        }
    }

    #[test]
    fn progress_is_an_iteration_or_a_sleep() {
        let before = Progress::new(&[reactor(2, 10, 3, false), reactor(5, 10, 3, true)]);
        let missing = |first, second| before.missing(&[first, second]);
        let (polls, sleeps) = (reactor(2, 11, 3, false), reactor(5, 10, 3, true));
        assert_eq!(missing(polls.clone(), sleeps.clone()), None);
        let slept = reactor(5, 10, 4, false);
        assert_eq!(missing(polls.clone(), slept), None);
        let stuck = |core| Some(NoProgress { core: Core(core), tid: 7 });
        assert_eq!(missing(polls, reactor(5, 10, 3, false)), stuck(5));
        assert_eq!(missing(reactor(2, 10, 3, false), sleeps), stuck(2));
    }

    #[test]
    fn the_watchdog_of_another_process_is_not_fed() {
        let text = |text: &str| Some(text.to_owned());
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog(text("1000000"), text("5"), 5), second);
        assert_eq!(watchdog(text("1000000"), None, 5), second);
        assert_eq!(watchdog(text("1000000"), text("6"), 5), None);
        assert_eq!(watchdog(text("1000000"), text("x"), 5), None);
        for usec in [None, text("0"), text("-1"), text("x")] {
            assert_eq!(watchdog(usec, None, 5), None);
        }
    }

    /// A service manager's socket, and its client with this watchdog time.
    fn manager(watchdog: Duration) -> (UnixDatagram, Notifier) {
        let (socket, manager) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        manager.set_nonblocking(true).unwrap();
        (manager, Notifier { socket: Ok(Some(socket)), watchdog: Some(watchdog) })
    }

    fn received(manager: &UnixDatagram) -> Vec<String> {
        let mut bytes = [0; 256];
        let mut messages = vec![];
        while let Ok(len) = manager.recv(&mut bytes) {
            messages.push(String::from_utf8(bytes[..len].to_vec()).unwrap());
        }
        messages
    }

    /// Reactors whose counter moves only before the third and after the twentieth look.
    #[test]
    fn a_reactor_without_progress_withholds_the_watchdogs_report_until_it_goes_on() {
        let (manager, notifier) = manager(Duration::from_millis(16));
        let looks = std::cell::Cell::new(0);
        let seen = std::cell::RefCell::new(vec![]);
        let reactors = || {
            looks.set(looks.get() + 1);
            seen.borrow_mut().extend(received(&manager).into_iter().map(|m| (looks.get(), m)));
            let iterations = if (3..20).contains(&looks.get()) { 3 } else { looks.get() };
            vec![reactor(1, iterations, 0, false)]
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let until = async {
                while looks.get() < 30 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::select! {
                () = notifier.feed_watchdog(reactors) => panic!("it ends"),
                () = until => {}
            }
        });
        let seen = seen.into_inner();
        let fed: Vec<u64> =
            seen.iter().filter(|(_, m)| m == "WATCHDOG=1").map(|(look, _)| *look).collect();
        assert!(fed.iter().any(|look| *look <= 5) && fed.iter().any(|look| *look > 20), "{fed:?}");
        assert!(!fed.iter().any(|look| (6..=20).contains(look)), "{fed:?}");
        let status = seen.iter().find(|(_, m)| m.starts_with("STATUS=the reactor on core 1"));
        assert!(status.is_some(), "{seen:?}");
    }

    #[test]
    fn addresses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        connect(path.as_os_str().as_bytes()).unwrap().send(b"READY=1").unwrap();
        assert_eq!(received(&manager), ["READY=1"]);
        let name = format!("vhost-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&abstract_name).unwrap();
        manager.set_nonblocking(true).unwrap();
        connect(format!("@{name}").as_bytes()).unwrap().send(b"READY=1").unwrap();
        assert_eq!(received(&manager), ["READY=1"]);
        for address in ["", "relative", "/no/such/socket", "@no-such-name"] {
            assert!(connect(address.as_bytes()).is_err(), "{address}");
        }
    }
}
