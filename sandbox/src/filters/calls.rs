//! The lists of system calls, by purpose.

use libc::*;

/// A system call and checks of its arguments. One check must hold; without checks, the call matches
/// with any arguments.
pub(super) type Call<'a> = (i64, &'a [Check]);

/// A check of one argument. The first field is the argument's index.
#[derive(Clone, Copy)]
pub(super) enum Check {
    /// The argument has this value.
    Is(u8, u32),
    /// The argument has another value.
    IsNot(u8, u32),
    /// The argument, masked with the first number, has the value of the second.
    Masked(u8, u32, u32),
    /// The argument is this process's id.
    OwnProcess(u8),
}

use Check::{Is, Masked, OwnProcess};

const ANY: &[Check] = &[];
const OWN_PROCESS: &[Check] = &[OwnProcess(0)];
const UNIX_SOCKETS: &[Check] = &[Is(0, AF_UNIX as u32)];

/// A filter cannot check the flags of `clone3`, which are in memory. On ENOSYS, libc falls back to
/// `clone`.
pub(super) const CLONE3: Call = (SYS_clone3, ANY);

/// Calls that any thread may make: of libc's allocator, of std, of a failing assertion, at the exit
/// of a thread, and of the SIGBUS handler.
pub(super) const LIBC: &[Call] = &[
    (SYS_mmap, ANY),
    (SYS_munmap, ANY),
    (SYS_mremap, ANY),
    (SYS_mprotect, ANY),
    (SYS_madvise, ANY),
    (SYS_brk, ANY),
    (SYS_futex, ANY),
    (SYS_futex_waitv, ANY),
    (SYS_sched_yield, ANY),
    (SYS_clock_gettime, ANY),
    (SYS_clock_getres, ANY),
    (SYS_gettimeofday, ANY),
    (SYS_nanosleep, ANY),
    (SYS_clock_nanosleep, ANY),
    (SYS_getrandom, ANY),
    (SYS_getpid, ANY),
    (SYS_gettid, ANY),
    (SYS_getcpu, ANY),
    (SYS_rseq, ANY),
    (SYS_membarrier, ANY),
    (SYS_set_robust_list, ANY),
    (SYS_rt_sigaction, ANY),
    (SYS_rt_sigprocmask, ANY),
    (SYS_rt_sigreturn, ANY),
    (SYS_sigaltstack, ANY),
    (SYS_restart_syscall, ANY),
    (SYS_tgkill, OWN_PROCESS),
    (SYS_write, ANY),
    (SYS_writev, ANY),
    (SYS_close, ANY),
    (SYS_exit, ANY),
    (SYS_exit_group, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_time, ANY),
];

/// Calls that start threads, but no processes.
pub(super) const THREADS: &[Call] = &[
    (SYS_clone, &[Masked(0, CLONE_THREAD as u32, CLONE_THREAD as u32)]),
    (SYS_clone3, ANY),
    (
        SYS_prctl,
        &[
            Is(0, PR_SET_NAME as u32),
            Is(0, PR_GET_NAME as u32),
            // libc sets names of its mappings.
            Is(0, PR_SET_VMA as u32),
            Is(0, PR_CAPBSET_READ as u32),
            Is(0, PR_CAP_AMBIENT as u32),
        ],
    ),
    (SYS_prlimit64, &[Is(0, 0), OwnProcess(0)]),
    (SYS_sched_getaffinity, ANY),
    (SYS_set_tid_address, ANY),
    (SYS_getppid, ANY),
];

/// Calls of a reactor besides [`LIBC`]: submitting I/O and sleeping.
pub(super) const REACTOR: &[Call] = &[
    (SYS_io_uring_enter, ANY),
    (SYS_io_submit, ANY),
    // A call without effect, which makes the kernel run completions of an io_uring after a move to
    // another thread.
    (SYS_getppid, ANY),
    (SYS_epoll_pwait2, ANY),
    (SYS_epoll_pwait, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_epoll_wait, ANY),
];

