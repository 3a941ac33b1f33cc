//! Log lines in SPDK's format, with levels and flags that RPCs change at run time.
//!
//! In SPDK, INFO and DEBUG lines also need their component's *flag*. tracing's five levels map to
//! SPDK's five levels:
//!
//! | tracing | SPDK | appears if |
//! |---|---|---|
//! | `error!` | ERROR | the level allows it |
//! | `warn!` | WARNING | the level allows it |
//! | `info!` | NOTICE | the level allows it |
//! | `debug!` | INFO | the level allows it and a flag covers the event's target |
//! | `trace!` | DEBUG | the level allows it and a flag covers the event's target |
//!
//! So the default print level, INFO, shows errors, warnings and notices, and INFO lines of the
//! flags given with `-L`, as in SPDK. A line goes to stderr if the *print level* allows it, and to
//! syslog if the *log level* allows it. The log thread writes both. If stderr is systemd's journal, a
//! line goes there once, on stderr, with the priority that it has in syslog and without a time.
#![expect(unsafe_code, reason = "local time and syslog exist in libc only")]

use std::ffi::CString;
use std::fmt::{self, Write as _};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

mod errors;
mod flags;
mod journal;
mod writer;

use flags::FLAGS;
use writer::{Entry, Writer};

pub(crate) use errors::errors_of;
pub(crate) use flags::is_flag;

/// SPDK's log levels, the most important first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// An operation failed.
    Error,
    /// An operation succeeded with a limitation, or a condition needs attention.
    Warning,
    /// Normal operation, for operators.
    Notice,
    /// Details for operators; needs a flag.
    Info,
    /// Details for developers; needs a flag.
    Debug,
}

impl Level {
    const ALL: [Self; 5] = [Self::Error, Self::Warning, Self::Notice, Self::Info, Self::Debug];

    /// The name in log lines and in RPCs.
    pub(crate) fn name(self) -> &'static str {
        ["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"][self as usize]
    }

    /// The level of this name, in upper case.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    fn from_u8(number: u8) -> Self {
        Self::ALL[usize::from(number).min(Self::ALL.len() - 1)]
    }

    fn of(level: &tracing::Level) -> Self {
        match *level {
            tracing::Level::ERROR => Self::Error,
            tracing::Level::WARN => Self::Warning,
            tracing::Level::INFO => Self::Notice,
            tracing::Level::DEBUG => Self::Info,
            tracing::Level::TRACE => Self::Debug,
        }
    }

    fn syslog_priority(self) -> libc::c_int {
        match self {
            Self::Error => libc::LOG_ERR,
            Self::Warning => libc::LOG_WARNING,
            Self::Notice => libc::LOG_NOTICE,
            // As in SPDK, which does not use LOG_DEBUG.
            Self::Info | Self::Debug => libc::LOG_INFO,
        }
    }
}

/// The settings of the log, shared by all clones.
#[derive(Clone)]
pub(crate) struct Log(Arc<State>);

struct State {
    print_level: AtomicU8,
    syslog_level: AtomicU8,
    timestamps: AtomicBool,
    /// A bit for each flag, the lower 64 first.
    flags: [AtomicU64; 2],
    writer: OnceLock<Writer>,
}

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// With SPDK's defaults: INFO to stderr, NOTICE to syslog, timestamps, no flags.
    pub(crate) fn new() -> Self {
        Self(Arc::new(State {
            print_level: AtomicU8::new(Level::Info as u8),
            syslog_level: AtomicU8::new(Level::Notice as u8),
            timestamps: AtomicBool::new(true),
            flags: Default::default(),
            writer: OnceLock::new(),
        }))
    }

    /// Starts the log thread and makes this the log of the process, on stderr and in syslog.
    ///
    /// # Errors
    /// The process already has a log, or the thread cannot be started.
    pub(crate) fn install(&self) -> io::Result<()> {
        open_syslog();
        let writer = Writer::start(syslog)?;
        if self.0.writer.set(writer).is_err() {
            return Err(io::Error::other("the log is already installed"));
        }
        let (print, log) = (self.clone(), self.clone());
        let in_journal = journal::is_stderr();
        if in_journal {
            self.set_timestamps(false);
        }
        let layer = Lines {
            log: self.clone(),
            print: Box::new(move |level, line| {
                let priority = level.syslog_priority();
                let line = if in_journal { format!("<{priority}>{line}") } else { line.to_owned() };
                print.write(Entry::Print(line));
            }),
            syslog: Box::new(move |(level, line)| {
                if !in_journal || level > log.print_level() {
                    log.write(Entry::Syslog(level.syslog_priority(), line));
                }
            }),
        };
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
            .map_err(io::Error::other)
    }

    fn write(&self, entry: Entry) {
        if let Some(writer) = self.0.writer.get() {
            writer.send(entry);
        }
    }

    /// Waits, for a bounded time, until all earlier lines are written. For the exit of the process.
    pub(crate) fn flush(&self) {
        if let Some(writer) = self.0.writer.get() {
            writer.flush();
        }
    }

    /// The least important level that goes to stderr.
    pub(crate) fn print_level(&self) -> Level {
        Level::from_u8(self.0.print_level.load(Relaxed))
    }

    /// Changes the least important level that goes to stderr.
    pub(crate) fn set_print_level(&self, level: Level) {
        self.0.print_level.store(level as u8, Relaxed);
    }

    /// The least important level that goes to syslog.
    pub(crate) fn log_level(&self) -> Level {
        Level::from_u8(self.0.syslog_level.load(Relaxed))
    }

    /// Changes the least important level that goes to syslog.
    pub(crate) fn set_log_level(&self, level: Level) {
        self.0.syslog_level.store(level as u8, Relaxed);
    }

    /// Sets whether lines on stderr start with the time.
    pub(crate) fn set_timestamps(&self, enabled: bool) {
        self.0.timestamps.store(enabled, Relaxed);
    }

    /// Sets or clears the flags that a pattern matches. Returns false if it matches none.
    pub(crate) fn set_flag(&self, pattern: &str, enabled: bool) -> bool {
        let bits = flags::matching(pattern);
        for (half, flags) in halves(bits).into_iter().zip(&self.0.flags) {
            if enabled {
                flags.fetch_or(half, Relaxed);
            } else {
                flags.fetch_and(!half, Relaxed);
            }
        }
        bits != 0
    }

    /// All flags by name, and whether each is set.
    pub(crate) fn flags(&self) -> impl Iterator<Item = (&'static str, bool)> {
        let bits = self.flag_bits();
        (0..).zip(FLAGS).map(move |(bit, (flag, _)): (u32, _)| (flag, bits & (1 << bit) != 0))
    }

    fn flag_bits(&self) -> u128 {
        let [low, high] = &self.0.flags;
        u128::from(low.load(Relaxed)) | u128::from(high.load(Relaxed)) << 64
    }

    fn flag_covers(&self, target: &str) -> bool {
        flags::cover(self.flag_bits(), target)
    }

    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        let level = Level::of(metadata.level());
        level <= self.print_level().max(self.log_level())
            && (level <= Level::Notice || self.flag_covers(metadata.target()))
    }
}

