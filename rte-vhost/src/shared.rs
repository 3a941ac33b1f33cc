//! The transport's state that its callbacks and its methods share.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once, OnceLock};

use closer::Account;
use vhost_target::{OnStart, Target};

use crate::listeners::Listeners;

/// rte_vhost's callbacks take no argument of the application, so a process has one transport.
static SHARED: OnceLock<Shared> = OnceLock::new();

pub(crate) struct Shared {
    pub(crate) target: Arc<Target>,
    pub(crate) anchor: PathBuf,
    /// The account that owns the fds of connections to the anchor socket.
    anchor_account: Account,
    pub(crate) listeners: Listeners,
    /// Whether replies to GET_VRING_BASE can be deferred.
    deferral: AtomicBool,
    /// Whether fds from front ends arrive in this program's `recvmsg` instead of rte_vhost's.
    fds_arrive: AtomicBool,
    /// Called on the event thread before its first message.
    on_event_thread: OnStart,
    begun: Once,
}

impl Shared {
    /// Prepares the event thread. To be called there, before its first message.
    pub(crate) fn begin_event_thread(&self) {
        self.begun.call_once(|| (self.on_event_thread)());
    }

    /// The account that owns the fds of front ends that connect to `path`.
    pub(crate) fn account_of(&self, path: &Path) -> Account {
        if path == self.anchor {
            return self.anchor_account.clone();
        }
        // The controller was deleted meanwhile: its late connections get an account of their own.
        let account = self.target.account(path);
        account.unwrap_or_else(|| Account::new(path.display().to_string()))
    }

    pub(crate) fn deferral(&self) -> bool {
        self.deferral.load(Ordering::Relaxed)
    }

    pub(crate) fn set_deferral(&self, works: bool) {
        self.deferral.store(works, Ordering::Relaxed);
    }

    pub(crate) fn fds_arrive(&self) -> bool {
        self.fds_arrive.load(Ordering::Relaxed)
    }

    pub(crate) fn set_fds_arrive(&self, arrive: bool) {
        self.fds_arrive.store(arrive, Ordering::Relaxed);
    }
}

/// Makes the callbacks call `target`. rte_vhost's event thread calls `on_event_thread` first.
pub(crate) fn begin(
    target: &Arc<Target>,
    anchor: &Path,
    on_event_thread: OnStart,
) -> io::Result<()> {
    let shared = Shared {
        target: Arc::clone(target),
        anchor: anchor.to_owned(),
        anchor_account: Account::new("the start-up self-test"),
        listeners: Listeners::default(),
        deferral: AtomicBool::new(true),
        fds_arrive: AtomicBool::new(false),
        on_event_thread,
        begun: Once::new(),
    };
    SHARED
        .set(shared)
        .map_err(|_| io::Error::other("a process can have only one rte_vhost transport"))
}

/// The state that the callbacks share.
pub(crate) fn shared() -> &'static Shared {
    SHARED.get().expect("`begin` runs before every callback and method")
}
