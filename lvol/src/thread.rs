//! The thread of a store, which allocates and releases clusters for guests' I/O.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender};
use std::thread;

use bdev::{Ended, Error, Io, Op, Tag};
use blobstore::{BlobId, Place};
use tracing::warn;

use crate::core::{PREFETCHED_MAX, Shared};
use crate::link::Link;
use crate::table::Entry;
use crate::volume::{JOB_CLUSTERS, Job, Volume};

/// Jobs that are taken from one channel at a time, so that one channel does not hold up others.
const JOBS: usize = 32;
/// Clusters that are allocated for one volume at a time.
const CLUSTERS: usize = 64;

impl Job {
    /// The form in which a job goes through the line.
    pub(crate) fn io(self, tag: Tag, offset: u64, len: u64) -> Io {
        match self {
            Self::Allocate => Io::plain(Op::WriteZeroes, tag, offset, len),
            Self::Release => Io::plain(Op::Unmap, tag, offset, len),
            Self::Zero => Io::plain(Op::WriteZeroes, tag, offset, len).unmapping(true),
        }
    }

    fn of(io: &Io) -> Self {
        match io.op {
            Op::Unmap => Self::Release,
            _ if io.may_unmap => Self::Zero,
            _ => Self::Allocate,
        }
    }
}

/// Starts the thread. It ends when the store is closed, with the last channel.
///
/// # Errors
/// The system cannot start a thread.
pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    let shared = Arc::clone(shared);
    thread::Builder::new().name("vhost-lvs".into()).spawn(move || {
        let mut workers = Workers::default();
        loop {
            shared.waker.wait(|| has_work(&shared));
            let jobs = take_jobs(&shared);
            if shared.closed.load(Ordering::SeqCst) {
                jobs.iter().for_each(|(link, job)| {
                    link.line.complete(job.tag, Ended::Failed(libc::ENODEV));
                });
                if jobs.is_empty() && shared.lock_links().is_empty() {
                    break;
                }
                continue;
            }
            serve(&shared, &mut workers, jobs);
        }
        drop(workers);
        // A store that was dropped was not closed.
        let base = shared.lock().base.clone();
        base.close();
    })?;
    Ok(())
}

fn has_work(shared: &Shared) -> bool {
    let links = shared.lock_links();
    let ended = shared.closed.load(Ordering::SeqCst) && links.is_empty();
    ended || links.iter().any(|link| link.line.waiting() > 0)
}

type Taken = (Arc<Link>, Io);

fn take_jobs(shared: &Shared) -> Vec<Taken> {
    let links = shared.lock_links().clone();
    let mut jobs = vec![];
    for link in links {
        let taken = std::iter::from_fn(|| link.line.take_job()).take(JOBS);
        jobs.extend(taken.map(|job| (Arc::clone(&link), job)));
    }
    jobs
}

/// Does jobs: first all allocations, by volume, then one release for each volume.
fn serve(shared: &Arc<Shared>, workers: &mut Workers, jobs: Vec<Taken>) {
    let mut allocations: BTreeMap<BlobId, Vec<Taken>> = BTreeMap::new();
    let mut releases: BTreeMap<(BlobId, bool), Vec<Taken>> = BTreeMap::new();
    for (link, io) in jobs {
        let (id, job) = (link.volume.id, Job::of(&io));
        if link.line.abandoned().load(Ordering::Relaxed) {
            link.line.complete(io.tag, Ended::Failed(libc::ECANCELED));
        } else if job != Job::Allocate {
            releases.entry((id, job == Job::Zero)).or_default().push((link, io));
        } else if let Some(external) = external_of(shared, &link, &io) {
            workers.give(shared, external, (link, io));
        } else {
            allocations.entry(id).or_default().push((link, io));
        }
    }
    for (id, jobs) in allocations {
        allocate(shared, id, &jobs);
    }
    for ((id, zero), jobs) in releases {
        let ranges: Vec<_> = jobs.iter().map(|(link, io)| clusters(link, io)).collect();
        let released = shared.lock().release(shared, id, &ranges, zero);
        let Some((link, _)) = jobs.first() else { continue };
        let ended = ended(shared, &link.volume, released);
        jobs.iter().for_each(|(link, io)| link.line.complete(io.tag, ended));
    }
}

/// The external snapshot that must be read to allocate the clusters of a job, if it is to be read
/// beforehand.
fn external_of(shared: &Shared, link: &Link, io: &Io) -> Option<Vec<u8>> {
    let reads = |index| link.volume.table.get(index) == Entry::At(Place::External);
    if shared.cluster_size > PREFETCHED_MAX || !clusters(link, io).any(reads) {
        return None;
    }
    let facts = shared.lock_facts().clone();
    facts.volume(link.volume.id)?.external.clone()
}

