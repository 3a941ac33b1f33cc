//! The socket's file and its lock.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;

use crate::fixture::{Fixture, run};
use rpc::{BindError, Registry, Server};

fn bind(path: impl AsRef<std::path::Path>) -> Result<Server, BindError> {
    Server::bind(path, Rc::new(Registry::new()))
}

#[test]
fn the_lock_is_exclusive_and_private_and_both_files_are_removed() {
    run(async {
        let fixture = Fixture::new();
        let path = fixture.path();
        let lock = fixture.dir.path().join("rpc.sock.lock");
        assert_eq!(std::fs::metadata(&lock).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(BindError::InUse(_))));
        // The refused server left the first one's socket alone.
        let mut client = fixture.client().await;
        client.sync().await;
        fixture.server.shutdown().await;
        assert_eq!(client.line().await, None);
        assert!(!path.exists() && !lock.exists());
        let again = bind(&path).unwrap();
        drop(again);
        assert!(!path.exists() && !lock.exists());
    });
}

#[test]
fn files_of_a_process_that_crashed_are_replaced() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        std::fs::write(dir.path().join("s.lock"), "").unwrap();
        let server = bind(&path).unwrap();
        assert!(std::fs::metadata(server.path()).unwrap().file_type().is_socket());
        server.shutdown().await;
    });
}

#[test]
fn invalid_paths_are_refused_and_leave_no_files() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let space = 107 - dir.path().as_os_str().len() - 1;
        let fits = dir.path().join("a".repeat(space));
        bind(&fits).unwrap().shutdown().await;
        let error = bind(dir.path().join("a".repeat(space + 1))).err().unwrap();
        assert!(matches!(error, BindError::PathTooLong { length: 108, .. }), "{error}");
        assert!(error.to_string().contains("108 bytes long; the limit is 107"));
        assert!(matches!(bind(dir.path().join("no/such")), Err(BindError::Lock(..))));
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        assert!(matches!(bind(dir.path().join("directory")), Err(BindError::Listen(..))));
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    });
}

#[test]
fn shutdown_sends_finished_answers_and_running_calls_see_that_their_client_is_gone() {
    run(async {
        let fixture = Fixture::new();
        let mut client = fixture.client().await;
        client.send(r#"{"method":"wait","id":1}{"method":"note","id":2}"#).await;
        fixture.probe.until(|probe| probe.started.borrow().len() == 2).await;
        fixture.server.shutdown().await;
        assert!(client.line().await.unwrap().contains(r#""id":2"#));
        assert_eq!(client.line().await, None);
        fixture.probe.until(|probe| probe.gone.get() == 1).await;
    });
}

#[test]
fn a_file_that_the_caller_refuses_is_removed() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let refuse = |bound: &std::path::Path| {
            assert!(std::fs::metadata(bound).unwrap().file_type().is_socket());
            // It does not listen yet.
            assert!(UnixStream::connect(bound).is_err());
            Err(std::io::Error::other("not like this"))
        };
        let refused = Server::bind_with(&path, Rc::new(Registry::new()), refuse);
        let error = refused.err().unwrap();
        assert!(matches!(error, BindError::File(..)), "{error}");
        assert!(error.to_string().ends_with("/s: not like this"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

/// Puts another socket at a path, as another program might.
fn replace(path: &std::path::Path) -> UnixListener {
    std::fs::remove_file(path).expect("the server's file");
    UnixListener::bind(path).expect("a free path")
}

#[test]
fn a_file_that_another_program_has_put_there_stays() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut other = None;
        let refuse = |bound: &std::path::Path| {
            other = Some(replace(bound));
            Err(std::io::Error::other("not like this"))
        };
        assert!(Server::bind_with(&path, Rc::new(Registry::new()), refuse).is_err());
        assert!(UnixStream::connect(&path).is_ok(), "the other program's socket");
        drop(other);
        let server = bind(&path).unwrap();
        let other = replace(&path);
        server.shutdown().await;
        assert!(UnixStream::connect(&path).is_ok(), "the other program's socket");
        drop(other);
        // The next server removes what no process listens on.
        bind(&path).unwrap().shutdown().await;
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}
