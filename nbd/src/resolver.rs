//! Resolves host names, on the calling thread or on a helper thread until a deadline.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Instant;

use crate::uri::Address;

/// Where a server listens, without a host name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The addresses of a host, to try in this order.
    Tcp(Vec<SocketAddr>),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Resolves a host name. Blocks as long as the system's resolver.
///
/// # Errors
/// The name has no address, or the resolver has failed.
pub(crate) fn resolve(address: &Address) -> io::Result<Target> {
    Ok(match address {
        Address::Unix(path) => Target::Unix(path.clone()),
        Address::Tcp(host, port) => Target::Tcp((&**host, *port).to_socket_addrs()?.collect()),
    })
}

/// Resolves the host name of one server, on one helper thread at most.
#[derive(Debug, Default)]
pub(crate) struct Resolver {
    /// The result of a helper thread that was not done before its deadline.
    pending: Option<Receiver<io::Result<Target>>>,
}

impl Resolver {
    /// Resolves a host name until a deadline. If the resolver takes longer, the next call waits for
    /// the same result.
    ///
    /// # Errors
    /// As [`resolve`]; `TimedOut`.
    pub(crate) fn resolve(&mut self, address: &Address, deadline: Instant) -> io::Result<Target> {
        match address {
            Address::Tcp(host, _) if host.parse::<IpAddr>().is_err() => {
                let address = address.clone();
                self.run(move || resolve(&address), deadline)
            }
            _ => resolve(address),
        }
    }

    fn run(
        &mut self,
        call: impl FnOnce() -> io::Result<Target> + Send + 'static,
        deadline: Instant,
    ) -> io::Result<Target> {
        let result = match self.pending.take() {
            Some(result) => result,
            None => {
                let (sender, result) = sync_channel(1);
                // Fails if the disk was deleted.
                let send = move || drop(sender.send(call()));
                thread::Builder::new().name("vhost-nbd-dns".into()).spawn(send)?;
                result
            }
        };
        match result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(target) => target,
            Err(RecvTimeoutError::Timeout) => {
                self.pending = Some(result);
                let text = "the host name was not resolved in time";
                Err(io::Error::new(ErrorKind::TimedOut, text))
            }
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the resolver has failed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_slow_resolver_is_asked_once_and_not_waited_for() {
        let far = Instant::now() + Duration::from_secs(60);
        let mut resolver = Resolver::default();
        let (answer, wait) = channel();
        let slow = move || wait.recv().map_err(io::Error::other);
        let e = resolver.run(slow, Instant::now()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        let other = || -> io::Result<Target> { panic!("a second thread") };
        assert!(resolver.run(other, Instant::now()).is_err());
        let target = Target::Tcp(vec![([127, 0, 0, 1], 1).into()]);
        answer.send(target.clone()).unwrap();
        assert_eq!(resolver.run(other, far).unwrap(), target);
        assert!(resolver.pending.is_none());
        let failed = resolver.run(|| Err(ErrorKind::NotFound.into()), far);
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn names_and_numbers_are_resolved() {
        let far = Instant::now() + Duration::from_secs(60);
        for host in ["localhost", "127.0.0.1", "::1"] {
            let address = Address::Tcp(host.into(), 7);
            let target = resolve(&address).unwrap();
            assert!(matches!(&target, Target::Tcp(all) if !all.is_empty()), "{host}");
            assert_eq!(Resolver::default().resolve(&address, far).unwrap(), target);
        }
        // No time is needed without a name.
        let past = Instant::now();
        assert!(Resolver::default().resolve(&Address::Tcp("::1".into(), 7), past).is_ok());
        let path = PathBuf::from("/socket");
        let unix = Resolver::default().resolve(&Address::Unix(path.clone()), past);
        assert_eq!(unix.unwrap(), Target::Unix(path));
    }
}
