//! Starts DPDK's EAL on a thread of its own, with or without hugepages, on CPUs that no reactor
//! uses.
#![expect(unsafe_code, reason = "CPU affinity, a trial mapping and DPDK's start are C calls")]

use std::ffi::{CStr, CString, NulError, c_char, c_int};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::log;

/// The size of EAL's ordinary memory, in MiB, if the operator gives none. Pages that rte_vhost
/// never touches cost only 11 KiB of bookkeeping per MiB.
const MEM_MB_DEFAULT: u64 = 256;

/// The minimum. 16 MiB was enough for 64 controllers with 4 queues each; rte_vhost supports up to
/// 1,024 connections.
const MEM_MB_MIN: u64 = 64;

/// The maximum. SPDK takes the memory of every disk from here, so operators give gigabytes. This
/// program keeps only rte_vhost's queues there, and the bookkeeping for gigabytes would be
/// resident.
const MEM_MB_MAX: u64 = 1024;

/// EAL uses hugepages of one size only if this much memory, in kB, is free in them. It was enough
/// for 64 controllers.
const HUGE_KB_MIN: u64 = 16 << 10;

/// The largest hugepage that EAL may take, in kB. rte_vhost needs a few MiB, and a page of 1 GiB is
/// better left to a VM.
const HUGE_PAGE_KB_MAX: u64 = 32 << 10;

/// The kernel's directory about hugepages.
const HUGEPAGES: &str = "/sys/kernel/mm/hugepages";

/// The operator's options for EAL.
#[derive(Clone, Debug, Default)]
pub struct EalOptions {
    /// CPUs that EAL's threads must not use.
    pub reactor_cores: Vec<usize>,
    /// `--no-huge`: use ordinary memory even if hugepages are free.
    pub no_huge: bool,
    /// `-s`, in MiB: the size of EAL's ordinary memory, limited to 64 to 1,024. It has no effect on
    /// hugepages, which are taken as needed.
    pub mem_mb: Option<u64>,
    /// `--env-context`: further arguments, appended to EAL's command line.
    pub extra_args: Vec<String>,
}

/// The kind of memory that EAL uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EalMemory {
    /// Hugepages, taken as needed.
    Huge {
        /// Size of a page, in kB.
        page_kb: u64,
        /// The number of free pages at the start.
        free: u64,
    },
    /// Ordinary pages, which become resident when they are used.
    Ordinary {
        /// The amount, in MiB.
        size_mb: u64,
        /// Why hugepages are not used.
        reason: String,
    },
}

/// Facts about EAL after its start.
#[derive(Clone, Debug)]
pub struct EalInfo {
    /// DPDK's version string, such as `DPDK 22.11.11`.
    pub version: String,
    /// The kind of memory that it uses.
    pub memory: EalMemory,
    /// The CPUs that its threads run on.
    pub housekeeping: Vec<usize>,
}

/// The reason why EAL did not start. None of these errors can be retried in the same process.
#[derive(Debug, thiserror::Error)]
pub enum EalError {
    /// The library is of another DPDK release than the headers, so its structures may differ.
    #[error("built for DPDK {built}, but DPDK {loaded} is loaded: install {built}, or rebuild")]
    Version {
        /// The release of the headers.
        built: String,
        /// The release of the library.
        loaded: String,
    },
    /// EAL was started before, with or without success.
    #[error("EAL can be started only once in a process")]
    Again,
    /// The thread that starts EAL could not be created or pinned.
    #[error("cannot start a thread for EAL on CPUs {cpus}: {source}")]
    Thread {
        /// The CPUs that the thread was to run on.
        cpus: String,
        /// The system's error.
        source: io::Error,
    },
    /// An argument that cannot become a C string.
    #[error("invalid EAL argument: contains a NUL byte: {0}")]
    Argument(#[from] NulError),
    /// `rte_eal_init` failed.
    #[error("DPDK's EAL failed to start: {0}")]
    Init(String),
}

/// An EAL start in progress.
#[derive(Debug)]
pub struct EalStart {
    thread: io::Result<JoinHandle<Result<EalInfo, EalError>>>,
}

impl EalStart {
    /// Begins to start EAL on a thread of its own. The start takes about 0.1 s, because DPDK
    /// measures the clock; the caller can do something else meanwhile.
    pub fn spawn(options: EalOptions) -> EalStart {
        // The set is read here, so that a caller that pins itself later does not narrow it.
        let cpus = housekeeping_cpus(&options.reactor_cores);
        EalStart {
            thread: thread::Builder::new()
                .name("eal-start".into())
                .spawn(move || init(&options, cpus?)),
        }
    }

