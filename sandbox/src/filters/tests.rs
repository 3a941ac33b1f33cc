//! Each kind of thread makes calls that it may not make. A call that a filter refuses returns
//! EPERM; a call that passes returns the kernel's error for invalid arguments.

use std::collections::BTreeSet;
use std::io;
use std::thread;
use std::time::Duration;

use super::calls::{self, Call};
use super::*;
use crate::capabilities;

/// A range of numbers that includes all system calls.
const NUMBERS: std::ops::Range<i64> = 0..500;

/// `uretprobe` and `uprobe` of x86-64: the kernel runs no filter for them, and kills a process that
/// makes them outside of a probe.
const NOT_FILTERED: [i64; 2] = [335, 336];

/// The result of `f` on a thread with these filters.
fn with<R: Send>(programs: &[&BpfProgram], f: impl FnOnce() -> R + Send) -> R {
    let confined = || {
        capabilities::no_new_privileges().unwrap();
        programs.iter().for_each(|program| install(program).unwrap());
        f()
    };
    thread::scope(|scope| scope.spawn(confined).join()).unwrap()
}

fn process(programs: &Programs) -> Vec<&BpfProgram> {
    programs.process.iter().collect()
}

fn control(programs: &Programs) -> Vec<&BpfProgram> {
    [process(programs), vec![&programs.no_code]].concat()
}

fn worker(programs: &Programs) -> Vec<&BpfProgram> {
    [control(programs), vec![&programs.worker]].concat()
}

fn reactor(programs: &Programs) -> Vec<&BpfProgram> {
    [worker(programs), vec![&programs.reactor]].concat()
}

/// The errno of a call, 0 if it succeeds.
fn errno(number: i64, arguments: [u64; 4]) -> i32 {
    let [a, b, c, d] = arguments;
    // SAFETY: callers pass arguments that refer to no memory, or calls that the filters refuse.
    let rc = unsafe { libc::syscall(number, a, b, c, d, 0, 0) };
    if rc >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap() }
}

fn refused(number: i64, arguments: [u64; 4]) -> bool {
    errno(number, arguments) == libc::EPERM
}

/// Calls of `NUMBERS` that are on no list and do not end the process, but pass with all-zero
/// arguments.
fn let_through(lists: &[&[Call]]) -> Vec<i64> {
    let listed: BTreeSet<i64> =
        lists.iter().chain(&[calls::KILL]).flat_map(|list| list.iter()).map(|c| c.0).collect();
    let tried = NUMBERS.filter(|n| !listed.contains(n) && !NOT_FILTERED.contains(n));
    tried.filter(|n| !refused(*n, [0; 4])).collect()
}

#[test]
fn calls_that_are_on_no_list_are_refused() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let lists = [calls::LIBC, calls::THREADS, calls::DATA, calls::CONTROL];
    assert_eq!(with(&process(&programs), || let_through(&lists)), [] as [i64; 0]);
    let lists = [calls::LIBC, calls::REACTOR];
    assert_eq!(with(&reactor(&programs), || let_through(&lists)), [] as [i64; 0]);
    let lists = [calls::LIBC, calls::THREADS, calls::OPENER];
    let opener = of_opener().unwrap();
    assert_eq!(with(&opener.iter().collect::<Vec<_>>(), || let_through(&lists)), [] as [i64; 0]);
}

#[test]
fn a_reactor_opens_nothing_connects_nowhere_and_starts_nothing() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    with(&reactor(&programs), || {
        for number in [
            libc::SYS_openat,
            libc::SYS_read,
            libc::SYS_unlinkat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_sendmsg,
            libc::SYS_recvmsg,
            libc::SYS_memfd_create,
            libc::SYS_ioctl,
            libc::SYS_fcntl,
            libc::SYS_kill,
            libc::SYS_clone,
            libc::SYS_prctl,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_seccomp,
        ] {
            assert!(refused(number, [0; 4]), "{number}");
        }
        assert!(thread::Builder::new().spawn(|| ()).is_err());
        assert!(std::fs::File::open("/proc/self/status").is_err());
    });
}

