//! What RPC methods and signals ask for, with everything that can block on a thread of its own.
//!
//! Lives on the control thread. Whoever has to wait for something to become true waits for
//! [`Control::changed`] and looks again.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bdev::Bdev;
use closer::Stuck;
use rte_vhost::DpdkTransport;
use sandbox::{Sandbox, Thread};
use tempfile::TempDir;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tracing::{error, warn};
use vhost_target::{ControllerSpec, Core, Error, Mode, Target};

use crate::lived;

/// Interval of checks for operations that take long.
const TICK: Duration = Duration::from_secs(1);

/// How long the end of the process waits for I/O in flight, in all.
const SHUTDOWN_DRAIN: Duration = Duration::from_secs(2);

/// The control side of the target.
#[derive(Debug)]
pub(crate) struct Control {
    target: Arc<Target>,
    dpdk: DpdkThread,
    changed: watch::Sender<()>,
    socket_dir: PathBuf,
}

/// How a deletion is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeleteOptions {
    /// How long to wait for front ends to leave and I/O to complete.
    pub timeout: Duration,
    /// End the connections first; leave I/O that does not complete behind.
    pub force: bool,
}

/// Why a deletion ended.
enum Wait {
    Done,
    TimedOut,
    Cancelled,
}

impl Control {
    /// Starts the reactors and, once `eal` has brought DPDK up, the transport, which uses and
    /// removes `private_dir`. Blocks. The threads are restricted by `sandbox`.
    pub(crate) fn start(
        cores: &[usize],
        mode: Mode,
        socket_dir: PathBuf,
        sandbox: &Sandbox,
        private_dir: TempDir,
        eal: impl FnOnce() -> Result<(), String>,
    ) -> Result<Self, String> {
        let changed = watch::Sender::new(());
        let hook = changed.clone();
        let cores: Vec<Core> = cores.iter().copied().map(Core).collect();
        let (changes, of_reactor) = (Arc::new(move || hook.send_replace(())), sandbox.clone());
        let on_start = Arc::new(move || of_reactor.narrow(Thread::Reactor));
        let target = on_worker(sandbox, || Target::start_with(&cores, mode, changes, on_start))
            .map_err(|e| format!("cannot start the reactors: {e}"))?;
        eal()?;
        let of_front_ends = sandbox.clone();
        let on_thread = Arc::new(move || of_front_ends.narrow(Thread::Worker));
        let transport = DpdkTransport::start(&target, private_dir, on_thread)
            .map_err(|e| format!("cannot start the vhost-user transport: {e}"))?;
        let dpdk = DpdkThread::start(transport).map_err(|e| e.to_string())?;
        Ok(Self { target, dpdk, changed, socket_dir })
    }

    /// The target, for what does not block.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Where a controller's socket is: SPDK puts the directory of `-S` before the name.
    pub(crate) fn socket_path(&self, controller: &str) -> PathBuf {
        self.socket_dir.join(controller)
    }

    /// Something to look at again has happened, from the moment of this call on.
    pub(crate) fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Makes whoever waits for something look again.
    pub(crate) fn notify(&self) {
        self.changed.send_replace(());
    }

