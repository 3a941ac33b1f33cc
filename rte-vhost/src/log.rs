//! Sends DPDK's log lines to `tracing`, target `dpdk`.
#![expect(unsafe_code, reason = "a C stream whose write function is in Rust")]

use std::ffi::{c_char, c_int, c_long, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::{Mutex, Once, PoisonError};

use tracing::Level;

/// The length limit of a line, in bytes; a longer line is logged in pieces. DPDK's own lines are
/// shorter than 1,024.
const LINE_BYTES_MAX: usize = 4096;

/// Parts of lines that DPDK logs as notices, warnings or errors although this program is
/// unaffected. They are logged at debug.
const HARMLESS: [&str; 3] = [
    // An unprivileged user may lack the run-time directory. `--no-shconf` and `--in-memory` put
    // nothing there.
    "Error creating '",
    // `--in-memory` needs no mount.
    "but no mounted hugetlbfs found for that size",
    // DPDK logs this for every page size that it does not use, for example 1 GiB. Free pages of the
    // used size were found before EAL was started.
    " kB hugepages reported on node ",
];

/// Text that is collected until it forms whole lines.
static PENDING: Mutex<Lines> = Mutex::new(Lines::new());

/// Sends every line that DPDK logs from now on to `tracing`.
///
/// Must be called before `rte_eal_init` to get its lines; further calls have no effect. Levels:
/// emergency to error → error, warning → warn, notice → info, info → debug, debug → trace.
/// rte_vhost logs every message of every front end at info, so an operator at level info does not
/// see those lines. If libc refuses the stream, DPDK continues to log to stderr.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let functions =
            spdk_sys::cookie_io_functions_t { write: Some(write), ..Default::default() };
        // SAFETY: the mode is a C string, the cookie is never dereferenced, and `write` has the
        // type that `fopencookie` calls.
        let stream = unsafe { spdk_sys::fopencookie(null_mut(), c"w".as_ptr(), functions) };
        if stream.is_null() {
            tracing::warn!(target: "dpdk", "cannot open a log stream; DPDK logs to stderr");
            return;
        }
        // SAFETY: the stream is valid and never closed, so DPDK may keep it for the life of the
        // process.
        let refused = unsafe { spdk_sys::rte_openlog_stream(stream) } != 0;
        if refused {
            tracing::warn!(target: "dpdk", "DPDK refused the log stream; it logs to stderr");
        }
    });
}

/// Runs `call`. Returns its result and the lines that DPDK logged as errors meanwhile, on any
/// thread: DPDK's functions report the reason of a failure only in the log.
pub(crate) fn errors_of<T>(call: impl FnOnce() -> T) -> (T, Vec<String>) {
    let errors = || PENDING.lock().unwrap_or_else(PoisonError::into_inner).errors.take();
    PENDING.lock().unwrap_or_else(PoisonError::into_inner).errors = Some(Vec::new());
    let result = call();
    (result, errors().unwrap_or_default())
}

/// `cookie_write_function_t`: takes the text of one log message, on the thread that logs it.
unsafe extern "C" fn write(_cookie: *mut c_void, text: *const c_char, len: usize) -> c_long {
    // SAFETY: stdio passes its own buffer with the number of bytes in it, and waits for this call.
    let text = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
    // SAFETY: the function only reads a thread-local variable, which DPDK sets before it writes to
    // the stream.
    let level = unsafe { spdk_sys::rte_log_cur_msg_loglevel() };
    // A log subscriber may panic, for example when stderr is closed. A panic must not unwind into
    // C.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
        pending.push(text, level_of(level), tell);
    }));
    len as c_long
}

/// Logs one line through `tracing`.
fn tell(level: Level, line: &str) {
    match level {
        Level::ERROR => tracing::error!(target: "dpdk", "{line}"),
        Level::WARN => tracing::warn!(target: "dpdk", "{line}"),
        Level::INFO => tracing::info!(target: "dpdk", "{line}"),
        Level::DEBUG => tracing::debug!(target: "dpdk", "{line}"),
        Level::TRACE => tracing::trace!(target: "dpdk", "{line}"),
    }
}

/// Returns the `tracing` level of DPDK's `level`; text without a level counts as info.
fn level_of(level: c_int) -> Level {
    match u32::try_from(level).unwrap_or(spdk_sys::RTE_LOG_INFO) {
        0 => Level::DEBUG,
        1..=spdk_sys::RTE_LOG_ERR => Level::ERROR,
        spdk_sys::RTE_LOG_WARNING => Level::WARN,
        spdk_sys::RTE_LOG_NOTICE => Level::INFO,
        spdk_sys::RTE_LOG_INFO => Level::DEBUG,
        _ => Level::TRACE,
    }
}

/// Splits a stream of text into lines.
struct Lines {
    line: Vec<u8>,
    /// The level that came with the first part of `line`.
    level: Option<Level>,
    /// The lines at level error, while [`errors_of`] collects them.
    errors: Option<Vec<String>>,
}

