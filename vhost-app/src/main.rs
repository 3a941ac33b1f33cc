//! `vhost`: serves block devices to virtual machines over vhost-user sockets, in place of SPDK's.
//!
//! The start, in order: options; what has to be done before the second thread starts (`prepare`);
//! log, signals, EAL on a thread of its own while the reactors start, the configuration's first
//! pass, the RPC socket, initialisation, the second pass. From then on the control thread serves
//! RPCs until a signal.

mod cli;
mod config_file;
mod control;
mod core_locks;
mod io_errors;
mod lived;
mod logging;
mod methods;
mod prepare;
mod process;

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rpc::{Phase, Registry, Server};
use rte_vhost::eal::{self, EalInfo, EalOptions, EalStart};
use sandbox::{Sandbox, Thread};
use tempfile::TempDir;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing::{debug, error, info, warn};
use vhost_target::Mode;

use cli::Options;
use config_file::ConfigFile;
use control::Control;
use io_errors::IoErrors;
use methods::{App, Startup};
use prepare::Prepared;

/// How long the end may take, should a part of it hang: [`Control::shut_down`] waits 2 s for I/O.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// How long finished answers may take on their way to clients at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// An exit code; the reason is in the log.
type Failure = u8;

fn main() {
    let options = match Options::parse(std::env::args_os()) {
        Ok(options) => options,
        Err(exit) => {
            exit.print();
            std::process::exit(exit.code.into());
        }
    };
    let prepared = Prepared::new(&options);
    let log = logging::Log::new();
    let code = match start_log(&log, &options) {
        Ok(()) => run(&options, prepared, &log),
        Err(e) => {
            eprintln!("{e}");
            1
        }
    };
    end(&log, code);
}

/// Ends the process. Sockets and locks are removed by then, and memory goes with the process: there
/// is nothing left that could be worth waiting for a thread that does not come back.
fn end(log: &logging::Log, code: u8) -> ! {
    log.flush();
    process::exit_now(code);
}

fn start_log(log: &logging::Log, options: &Options) -> Result<(), String> {
    if options.silence_noticelog {
        log.set_print_level(logging::Level::Warning);
    }
    for flag in &options.log_flags {
        log.set_flag(flag, true);
    }
    log.install().map_err(|e| e.to_string())
}

/// Everything between the log and the exit code. Returns only if the start fails early.
fn run(options: &Options, prepared: Prepared, log: &logging::Log) -> Failure {
    match start(options, prepared, log) {
        Ok(never) => match never {},
        Err(code) => code,
    }
}

fn start(options: &Options, prepared: Prepared, log: &logging::Log) -> Result<Infallible, Failure> {
    let failed = |e: &dyn std::fmt::Display| {
        error!("{e}");
        1
    };
    info!("Starting {} / {} initialization...", cli::VERSION, eal::dpdk_version());
    prepared.pid_file.map_err(|e| failed(&e))?;
    if let Err(e) = prepared.pinned {
        warn!("{e}");
    }
    let sandbox = prepare::report(prepared.sandbox, options).map_err(|e| failed(&e))?;
    if options.core_dump {
        process::allow_core_dumps();
    }
    process::raise_file_limit();
    name_unused(options);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| failed(&format_args!("cannot start the runtime: {e}")))?;
    let signals = {
        let _inside = runtime.enter();
        Signals::new().map_err(|e| failed(&format_args!("cannot take signals: {e}")))?
    };
    let cores = reactor_cores(options);
    let locks = prepared.locks.map_err(|e| failed(&e))?;
    let private_dir = prepared
        .private_dir
        .map_err(|e| failed(&format_args!("cannot make a directory for a private socket: {e}")))?;
    let control = start_control(options, &cores, &sandbox, private_dir).map_err(|e| failed(&e))?;
    info!("Total cores available: {}", cores.len());
    for core in &cores {
        info!("Reactor started on core {core}");
    }
    match options.reactor_mode {
        Mode::Poll => {}
        Mode::Sleep { after_us: 0 } => info!("Reactors sleep whenever there is nothing to do"),
        Mode::Sleep { after_us } => info!("Reactors sleep after {after_us} us without work"),
    }
    let app = Rc::new(App::new(Rc::clone(&control), log.clone(), sandbox.opener(), options.share));
    let mut registry = Registry::new();
    methods::register(&mut registry, &app);
    if let Some(names) = &options.rpcs_allowed {
        registry.allow_only(names.iter().cloned());
    }
    let registry = Rc::new(registry);
    LocalSet::new().block_on(&runtime, async move {
        let code = serve(options, &app, &registry, signals).await.err().unwrap_or(0);
        drop(locks);
        // In here: the end of the runtime would wait for calls that block, and that of the bdevs
        // for their memory.
        end(log, code)
    })
}

/// Options that were given and change nothing here, in one line.
fn name_unused(options: &Options) {
    let mut unused = options.unused.clone();
    if options.huge_dir.is_some() {
        unused.push("--huge-dir (hugepages are taken without a mount)");
    }
    if !unused.is_empty() {
        info!("options without a meaning here: {}", unused.join(", "));
    }
}