fn halves(bits: u128) -> [u64; 2] {
    [bits, bits >> 64].map(|half| (half & u128::from(u64::MAX)).try_into().unwrap_or(0))
}

type Print = Box<dyn Fn(Level, &str) + Send + Sync>;
type Sink<T> = Box<dyn Fn(T) + Send + Sync>;

/// Turns events into lines.
struct Lines {
    log: Log,
    print: Print,
    syslog: Sink<(Level, String)>,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        // tracing must call `enabled` for each event, because levels and flags change.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        self.log.wants(metadata)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let level = Level::of(metadata.level());
        let mut line = String::with_capacity(160);
        let time_len = if self.log.0.timestamps.load(Relaxed) {
            push_time(&mut line, SystemTime::now());
            line.len()
        } else {
            0
        };
        push_place(&mut line, metadata);
        line.push_str(": *");
        line.push_str(level.name());
        line.push_str("*: ");
        event.record(&mut Text(&mut line));
        line.push('\n');
        if level <= self.log.print_level() {
            (self.print)(level, &line);
        }
        if level <= self.log.log_level() {
            (self.syslog)((level, line[time_len..].trim_end().to_owned()));
        }
    }
}

/// Appends `FILE:  42:module`: the file without its directories, the line, and the module's path
/// with underscores in place of SPDK's function.
fn push_place(line: &mut String, metadata: &Metadata<'_>) {
    let file = metadata.file().unwrap_or("?");
    let file = Path::new(file).file_name().map_or("?".into(), |name| name.to_string_lossy());
    let module = metadata.module_path().unwrap_or(metadata.target()).replace("::", "_");
    let _ = write!(line, "{file}:{:4}:{module}", metadata.line().unwrap_or(0));
}

/// Appends `[YYYY-MM-DD HH:MM:SS.uuuuuu] ` in local time.
fn push_time(line: &mut String, now: SystemTime) {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = libc::time_t::try_from(since.as_secs()).unwrap_or(libc::time_t::MAX);
    // SAFETY: `tm` consists of integers and a pointer that may be null, so zeroes are valid.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals, and `localtime_r` keeps neither.
    unsafe { libc::localtime_r(&seconds, &mut tm) };
    let _ = write!(
        line,
        "[{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06}] ",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        since.subsec_micros()
    );
}

/// Appends an event's message and its other fields as ` name=value`. Replaces control characters by
/// spaces, so that a text from a client cannot forge a log line.
struct Text<'a>(&'a mut String);

impl Visit for Text<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() != "message" {
            let _ = write!(self.0, " {}=", field.name());
        }
        let _ = write!(OneLine(self.0), "{value:?}");
    }
}

struct OneLine<'a>(&'a mut String);

impl fmt::Write for OneLine<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend(text.chars().map(|c| if c.is_control() { ' ' } else { c }));
        Ok(())
    }
}

fn open_syslog() {
    // SAFETY: syslog keeps the name, which is a static string.
    unsafe { libc::openlog(c"spdk".as_ptr(), libc::LOG_PID, libc::LOG_LOCAL7) };
}

