//! The process that opens disks for the main process.
//!
//! A thread would not do: threads share memory, and code that takes over one has the rights of all.
//! So it is a process, forked while there is one thread, and connected by a socket. A request is a
//! path, and carries one end of a socket pair for its answer, so that requests need no numbers and
//! none waits for another. Each is served by a thread, as opening can block for ever (a FUSE file
//! system whose server hangs), and there are at most [`OPENS_MAX`] of them.
//!
//! It ends with the main process, however that ends, as its socket then reaches end of file.
//! (PR_SET_PDEATHSIG would not work: the main process's Landlock domain stops the signal.) It ignores
//! signals that are sent to both (Ctrl-C, a service manager), since requests may be in progress.
#![expect(unsafe_code, reason = "fork and what comes after it")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::{capabilities, filters, paths};

/// Limit on requests in progress, and so on threads; further ones are refused while that many hang.
const OPENS_MAX: usize = 64;

/// Bytes of a request: a flag and a path. The kernel accepts no longer path.
const REQUEST_MAX: usize = 1 + libc::PATH_MAX as usize;

/// Stack of a thread that opens, which calls little.
const STACK_BYTES: usize = 64 << 10;

/// Codes that are no errno; code 0 comes with the fd. This one: neither a file nor a block device.
const NOT_A_DISK: i32 = -1;
/// [`OPENS_MAX`] requests are in progress.
const TOO_MANY: i32 = -2;

/// Opens the files of disks.
#[derive(Clone, Debug)]
pub struct Opener(Option<Arc<OwnedFd>>);

impl Opener {
    /// Opens in this process.
    #[must_use]
    pub fn in_process() -> Self {
        Self(None)
    }

    /// Opens a file or block device as [`bdev::open_file`] does. May block.
    ///
    /// # Errors
    /// As [`bdev::open_file`], and `Busy` while many other opens hang.
    pub fn open(&self, path: &Path, readonly: bool) -> Result<File, bdev::Error> {
        let Some(socket) = &self.0 else { return bdev::open_file(path, readonly) };
        let system = |source| bdev::Error::System { what: path.display().to_string(), source };
        if path.as_os_str().len() >= REQUEST_MAX {
            return Err(system(io::Error::from_raw_os_error(libc::ENAMETOOLONG)));
        }
        let (code, file) = ask(socket.as_fd(), path, readonly).map_err(|e| {
            let what = format!("{}: {}", path.display(), e.text());
            bdev::Error::System { what, source: e.source() }
        })?;
        match (code, file) {
            (0, Some(file)) => Ok(file.into()),
            // The kernel drops an fd if the receiving process has reached its limit.
            (0, None) => Err(system(io::Error::from_raw_os_error(libc::EMFILE))),
            (TOO_MANY, _) => {
                let text = format!("{}: {OPENS_MAX} other opens are blocked", path.display());
                Err(bdev::Error::Busy(text))
            }
            (NOT_A_DISK, _) => Err(bdev::not_a_disk(path)),
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
#[derive(Debug)]
enum Unanswered {
    /// The process that opens disks has ended.
    Gone(io::Error),
    /// The request could not be sent.
    NotSent(io::Error),
    /// The process that opens disks has dropped it: it could not start a thread or receive the fd,
    /// or has ended.
    Dropped,
}

impl Unanswered {
    fn text(&self) -> &'static str {
        match self {
            Self::Gone(_) => "the process that opens disks is gone; restart vhost to add disks",
            Self::NotSent(_) => "cannot ask the process that opens disks",
            Self::Dropped => {
                "no answer from the process that opens disks; try again, and if that fails, \
                 restart vhost to add disks"
            }
        }
    }

    fn source(self) -> io::Error {
        let errno = match self {
            Self::Gone(e) | Self::NotSent(e) => e.raw_os_error().unwrap_or(libc::EIO),
            Self::Dropped => libc::ECONNRESET,
        };
        io::Error::from_raw_os_error(errno)
    }
}

/// Sends a request and waits for its answer.
fn ask(
    socket: BorrowedFd<'_>,
    path: &Path,
    readonly: bool,
) -> Result<(i32, Option<OwnedFd>), Unanswered> {
    let (answers, theirs) = pair().map_err(Unanswered::NotSent)?;
    let request = [&[u8::from(readonly)], path.as_os_str().as_bytes()].concat();
    send(socket, &request, Some(theirs.as_fd())).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Unanswered::Gone(e),
        _ => Unanswered::NotSent(e),
    })?;
    // Otherwise `receive` would never see the end of the answers.
    drop(theirs);
    let mut code = [0; 4];
    match receive(answers.as_fd(), &mut code) {
        Ok((len, file)) if len == code.len() => Ok((i32::from_ne_bytes(code), file)),
        _ => Err(Unanswered::Dropped),
    }
}

