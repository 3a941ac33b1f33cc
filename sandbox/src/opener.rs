//! The process that opens disks for the main process.
//!
//! It is a process, not a thread, because threads share memory: an attacker on one thread has the
//! rights of all threads. The main process forks it while it has one thread. A socket connects the
//! two. A request is a path with one end of a socket pair for the answer, so requests need no
//! numbers and do not wait for each other. A thread serves each request, because opening can block
//! for ever (a FUSE file system whose server hangs). The process runs at most [`OPENS_MAX`]
//! threads.
//!
//! The process exits when its socket reaches end of file, so it exits with the main process, even
//! after a crash. (PR_SET_PDEATHSIG would not work: the main process's Landlock domain blocks the
//! signal.) It ignores signals that are sent to both processes (Ctrl-C, a service manager), because
//! requests may be in progress.
#![expect(unsafe_code, reason = "fork, and setting up the new process")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bdev::Access;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::{Error, capabilities, filters, paths};

/// Limit on requests in progress, each of which has a thread. Further requests are refused.
const OPENS_MAX: usize = 64;

/// Limit on the bytes of a request: a number and a path of the maximum length.
const REQUEST_MAX: usize = 1 + libc::PATH_MAX as usize;

/// Stack of a thread that serves a request. Its call depth is small.
const STACK_BYTES: usize = 64 << 10;

/// Answer codes: 0 with an fd, a positive errno, or one of these. The path is not of the kind that
/// the access requires.
const NOT_OF_KIND: i32 = -1;
/// [`OPENS_MAX`] requests are in progress.
const TOO_MANY: i32 = -2;

/// Opens the files of disks: a handle to the process that opens disks, or none to open in this
/// process.
#[derive(Clone, Debug)]
pub struct Opener(Option<Arc<OwnedFd>>);

impl Opener {
    /// Opens in this process.
    #[must_use]
    pub fn in_process() -> Self {
        Self(None)
    }

    /// Opens a file as [`bdev::open_file`] does. May block.
    ///
    /// # Errors
    /// As [`bdev::open_file`], and `Busy` while 64 other opens are blocked. EPERM in the sandbox for
    /// an access that it does not allow.
    pub fn open(&self, path: &Path, access: Access) -> Result<File, bdev::Error> {
        let Some(socket) = &self.0 else { return bdev::open_file(path, access) };
        let system = |source| bdev::Error::System { what: path.display().to_string(), source };
        if !access.is_in_sandbox() {
            let what = format!("{}: not in the sandbox; needs --no-sandbox", path.display());
            let source = io::Error::from_raw_os_error(libc::EPERM);
            return Err(bdev::Error::System { what, source });
        }
        if path.as_os_str().len() >= REQUEST_MAX {
            return Err(system(io::Error::from_raw_os_error(libc::ENAMETOOLONG)));
        }
        let (code, file) = request(socket.as_fd(), path, access).map_err(|e| {
            let what = format!("{}: {e}", path.display());
            bdev::Error::System { what, source: e.into_source() }
        })?;
        match (code, file) {
            (0, Some(file)) => Ok(file.into()),
            // The kernel drops an fd if the receiving process has reached its limit.
            (0, None) => Err(system(io::Error::from_raw_os_error(libc::EMFILE))),
            (TOO_MANY, _) => {
                let text = format!("{}: {OPENS_MAX} other opens are blocked", path.display());
                Err(bdev::Error::Busy(text))
            }
            (NOT_OF_KIND, _) => Err(bdev::not_of_kind(path, access)),
            (libc::EACCES, _) => {
                let what = format!("{} (opened in the sandbox: see --disk-dir)", path.display());
                let source = io::Error::from_raw_os_error(libc::EACCES);
                Err(bdev::Error::System { what, source })
            }
            (code, _) => Err(system(io::Error::from_raw_os_error(code))),
        }
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    /// The process that opens disks has ended.
    #[error("the process that opens disks has ended; restart vhost to add disks")]
    Gone(#[source] io::Error),
    /// The request could not be sent.
    #[error("cannot send a request to the process that opens disks")]
    NotSent(#[source] io::Error),
    /// The process that opens disks could not start a thread or receive the fd, or has ended.
    #[error(
        "no answer from the process that opens disks; try again, and if that fails, restart vhost \
         to add disks"
    )]
    Dropped,
}

impl RequestError {
    fn into_source(self) -> io::Error {
        let errno = match self {
            Self::Gone(e) | Self::NotSent(e) => e.raw_os_error().unwrap_or(libc::EIO),
            Self::Dropped => libc::ECONNRESET,
        };
        io::Error::from_raw_os_error(errno)
    }
}

/// Sends a request and waits for its answer.
fn request(
    socket: BorrowedFd<'_>,
    path: &Path,
    access: Access,
) -> Result<(i32, Option<OwnedFd>), RequestError> {
    let (answers, theirs) = pair().map_err(RequestError::NotSent)?;
    let request = [&[access as u8], path.as_os_str().as_bytes()].concat();
    send(socket, &request, Some(theirs.as_fd())).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => RequestError::Gone(e),
        _ => RequestError::NotSent(e),
    })?;
    // While this process holds their end, `receive` would not return when they drop it.
    drop(theirs);
    let mut code = [0; 4];
    match receive(answers.as_fd(), &mut code) {
        Ok((len, file)) if len == code.len() => Ok((i32::from_ne_bytes(code), file)),
        _ => Err(RequestError::Dropped),
    }
}