    /// Waits until EAL has started or failed.
    ///
    /// # Errors
    /// EAL has failed, or its thread could not be started.
    pub fn wait(self) -> Result<EalInfo, EalError> {
        match self.thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(source) => Err(EalError::Thread { cpus: "of this process".into(), source }),
        }
    }
}

/// Returns DPDK's version string, such as `DPDK 22.11.11`. May be called before EAL is started.
pub fn dpdk_version() -> String {
    // SAFETY: the function returns a constant string and may be called at any time.
    let version = unsafe { spdk_sys::rte_version() };
    // SAFETY: it is a C string that is valid for the life of the process.
    unsafe { CStr::from_ptr(version) }.to_string_lossy().into_owned()
}

/// Returns the CPUs that the calling thread may use and no reactor uses. If none is left, returns
/// all CPUs that the thread may use.
///
/// # Errors
/// The kernel does not report the thread's CPUs.
pub fn housekeeping_cpus(reactor_cores: &[usize]) -> Result<Vec<usize>, EalError> {
    let mut set = no_cpus();
    // SAFETY: the kernel fills a set of the given size.
    let failed = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } != 0;
    if failed {
        let source = io::Error::last_os_error();
        return Err(EalError::Thread { cpus: "of this process".into(), source });
    }
    let allowed: Vec<usize> = (0..libc::CPU_SETSIZE as usize)
        .filter(|cpu| {
            // SAFETY: `cpu` is less than CPU_SETSIZE.
            unsafe { libc::CPU_ISSET(*cpu, &set) }
        })
        .collect();
    let rest: Vec<usize> =
        allowed.iter().copied().filter(|cpu| !reactor_cores.contains(cpu)).collect();
    Ok(if rest.is_empty() { allowed } else { rest })
}

/// Starts EAL. Runs on a thread of its own, which it may pin.
fn init(options: &EalOptions, cpus: Vec<usize>) -> Result<EalInfo, EalError> {
    static STARTED: AtomicBool = AtomicBool::new(false);
    let version = version()?;
    pin(&cpus)?;
    if STARTED.swap(true, Ordering::Relaxed) {
        return Err(EalError::Again);
    }
    log::install();

    let memory = choose_memory(options, Path::new(HUGEPAGES), hugepages_work);
    match &memory {
        EalMemory::Huge { page_kb, free } => {
            tracing::info!("EAL: using hugepages: {free} of {page_kb} kB are free");
        }
        EalMemory::Ordinary { reason, .. } => {
            tracing::info!("EAL: using ordinary memory: {reason}");
        }
    }
    let args = arguments(options, &memory, &cpus);
    tracing::debug!("EAL: {version}, arguments {}", args.join(" "));
    let began = Instant::now();
    call_init(args)?;
    tracing::debug!("EAL: started in {} ms", began.elapsed().as_millis());
    Ok(EalInfo { version, memory, housekeeping: cpus })
}