/// The CPU of each reactor. With `--lcores` a reactor is known by the CPU that it runs on.
fn reactor_cores(options: &Options) -> Vec<usize> {
    let Some(lcores) = &options.lcores else { return options.cores.clone() };
    let mut cpus: Vec<usize> =
        lcores.iter().filter_map(|core| core.cpus.first().copied()).collect();
    cpus.sort_unstable();
    cpus.dedup();
    if cpus != options.cores {
        warn!("--lcores: reactors run on CPUs {cpus:?} and go by these numbers in RPCs");
    }
    cpus
}

fn start_control(
    options: &Options,
    cores: &[usize],
    sandbox: &Sandbox,
    private_dir: TempDir,
) -> Result<Rc<Control>, String> {
    let eal = EalStart::spawn(EalOptions {
        reactor_cores: cores.to_vec(),
        no_huge: options.no_huge,
        mem_mb: options.mem_size_mib.map(u64::from),
        extra_args: vec![],
    });
    // EAL may load libraries. No other thread does.
    sandbox.narrow(Thread::Control);
    let socket_dir = control::socket_dir(options.socket_dir.as_deref());
    let wait = || {
        let EalInfo { version, memory, housekeeping } = eal.wait().map_err(|e| e.to_string())?;
        debug!("{version} is up on CPUs {housekeeping:?} with {memory:?}");
        Ok(())
    };
    let control =
        Control::start(cores, options.reactor_mode, socket_dir, sandbox, private_dir, wait)?;
    control.target().set_drain_limit(options.drain_limit);
    Ok(Rc::new(control))
}

/// Serves RPCs until a signal comes, and ends in order.
async fn serve(
    options: &Options,
    app: &Rc<App>,
    registry: &Rc<Registry>,
    mut signals: Signals,
) -> Result<(), Failure> {
    let (served, io_errors) = (Rc::clone(app), RefCell::new(IoErrors::default()));
    spawn_local(async move {
        let log_troubles = |now| {
            let live = served.bdevs.all();
            let bdevs: Vec<_> = live.iter().map(|live| live.bdev.clone()).collect();
            io_errors.borrow_mut().log(&bdevs, now);
            live.iter().for_each(|live| live.entry.each_second());
        };
        if let Err(e) = served.control.run(log_troubles).await {
            error!("the reactors' events cannot be read: {e}");
        }
    });
    let mut server = None;
    let result = tokio::select! {
        // First, so that a signal that came during the start is seen.
        biased;
        name = signals.next() => {
            info!("{name}: ending");
            Ok(())
        }
        result = initialise(options, app, registry, &mut server) => match result {
            Ok(()) => {
                let name = signals.next().await;
                info!("{name}: ending");
                Ok(())
            }
            Err(code) => {
                // framework_start_init answers while `stop` waits, and its answer is flushed there.
                app.startup.send_replace(Startup::Failed);
                Err(code)
            }
        },
    };
    stop(app, server).await;
    result
}

/// The configuration and the RPC socket.
async fn initialise(
    options: &Options,
    app: &App,
    registry: &Rc<Registry>,
    server: &mut Option<Server>,
) -> Result<(), Failure> {
    let config = match options.config.clone() {
        Some(path) => {
            let ignore_errors = options.ignore_config_errors;
            // It may be a pipe, and a signal has to get through meanwhile.
            let read = spawn_blocking(move || ConfigFile::read(&path, ignore_errors)).await;
            let read = read.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
            Some(read.map_err(|e| config_file::report(&e))?)
        }
        None => None,
    };
    replay(config.as_ref(), registry, Phase::Startup).await?;
    if let Some(path) = &options.rpc_socket {
        *server = Some(bind(path, registry)?);
    }
    if options.wait_for_rpc {
        let mut startup = app.startup.subscribe();
        let _ = startup.wait_for(|startup| *startup == Startup::Requested).await;
    }
    if let Some(server) = server {
        server.pause();
    }
    registry.set_phase(Phase::Runtime);
    replay(config.as_ref(), registry, Phase::Runtime).await?;
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

fn bind(path: &Path, registry: &Rc<Registry>) -> Result<Server, Failure> {
    Server::bind(path, Rc::clone(registry)).map_err(|e| {
        error!("{e}");
        // SPDK's EINVAL.
        libc::EINVAL.wrapping_neg() as u8
    })
}

/// Ends controllers, reactors and the RPC server, in bounded time.
async fn stop(app: &App, server: Option<Server>) {
    if let Some(server) = &server {
        // What would be made from here on would be left behind.
        server.pause();
    }
    let control = &app.control;
    if lived::timeout(SHUTDOWN_LIMIT, control.shut_down()).await.is_none() {
        warn!("the transport does not stop; leaving it");
        rte_vhost::transport::remove_sockets();
    }
    if let Some(server) = server {
        let _ = lived::timeout(FLUSH_LIMIT, server.shutdown()).await;
    }
}

/// The signals that end the process in order. SIGPIPE is ignored, as in every Rust program.
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
