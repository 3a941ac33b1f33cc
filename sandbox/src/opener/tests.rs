use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::symlink;

use super::*;

/// The process under test.
struct Helper {
    opener: Opener,
    pid: i32,
}

impl Helper {
    /// The test harness has another thread. It holds no lock that the new process needs, because it
    /// waits for this thread.
    fn start(dirs: &[PathBuf]) -> Self {
        let (opener, pid) = fork(dirs).unwrap();
        Self { opener, pid: pid.try_into().unwrap() }
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.opener.0.as_ref().unwrap().as_fd()
    }

    /// Waits for the process's exit, and returns the signal that killed it.
    fn wait(&self) -> Option<i32> {
        let mut status = 0;
        // SAFETY: `status` is live.
        assert_eq!(unsafe { libc::waitpid(self.pid, &raw mut status, 0) }, self.pid);
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: `kill` has no precondition; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.pid, signal) }, 0);
    }
}

fn file(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, [7; 4096]).unwrap();
    path
}

fn errno(result: Result<File, bdev::Error>) -> i32 {
    result.map(|_| ()).unwrap_err().errno()
}

#[test]
fn files_are_opened_as_they_are_without_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "disk");
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let helper = Helper::start(&[]);
    for opener in [Opener::in_process(), helper.opener.clone()] {
        let flags = |file: &File| {
            // SAFETY: asks for the flags of an open file.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) & libc::O_ACCMODE }
        };
        assert_eq!(flags(&opener.open(&path, Access::ReadWrite).unwrap()), libc::O_RDWR);
        assert_eq!(flags(&opener.open(&link, Access::ReadOnly).unwrap()), libc::O_RDONLY);
        assert_eq!(errno(opener.open(&dir.path().join("none"), Access::ReadWrite)), libc::ENOENT);
        assert_eq!(errno(opener.open(dir.path(), Access::ReadWrite)), libc::EISDIR);
        assert_eq!(errno(opener.open(Path::new(""), Access::ReadWrite)), libc::ENOENT);
        assert_eq!(
            errno(opener.open(Path::new(&"x".repeat(300)), Access::ReadWrite)),
            libc::ENAMETOOLONG
        );
        assert_eq!(
            errno(opener.open(Path::new(&"x".repeat(5000)), Access::ReadWrite)),
            libc::ENAMETOOLONG
        );
        let e = opener.open(&socket, Access::ReadWrite).unwrap_err();
        assert!(e.to_string().ends_with("socket: neither a file nor a block device"), "{e}");
        assert!(matches!(e, bdev::Error::Invalid(_)));
    }
    // The fd is like one that was opened in this process.
    let mut disk = helper.opener.open(&path, Access::ReadWrite).unwrap();
    // SAFETY: sets flags of an open file: no alignment is wanted.
    unsafe { libc::fcntl(disk.as_raw_fd(), libc::F_SETFL, 0) };
    disk.write_all(b"new").unwrap();
    let mut rest = vec![];
    disk.read_to_end(&mut rest).unwrap();
    assert_eq!((&fs::read(&path).unwrap()[..4], rest.len()), (&b"new\x07"[..], 4093));
}

#[test]
fn with_directories_nothing_outside_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let [inside, outside] = ["in", "out"].map(|name| {
        fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name)
    });
    let (disk, secret) = (file(&inside, "disk"), file(&outside, "secret"));
    let link = inside.join("link");
    symlink(&secret, &link).unwrap();
    let helper = Helper::start(std::slice::from_ref(&inside));
    helper.opener.open(&disk, Access::ReadWrite).unwrap();
    for path in [&secret, &link, &inside.join("../out/secret")] {
        assert_eq!(
            errno(helper.opener.open(path, Access::ReadOnly)),
            libc::EACCES,
            "{}",
            path.display()
        );
    }
    let refusal = fork(&[inside, dir.path().join("none")]).unwrap_err().to_string();
    assert!(refusal.contains("--disk-dir") && refusal.contains("none"), "{refusal}");
}

#[test]
fn nothing_but_disks_is_opened() {
    use Access::{NvmeControl, NvmeController, NvmeHealth, NvmeNamespace};
    let helper = Helper::start(&[]);
    for access in [NvmeControl, NvmeController, NvmeNamespace, NvmeHealth] {
        let path = Path::new("/dev/nvme0");
        let e = helper.opener.open(path, access).unwrap_err();
        assert_eq!(e.errno(), libc::EPERM);
        assert!(e.to_string().contains("needs --no-sandbox"), "{e}");
        // The process does not rely on its client.
        let answer = request(helper.socket(), path, access);
        assert!(matches!(answer, Err(RequestError::Dropped)), "{answer:?}");
    }
    let e = helper.opener.open(Path::new("/dev/null"), Access::Exclusive).unwrap_err();
    assert_eq!(e.errno(), libc::EINVAL);
    for path in ["/proc/self/mem", "/sys/kernel/uevent_seqnum"] {
        assert_eq!(errno(helper.opener.open(Path::new(path), Access::ReadOnly)), libc::EPERM);
    }
}