    /// Serves the reactors' events, and calls `each_second`. Ends only if the system fails.
    pub(crate) async fn run(&self, each_second: impl Fn(Instant)) -> io::Result<()> {
        // An eventfd is read as a pipe is.
        let wake = self.target.events().wake().as_fd().try_clone_to_owned()?;
        let wake = pipe::Receiver::from_owned_fd_unchecked(wake)?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut last, mut counted) = (Instant::now(), true);
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    ready?;
                    // Emptied first: what comes after this wakes us again.
                    let _ = wake.try_read(&mut [0; 8]);
                    self.target.process_events();
                }
                _ = tick.tick() => {
                    // If a tick is very late, the process was stopped: that time must not count. But of
                    // two in a row the second counts: on some hosts all ticks are late.
                    let passed = std::mem::replace(&mut last, Instant::now()).elapsed();
                    counted = !counted || passed < TICK * 3 / 2;
                    if counted {
                        self.target.tick();
                        closer::tick().iter().for_each(warn_of_stuck);
                    }
                    each_second(Instant::now());
                    // A bdev's last user may have gone without a word.
                    self.notify();
                }
            }
        }
    }

    /// Makes a controller and opens its socket.
    pub(crate) async fn create_controller(&self, spec: ControllerSpec) -> Result<(), Error> {
        let target = Arc::clone(&self.target);
        self.dpdk.run(move |transport| target.create_controller(spec, transport)).await
    }

    /// Deletes a controller; `cancelled` gives it up. While another deletion of it is under way,
    /// waits for that.
    pub(crate) async fn delete_controller(
        &self,
        name: &str,
        options: DeleteOptions,
        cancelled: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let mut deadline = pin!(lived::sleep(options.timeout));
        let mut changed = self.changed();
        tokio::pin!(cancelled);
        // Another deletion goes first. A controller made anew since then is not the one meant.
        let meant = self.target.controller_id(name);
        let wait = self
            .wait(&mut changed, &mut deadline, &mut cancelled, || !self.target.is_deleting(name));
        if !matches!(wait.await, Wait::Done) {
            return Err(Error::Busy(name.into()));
        }
        if self.target.controller_id(name) != meant {
            return Err(Error::NoController(name.into()));
        }
        self.target.begin_delete(name, options.force)?;
        let gone =
            || self.target.delete_progress(name).is_ok_and(|p| p.connected + p.draining == 0);
        let wait = self.wait(&mut changed, &mut deadline, &mut cancelled, gone).await;
        match wait {
            Wait::Done => {}
            // `finish_delete` logs what is left.
            Wait::TimedOut if options.force => {}
            Wait::TimedOut | Wait::Cancelled => {
                self.target.cancel_delete(name);
                return Err(Error::Busy(name.into()));
            }
        }
        let (target, name) = (Arc::clone(&self.target), name.to_owned());
        self.dpdk.run(move |transport| target.finish_delete(&name, transport)).await;
        Ok(())
    }

    /// Waits until `done`, looking again at each change.
    async fn wait(
        &self,
        changed: &mut watch::Receiver<()>,
        deadline: &mut (impl Future<Output = ()> + Unpin),
        cancelled: &mut (impl Future<Output = ()> + Unpin),
        done: impl Fn() -> bool,
    ) -> Wait {
        loop {
            if done() {
                return Wait::Done;
            }
            tokio::select! {
                biased;
                () = &mut *cancelled => return Wait::Cancelled,
                _ = changed.changed() => {}
                () = &mut *deadline => return Wait::TimedOut,
            }
        }
    }

    /// Moves a queue of a controller to another core; once under way it is not given up.
    pub(crate) async fn move_queue(
        &self,
        controller: String,
        session: Option<u32>,
        queue: usize,
        core: Core,
    ) -> Result<(), Error> {
        self.place(move |target| target.move_queue(&controller, session, queue, core)).await
    }

    /// Has a controller served on other cores; once under way it is not given up.
    pub(crate) async fn set_cores(
        &self,
        controller: String,
        cores: Vec<Core>,
    ) -> Result<(), Error> {
        self.place(move |target| target.set_cores(&controller, &cores)).await
    }

    /// Does what waits for reactors' turns to end.
    async fn place(
        &self,
        change: impl FnOnce(&Target) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let target = Arc::clone(&self.target);
        let changed = tokio::task::spawn_blocking(move || change(&target)).await;
        changed.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }

    /// Takes a disk out of the target and waits until nobody uses it any more. I/O that never
    /// completes makes this wait for ever, and nobody else.
    pub(crate) async fn remove_bdev(&self, bdev: Arc<dyn Bdev>) {
        let mut changed = self.changed();
        vhost_blk::remove_bdev(&self.target, &bdev);
        let weak = Arc::downgrade(&bdev);
        // Ours may be the last, and a disk's memory takes a while to give back.
        let _ = tokio::task::spawn_blocking(move || drop(bdev)).await;
        while weak.strong_count() > 0 {
            let _ = changed.changed().await;
        }
    }

    /// Ends all connections, waits a bounded time for their I/O, removes all sockets and stops the
    /// reactors.
    pub(crate) async fn shut_down(&self) {
        let mut deadline = pin!(lived::sleep(SHUTDOWN_DRAIN));
        let mut changed = self.changed();
        self.target.begin_shutdown();
        let never = &mut std::future::pending();
        let gone = || self.target.connections() == 0;
        if matches!(self.wait(&mut changed, &mut deadline, never, gone).await, Wait::TimedOut) {
            let (sessions, ios, _) = self.target.quarantine();
            warn!("ending with {ios} I/Os of {sessions} connections in flight");
        }
        let target = Arc::clone(&self.target);
        self.dpdk
            .run(move |transport| {
                for controller in target.controllers() {
                    target.finish_delete(&controller.name, transport);
                }
                target.stop_reactors();
            })
            .await;
    }
}

fn warn_of_stuck(Stuck { name, waiting }: &Stuck) {
    warn!("{name}: a close takes long; {waiting} file descriptors are not closed");
}

type Job = Box<dyn FnOnce(&DpdkTransport) + Send>;

/// The one thread that calls `rte_vhost_driver_*`, one job at a time, in order.
#[derive(Debug)]
struct DpdkThread(mpsc::Sender<Job>);

impl DpdkThread {
    fn start(transport: DpdkTransport) -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::Builder::new().name("vhost-dpdk".into()).spawn(move || {
            jobs.into_iter().for_each(|job| job(&transport));
        })?;
        Ok(Self(sender))
    }

    async fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&DpdkTransport) -> R + Send + 'static,
    ) -> R {
        let (result_in, result) = oneshot::channel();
        let job = Box::new(move |transport: &DpdkTransport| {
            let _ = result_in.send(job(transport));
        });
        if self.0.send(job).is_err() {
            error!("the DPDK thread is gone");
        }
        result.await.expect("the DPDK thread ends only with the process")
    }
}

/// Calls `start` on a thread with the restrictions of workers, which the threads that it starts
/// inherit.
fn on_worker<R: Send>(sandbox: &Sandbox, start: impl FnOnce() -> R + Send) -> R {
    let starter = || {
        sandbox.narrow(Thread::Worker);
        start()
    };
    let result = thread::scope(|scope| scope.spawn(starter).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The directory of `-S` as SPDK takes it: a prefix, relative to where the process was started.
pub(crate) fn socket_dir(option: Option<&Path>) -> PathBuf {
    option.unwrap_or(Path::new("")).to_path_buf()
}
