//! `vhost`: serves block devices to virtual machines over vhost-user sockets, as SPDK's `vhost`
//! does.
//!
//! Startup, in order: options; steps that must precede the second thread (`prepare`); log; signals;
//! EAL on its own thread, while the reactors start; first pass over the configuration; RPC socket;
//! initialisation; second pass. Then the control thread serves RPCs until a signal arrives.

mod active_time;
mod check;
mod cli;
mod config_file;
mod control;
mod core_locks;
mod devices;
mod engines;
mod io_errors;
mod logging;
mod methods;
mod metrics;
mod notify;
mod prepare;
mod process;
mod socket_access;

use std::cell::RefCell;
use std::convert::Infallible;
use std::io::{self, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rpc::{Phase, Registry, Server};
use rte_vhost::eal::{self, EalInfo, EalOptions, EalStart};
use sandbox::{Sandbox, SocketAccess, Thread};
use tempfile::TempDir;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing::{debug, error, info, warn};
use vhost_target::Mode;

use cli::Options;
use config_file::ConfigFile;
use control::{Control, Sockets};
use io_errors::IoErrors;
use methods::{App, Startup};
use notify::Notifier;
use prepare::Prepared;

/// Limit on the shutdown of the target, in case a thread is blocked. [`Control::shut_down`] itself
/// waits 2 s for I/O.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// Limit on the end of exports over NBD at shutdown.
const EXPORTS_LIMIT: Duration = Duration::from_secs(1);

/// Limit on the time to release locks in storage clusters at shutdown.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// Limit on the time to send finished answers to RPC clients at shutdown.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// An exit code, whose reason has been logged.
type Failure = u8;

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Prepare(#[from] prepare::PrepareError),
    #[error("{0}")]
    CoreLock(#[from] core_locks::CoreLockError),
    #[error("{0}")]
    Metrics(#[from] metrics::BindError),
    #[error("{0}")]
    Control(#[from] control::StartError),
    #[error("cannot start the async runtime: {0}")]
    Runtime(#[source] io::Error),
    #[error("cannot install signal handlers: {0}")]
    Signals(#[source] io::Error),
    #[error("cannot create a directory for a private socket: {0}")]
    PrivateDir(#[source] io::Error),
}

fn main() {
    let options = match Options::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(exit) => {
            exit.print();
            std::process::exit(exit.code.into());
        }
    };
    let notifier = Notifier::from_environment();
    if let Some(path) = &options.check {
        std::process::exit(check::check(path, &options).into());
    }
    let prepared = Prepared::new(&options);
    let log = logging::Log::new();
    let code = match start_log(&log, &options) {
        Ok(()) => run(&options, prepared, notifier, &log),
        Err(e) => {
            let _ = writeln!(io::stderr(), "cannot start the log: {e}");
            1
        }
    };
    exit(&log, code);
}

/// Ends the process after the log is written. The caller has removed sockets and lock files. Does
/// not wait for other threads, which may be blocked for ever.
fn exit(log: &logging::Log, code: u8) -> ! {
    log.flush();
    process::exit_now(code);
}

fn start_log(log: &logging::Log, options: &Options) -> io::Result<()> {
    if options.silence_noticelog {
        log.set_print_level(logging::Level::Warning);
    }
    for flag in &options.log_flags {
        log.set_flag(flag, true);
    }
    log.install()
}

/// Runs from the start of the log to the exit. Returns only if the process cannot start.
fn run(options: &Options, prepared: Prepared, notifier: Notifier, log: &logging::Log) -> Failure {
    match start(options, prepared, notifier, log) {
        Ok(never) => match never {},
        Err(e) => {
            error!("{e}");
            1
        }
    }
}

fn start(
    options: &Options,
    prepared: Prepared,
    notifier: Notifier,
    log: &logging::Log,
) -> Result<Infallible, StartError> {
    info!("Starting {} / {} initialization...", cli::VERSION, eal::dpdk_version());
    notifier.report();
    prepared.pid_file?;
    if let Err(e) = prepared.pinned {
        warn!("{e}");
    }
    let sandbox = prepare::report(prepared.sandbox, options)?;
    if options.core_dump {
        process::allow_core_dumps();
    }
    process::raise_file_limit();
    log_ignored_arguments(options);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let signals = {
        let _inside = runtime.enter();
        Signals::new().map_err(StartError::Signals)?
    };
    let cores = reactor_cores(options);
    let locks = prepared.locks?;
    let metrics = prepared.metrics?;
    let private_dir = prepared.private_dir.map_err(StartError::PrivateDir)?;
    let access = prepared.socket_access?;
    engines::start(prepared.network).map_err(control::StartError::Engines)?;
    let control = start_control(options, &cores, &sandbox, private_dir, access)?;
    log_reactors(options, &cores);
    let app = Rc::new(App::new(
        Rc::clone(&control),
        log.clone(),
        sandbox.opener(),
        options.share,
        prepared.network,
    ));
    *app.core_locks.borrow_mut() = locks;
    let mut registry = Registry::new();
    methods::register(&mut registry, &app);
    if let Some(names) = &options.rpcs_allowed {
        registry.allow_only(names.iter().cloned());
    }
    let registry = Rc::new(registry);
    LocalSet::new().block_on(&runtime, async move {
        if let Some(bound) = metrics
            && let Err(e) = metrics::start(bound, &app, &registry)
        {
            error!("--metrics: cannot start a thread: {e}");
        }
        let settings = Settings { options, access, notifier };
        let code = serve(&settings, &app, &registry, signals).await.err().unwrap_or(0);
        drop(app.core_locks.take());
        // Exits inside the runtime: dropping the runtime waits for calls that block, and dropping
        // the bdevs frees their memory, which takes long.
        exit(log, code)
    })
}

/// What the process serves with.
struct Settings<'a> {
    options: &'a Options,
    /// The mode and owner of sockets.
    access: SocketAccess,
    notifier: Notifier,
}

fn log_ignored_arguments(options: &Options) {
    if !options.without_effect.is_empty() {
        info!("ignoring options that have no effect: {}", options.without_effect.join(", "));
    }
    if !options.positional.is_empty() {
        warn!("ignoring arguments that are not options: {}", options.positional.join(" "));
    }
}

fn log_reactors(options: &Options, cores: &[usize]) {
    info!("Total cores available: {}", cores.len());
    for core in cores {
        info!("Reactor started on core {core}");
    }
    match options.reactor_mode {
        Mode::Poll => {}
        Mode::Sleep { after_us: 0 } => info!("Reactors sleep as soon as they have no work"),
        Mode::Sleep { after_us } => info!("Reactors sleep after {after_us} us without work"),
    }
}

/// The CPU of each reactor. With `--lcores`, the number of that CPU identifies the reactor.
fn reactor_cores(options: &Options) -> Vec<usize> {
    let Some(lcores) = &options.lcores else { return options.cores.clone() };
    let mut cpus: Vec<usize> =
        lcores.iter().filter_map(|core| core.cpus.first().copied()).collect();
    cpus.sort_unstable();
    cpus.dedup();
    if cpus != options.cores {
        let cpus = process::list(&cpus);
        warn!("--lcores: reactors run on CPUs {cpus}; use these numbers as core numbers in RPCs");
    }
    cpus
}

fn start_control(
    options: &Options,
    cores: &[usize],
    sandbox: &Sandbox,
    private_dir: TempDir,
    access: SocketAccess,
) -> Result<Rc<Control>, control::StartError> {
    let eal = EalStart::spawn(EalOptions {
        reactor_cores: cores.to_vec(),
        no_huge: options.no_huge,
        mem_mb: options.mem_size_mib.map(u64::from),
        extra_args: vec![],
    });
    // The threads that may load libraries have started. This thread and later ones may not do that.
    sandbox.narrow(Thread::Control);
    let sockets = Sockets {
        dir: control::socket_dir(options.socket_dir.as_deref()),
        on_bound: Arc::new(move |path| socket_access::apply(&access, path)),
    };
    let wait = || {
        let EalInfo { version, memory, housekeeping } = eal.wait()?;
        debug!("{version} runs on CPUs {} with {memory:?}", process::list(&housekeeping));
        Ok(())
    };
    let control = Control::start(cores, options.reactor_mode, sockets, sandbox, private_dir, wait)?;
    control.target().set_drain_limit(options.drain_limit);
    Ok(Rc::new(control))
}

/// Serves RPCs until a signal arrives, and shuts down.
async fn serve(
    settings: &Settings<'_>,
    app: &Rc<App>,
    registry: &Rc<Registry>,
    mut signals: Signals,
) -> Result<(), Failure> {
    let (served, io_errors) = (Rc::clone(app), RefCell::new(IoErrors::default()));
    spawn_local(async move {
        let each_second = |now| {
            let live = served.bdevs.all();
            let bdevs: Vec<_> = live.iter().map(|live| live.bdev.clone()).collect();
            io_errors.borrow_mut().log(&bdevs, now);
            live.iter().for_each(|live| live.entry.each_second());
        };
        if let Err(e) = served.control.run(each_second).await {
            error!("cannot read the reactors' events: {e}; restart vhost");
        }
    });
    let mut server = None;
    let result = tokio::select! {
        // The signal is checked first, as it may have arrived during startup.
        biased;
        name = signals.next() => {
            info!("{name}: shutting down");
            Ok(())
        }
        result = initialise(settings, app, registry, &mut server) => match result {
            Ok(()) => {
                let name = until_signal(&settings.notifier, app, &mut signals).await;
                info!("{name}: shutting down");
                Ok(())
            }
            Err(code) => {
                // framework_start_init answers while `stop` waits; `stop` flushes the answer.
                app.startup.send_replace(Startup::Failed);
                Err(code)
            }
        },
    };
    // The service manager does not wait for it.
    let _ = settings.notifier.send("STOPPING=1\nSTATUS=Shutting down");
    stop(app, server).await;
    result
}

/// Tells the service manager that the process is ready, and then that it is alive, until a signal
/// arrives. Returns the signal's name.
async fn until_signal(notifier: &Notifier, app: &App, signals: &mut Signals) -> &'static str {
    let target = app.control.target();
    let cores = target.cores().len();
    let alive = async {
        let reactors = if cores == 1 { "1 reactor".into() } else { format!("{cores} reactors") };
        notifier.send_surely(&format!("READY=1\nSTATUS=Serving with {reactors}")).await;
        notifier.feed_watchdog(|| target.reactors()).await;
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        biased;
        name = signals.next() => name,
        never = alive => match never {},
    }
}

/// Loads the configuration and opens the RPC socket.
async fn initialise(
    settings: &Settings<'_>,
    app: &App,
    registry: &Rc<Registry>,
    server: &mut Option<Server>,
) -> Result<(), Failure> {
    let options = settings.options;
    let config = match options.config.clone() {
        Some(path) => {
            let ignore_errors = options.ignore_config_errors;
            // On the blocking pool: the file may be a pipe, and signals must be handled meanwhile.
            let read = spawn_blocking(move || ConfigFile::read(&path, ignore_errors)).await;
            let read = read.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
            Some(read.map_err(|e| config_file::report(&e))?)
        }
        None => None,
    };
    replay(config.as_ref(), registry, Phase::Startup).await?;
    if let Some(path) = &options.rpc_socket {
        *server = Some(bind(path, registry, &settings.access)?);
    }
    if options.wait_for_rpc {
        let _ = settings.notifier.send("STATUS=Waiting for framework_start_init");
        let mut startup = app.startup.subscribe();
        let _ = startup.wait_for(|startup| *startup == Startup::Requested).await;
    }
    if let Some(server) = server {
        server.pause();
    }
    registry.set_phase(Phase::Runtime);
    replay(config.as_ref(), registry, Phase::Runtime).await?;
    if let Err(e) = methods::start_loaded(app).await
        && !options.ignore_config_errors
    {
        return Err(config_file::errno_exit_code(e.errno()));
    }
    app.startup.send_replace(Startup::Running);
    if let Some(server) = server {
        server.resume();
    }
    Ok(())
}

async fn replay(
    config: Option<&ConfigFile>,
    registry: &Rc<Registry>,
    phase: Phase,
) -> Result<(), Failure> {
    match config {
        Some(config) => config.replay(registry, phase).await.map_err(|e| config_file::report(&e)),
        None => Ok(()),
    }
}

fn bind(path: &Path, registry: &Rc<Registry>, access: &SocketAccess) -> Result<Server, Failure> {
    let on_bound = |path: &Path| socket_access::apply(access, path);
    Server::bind_with(path, Rc::clone(registry), on_bound).map_err(|e| {
        error!("{e}");
        config_file::errno_exit_code(libc::EINVAL)
    })
}

/// Stops controllers, reactors and the RPC server, in bounded time.
async fn stop(app: &Rc<App>, server: Option<Server>) {
    if let Some(server) = &server {
        // No new requests: nothing would remove the sockets of a controller created from here on.
        server.pause();
    }
    let control = &app.control;
    if active_time::timeout(EXPORTS_LIMIT, app.exports.stop_all(control)).await.is_none() {
        warn!("I/O of NBD exports has not ended within {} s", EXPORTS_LIMIT.as_secs());
    }
    if active_time::timeout(SHUTDOWN_LIMIT, control.shut_down()).await.is_none() {
        let limit = SHUTDOWN_LIMIT.as_secs();
        warn!("the vhost-user transport did not stop within {limit} s; exiting without it");
        rte_vhost::transport::remove_sockets();
    }
    release_storage(app).await;
    if let Some(server) = server {
        let _ = active_time::timeout(FLUSH_LIMIT, server.shutdown()).await;
    }
}

/// Releases what other hosts may wait for, in bounded time.
async fn release_storage(app: &Rc<App>) {
    let mut released: Vec<_> =
        app.bdevs.all().iter().filter_map(|live| live.entry.release()).collect();
    let host: Rc<dyn bdev::Host> = Rc::clone(app) as _;
    released.extend(host.modules().iter().filter_map(|module| module.release(&host)));
    let all = async {
        for one in released {
            one.await;
        }
    };
    if active_time::timeout(RELEASE_LIMIT, all).await.is_none() {
        warn!(
            "storage was not released in time: other hosts may have to wait for 30 s for locks of \
             clusters, and lvstores are recovered when they are loaded"
        );
    }
}

/// The signals that start the shutdown. The Rust runtime ignores SIGPIPE.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}