/// Forks the process that opens disks; `dirs` as in [`crate::Needs`]. Returns its handle and its
/// id.
///
/// To be called while the process has one thread.
///
/// # Errors
/// The reason: it cannot be started, or not restricted.
pub(crate) fn fork(dirs: &[PathBuf]) -> Result<(Opener, u32), String> {
    let text = |e: io::Error| format!("cannot start the process that opens disks: {e}");
    let (ours, theirs) = pair().map_err(text)?;
    // SAFETY: there is one thread, as the caller says, so that no lock is held in the new process.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(text(io::Error::last_os_error()));
    }
    if pid == 0 {
        drop(ours);
        serve_or_tell(&theirs, dirs);
        // SAFETY: ends the process at once, without the exit handlers of its parent.
        unsafe { libc::_exit(0) };
    }
    drop(theirs);
    let mut said = [0; 512];
    let (len, _) = receive(ours.as_fd(), &mut said).map_err(text)?;
    // It sends one zero byte when it is ready, or the reason why it ends.
    match &said[..len] {
        [0] => Ok((Opener(Some(Arc::new(ours))), pid.unsigned_abs())),
        [] => Err(text(io::ErrorKind::UnexpectedEof.into())),
        reason => Err(String::from_utf8_lossy(reason).into_owned()),
    }
}

/// The main function of the process that opens disks.
fn serve_or_tell(socket: &OwnedFd, dirs: &[PathBuf]) {
    let Ok(socket) = detach(socket.as_raw_fd()) else { return };
    match give_up(dirs) {
        Ok(()) => {
            if send(socket.as_fd(), &[0], None).is_ok() {
                serve(&socket);
            }
        }
        Err(reason) => {
            let _ = send(socket.as_fd(), reason.as_bytes(), None);
        }
    }
}

/// Detaches the new process from its parent's fds and signals.
fn detach(socket: i32) -> io::Result<OwnedFd> {
    const SOCKET: i32 = 3;
    let check = |rc: i32| if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) };
    // SAFETY: a name that outlives the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, c"vhost-open".as_ptr()) })?;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // SAFETY: a path that outlives the call. The standard fds are replaced, so that a reader of the
    // parent's output sees its end when the parent ends.
    let null = check(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) })?;
    // Above the numbers that are set next.
    // SAFETY: fds of this process; nobody else uses the numbers.
    let socket = check(unsafe { libc::fcntl(socket, libc::F_DUPFD_CLOEXEC, 16) })?;
    for fd in 0..SOCKET {
        // SAFETY: as above.
        check(unsafe { libc::dup2(null, fd) })?;
    }
    // SAFETY: as above.
    check(unsafe { libc::dup3(socket, SOCKET, libc::O_CLOEXEC) })?;
    // SAFETY: nothing here refers to any of these any more. Kernels before 5.9 keep them open.
    unsafe { libc::syscall(libc::SYS_close_range, SOCKET + 1, libc::c_uint::MAX, 0) };
    // SAFETY: just made, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(SOCKET) })
}

/// Restricts this process to what opening needs. The parent finds out by itself what the kernel
/// lacks, and reports it.
fn give_up(dirs: &[PathBuf]) -> Result<(), String> {
    // Compiled here, as filters contain the process's id.
    let programs = filters::of_opener().map_err(|e| format!("system call filters: {e}"))?;
    let _ = capabilities::no_new_privileges();
    let _ = capabilities::keep(capabilities::OF_OPENER);
    match paths::enter_opener(dirs) {
        Err(reason) if !dirs.is_empty() => return Err(format!("--disk-dir: {reason}")),
        _ => {}
    }
    let _ = filters::install_all(&programs);
    Ok(())
}

/// Serves requests until the parent is gone.
fn serve(socket: &OwnedFd) {
    let under_way = Arc::new(AtomicUsize::new(0));
    let mut request = [0; REQUEST_MAX];
    loop {
        let Ok((len, answers)) = receive(socket.as_fd(), &mut request) else { return };
        let [how, path @ ..] = &request[..len] else { return };
        let Some(answers) = answers else { continue };
        let (readonly, path) =
            (*how != 0, PathBuf::from(std::ffi::OsString::from_vec(path.into())));
        // Relaxed: only this thread adds, and a count that is too high for a moment does no harm.
        if under_way.load(Ordering::Relaxed) >= OPENS_MAX {
            answer(&answers, TOO_MANY, None);
            continue;
        }
        under_way.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&under_way));
        let open = move || {
            let _counted = counted;
            match bdev::open_file(&path, readonly) {
                Ok(file) => answer(&answers, 0, Some(file.as_fd())),
                Err(bdev::Error::System { source, .. }) => {
                    answer(&answers, source.raw_os_error().unwrap_or(libc::EIO), None);
                }
                Err(_) => answer(&answers, NOT_A_DISK, None),
            }
        };
        // If no thread can be started, the answer's socket is closed without an answer.
        let _ = thread::Builder::new().stack_size(STACK_BYTES).spawn(open);
    }
}

/// A request in progress.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(answers: &OwnedFd, code: i32, file: Option<BorrowedFd<'_>>) {
    // If the client is gone, nobody needs the answer.
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

/// Receives a message and the fd that came with it. 0 bytes: the other end is gone.
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
