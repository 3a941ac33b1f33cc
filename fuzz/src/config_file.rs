//! Fuzzes the reader of `-c`: the module of `vhost-app`, included as source, and a replay of calls to methods that do
//! nothing.
//!
//! Invariants: a text is either read or refused with a reason in one line; each call that is read is executed once,
//! in the pass of its phase; text in comments is ignored, and strict JSON has no comments.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;

use rpc::{Phase, Phases, Registry, RpcError};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::guest::memfd;
use crate::input::Input;
use crate::product::config_file::{ConfigFile, Error, report};

struct Stage {
    runtime: Runtime,
    registry: Rc<Registry>,
    file: File,
    path: PathBuf,
    /// Calls per pass, and whether they fail.
    calls: Rc<[Cell<usize>; 2]>,
    failing: Rc<Cell<bool>>,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new(Stage::new());
}

impl Stage {
    fn new() -> Self {
        let calls = Rc::<[Cell<usize>; 2]>::default();
        let failing = Rc::<Cell<bool>>::default();
        let mut registry = Registry::new();
        let methods = [
            ("bdev_set_options", Phases::Startup),
            ("log_set_level", Phases::Both),
            ("bdev_malloc_create", Phases::Runtime),
            ("vhost_create_blk_controller", Phases::Runtime),
        ];
        for (name, phases) in methods {
            let (calls, failing) = (Rc::clone(&calls), Rc::clone(&failing));
            registry.register(name, phases, move |params| {
                let pass = usize::from(params.phase() == Phase::Runtime);
                calls[pass].set(calls[pass].get() + 1);
                let answer = if failing.get() { Err(RpcError::errno(22)) } else { Ok(Value::Null) };
                std::future::ready(answer)
            });
        }
        let file = File::from(memfd(0));
        Self {
            runtime: Builder::new_current_thread().enable_time().build().expect("a runtime"),
            registry: Rc::new(registry),
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            file,
            calls,
            failing,
        }
    }

    fn read(&self, text: &[u8], ignore_errors: bool) -> Result<ConfigFile, Error> {
        self.file.set_len(text.len() as u64).expect("a memfd");
        self.file.write_all_at(text, 0).expect("a memfd");
        ConfigFile::read(&self.path, ignore_errors)
    }

    /// Both passes, as at the start of `vhost`.
    fn replay(&self, config: &ConfigFile) -> Result<(), Error> {
        self.calls.iter().for_each(|calls| calls.set(0));
        self.runtime.block_on(async {
            config.replay(&self.registry, Phase::Startup).await?;
            config.replay(&self.registry, Phase::Runtime).await
        })
    }
}

/// Fragments from which structured inputs are made.
const PARTS: [&str; 42] = [
    "\"\\\"//\"",
    "\"\\\"/*\"",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "\\",
    "/*",
    "*/",
    "//",
    "\n",
    " ",
    "null",
    "true",
    "1",
    "{}",
    "[]",
    "\"subsystems\":",
    "\"subsystem\":",
    "\"config\":",
    "\"method\":",
    "\"params\":",
    "\"bdev\"",
    "\"vhost_blk\"",
    "\"nvmf\"",
    "\"bdev_set_options\"",
    "\"log_set_level\"",
    "\"bdev_malloc_create\"",
    "\"vhost_create_blk_controller\"",
    "\"trace_set_tpoint_mask\"",
    "\"unheard_of\"",
    "\"\\\"\"",
    "{\"subsystems\":[",
    "{\"subsystem\":\"bdev\",\"config\":[",
    "{\"method\":\"bdev_malloc_create\"}",
    "{\"method\":\"log_set_level\",\"params\":{}}",
    "{\"method\":\"bdev_set_options\"}",
    "]}",
    "\u{e9}",
];

/// Runs an input.
///
/// # Panics
/// An invariant is broken.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let how = input.u8();
    let text = if how & 1 == 0 {
        input.bytes(8192).to_vec()
    } else {
        let mut text = String::new();
        while !input.is_empty() {
            text.push_str(input.pick(&PARTS));
        }
        text.into_bytes()
    };
    STAGE.with_borrow(|stage| {
        stage.failing.set(how & 2 != 0);
        let config = match stage.read(&text, false) {
            Ok(config) => config,
            Err(e) => {
                refused(&e);
                let json = serde_json::from_slice::<Value>(&text).is_ok();
                let reason = e.to_string();
                let blind = reason.contains("not JSON") || reason.contains("comment without");
                assert!(!(json && blind), "{reason}: {}", String::from_utf8_lossy(&text));
                return;
            }
        };
        let calls = match stage.replay(&config) {
            Ok(()) => {
                assert!(!stage.failing.get() || stage.total() == 0, "a failure was passed over");
                Some(stage.total())
            }
            Err(e) => {
                refused(&e);
                None
            }
        };
        let careless = stage.read(&text, true).expect("it was read just now");
        stage.replay(&careless).expect("errors are ignored");
        assert!(calls.is_none_or(|calls| calls == stage.total()), "{calls:?}");
        // The contents of comments do not matter.
        let commented = [b"// [{\"}\n/* \" */".as_slice(), &text, b"/* { */"].concat();
        let again = stage.read(&commented, true).expect("comments are allowed");
        let before = stage.total();
        stage.replay(&again).expect("errors are ignored");
        assert_eq!(stage.total(), before, "with comments");
    });
}

impl Stage {
    fn total(&self) -> usize {
        self.calls.iter().map(Cell::get).sum()
    }
}

fn refused(error: &Error) {
    assert!(!error.to_string().is_empty() && report(error) != 0);
}