/// I/O on open files and sockets, mappings, and waiting.
pub(super) const DATA: &[Call] = &[
    (SYS_read, ANY),
    (SYS_readv, ANY),
    (SYS_pread64, ANY),
    (SYS_preadv, ANY),
    (SYS_preadv2, ANY),
    (SYS_pwrite64, ANY),
    (SYS_pwritev, ANY),
    (SYS_pwritev2, ANY),
    (SYS_lseek, ANY),
    (SYS_fcntl, ANY),
    (SYS_flock, ANY),
    (SYS_fstat, ANY),
    (SYS_fstatfs, ANY),
    (SYS_newfstatat, ANY),
    (SYS_statx, ANY),
    (SYS_statfs, ANY),
    (SYS_ftruncate, ANY),
    (SYS_fallocate, ANY),
    (SYS_fsync, ANY),
    (SYS_fdatasync, ANY),
    (SYS_sync_file_range, ANY),
    (SYS_fadvise64, ANY),
    (SYS_dup, ANY),
    (SYS_dup3, ANY),
    (SYS_close_range, ANY),
    (SYS_ioctl, IOCTLS),
    (SYS_memfd_create, ANY),
    (SYS_pipe2, ANY),
    (SYS_eventfd2, ANY),
    (SYS_timerfd_create, ANY),
    (SYS_timerfd_settime, ANY),
    (SYS_timerfd_gettime, ANY),
    (SYS_epoll_create1, ANY),
    (SYS_epoll_ctl, ANY),
    (SYS_epoll_pwait, ANY),
    (SYS_epoll_pwait2, ANY),
    (SYS_ppoll, ANY),
    (SYS_pselect6, ANY),
    (SYS_io_uring_setup, ANY),
    (SYS_io_uring_enter, ANY),
    (SYS_io_uring_register, ANY),
    (SYS_io_setup, ANY),
    (SYS_io_destroy, ANY),
    (SYS_io_submit, ANY),
    (SYS_accept, ANY),
    (SYS_accept4, ANY),
    (SYS_recvmsg, ANY),
    (SYS_recvmmsg, ANY),
    (SYS_recvfrom, ANY),
    (SYS_sendmsg, ANY),
    (SYS_sendmmsg, ANY),
    (SYS_sendto, ANY),
    (SYS_shutdown, ANY),
    (SYS_getsockname, ANY),
    (SYS_getpeername, ANY),
    (SYS_getsockopt, ANY),
    (SYS_setsockopt, ANY),
    (SYS_socketpair, UNIX_SOCKETS),
    (SYS_mlock, ANY),
    (SYS_mlock2, ANY),
    (SYS_munlock, ANY),
    (SYS_msync, ANY),
    (SYS_mincore, ANY),
    // libnuma, for EAL and rte_vhost.
    (SYS_get_mempolicy, ANY),
    (SYS_set_mempolicy, ANY),
    (SYS_mbind, ANY),
    (SYS_move_pages, OWN_PAGES),
    #[cfg(target_arch = "x86_64")]
    (SYS_stat, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_lstat, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_dup2, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_pipe, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_poll, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_select, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_epoll_create, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_epoll_wait, ANY),
];

const OWN_PAGES: &[Check] = &[Is(0, 0), OwnProcess(0)];

/// Requests of `ioctl`: for terminals and sockets, queries and those that std uses; for block
/// devices, all, because only disks are open. TIOCSTI, which injects terminal input, is refused.
#[expect(clippy::cast_possible_truncation, reason = "the kernel's ioctl requests have 32 bits")]
const IOCTLS: &[Check] = &[
    Is(1, TCGETS as u32),
    Is(1, TIOCGWINSZ as u32),
    Is(1, TIOCOUTQ as u32),
    Is(1, FIONREAD as u32),
    Is(1, FIONBIO as u32),
    Is(1, FIOCLEX as u32),
    // _IO(0x12, …): BLKGETSIZE64 and other block device requests.
    Masked(1, 0xff00, 0x1200),
];

/// Calls on paths (Landlock restricts the paths), and on the process's own attributes.
pub(super) const CONTROL: &[Call] = &[
    (SYS_openat, ANY),
    (SYS_openat2, ANY),
    (SYS_faccessat, ANY),
    (SYS_faccessat2, ANY),
    (SYS_readlinkat, ANY),
    (SYS_getdents64, ANY),
    (SYS_getcwd, ANY),
    (SYS_unlinkat, ANY),
    (SYS_mkdirat, ANY),
    (SYS_renameat, ANY),
    (SYS_renameat2, ANY),
    (SYS_umask, ANY),
    (SYS_socket, UNIX_SOCKETS),
    (SYS_bind, ANY),
    (SYS_listen, ANY),
    (SYS_connect, ANY),
    (SYS_kill, OWN_PROCESS),
    (SYS_rt_sigtimedwait, ANY),
    (SYS_sched_setaffinity, ANY),
    (SYS_sched_getparam, ANY),
    (SYS_sched_getscheduler, ANY),
    (SYS_sched_setscheduler, ANY),
    (SYS_sched_get_priority_max, ANY),
    (SYS_sched_get_priority_min, ANY),
    (SYS_uname, ANY),
    (SYS_sysinfo, ANY),
    (SYS_getrusage, ANY),
    (SYS_times, ANY),
    (SYS_getuid, ANY),
    (SYS_geteuid, ANY),
    (SYS_getgid, ANY),
    (SYS_getegid, ANY),
    // To restrict threads further.
    (SYS_capget, ANY),
    (SYS_capset, ANY),
    (SYS_seccomp, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_open, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_access, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_readlink, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_unlink, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_mkdir, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_rmdir, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_rename, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_getrlimit, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_setrlimit, ANY),
];

