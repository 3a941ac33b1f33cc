//! The thread of a store, which allocates and releases clusters for guests' I/O.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use bdev::{Ended, Error, Io, Line, Op, Tag};
use blobstore::BlobId;
use tracing::warn;

use crate::store::Shared;
use crate::volume::{JOB_CLUSTERS, Job, Volume};

/// Jobs that are taken from one channel at a time, so that one channel does not hold up others.
const JOBS: usize = 32;
/// Clusters that are allocated for one volume at a time.
const CLUSTERS: usize = 64;

/// A channel, as the store's thread sees it.
pub(crate) struct Link {
    pub(crate) volume: Arc<Volume>,
    /// The jobs. Each is an operation without data on a range of the volume.
    pub(crate) line: Arc<Line>,
}

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

/// Starts the thread. It ends when the store is closed.
///
/// # Errors
/// The system cannot start a thread.
pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    let shared = Arc::clone(shared);
    thread::Builder::new().name("vhost-lvs".into()).spawn(move || {
        loop {
            shared.waker.wait(|| has_work(&shared));
            let jobs = take_jobs(&shared);
            if shared.closed.load(Ordering::SeqCst) {
                jobs.iter().for_each(|(link, job)| {
                    link.line.complete(job.tag, Ended::Failed(libc::ENODEV));
                });
                if jobs.is_empty() && shared.lock_links().is_empty() {
                    return;
                }
                continue;
            }
            serve(&shared, &jobs);
        }
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

/// Does jobs: first all allocations, by volume, then the rest.
fn serve(shared: &Shared, jobs: &[Taken]) {
    let mut allocations: BTreeMap<BlobId, Vec<&Taken>> = BTreeMap::new();
    let mut others = vec![];
    for job in jobs {
        let (link, io) = job;
        if link.line.abandoned().load(Ordering::Relaxed) {
            link.line.complete(io.tag, Ended::Failed(libc::ECANCELED));
        } else if Job::of(io) == Job::Allocate {
            allocations.entry(link.volume.id).or_default().push(job);
        } else {
            others.push(job);
        }
    }
    for (id, jobs) in allocations {
        allocate(shared, id, &jobs);
    }
    for (link, io) in others {
        let zero = Job::of(io) == Job::Zero;
        let released = shared.lock().release(shared, link.volume.id, clusters(link, io), zero);
        link.line.complete(io.tag, ended(shared, &link.volume, released));
    }
}

/// Allocates clusters for all jobs of a volume together. A job whose clusters are not all allocated
/// comes again.
fn allocate(shared: &Shared, id: BlobId, jobs: &[&Taken]) {
    let mut core = shared.lock();
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
    // The store may know better than the tables: it was loaded again, or a snapshot has failed.
    core.republish(id, jobs.iter().map(|(link, io)| clusters(link, io)));
    let Some((link, _)) = jobs.first() else { return };
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
        warn!("lvstore on {}: {volume}: {e}", shared.base_name);
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
