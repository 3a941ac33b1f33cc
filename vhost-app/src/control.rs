//! Operations of RPC methods and signals on the target. Calls that can block run on other threads.
//!
//! [`Control`] lives on the control thread. A task that waits for a condition waits for
//! [`Control::changed`] and checks the condition again.

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
use rte_vhost::{DpdkTransport, OnBound};
use sandbox::{Sandbox, Thread};
use tempfile::TempDir;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tracing::{error, warn};
use vhost_target::{ControllerSpec, Core, Error, Mode, Target};

use crate::{active_time, devices};
use rte_vhost::eal::EalError;

/// Interval of checks for operations that take long.
const TICK: Duration = Duration::from_secs(1);

/// The first pause of [`Control::until`].
const PAUSE: Duration = Duration::from_millis(2);

/// Limit on the wait for I/O in flight at shutdown, for all connections together.
const SHUTDOWN_DRAIN: Duration = Duration::from_secs(2);

/// Why the control side cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot start the reactors: {0}")]
    Reactors(#[source] io::Error),
    /// The text of [`EalError`] names EAL.
    #[error("{0}")]
    Eal(#[from] EalError),
    #[error("cannot start the vhost-user transport: {0}")]
    Transport(#[source] io::Error),
    #[error("cannot start the thread that loads librbd: {0}")]
    Engines(#[source] io::Error),
    #[error("cannot start the thread for DPDK calls: {0}")]
    DpdkThread(#[source] io::Error),
}

/// The control side of the target.
pub(crate) struct Control {
    target: Arc<Target>,
    dpdk: DpdkThread,
    changed: watch::Sender<()>,
    socket_dir: PathBuf,
    on_bound: OnBound,
}

/// Where and how the controllers' sockets are created.
pub(crate) struct Sockets {
    /// See [`socket_dir`].
    pub(crate) dir: PathBuf,
    /// Called before front ends can connect to a socket.
    pub(crate) on_bound: OnBound,
}

/// How to delete a controller that front ends use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeleteOptions {
    /// Limit on the wait for front ends to disconnect and I/O to complete.
    pub timeout: Duration,
    /// Close the connections first, and do not wait for I/O longer than `timeout`.
    pub force: bool,
}

/// Why [`Control::wait`] ended.
enum Wait {
    Done,
    TimedOut,
    Cancelled,
}

impl Control {
    /// Starts the reactors, and the transport after `eal` has returned. The transport uses and
    /// removes `private_dir`. Blocks. `sandbox` restricts the threads. The controllers' sockets are
    /// created in `sockets`.
    pub(crate) fn start(
        cores: &[usize],
        mode: Mode,
        sockets: Sockets,
        sandbox: &Sandbox,
        private_dir: TempDir,
        eal: impl FnOnce() -> Result<(), EalError>,
    ) -> Result<Self, StartError> {
        let changed = watch::Sender::new(());
        let hook = changed.clone();
        let cores: Vec<Core> = cores.iter().copied().map(Core).collect();
        let (changes, of_reactor) = (Arc::new(move || hook.send_replace(())), sandbox.clone());
        let on_start = Arc::new(move || of_reactor.narrow(Thread::Reactor));
        let target = on_worker(sandbox, || Target::start_with(&cores, mode, changes, on_start))
            .map_err(StartError::Reactors)?;
        eal()?;
        let of_front_ends = sandbox.clone();
        let on_thread = Arc::new(move || of_front_ends.narrow(Thread::Worker));
        let on_bound = Arc::clone(&sockets.on_bound);
        let transport = DpdkTransport::start(&target, private_dir, on_thread, on_bound)
            .map_err(StartError::Transport)?;
        let dpdk = DpdkThread::start(transport).map_err(StartError::DpdkThread)?;
        let Sockets { dir: socket_dir, on_bound } = sockets;
        Ok(Self { target, dpdk, changed, socket_dir, on_bound })
    }

    /// The target, for calls that do not block.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The path of a controller's socket: the directory of `-S` and the name, as in SPDK.
    pub(crate) fn socket_path(&self, controller: &str) -> PathBuf {
        self.socket_dir.join(controller)
    }

    /// Gives the file of a new socket its mode and owner.
    pub(crate) fn on_bound(&self) -> OnBound {
        Arc::clone(&self.on_bound)
    }

    /// Returns a function that does the same as [`Control::notify`] on any thread.
    pub(crate) fn notifier(&self) -> impl Fn() + Send + Sync + 'static {
        let changed = self.changed.clone();
        move || changed.send_replace(())
    }

    /// Reports changes of the target that happen after this call.
    pub(crate) fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Makes the tasks that wait for a condition check it again.
    pub(crate) fn notify(&self) {
        self.changed.send_replace(());
    }

    /// Processes the reactors' events, and calls `each_second`. Returns only on a system error.
    pub(crate) async fn run(&self, each_second: impl Fn(Instant)) -> io::Result<()> {
        // tokio has no type for an eventfd, but its pipes read any fd.
        let wake = self.target.events().wake().as_fd().try_clone_to_owned()?;
        let wake = pipe::Receiver::from_owned_fd_unchecked(wake)?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut last, mut counted) = (Instant::now(), true);
        loop {
            tokio::select! {
                ready = wake.readable() => {
                    ready?;
                    // Before the events are processed: an event that arrives later wakes us again.
                    let _ = wake.try_read(&mut [0; 8]);
                    self.target.process_events();
                }
                _ = tick.tick() => {
                    // A late tick means that the process was stopped, and that time must not count.
                    // Of two late ticks in a row the second counts: on some hosts all ticks are
                    // late.
                    let passed = std::mem::replace(&mut last, Instant::now()).elapsed();
                    counted = !counted || passed < TICK * 3 / 2;
                    if counted {
                        self.target.tick();
                        closer::tick().iter().for_each(warn_of_stuck);
                    }
                    each_second(Instant::now());
                    // No event reports that the last user of a bdev has dropped it.
                    self.notify();
                }
            }
        }
    }

    /// Creates a controller and its socket.
    pub(crate) async fn create_controller(&self, spec: ControllerSpec) -> Result<(), Error> {
        let target = Arc::clone(&self.target);
        self.dpdk.run(move |transport| target.create_controller(spec, transport)).await
    }

    /// Opens the socket of a controller that was created without one.
    pub(crate) async fn start_controller(&self, name: String) -> Result<(), Error> {
        let target = Arc::clone(&self.target);
        self.dpdk.run(move |transport| target.start_controller(&name, transport)).await
    }

    /// Deletes a controller. Waits first for another deletion of it that is in progress. If
    /// `cancelled` completes earlier, the controller stays.
    pub(crate) async fn delete_controller(
        &self,
        name: &str,
        options: DeleteOptions,
        cancelled: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let mut deadline = pin!(active_time::sleep(options.timeout));
        let mut changed = self.changed();
        tokio::pin!(cancelled);
        // After another deletion, the name may belong to a new controller, which must stay.
        let requested = self.target.controller_id(name);
        let wait = self
            .wait(&mut changed, &mut deadline, &mut cancelled, || !self.target.is_deleting(name));
        if !matches!(wait.await, Wait::Done) {
            return Err(Error::Busy(name.into()));
        }
        if self.target.controller_id(name) != requested {
            return Err(Error::NoController(name.into()));
        }
        let deletion = self.target.begin_delete(name, options.force)?;
        let gone = || {
            let progress = deletion.progress();
            progress.connected + progress.draining == 0
        };
        let wait = self.wait(&mut changed, &mut deadline, &mut cancelled, gone).await;
        match wait {
            Wait::Done => {}
            // `finish` logs the I/O that has not completed.
            Wait::TimedOut if options.force => {}
            Wait::TimedOut | Wait::Cancelled => return Err(Error::Busy(name.into())),
        }
        let released = name.to_owned();
        self.change(move |target| devices::release(target, &released)).await;
        self.dpdk.run(move |transport| deletion.finish(transport)).await;
        Ok(())
    }

    /// Waits until `done` returns true, for something that no change reports, such as the release
    /// of a bdev by its last user: looks after each change, and after pauses that grow.
    pub(crate) async fn until(&self, done: impl Fn() -> bool) {
        let (mut changed, mut pause) = (self.changed(), PAUSE);
        while !done() {
            if tokio::time::timeout(pause, changed.changed()).await.is_err() {
                pause = TICK.min(pause * 2);
            }
        }
    }

    /// Waits until `done` returns true. Calls it at first and after each change.
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

    /// Moves a queue of a controller to another core. Dropping the future does not cancel the move.
    pub(crate) async fn move_queue(
        &self,
        controller: String,
        session: Option<u32>,
        queue: usize,
        core: Core,
    ) -> Result<(), Error> {
        self.change(move |target| target.move_queue(&controller, session, queue, core)).await
    }

    /// Moves all queues of a controller to other cores. Dropping the future does not cancel it.
    pub(crate) async fn set_cores(
        &self,
        controller: String,
        cores: Vec<Core>,
    ) -> Result<(), Error> {
        self.change(move |target| target.set_cores(&controller, &cores)).await
    }

    /// Makes a change that may wait: for poll iterations of reactors, or for a bdev to be opened.
    /// Runs it on the blocking pool. Dropping the future does not cancel it.
    pub(crate) async fn change<R: Send + 'static>(
        &self,
        change: impl FnOnce(&Target) -> R + Send + 'static,
    ) -> R {
        let target = Arc::clone(&self.target);
        let changed = tokio::task::spawn_blocking(move || change(&target)).await;
        changed.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }

    /// Removes a bdev from the target and waits until its last user has dropped it. If an I/O never
    /// completes, this waits for ever; other operations go on.
    pub(crate) async fn remove_bdev(&self, bdev: Arc<dyn Bdev>) {
        let weak = Arc::downgrade(&bdev);
        // This reference may be the last, and to free a disk's memory may take long.
        self.change(move |target| devices::remove_bdev(target, &bdev)).await;
        self.until(|| weak.strong_count() == 0).await;
    }

    /// Closes all connections, waits a bounded time for their I/O, removes all sockets and stops
    /// the reactors.
    pub(crate) async fn shut_down(&self) {
        let mut deadline = pin!(active_time::sleep(SHUTDOWN_DRAIN));
        let mut changed = self.changed();
        self.target.begin_shutdown();
        let never = &mut std::future::pending();
        let gone = || self.target.connections() == 0;
        if matches!(self.wait(&mut changed, &mut deadline, never, gone).await, Wait::TimedOut) {
            let (sessions, ios, _) = self.target.quarantine();
            warn!("shutting down with {ios} I/Os of {sessions} connections still in flight");
        }
        let target = Arc::clone(&self.target);
        self.dpdk
            .run(move |transport| {
                target.remove_controllers(transport);
                target.stop_reactors();
            })
            .await;
    }
}

fn warn_of_stuck(Stuck { name, waiting }: &Stuck) {
    warn!("{name}: a close takes long; {waiting} file descriptors wait to be closed");
}

type Job = Box<dyn FnOnce(&DpdkTransport) + Send>;

/// The only thread that calls `rte_vhost_driver_*`. Runs one job at a time, in order.
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
            error!("the thread for DPDK calls has ended");
        }
        result.await.expect("the thread for DPDK calls ends only with the process")
    }
}

/// Calls `start` on a thread with the sandbox's restrictions of workers. Threads that `start`
/// starts inherit them.
fn on_worker<R: Send>(sandbox: &Sandbox, start: impl FnOnce() -> R + Send) -> R {
    let starter = || {
        sandbox.narrow(Thread::Worker);
        start()
    };
    let result = thread::scope(|scope| scope.spawn(starter).join());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The directory of `-S` as SPDK uses it: a prefix, relative to the working directory.
pub(crate) fn socket_dir(option: Option<&Path>) -> PathBuf {
    option.unwrap_or(Path::new("")).to_path_buf()
}