/// Calls that librados makes to connect to a storage cluster, besides those of [`CONTROL`].
pub(super) const NETWORK: &[Call] = &[
    (
        SYS_socket,
        &[
            Is(0, AF_INET as u32),
            Is(0, AF_INET6 as u32),
            // libc reads the host's addresses through it.
            Is(0, AF_NETLINK as u32),
        ],
    ),
    // libceph-common reads resource limits when it is loaded.
    (SYS_getrlimit, ANY),
];

/// Calls of the process that opens disks besides [`LIBC`] and [`THREADS`].
pub(super) const OPENER: &[Call] = &[
    (SYS_openat, ANY),
    (SYS_fstat, ANY),
    (SYS_fstatfs, ANY),
    (SYS_newfstatat, ANY),
    (SYS_statx, ANY),
    (SYS_fcntl, &[Is(1, F_GETFD as u32)]),
    (SYS_recvmsg, ANY),
    (SYS_sendmsg, ANY),
    (SYS_sendto, ANY),
];

/// Calls that make memory executable.
pub(super) const NEW_CODE: &[Call] =
    &[(SYS_mmap, EXECUTABLE), (SYS_mprotect, EXECUTABLE), (SYS_pkey_mprotect, EXECUTABLE)];

const EXECUTABLE: &[Check] = &[Masked(2, PROT_EXEC as u32, PROT_EXEC as u32)];

/// Calls that are refused to workers: creating sockets other than pairs, connecting, creating,
/// renaming and removing files, signals, and process attributes.
pub(super) const NOT_FOR_WORKERS: &[Call] = &[
    (SYS_socket, ANY),
    (SYS_bind, ANY),
    (SYS_listen, ANY),
    (SYS_connect, ANY),
    (SYS_openat, &[MAKES_FILE_AT, MAKES_UNNAMED_FILE_AT]),
    // A filter cannot check its flags, which are in memory.
    (SYS_openat2, ANY),
    (SYS_unlinkat, ANY),
    (SYS_mkdirat, ANY),
    (SYS_renameat, ANY),
    (SYS_renameat2, ANY),
    (SYS_fchmodat, ANY),
    (SYS_fchownat, ANY),
    (SYS_kill, ANY),
    (SYS_umask, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_open, &[MAKES_FILE, MAKES_UNNAMED_FILE]),
    #[cfg(target_arch = "x86_64")]
    (SYS_rename, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_unlink, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_mkdir, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_rmdir, ANY),
];

const CREAT: u32 = O_CREAT as u32;
/// `O_TMPFILE` without `O_DIRECTORY`, which it includes and which creates no file by itself.
const TMPFILE: u32 = (O_TMPFILE & !O_DIRECTORY) as u32;

const MAKES_FILE_AT: Check = Masked(2, CREAT, CREAT);
const MAKES_UNNAMED_FILE_AT: Check = Masked(2, TMPFILE, TMPFILE);
#[cfg(target_arch = "x86_64")]
const MAKES_FILE: Check = Masked(1, CREAT, CREAT);
#[cfg(target_arch = "x86_64")]
const MAKES_UNNAMED_FILE: Check = Masked(1, TMPFILE, TMPFILE);

/// Calls that kill the process. No library has a reason to make them: they start programs, access
/// other processes, change identities or mounts, or load kernel code.
pub(super) const KILL: &[Call] = &[
    (SYS_execve, ANY),
    (SYS_execveat, ANY),
    (SYS_ptrace, ANY),
    (SYS_process_vm_readv, ANY),
    (SYS_process_vm_writev, ANY),
    (SYS_pidfd_getfd, ANY),
    (SYS_setuid, ANY),
    (SYS_setgid, ANY),
    (SYS_setreuid, ANY),
    (SYS_setregid, ANY),
    (SYS_setresuid, ANY),
    (SYS_setresgid, ANY),
    (SYS_setfsuid, ANY),
    (SYS_setfsgid, ANY),
    (SYS_setgroups, ANY),
    (SYS_unshare, ANY),
    (SYS_setns, ANY),
    (SYS_chroot, ANY),
    (SYS_pivot_root, ANY),
    (SYS_mount, ANY),
    (SYS_umount2, ANY),
    (SYS_move_mount, ANY),
    (SYS_open_tree, ANY),
    (SYS_fsopen, ANY),
    (SYS_fsmount, ANY),
    (SYS_open_by_handle_at, ANY),
    (SYS_init_module, ANY),
    (SYS_finit_module, ANY),
    (SYS_delete_module, ANY),
    (SYS_kexec_load, ANY),
    (SYS_reboot, ANY),
    (SYS_bpf, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_fork, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_vfork, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_iopl, ANY),
    #[cfg(target_arch = "x86_64")]
    (SYS_ioperm, ANY),
];