/// Returns DPDK's version string if the library is of the same release as the headers. The minor
/// number may differ: distributions update a stable release in place, and DPDK keeps its structures
/// then.
fn version() -> Result<String, EalError> {
    let loaded = dpdk_version();
    // SAFETY: the function returns a constant.
    let year = unsafe { spdk_sys::rte_version_year() };
    // SAFETY: the function returns a constant.
    let month = unsafe { spdk_sys::rte_version_month() };
    if (year, month) == (spdk_sys::RTE_VER_YEAR, spdk_sys::RTE_VER_MONTH) {
        return Ok(loaded);
    }
    let built = format!("{}.{:02}", spdk_sys::RTE_VER_YEAR, spdk_sys::RTE_VER_MONTH);
    Err(EalError::Version { built, loaded })
}

/// Pins the calling thread, and so every thread that DPDK creates from it, to `cpus`.
fn pin(cpus: &[usize]) -> Result<(), EalError> {
    let mut set = no_cpus();
    for cpu in cpus {
        // SAFETY: the CPUs come from a set of the same size.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    // SAFETY: the kernel reads a set of the given size.
    let failed = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } != 0;
    if failed {
        return Err(EalError::Thread { cpus: list(cpus), source: io::Error::last_os_error() });
    }
    Ok(())
}

/// Returns an empty CPU set.
fn no_cpus() -> libc::cpu_set_t {
    // SAFETY: it is an array of integers.
    unsafe { std::mem::zeroed() }
}

/// Formats `cpus` as EAL and taskset expect them: `0,2,3`.
fn list(cpus: &[usize]) -> String {
    cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Chooses EAL's memory before EAL is started, as EAL cannot be started twice. `works` tries a
/// hugepage mapping of the given size in kB.
fn choose_memory(
    options: &EalOptions,
    hugepages: &Path,
    works: impl Fn(u64) -> io::Result<()>,
) -> EalMemory {
    let ordinary = |reason: String| EalMemory::Ordinary {
        size_mb: options.mem_mb.unwrap_or(MEM_MB_DEFAULT).clamp(MEM_MB_MIN, MEM_MB_MAX),
        reason,
    };
    if options.no_huge {
        return ordinary("--no-huge".into());
    }
    let pools = free_hugepages(hugepages);
    if pools.is_empty() {
        return ordinary("no free hugepages".into());
    }
    // EAL tries the smallest pages first, so the smallest size decides.
    let Some(&(page_kb, free)) = pools
        .iter()
        .find(|(page_kb, free)| *page_kb <= HUGE_PAGE_KB_MAX && page_kb * free >= HUGE_KB_MIN)
    else {
        return ordinary("not enough memory in free hugepages of a suitable size".into());
    };
    match works(page_kb) {
        Ok(()) => EalMemory::Huge { page_kb, free },
        Err(error) => ordinary(format!("free hugepages cannot be used ({error})")),
    }
}

/// Returns the page size in kB and the number of hugepages that are free and not reserved, smallest
/// size first.
fn free_hugepages(dir: &Path) -> Vec<(u64, u64)> {
    let number =
        |file: &Path| -> Option<u64> { std::fs::read_to_string(file).ok()?.trim().parse().ok() };
    let mut pools: Vec<(u64, u64)> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let page_kb =
                name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let free = number(&entry.path().join("free_hugepages"))?;
            // Reserved pages belong to mappings that have not touched them yet, but the kernel
            // counts them as free.
            let reserved = number(&entry.path().join("resv_hugepages")).unwrap_or(0);
            Some((page_kb, free.saturating_sub(reserved)))
        })
        .filter(|(_, free)| *free > 0)
        .collect();
    pools.sort_unstable();
    pools
}