fn syslog(priority: libc::c_int, line: &str) {
    let Ok(line) = CString::new(line) else { return };
    // SAFETY: the format takes one string; both strings are terminated and live.
    unsafe { libc::syslog(priority, c"%s".as_ptr(), line.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Runs `body` with a log that collects its lines. Returns the lines for stderr and for syslog.
    fn collect(log: &Log, body: impl FnOnce()) -> (Vec<String>, Vec<String>) {
        let printed = Arc::new(Mutex::new(Vec::new()));
        let logged = Arc::new(Mutex::new(Vec::new()));
        let (print, syslog) = (Arc::clone(&printed), Arc::clone(&logged));
        let layer = Lines {
            log: log.clone(),
            print: Box::new(move |_, line| print.lock().unwrap().push(line.to_owned())),
            syslog: Box::new(move |(_, line)| syslog.lock().unwrap().push(line)),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), body);
        (std::mem::take(&mut printed.lock().unwrap()), std::mem::take(&mut logged.lock().unwrap()))
    }

    fn one_of_each() {
        tracing::error!(target: "vhost_ring", "e");
        tracing::warn!(target: "vhost_ring", "w");
        tracing::info!(target: "vhost_ring", "n");
        tracing::debug!(target: "vhost_ring", "i");
        tracing::trace!(target: "vhost_ring", "d");
    }

    fn levels(lines: &[String]) -> String {
        lines.iter().filter_map(|line| line.trim_end().chars().last()).collect()
    }

    #[test]
    fn a_line_has_spdks_format() {
        let (printed, logged) = collect(&Log::new(), || {
            tracing::error!(vid = 3, name = "a\nb", "it {}", "broke\x1b[31m\r\n");
        });
        let line = &printed[0];
        let (time, rest) = line.split_at("[2026-01-01 00:00:00.000000] ".len());
        let shape: String =
            time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "[0000-00-00 00:00:00.000000] ");
        let (place, text) = rest.split_once(": *ERROR*: ").unwrap();
        assert_eq!(text, "it broke [31m   vid=3 name=a b\n");
        let parts: Vec<&str> = place.split(':').collect();
        assert_eq!(parts[0], "logging.rs");
        assert_eq!(parts[1].len(), 4, "the line number is padded to four: {place}");
        assert!(parts[1].trim_start().parse::<u32>().is_ok());
        assert!(parts.len() == 3 && parts[2].ends_with("logging_tests"), "{place}");
        assert_eq!(logged, [rest.trim_end()]);
    }

    #[test]
    fn the_time_is_local_time() {
        let mut line = String::new();
        push_time(&mut line, UNIX_EPOCH + std::time::Duration::from_micros(1_500_000));
        // In every zone, offsets since 1970 are whole minutes.
        assert!(line.ends_with(":01.500000] "), "{line}");
    }

    #[test]
    fn levels_and_flags_select_lines_and_change_at_run_time() {
        let log = Log::new();
        assert_eq!((log.print_level(), log.log_level()), (Level::Info, Level::Notice));
        let (printed, logged) = collect(&log, one_of_each);
        assert_eq!((levels(&printed), levels(&logged)), ("ewn".into(), "ewn".into()));

        log.set_print_level(Level::Warning);
        log.set_log_level(Level::Error);
        let (printed, logged) = collect(&log, one_of_each);
        assert_eq!((levels(&printed), levels(&logged)), ("ew".into(), "e".into()));

        // The same call sites, within one subscriber.
        let (printed, _) = collect(&log, || {
            log.set_print_level(Level::Error);
            one_of_each();
            log.set_print_level(Level::Debug);
            one_of_each();
            assert!(log.set_flag("vhost_ring", true));
            one_of_each();
            assert!(log.set_flag("vhost_ring", false));
            log.set_print_level(Level::Info);
            assert!(log.set_flag("all", true));
            one_of_each();
        });
        assert_eq!(levels(&printed), "eewnewnidewni");
    }

    #[test]
    fn flags_cover_modules() {
        let log = Log::new();
        assert!(!log.flag_covers("vhost_target::queue"));
        log.set_flag("vhost_ring", true);
        for (target, covered) in [
            ("vhost_ring", true),
            ("vhost_target::queue", true),
            ("vhost_target::queue::core", true),
            ("vhost_target::queues", false),
            ("vhost_target", false),
            ("rpc", false),
        ] {
            assert_eq!(log.flag_covers(target), covered, "{target}");
        }
        log.set_flag("all", true);
        assert!(log.flag_covers("vhost_target::session") && !log.flag_covers("mio::poll"));
        assert!(log.flags().all(|(_, set)| set));
        log.set_flag("all", false);
        assert!(log.flags().all(|(_, set)| !set));
    }

    #[test]
    fn names() {
        assert!(is_flag("all") && is_flag("vhost_blk_data") && !is_flag("nope") && !is_flag(""));
        assert!(!Log::new().set_flag("nope", true));
        assert_eq!(Level::from_name("WARNING"), Some(Level::Warning));
        assert_eq!(Level::from_name("warning"), None);
        assert_eq!(Level::from_name("WARN"), None);
    }
}