impl Lines {
    const fn new() -> Lines {
        Lines { line: Vec::new(), level: None, errors: None }
    }

    /// Adds `text`, logged at `level`, and calls `tell` for each line that it completes. Skips
    /// empty lines.
    fn push(&mut self, text: &[u8], level: Level, mut tell: impl FnMut(Level, &str)) {
        for part in text.split_inclusive(|byte| *byte == b'\n') {
            self.level.get_or_insert(level);
            let (part, ends) = match part.strip_suffix(b"\n") {
                Some(part) => (part, true),
                None => (part, false),
            };
            for piece in part.chunks(LINE_BYTES_MAX) {
                if self.line.len() + piece.len() > LINE_BYTES_MAX {
                    self.end_line(&mut tell);
                    self.level = Some(level);
                }
                self.line.extend_from_slice(piece);
            }
            if ends {
                self.end_line(&mut tell);
            }
        }
    }

    /// Passes `line` to `tell`, and empties it.
    fn end_line(&mut self, tell: &mut impl FnMut(Level, &str)) {
        let level = self.level.take().unwrap_or(Level::DEBUG);
        let line = String::from_utf8_lossy(&self.line);
        let line = line.trim_end();
        if !line.is_empty() {
            let harmless = HARMLESS.iter().any(|part| line.contains(part));
            let level = if harmless { level.max(Level::DEBUG) } else { level };
            if let (Level::ERROR, Some(errors)) = (level, &mut self.errors) {
                errors.push(line.to_owned());
            }
            tell(level, line);
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(parts: &[(&str, Level)]) -> (Vec<(Level, String)>, Vec<String>) {
        let mut lines = Lines { errors: Some(Vec::new()), ..Lines::new() };
        let mut told = Vec::new();
        for (text, level) in parts {
            lines.push(text.as_bytes(), *level, |level, line| told.push((level, line.to_owned())));
        }
        (told, lines.errors.unwrap_or_default())
    }

    #[test]
    fn parts_of_a_message_are_joined_to_one_line() {
        let (told, _) = told(&[
            ("EAL: Detected", Level::DEBUG),
            (" 2 NUMA nodes\nEAL: next\n\n", Level::WARN),
            ("EAL: no end", Level::WARN),
        ]);
        assert_eq!(
            told,
            [
                (Level::DEBUG, "EAL: Detected 2 NUMA nodes".to_owned()),
                (Level::WARN, "EAL: next".to_owned())
            ]
        );
    }

    #[test]
    fn a_long_line_is_logged_in_pieces_without_loss() {
        let text = "x".repeat(3 * LINE_BYTES_MAX / 2);
        let (told, _) = told(&[(&text, Level::WARN), (&text, Level::WARN), ("\n", Level::WARN)]);
        assert!(told.iter().all(|(level, _)| *level == Level::WARN));
        assert!(told.iter().all(|(_, line)| line.len() <= LINE_BYTES_MAX));
        assert_eq!(told.iter().map(|(_, line)| line.len()).sum::<usize>(), 2 * text.len());
    }

    #[test]
    fn errors_are_collected_except_harmless_ones() {
        let (told, errors) = told(&[
            ("EAL: FATAL: Cannot init memory\n", Level::ERROR),
            ("EAL: Error creating '/run/user/1000/dpdk': No such file\n", Level::ERROR),
            ("EAL: a warning\n", Level::WARN),
        ]);
        assert_eq!(errors, ["EAL: FATAL: Cannot init memory"]);
        assert_eq!(told[1].0, Level::DEBUG);
    }

    #[test]
    fn dpdk_messages_are_received_with_their_level() {
        install();
        let ((), errors) = errors_of(|| {
            for (level, format) in [
                (spdk_sys::RTE_LOG_ERR, c"TEST: an error, %d\n"),
                (spdk_sys::RTE_LOG_INFO, c"TEST: a notice, %d\n"),
            ] {
                // SAFETY: the format takes one int; log type 0 is EAL's own.
                unsafe { spdk_sys::rte_log(level, 0, format.as_ptr(), 7 as c_int) };
            }
        });
        assert_eq!(errors, ["TEST: an error, 7"]);
    }

    #[test]
    fn dpdk_info_messages_are_not_shown_at_level_info() {
        assert_eq!(level_of(spdk_sys::RTE_LOG_INFO as c_int), Level::DEBUG);
        assert_eq!(level_of(spdk_sys::RTE_LOG_DEBUG as c_int), Level::TRACE);
        assert_eq!(level_of(spdk_sys::RTE_LOG_WARNING as c_int), Level::WARN);
        assert_eq!(level_of(spdk_sys::RTE_LOG_ERR as c_int), Level::ERROR);
        assert_eq!(level_of(spdk_sys::RTE_LOG_EMERG as c_int), Level::ERROR);
        assert_eq!(level_of(-1), Level::DEBUG);
    }
}