/// The threads that allocate what external snapshots are read for, by the snapshots' ids: one that
/// hangs holds up only what needs it.
#[derive(Default)]
struct Workers(BTreeMap<Vec<u8>, Sender<Taken>>);

impl Workers {
    /// Gives a job to the thread of an external snapshot.
    fn give(&mut self, shared: &Arc<Shared>, external: Vec<u8>, job: Taken) {
        if let Some(worker) = self.0.get(&external) {
            // The thread ends after its sender is dropped.
            let _ = worker.send(job);
            return;
        }
        let (sender, jobs) = mpsc::channel::<Taken>();
        let (shared, id, volume) =
            (Arc::clone(shared), external.clone(), Arc::clone(&job.0.volume));
        let spawned = thread::Builder::new().name("vhost-lvs-copy".into()).spawn({
            let shared = Arc::clone(&shared);
            move || jobs.iter().for_each(|job| allocate_copied(&shared, &id, job))
        });
        match spawned {
            Ok(_) => {
                let _ = sender.send(job);
                self.0.insert(external, sender);
            }
            Err(source) => {
                let what = "cannot start a thread".to_owned();
                let ended = ended(&shared, &volume, Err(Error::System { what, source }));
                job.0.line.complete(job.1.tag, ended);
            }
        }
    }
}

/// Allocates some of the clusters of a job, with what an external snapshot has there.
fn allocate_copied(shared: &Shared, external: &[u8], job: Taken) {
    let (link, io) = &job;
    if link.line.abandoned().load(Ordering::Relaxed) || shared.closed.load(Ordering::Relaxed) {
        link.line.complete(io.tag, Ended::Failed(libc::ECANCELED));
        return;
    }
    let limit = usize::try_from(PREFETCHED_MAX / shared.cluster_size).unwrap_or(1).max(1);
    let not_own = |index: &u64| !link.volume.table.is_own(*index);
    let indices: Vec<u64> = clusters(link, io).filter(not_own).take(limit.min(CLUSTERS)).collect();
    let copied = shared.with_prefetched(external, &indices, || {
        let mut core = shared.lock();
        core.mend_for_guest(shared)?;
        core.allocate_missing(shared, link.volume.id, &indices)
    });
    link.line.complete(io.tag, ended(shared, &link.volume, copied));
}

/// Allocates clusters for all jobs of a volume together. A job whose clusters are not all allocated
/// comes again.
fn allocate(shared: &Shared, id: BlobId, jobs: &[Taken]) {
    let Some((link, _)) = jobs.first() else { return };
    let mut core = shared.lock();
    if let Err(e) = core.mend_for_guest(shared) {
        let ended = ended(shared, &link.volume, Err(e));
        jobs.iter().for_each(|(link, io)| link.line.complete(io.tag, ended));
        return;
    }
    let mut indices = vec![];
    for (link, io) in jobs {
        let limit = CLUSTERS.saturating_sub(indices.len());
        indices.extend(core.missing(id, clusters(link, io), limit));
        indices.sort_unstable();
        indices.dedup();
    }
    let mut allocated = Ok(());
    if !indices.is_empty() {
        allocated = core.allocate(shared, id, &indices);
        let full = allocated.as_ref().is_err_and(|e| e.errno() == libc::ENOSPC);
        if full && indices.len() > 1 {
            // There may be room for one of them.
            allocated = core.allocate(shared, id, &indices[..1]);
        }
    }
    // The store may know better than the tables: a snapshot has failed, for example.
    core.republish(id, jobs.iter().map(|(link, io)| clusters(link, io)));
    let ended = ended(shared, &link.volume, allocated);
    for (link, io) in jobs {
        let done = core.missing(id, clusters(link, io), 1).is_empty();
        link.line.complete(io.tag, if done { Ended::Ok } else { ended });
    }
}

/// The answer to a job. A guest can cause any number of failures: some are logged.
fn ended(shared: &Shared, volume: &Volume, result: Result<(), Error>) -> Ended {
    let Err(e) = result else { return Ended::Ok };
    let since = shared.opened.elapsed().as_secs();
    if shared.warned.swap(since, Ordering::Relaxed) != since {
        warn!(
            "lvstore on {}: {volume}: cannot allocate or release clusters for a guest: {e}",
            shared.base_name
        );
    }
    Ended::Failed(e.errno())
}

/// The clusters that a job concerns: for allocations all that it touches, otherwise those that lie
/// in it as a whole.
fn clusters(link: &Link, io: &Io) -> std::ops::Range<u64> {
    let size = link.volume.cluster_size;
    let end = io.offset.saturating_add(io.len);
    let range = match Job::of(io) {
        Job::Allocate => io.offset / size..end.div_ceil(size),
        Job::Release | Job::Zero => io.offset.div_ceil(size)..end / size,
    };
    range.start..range.end.min(range.start.saturating_add(JOB_CLUSTERS + 1))
}