/// Root starts with all capabilities; other users have none to lose.
#[test]
fn it_keeps_no_capability_but_those_for_files_of_others() {
    let helper = Helper::start(&[]);
    let status = fs::read_to_string(format!("/proc/{}/status", helper.pid)).unwrap();
    let kept = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap().trim();
    // CAP_DAC_OVERRIDE is 1, CAP_DAC_READ_SEARCH is 2.
    assert_eq!(u64::from_str_radix(kept, 16).unwrap() & !0b110, 0, "{kept}");
}

#[test]
fn it_exits_with_the_last_socket_and_ignores_signals_to_both_processes() {
    let helper = Helper::start(&[]);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        helper.signal(signal);
    }
    assert_eq!(
        errno(helper.opener.open(Path::new("/"), Access::ReadWrite)),
        libc::EISDIR,
        "it lives"
    );
    let Helper { opener, pid } = helper;
    drop(opener);
    assert_eq!(Helper { opener: Opener::in_process(), pid }.wait(), None);
}

#[test]
fn an_open_after_its_exit_fails_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "disk");
    let helper = Helper::start(&[]);
    helper.signal(libc::SIGKILL);
    assert_eq!(helper.wait(), Some(libc::SIGKILL));
    let e = helper.opener.open(&path, Access::ReadWrite).unwrap_err();
    assert!(e.to_string().contains("restart vhost to add disks"), "{e}");
}

/// The error of an `open` whose request a thread takes, which passes its socket to `answers`.
fn error_of(answers: impl FnOnce(Option<OwnedFd>) + Send) -> bdev::Error {
    let (ours, theirs) = pair().unwrap();
    let opener = Opener(Some(Arc::new(ours)));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut request = [0; REQUEST_MAX];
            answers(receive(theirs.as_fd(), &mut request).unwrap().1);
        });
        opener.open(Path::new("/disk"), Access::ReadWrite).unwrap_err()
    })
}

#[test]
fn a_lost_answer_is_not_mistaken_for_the_exit_of_the_process() {
    let e = error_of(drop);
    assert_eq!(e.errno(), libc::ECONNRESET);
    let text = e.to_string();
    assert!(text.contains("no answer") && !text.contains("has ended"), "{text}");
    let e = error_of(|socket| answer(&socket.unwrap(), 0, None));
    assert_eq!(e.errno(), libc::EMFILE, "{e}");
    // open(2) itself may say so.
    let e = error_of(|socket| answer(&socket.unwrap(), libc::EBUSY, None));
    assert!(matches!(e, bdev::Error::System { .. }) && e.errno() == libc::EBUSY, "{e}");
}

/// A lease makes `open` in other processes block until it is given back.
#[test]
fn blocked_opens_delay_no_others_and_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (hangs, path) = (file(dir.path(), "hangs"), file(dir.path(), "disk"));
    let lease = File::options().read(true).write(true).open(&hangs).unwrap();
    // SAFETY: no handler is involved. The kernel sends this signal when an `open` blocks.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let set_lease = |kind: i32| {
        // SAFETY: on a file of ours.
        assert_eq!(unsafe { libc::fcntl(lease.as_raw_fd(), libc::F_SETLEASE, kind) }, 0);
    };
    set_lease(libc::F_WRLCK);
    let request = [&[0], hangs.as_os_str().as_bytes()].concat();
    let request_only = |helper: &Helper| {
        let (answers, theirs) = pair().unwrap();
        send(helper.socket(), &request, Some(theirs.as_fd())).unwrap();
        answers
    };
    let mut code = [0; 4];
    let mut is_opened = |answers: &OwnedFd| {
        let (len, file) = receive(answers.as_fd(), &mut code).unwrap();
        len == 4 && i32::from_ne_bytes(code) == 0 && file.is_some()
    };
    let helper = Helper::start(&[]);
    let one = request_only(&helper);
    helper.opener.open(&path, Access::ReadWrite).unwrap();

    let full = Helper::start(&[]);
    let all: Vec<OwnedFd> = (0..OPENS_MAX).map(|_| request_only(&full)).collect();
    // Requests are received in order.
    let refusal = full.opener.open(&path, Access::ReadWrite).unwrap_err();
    assert!(matches!(refusal, bdev::Error::Busy(_)), "{refusal}");
    helper.opener.open(&path, Access::ReadWrite).unwrap();

    set_lease(libc::F_UNLCK);
    assert!(is_opened(&one));
    assert!(all.iter().all(is_opened));
}

#[test]
fn an_invalid_request_is_refused_or_ignored() {
    let helper = Helper::start(&[]);
    send(helper.socket(), b"no answer wanted", None).unwrap();
    let (answers, theirs) = pair().unwrap();
    send(helper.socket(), &[0], Some(theirs.as_fd())).unwrap();
    drop(theirs);
    let mut code = [0; 4];
    let (len, file) = receive(answers.as_fd(), &mut code).unwrap();
    assert_eq!((len, i32::from_ne_bytes(code), file.is_none()), (4, libc::ENOENT, true));
    let e = helper.opener.open(Path::new("/x\0y"), Access::ReadWrite).unwrap_err();
    let bdev::Error::System { source, .. } = e else { panic!("{e}") };
    assert_ne!(source.kind(), ErrorKind::NotConnected);
}
