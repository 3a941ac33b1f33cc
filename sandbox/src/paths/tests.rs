use std::fs::{self, File};
use std::io::ErrorKind::PermissionDenied;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use super::*;

/// Runs `f` on a new thread, which may enter a domain.
fn on_thread(f: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(f).join()).unwrap();
}

#[track_caller]
fn denied<T>(result: std::io::Result<T>) {
    assert_eq!(result.err().expect("it is denied").kind(), PermissionDenied);
}

fn make_dirs(root: &Path, names: &[&str]) {
    names.iter().for_each(|name| fs::create_dir_all(root.join(name)).unwrap());
}

#[test]
fn the_process_creates_sockets_in_the_granted_directories_and_opens_no_other_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    make_dirs(dir.path(), &["sockets", "rpc", "runtime/private", "locks", "groups/own", "other"]);
    for name in ["config", "locks/lock", "groups/own/limit", "other/file", "sockets/file"] {
        fs::write(at(name), "text").unwrap();
    }
    let outside = UnixListener::bind(at("other/socket")).unwrap();
    let needs = Needs {
        socket_dir: at("sockets"),
        rpc_socket: Some(at("rpc/sock")),
        private_dir: Some(at("runtime/private")),
        config: Some(at("config")),
        locks_in: Some(at("locks")),
        reads_in: vec![at("groups")],
        disk_dirs: vec![],
        network: Network::Refused,
        socket_access: crate::SocketAccess::default(),
    };
    on_thread(|| {
        let Entered { absent, .. } = enter(&needs).expect("this kernel has Landlock");
        assert!(absent.iter().all(|path| READ.contains(&path.to_str().unwrap())), "{absent:?}");
        uses_what_it_needs(&at);
        is_denied_other_paths(&at);
    });
    drop(outside);
}

/// Options that create a file and open it for writing.
fn create() -> fs::OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options
}

fn uses_what_it_needs(at: &dyn Fn(&str) -> PathBuf) {
    drop(UnixListener::bind(at("sockets/vhost.0")).unwrap());
    fs::remove_file(at("sockets/vhost.0")).unwrap();
    drop(UnixListener::bind(at("rpc/sock")).unwrap());
    create().open(at("rpc/sock.lock")).unwrap();
    fs::remove_file(at("rpc/sock.lock")).unwrap();
    drop(UnixListener::bind(at("runtime/private/anchor")).unwrap());
    fs::remove_dir_all(at("runtime/private")).unwrap();
    fs::remove_file(at("locks/lock")).unwrap();
    create().open(at("locks/lock")).unwrap().set_len(4).unwrap();
    assert_eq!(fs::read(at("config")).unwrap(), b"text");
    assert_eq!(fs::read(at("groups/own/limit")).unwrap(), b"text");
    fs::read_dir(at("groups")).unwrap();
    fs::read("/proc/self/status").unwrap();
    fs::write("/dev/null", "text").unwrap();
    let named = std::thread::Builder::new().name("named".into());
    named.spawn(|| ()).unwrap().join().unwrap();
    UnixStream::connect(at("other/socket")).unwrap();
}

fn is_denied_other_paths(at: &dyn Fn(&str) -> PathBuf) {
    denied(fs::write(at("groups/own/limit"), ""));
    // Memory, code included.
    denied(File::options().write(true).open("/proc/self/mem"));
    denied(File::options().write(true).open("/proc/thread-self/mem"));
    denied(fs::read(at("other/file")));
    denied(fs::write(at("other/file"), ""));
    denied(fs::read_dir(at("other")));
    denied(fs::remove_file(at("other/file")));
    denied(fs::write(at("config"), ""));
    denied(fs::read(at("sockets/file")));
    denied(fs::write(at("sockets/new"), ""));
    denied(fs::create_dir(at("sockets/dir")));
    denied(UnixListener::bind(at("runtime/new")));
    denied(UnixListener::bind(at("other/new")));
    denied(fs::read("/etc/passwd"));
    denied(File::options().write(true).open("/proc/sys/kernel/core_pattern"));
    denied(TcpListener::bind("127.0.0.1:0"));
    denied(TcpStream::connect("127.0.0.1:1"));
}

#[test]
fn restrictions_that_an_older_kernel_lacks_are_named() {
    use RulesetStatus::{FullyEnforced, NotEnforced, PartiallyEnforced};
    assert_eq!(unsupported(FullyEnforced, ABI_TESTED).unwrap(), None);
    for (abi, names) in [
        (ABI::V1, "1, not 6, and does not restrict: truncation, TCP, ioctl on devices, signals"),
        (ABI::V4, "4, not 6, and does not restrict: ioctl on devices, signals and abstract"),
        (ABI::V5, "5, not 6, and does not restrict: signals and abstract sockets"),
    ] {
        let text = unsupported(PartiallyEnforced, abi).unwrap().unwrap();
        assert!(text.contains(names), "{text}");
    }
    assert!(unsupported(NotEnforced, ABI::Unsupported).is_err());
}

#[test]
fn abstract_sockets_of_other_processes_are_refused() {
    let name = SocketAddr::from_abstract_name(format!("sandbox-{}", std::process::id())).unwrap();
    let _outside = UnixListener::bind_addr(&name).unwrap();
    let dir = tempfile::tempdir().unwrap();
    on_thread(|| {
        enter_opener(&[dir.path().into()]).unwrap();
        denied(UnixStream::connect_addr(&name));
    });
    UnixStream::connect_addr(&name).unwrap();
}

#[test]
fn the_opener_opens_and_does_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();
    for dirs in [vec![], vec![dir.path().to_owned()]] {
        on_thread(|| {
            enter_opener(&dirs).unwrap();
            let opened = File::options().read(true).write(true).open(&file).unwrap();
            denied(opened.set_len(1));
            denied(fs::write(&file, ""));
            denied(fs::write(dir.path().join("new"), ""));
            denied(fs::remove_file(&file));
            denied(fs::read_dir(dir.path()));
            denied(fs::rename(&file, dir.path().join("new")));
            denied(TcpStream::connect("127.0.0.1:1"));
            assert_eq!(fs::read("/etc/passwd").is_ok(), dirs.is_empty());
        });
    }
}