/// Forks the process that opens disks; `dirs` as in [`crate::Needs`]. Returns its handle and its
/// id.
///
/// The calling process must have one thread.
pub(crate) fn fork(dirs: &[PathBuf]) -> Result<(Opener, u32), Error> {
    let (ours, theirs) = pair().map_err(Error::Opener)?;
    // SAFETY: the caller guarantees one thread, so no lock is held in the new process.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Error::Opener(io::Error::last_os_error()));
    }
    if pid == 0 {
        drop(ours);
        run(&theirs, dirs);
        // SAFETY: `_exit` has no precondition. It skips the exit handlers, which are the parent's.
        unsafe { libc::_exit(0) };
    }
    drop(theirs);
    let mut message = [0; 512];
    let (len, _) = receive(ours.as_fd(), &mut message).map_err(Error::Opener)?;
    // One zero byte means that the process is ready. Otherwise it sends the reason of its exit.
    match &message[..len] {
        [0] => Ok((Opener(Some(Arc::new(ours))), pid.unsigned_abs())),
        [] => Err(Error::Opener(io::ErrorKind::UnexpectedEof.into())),
        reason => Err(Error::OpenerRestrictions(String::from_utf8_lossy(reason).into_owned())),
    }
}

/// Why the process that opens disks could not restrict itself.
#[derive(Debug, thiserror::Error)]
enum RestrictError {
    #[error("cannot compile the system call filters: {0}")]
    Filters(#[from] seccompiler::BackendError),
    #[error("--disk-dir: {0}")]
    DiskDirs(#[source] paths::LandlockError),
}

/// The main function of the process that opens disks.
fn run(socket: &OwnedFd, dirs: &[PathBuf]) {
    let Ok(socket) = detach(socket.as_raw_fd()) else { return };
    match restrict(dirs) {
        Ok(()) => {
            if send(socket.as_fd(), &[0], None).is_ok() {
                serve(&socket);
            }
        }
        Err(e) => {
            let _ = send(socket.as_fd(), e.to_string().as_bytes(), None);
        }
    }
}

/// Detaches the new process from its parent's fds and signals.
fn detach(socket: i32) -> io::Result<OwnedFd> {
    const SOCKET: i32 = 3;
    let check = |rc: i32| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) };
    // SAFETY: the name is static.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, c"vhost-open".as_ptr()) })?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // The standard fds are replaced, so that a reader of the parent's output reaches end of file
    // when the parent exits. SAFETY: the path is static.
    let null = check(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) })?;
    // The duplicate is above the numbers that are replaced next.
    // SAFETY: duplicates an fd; no number is closed.
    let socket = check(unsafe { libc::fcntl(socket, libc::F_DUPFD_CLOEXEC, 16) })?;
    for fd in 0..SOCKET {
        // SAFETY: closes a standard fd; this process has one thread and no owner of that number.
        check(unsafe { libc::dup2(null, fd) })?;
    }
    // SAFETY: closes fd 3; this process has one thread and uses no fd of its parent but `socket`.
    check(unsafe { libc::dup3(socket, SOCKET, libc::O_CLOEXEC) })?;
    // Kernels before 5.9 have no `close_range`; the fds then stay open.
    // SAFETY: this process uses none of these fds from here on.
    unsafe { libc::syscall(libc::SYS_close_range, SOCKET + 1, libc::c_uint::MAX, 0) };
    // SAFETY: `dup3` has just created the fd, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(SOCKET) })
}

/// Drops the rights that opening does not need. Ignores parts that the kernel lacks: the parent
/// lacks them, too, and reports them.
fn restrict(dirs: &[PathBuf]) -> Result<(), RestrictError> {
    // Compiled in this process, because filters contain the process id.
    let programs = filters::of_opener()?;
    let _ = capabilities::no_new_privileges();
    let _ = capabilities::keep(capabilities::OF_OPENER);
    match paths::enter_opener(dirs) {
        Err(e) if !dirs.is_empty() => return Err(RestrictError::DiskDirs(e)),
        _ => {}
    }
    let _ = filters::install_all(&programs);
    Ok(())
}

/// Serves requests until the parent has closed its end of the socket.
fn serve(socket: &OwnedFd) {
    let in_progress = Arc::new(AtomicUsize::new(0));
    let mut request = [0; REQUEST_MAX];
    loop {
        let Ok((len, answers)) = receive(socket.as_fd(), &mut request) else { return };
        let [access, path @ ..] = &request[..len] else { return };
        let Some(access) = Access::in_sandbox(*access) else { continue };
        let Some(answers) = answers else { continue };
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.into()));
        // Relaxed: only this thread increments, and a stale count is only too high.
        if in_progress.load(Ordering::Relaxed) >= OPENS_MAX {
            answer(&answers, TOO_MANY, None);
            continue;
        }
        in_progress.fetch_add(1, Ordering::Relaxed);
        let guard = InProgress(Arc::clone(&in_progress));
        let open = move || {
            let _guard = guard;
            match bdev::open_file(&path, access) {
                Ok(file) => answer(&answers, 0, Some(file.as_fd())),
                Err(bdev::Error::System { source, .. }) => {
                    answer(&answers, source.raw_os_error().unwrap_or(libc::EIO), None);
                }
                Err(_) => answer(&answers, NOT_OF_KIND, None),
            }
        };
        // If no thread can be started, the client's socket is closed, which the client reports.
        let _ = thread::Builder::new().stack_size(STACK_BYTES).spawn(open);
    }
}

/// Counts one request until it is dropped.
struct InProgress(Arc<AtomicUsize>);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(answers: &OwnedFd, code: i32, file: Option<BorrowedFd<'_>>) {
    // An error means that the client has gone and needs no answer.
    let _ = send(answers.as_fd(), &code.to_ne_bytes(), file);
}

/// A connected pair of sockets that preserve message boundaries.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(fd) = &fd {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives a message and its fd. 0 bytes mean that the other end is closed.
fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)
    })?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((received.bytes, fd))
}

#[cfg(test)]
mod tests;
