//! Shallow copies: what a read-only volume itself has, copied to another bdev.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bdev::method::{Answer, DecodeFailure, Method, MethodError, Params, strerror};
use bdev::{Aside, Bdev, ClaimKind, Error, Host, Request, Rights, ThreadChannel};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::error;

use super::state::{COPY_LIMIT, State};
use super::volumes::find;
use super::{LvolModule, NAME};
use crate::disk::LvolDisk;

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// Copies whose end was not asked for. SPDK keeps any number.
const KEPT: usize = 1024;

pub(super) fn methods(module: &LvolModule) -> Vec<Method> {
    vec![
        module.method("bdev_lvol_start_shallow_copy", parse_start, start),
        module.method("bdev_lvol_check_shallow_copy", parse_check, check),
    ]
}

/// The copies, by number.
#[derive(Default)]
pub(super) struct Copies {
    last: Cell<u32>,
    copies: RefCell<BTreeMap<u32, Arc<Copy>>>,
}

/// A copy.
#[derive(Default)]
struct Copy {
    copied: AtomicU64,
    total: AtomicU64,
    stopped: AtomicBool,
    /// The positive errno of a copy that has failed, 0 of one that has ended.
    ended: Mutex<Option<i32>>,
    /// The bdevs that it uses.
    bdevs: Mutex<Vec<uuid::Uuid>>,
}

impl Copies {
    /// Stops the copies from or to a bdev that was removed.
    pub(super) fn stop(&self, bdev: &Arc<dyn Bdev>) {
        for copy in self.copies.borrow().values() {
            let bdevs = copy.bdevs.lock().unwrap_or_else(PoisonError::into_inner);
            if bdevs.contains(&bdev.uuid()) {
                copy.stopped.store(true, Ordering::Relaxed);
            }
        }
    }

    fn add(&self) -> (u32, Arc<Copy>) {
        let id = self.last.get().wrapping_add(1).max(1);
        self.last.set(id);
        let copy = Arc::<Copy>::default();
        let mut copies = self.copies.borrow_mut();
        copies.insert(id, Arc::clone(&copy));
        while copies.len() > KEPT {
            let ended = copies.iter().find(|(_, copy)| copy.result().is_some()).map(|(id, _)| *id);
            let Some(oldest) = ended else { break };
            copies.remove(&oldest);
        }
        (id, copy)
    }
}

impl Copy {
    fn result(&self) -> Option<i32> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, errno: i32) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(errno);
    }

    /// Copies the clusters that the volume has. Blocks.
    fn run(&self, from: &Arc<LvolDisk>, to: &Arc<dyn Bdev>) -> Result<(), Error> {
        let (volume, size) = (&from.volume, from.volume.cluster_size);
        if !volume.read_only.load(Ordering::Acquire) {
            let text = format!("{}: it is not read-only", from.name());
            return Err(Error::of_errno(text, libc::EPERM));
        }
        if to.size_bytes() < from.size_bytes() || to.block_size() != from.block_size() {
            let text = format!("{}: it is smaller, or has other blocks", to.name());
            return Err(Error::Invalid(text));
        }
        let all = 0..volume.clusters.load(Ordering::Acquire);
        let clusters: Vec<u64> = all.filter(|index| volume.table.is_own(*index)).collect();
        self.total.store(clusters.len() as u64, Ordering::Relaxed);
        let source: Arc<dyn Bdev> = Arc::clone(from) as _;
        let mut reader = ThreadChannel::open(&source, 1, Rights::Read)?;
        let mut writer = ThreadChannel::open(to, 1, Rights::Write)?;
        let system = |bdev: &dyn Bdev, errno| Error::of_errno(bdev.name(), errno);
        for index in clusters {
            let (mut at, end) = (index * size, (index + 1) * size);
            while at < end {
                if self.stopped.load(Ordering::Relaxed) {
                    return Err(system(&**to, libc::ENODEV));
                }
                let len = PIECE.min(end - at);
                let bytes = usize::try_from(len).unwrap_or(1);
                let read = reader.run(Request::read(at, bytes));
                let read = read.map_err(|errno| system(&**from, errno))?;
                writer.run(Request::write(at, read)).map_err(|errno| system(&**to, errno))?;
                at += len;
            }
            self.copied.fetch_add(1, Ordering::Relaxed);
        }
        if to.features().flush {
            let flush = Request::plain(bdev::Op::Flush, 0, 0);
            writer.run(flush).map_err(|errno| system(&**to, errno))?;
        }
        Ok(())
    }
}

struct Start {
    from: String,
    to: String,
}

fn parse_start(params: &Params) -> Result<Start, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        src_lvol_name: String,
        dst_bdev_name: String,
    }
    let Given { src_lvol_name: from, dst_bdev_name: to } =
        params.decode(DecodeFailure::INTERNAL)?;
    Ok(Start { from, to })
}

async fn start(state: Rc<State>, host: Rc<dyn Host>, Start { from, to }: Start) -> Answer {
    const METHOD: &str = "bdev_lvol_start_shallow_copy";
    let disk = Arc::clone(&find(&host, &from)?.disk);
    let none = || MethodError::invalid_params(strerror(libc::ENODEV));
    let target = host.registry().bdev(&to).ok_or_else(none)?;
    let claim = host.registry().claim(&target, ClaimKind::WriteExclusive, NAME);
    let (id, copy) = state.copies.add();
    *copy.bdevs.lock().unwrap_or_else(PoisonError::into_inner) = vec![disk.uuid(), target.uuid()];
    let claim = match claim {
        Ok(claim) => claim,
        Err(other) => {
            error!("{METHOD}: bdev {to}: {} uses it", other.owner);
            copy.end(libc::EPERM);
            return Ok(json!({ "operation_id": id }));
        }
    };
    let held = Rc::clone(&host);
    host.spawn(Box::pin(async move {
        let (aside, of_thread) = (Aside::new(from, 1), Arc::clone(&copy));
        let copied = aside.run(&held, COPY_LIMIT, move || of_thread.run(&disk, &target)).await;
        let errno = copied.err().map_or(0, |e| {
            error!("{METHOD}: {e}");
            e.errno()
        });
        drop(claim);
        copy.end(errno);
        held.released();
        bdev::life::settle(&held).await;
    }));
    Ok(json!({ "operation_id": id }))
}

fn parse_check(params: &Params) -> Result<u32, MethodError> {
    #[derive(Deserialize)]
    struct Given {
        operation_id: u32,
    }
    let Given { operation_id } = params.decode(DecodeFailure::INTERNAL)?;
    Ok(operation_id)
}

fn check(state: Rc<State>, _: Rc<dyn Host>, id: u32) -> std::future::Ready<Answer> {
    let copies = &state.copies.copies;
    let found = copies.borrow().get(&id).cloned();
    let Some(copy) = found else {
        return std::future::ready(Err(MethodError::errno(libc::ENODEV)));
    };
    let (result, count) = (copy.result(), |count: &AtomicU64| count.load(Ordering::Relaxed));
    let state = match result {
        None => "in progress",
        Some(0) => "complete",
        Some(_) => "error",
    };
    let mut shown: Value = json!({
        "copied_clusters": count(&copy.copied),
        "total_clusters": count(&copy.total),
        "state": state,
    });
    if let Some(errno) = result.filter(|errno| *errno != 0) {
        shown["error"] = strerror(errno).into();
    }
    if result.is_some() {
        copies.borrow_mut().remove(&id);
    }
    std::future::ready(Ok(shown))
}