#[test]
fn a_reactor_may_do_its_work_allocate_and_exit() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let no_fd = u64::MAX;
    with(&reactor(&programs), || {
        assert_eq!(errno(libc::SYS_io_uring_enter, [no_fd, 0, 0, 0]), libc::EBADF);
        assert_eq!(errno(libc::SYS_write, [no_fd, 0, 0, 0]), libc::EBADF);
        assert_eq!(errno(libc::SYS_getppid, [0; 4]), 0);
        assert!(!refused(libc::SYS_epoll_pwait2, [no_fd, 0, 1, 0]));
        assert!(!refused(libc::SYS_epoll_pwait, [no_fd, 0, 1, 0]));
        // Large enough for a mapping of its own, which grows and is unmapped.
        let mut memory = vec![1_u8; 1 << 20];
        memory.resize(8 << 20, 1);
        drop(memory);
        thread::park_timeout(Duration::from_nanos(1));
        thread::sleep(Duration::from_nanos(1));
        thread::yield_now();
    });
}

#[test]
fn no_thread_makes_memory_executable() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let page = 4096;
    let (rw, rwx) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_EXEC | libc::PROT_WRITE);
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    for thread in [control(&programs), worker(&programs), reactor(&programs)] {
        with(&thread, || {
            assert!(refused(libc::SYS_mmap, [0, page, rwx as u64, flags]));
            assert!(refused(libc::SYS_mprotect, [0, page, libc::PROT_EXEC as u64, 0]));
            assert!(refused(libc::SYS_pkey_mprotect, [0, page, libc::PROT_EXEC as u64, 0]));
            assert_eq!(errno(libc::SYS_mmap, [0, page, rw as u64, flags]), 0);
        });
    }
}

#[test]
fn workers_create_no_sockets_rename_no_files_and_send_no_signals() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let no_fd = u64::MAX;
    with(&worker(&programs), || {
        for (number, _) in calls::NOT_FOR_WORKERS {
            assert!(refused(*number, [no_fd; 4]), "{number}");
        }
        let here = libc::AT_FDCWD as u64;
        let makes_files =
            [libc::O_CREAT, libc::O_CREAT | libc::O_RDWR | libc::O_EXCL, libc::O_TMPFILE];
        for flags in makes_files.map(|flags| flags as u64) {
            assert!(refused(libc::SYS_openat, [here, 0, flags, 0]), "{flags:#o}");
            #[cfg(target_arch = "x86_64")]
            assert!(refused(libc::SYS_open, [0, flags, 0, 0]), "{flags:#o}");
        }
        // The calls pass the filter; their path is a null pointer.
        for flags in [libc::O_RDWR, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC] {
            assert_eq!(errno(libc::SYS_openat, [here, 0, flags as u64, 0]), libc::EFAULT);
        }
        assert!(std::os::unix::net::UnixStream::connect("/nowhere").is_err());
        assert_eq!(errno(libc::SYS_accept4, [no_fd, 0, 0, 0]), libc::EBADF);
        assert_eq!(errno(libc::SYS_munmap, [0, 4096, 0, 0]), 0);
        thread::spawn(|| ()).join().unwrap();
        std::fs::File::open("/proc/self/status").unwrap();
    });
}