/// Maps one hugepage and unmaps it again. A control group may forbid pages that the kernel reports
/// as free, and the process's limit on address space may be below EAL's reservation (134 GB).
fn hugepages_work(page_kb: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the structure.
    let failed = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } != 0;
    if failed {
        return Err(io::Error::last_os_error());
    }
    if limit.rlim_cur != libc::RLIM_INFINITY {
        return Err(io::Error::other("the process's address space is limited (RLIMIT_AS)"));
    }

    let len = usize::try_from(page_kb << 10).map_err(io::Error::other)?;
    let size_flag = (len.trailing_zeros() as c_int) << libc::MAP_HUGE_SHIFT;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size_flag;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: creates a new mapping at an address of the kernel's choice.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // Unlike a write, this call fails instead of raising SIGBUS when no page is available.
    // SAFETY: the mapping was made above and is `len` bytes long.
    let failed = unsafe { libc::madvise(page, len, libc::MADV_POPULATE_WRITE) } != 0;
    let error = io::Error::last_os_error();
    // SAFETY: the mapping was made above, and nothing points into it.
    unsafe { libc::munmap(page, len) };
    // EINVAL: the kernel is older than 5.14. There, the success of the mapping shows that the pages
    // are available.
    if failed && error.raw_os_error() != Some(libc::EINVAL) { Err(error) } else { Ok(()) }
}

/// Builds EAL's command line.
fn arguments(options: &EalOptions, memory: &EalMemory, cpus: &[usize]) -> Vec<String> {
    let mut args: Vec<String> =
        ["vhost", "--no-pci", "--no-telemetry", "--lcores"].map(Into::into).into();
    args.push(format!("0@({})", list(cpus)));
    // DPDK 22.11 rejects the two options together.
    match memory {
        EalMemory::Huge { .. } => args.extend(["--in-memory", "--iova-mode=va"].map(Into::into)),
        EalMemory::Ordinary { size_mb, .. } => {
            args.extend(["--no-huge", "--no-shconf", "-m"].map(Into::into));
            args.push(size_mb.to_string());
        }
    }
    args.extend_from_slice(&options.extra_args);
    args
}

/// Calls `rte_eal_init`.
fn call_init(args: Vec<String>) -> Result<(), EalError> {
    let args: Vec<CString> = args.into_iter().map(CString::new).collect::<Result<_, _>>()?;
    let count = args.len().try_into().expect("the kernel limits the size of a command line");
    let mut argv: Vec<*mut c_char> = args.into_iter().map(CString::into_raw).collect();
    argv.push(std::ptr::null_mut());
    // EAL reorders the array and keeps pointers to the strings, so both are leaked on purpose.
    let argv = argv.leak();
    let (result, errors) = log::errors_of(|| {
        // SAFETY: `argv` holds `count` C strings and a null pointer, all of which are valid for the
        // life of the process.
        unsafe { spdk_sys::rte_eal_init(count, argv.as_mut_ptr()) }
    });
    if result >= 0 {
        return Ok(());
    }
    let reason = if errors.is_empty() { "DPDK logged no reason".into() } else { errors.join("; ") };
    Err(EalError::Init(reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::sync::LazyLock;

    /// EAL on ordinary memory, started once for all tests that need it.
    fn eal() -> &'static EalInfo {
        static EAL: LazyLock<EalInfo> = LazyLock::new(|| {
            let options = EalOptions { no_huge: true, ..EalOptions::default() };
            EalStart::spawn(options).wait().expect("EAL starts without root and hugepages")
        });
        &EAL
    }

    #[test]
    fn eal_starts_with_ordinary_memory_off_the_callers_thread_and_only_once() {
        let before = housekeeping_cpus(&[]).unwrap();
        let info = eal();
        assert!(info.version.starts_with("DPDK "), "{}", info.version);
        assert!(is_ordinary(&info.memory), "{:?}", info.memory);
        assert_eq!(housekeeping_cpus(&[]).unwrap(), before, "the caller is not pinned");
        let again = EalStart::spawn(EalOptions::default()).wait();
        assert!(matches!(again, Err(EalError::Again)), "{again:?}");
    }

    /// Makes a directory like the kernel's, from `(page_kb, free, reserved)`.
    fn hugepages(pools: &[(u64, u64, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (page_kb, free, reserved) in pools {
            let pool = dir.path().join(format!("hugepages-{page_kb}kB"));
            fs::create_dir(&pool).unwrap();
            fs::write(pool.join("free_hugepages"), format!("{free}\n")).unwrap();
            fs::write(pool.join("resv_hugepages"), format!("{reserved}\n")).unwrap();
        }
        dir
    }

    fn chosen(options: &EalOptions, pools: &[(u64, u64, u64)]) -> EalMemory {
        choose_memory(options, hugepages(pools).path(), |_| Ok(()))
    }

    fn is_ordinary(memory: &EalMemory) -> bool {
        matches!(memory, EalMemory::Ordinary { .. })
    }

    #[test]
    fn free_hugepages_are_used_smallest_size_first() {
        let memory = chosen(&EalOptions::default(), &[(1 << 20, 4, 0), (2048, 512, 12)]);
        assert_eq!(memory, EalMemory::Huge { page_kb: 2048, free: 500 });
        for pools in [[(64, 999, 0), (2048, 512, 0)], [(2048, 512, 0), (64, 999, 0)]] {
            let memory = chosen(&EalOptions::default(), &pools);
            assert_eq!(memory, EalMemory::Huge { page_kb: 64, free: 999 });
        }
    }

    #[test]
    fn no_free_hugepage_means_ordinary_memory() {
        let options = EalOptions::default();
        assert!(is_ordinary(&chosen(&options, &[])));
        assert!(is_ordinary(&chosen(&options, &[(2048, 0, 0)])));
        assert!(is_ordinary(&chosen(&options, &[(2048, 64, 64)])), "all reserved");
        assert!(is_ordinary(&chosen(&options, &[(2048, 7, 0)])), "less than 16 MiB");
        assert!(is_ordinary(&chosen(&options, &[(1 << 20, 2, 0)])), "only 1 GiB pages");
        assert!(is_ordinary(&choose_memory(&options, Path::new("/nowhere"), |_| Ok(()))));
    }

    #[test]
    fn the_operator_and_the_kernel_can_refuse_hugepages() {
        let pools = [(2048, 512, 0)];
        let no_huge = EalOptions { no_huge: true, ..EalOptions::default() };
        assert!(is_ordinary(&chosen(&no_huge, &pools)));
        let dir = hugepages(&pools);
        let memory = choose_memory(&EalOptions::default(), dir.path(), |page_kb| {
            assert_eq!(page_kb, 2048);
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        });
        let EalMemory::Ordinary { reason, .. } = memory else { panic!("{memory:?}") };
        assert!(reason.contains("cannot be used"), "{reason}");
    }

    #[test]
    fn the_two_memory_modes_are_never_requested_together() {
        let options =
            EalOptions { extra_args: vec!["-n".into(), "4".into()], ..EalOptions::default() };
        let huge = arguments(&options, &EalMemory::Huge { page_kb: 2048, free: 9 }, &[0, 3]);
        assert_eq!(
            huge.join(" "),
            "vhost --no-pci --no-telemetry --lcores 0@(0,3) --in-memory --iova-mode=va -n 4"
        );
        let plain = EalMemory::Ordinary { size_mb: 256, reason: String::new() };
        assert_eq!(
            arguments(&options, &plain, &[1]).join(" "),
            "vhost --no-pci --no-telemetry --lcores 0@(1) --no-huge --no-shconf -m 256 -n 4"
        );
    }

    #[test]
    fn the_size_of_ordinary_memory_is_kept_in_bounds() {
        for (asked, got) in [(None, 256), (Some(0), 64), (Some(512), 512), (Some(1 << 20), 1024)] {
            let options = EalOptions { mem_mb: asked, ..EalOptions::default() };
            let memory = chosen(&options, &[]);
            assert!(
                matches!(memory, EalMemory::Ordinary { size_mb, .. } if size_mb == got),
                "{memory:?}"
            );
        }
    }

    #[test]
    fn housekeeping_cpus_exclude_the_reactors_and_are_never_empty() {
        let all = housekeeping_cpus(&[]).unwrap();
        assert_eq!(housekeeping_cpus(&all).unwrap(), all);
        assert_eq!(housekeeping_cpus(&all[1..]).unwrap(), all[..1]);
    }
}