#[test]
fn the_process_signals_only_itself_and_opens_no_network_socket() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let (me, init) = (u64::from(std::process::id()), 1);
    with(&control(&programs), || {
        assert_eq!(errno(libc::SYS_kill, [me, 0, 0, 0]), 0);
        assert!(refused(libc::SYS_kill, [init, 0, 0, 0]));
        assert!(refused(libc::SYS_tgkill, [init, init, 0, 0]));
        assert!(refused(libc::SYS_prlimit64, [init, 0, 0, 0]));
        let stream = libc::SOCK_STREAM as u64;
        for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET] {
            assert!(refused(libc::SYS_socket, [family as u64, stream, 0, 0]), "{family}");
        }
        assert_eq!(errno(libc::SYS_socket, [libc::AF_UNIX as u64, stream, 0, 0]), 0);
        assert!(refused(libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0]));
        // Ids of NVMe namespaces, admin commands, resets and rescans of controllers, I/O commands.
        for request in [0x4e40, 0xc048_4e41, 0x4e44, 0x4e45, 0x4e46, 0xc048_4e43, 0x4030_4e42] {
            assert!(refused(libc::SYS_ioctl, [u64::MAX, request, 0, 0]));
        }
        assert!(!refused(libc::SYS_ioctl, [u64::MAX, libc::BLKSSZGET, 0, 0]));
        // Forking, in two ways. `clone3` is reported as missing.
        assert!(refused(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0]));
        assert_eq!(errno(libc::SYS_clone3, [0; 4]), libc::ENOSYS);
        assert!(refused(libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0]));
        thread::spawn(|| ()).join().unwrap();
    });
}

#[test]
fn calls_that_no_library_makes_kill_the_process() {
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    let opener = of_opener().unwrap();
    for (number, _) in calls::KILL {
        for programs in [process(&programs), opener.iter().collect()] {
            assert_eq!(signal_of(&programs, *number), Some(libc::SIGSYS), "{number}");
        }
    }
    assert_eq!(signal_of(&process(&programs), libc::SYS_getuid), None);
}

/// The signal that kills a process with these filters when it makes a call.
fn signal_of(programs: &[&BpfProgram], number: i64) -> Option<i32> {
    // SAFETY: the new process only makes system calls, as this one has other threads.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // No core dump: the system may keep those of dumpable processes.
        // SAFETY: sets a flag of the process.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
        let installed = capabilities::no_new_privileges().is_ok()
            && programs.iter().all(|program| install(program).is_ok());
        if installed {
            // SAFETY: if it passes, all-zero arguments do nothing.
            unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
        }
        // SAFETY: ends the new process.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` is live.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
}

#[test]
fn a_file_gets_only_the_mode_and_the_owner_that_sockets_get() {
    const NOWHERE: u64 = u64::MAX;
    let stays = u64::from(u32::MAX);
    let access = SocketAccess { mode: Some(0o660), owner: None, group: Some(7) };
    let programs = Programs::compile(&access, Network::Refused).unwrap();
    let path = c"";
    let path = path.as_ptr() as u64;
    with(&control(&programs), || {
        // Refused by the kernel, which knows no such directory.
        assert_eq!(errno(libc::SYS_fchmodat, [NOWHERE, path, 0o660, 0]), libc::ENOENT);
        assert_eq!(errno(libc::SYS_fchownat, [NOWHERE, path, stays, 7]), libc::ENOENT);
        assert!(refused(libc::SYS_fchmodat, [NOWHERE, path, 0o666, 0]));
        assert!(refused(libc::SYS_fchownat, [NOWHERE, path, 0, 7]));
        assert!(refused(libc::SYS_fchownat, [NOWHERE, path, stays, 8]));
    });
    with(&worker(&programs), || {
        assert!(refused(libc::SYS_fchmodat, [NOWHERE, path, 0o660, 0]));
        assert!(refused(libc::SYS_fchownat, [NOWHERE, path, stays, 7]));
    });
    let access = SocketAccess { mode: None, owner: Some(7), group: None };
    let programs = Programs::compile(&access, Network::Refused).unwrap();
    with(&process(&programs), || {
        assert_eq!(errno(libc::SYS_fchownat, [NOWHERE, path, 7, stays]), libc::ENOENT);
        assert!(refused(libc::SYS_fchmodat, [NOWHERE, path, stays, 0]));
    });
    let programs = Programs::compile(&SocketAccess::default(), Network::Refused).unwrap();
    with(&process(&programs), || {
        assert!(refused(libc::SYS_fchmodat, [NOWHERE, path, 0o660, 0]));
        assert!(refused(libc::SYS_fchownat, [NOWHERE, path, stays, 7]));
    });
}
