//! `--metrics`: an HTTP server for Prometheus and other readers of OpenMetrics.
//!
//! It runs on a thread of its own, which nothing waits for. A client whose socket takes long to
//! close delays only other readers of metrics, and the connections of clients that hang are closed
//! for new ones. For each request, the thread asks the control thread for a [`Snapshot`], and
//! encodes it.

mod encode;
mod places;
mod snapshot;

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rpc::Registry;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tracing::{debug, error, info, warn};

use crate::cli::Address;
use crate::methods::App;
use encode::Format;
use places::{Place, Places};
use snapshot::Snapshot;

/// The maximum number of connections.
const CONNECTIONS: usize = 64;

/// Limit on the time of one connection, which has one request.
const CONNECTION_LIMIT: Duration = Duration::from_secs(8);

/// Limit on the time in which a client sends its request.
const REQUEST_LIMIT: Duration = Duration::from_secs(4);

/// Wait after an accept that failed, for example because no file descriptor was free.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// A listening socket. It is bound before the sandbox starts, which refuses to make such sockets.
#[derive(Debug)]
pub(crate) struct Bound {
    address: Address,
    listener: Listener,
}

#[derive(Debug)]
enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// Why the HTTP server has no socket.
#[derive(Debug, thiserror::Error)]
#[error("--metrics: cannot listen on {address}: {source}")]
pub(crate) struct BindError {
    address: Address,
    source: io::Error,
}

impl Bound {
    pub(crate) fn bind(address: &Address) -> Result<Self, BindError> {
        let listener = match address {
            Address::Tcp(address) => std::net::TcpListener::bind(address).map(Listener::Tcp),
            Address::Unix(path) => {
                remove_stale(path);
                std::os::unix::net::UnixListener::bind(path).map(Listener::Unix)
            }
        };
        let bound = listener.and_then(|listener| {
            let address = match &listener {
                // With the port that port 0 stands for.
                Listener::Tcp(listener) => {
                    listener.set_nonblocking(true)?;
                    Address::Tcp(listener.local_addr()?)
                }
                Listener::Unix(listener) => {
                    listener.set_nonblocking(true)?;
                    address.clone()
                }
            };
            Ok(Self { address, listener })
        });
        bound.map_err(|source| BindError { address: address.clone(), source })
    }
}

/// Removes a socket that an earlier process has left.
fn remove_stale(path: &Path) {
    let is_socket = path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket());
    // Without waiting: a live process may not accept.
    let refused = || -> rustix::io::Result<bool> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok(connect(&socket, &SocketAddrUnix::new(path)?) == Err(Errno::CONNREFUSED))
    };
    if is_socket && refused() == Ok(true) {
        let _ = std::fs::remove_file(path);
    }
}

/// A request for a snapshot.
type Ask = oneshot::Sender<Snapshot>;

/// Starts the thread, and the task of this thread that answers it.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn start(bound: Bound, app: &Rc<App>, registry: &Rc<Registry>) -> io::Result<()> {
    let (ask, mut asked) = mpsc::channel::<Ask>(CONNECTIONS);
    let address = bound.address.clone();
    std::thread::Builder::new().name("vhost-metrics".into()).spawn(move || {
        if let Err(e) = serve(bound, &ask) {
            error!("--metrics: the HTTP server does not run: {e}");
        }
    })?;
    info!("metrics: {address}");
    let (app, registry) = (Rc::clone(app), Rc::clone(registry));
    spawn_local(async move {
        while let Some(ask) = asked.recv().await {
            // The thread's task is gone if its client has disconnected.
            drop(ask.send(Snapshot::take(&app, &registry).await));
        }
    });
    Ok(())
}

/// The thread. Returns only if it cannot run.
fn serve(bound: Bound, ask: &mpsc::Sender<Ask>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let accept = async {
        match bound.listener {
            Listener::Tcp(listener) => {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                accept(ask, async || Ok(listener.accept().await?.0)).await
            }
            Listener::Unix(listener) => {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                accept(ask, async || Ok(listener.accept().await?.0)).await
            }
        }
    };
    LocalSet::new().block_on(&runtime, accept).map(|never| match never {})
}

async fn accept<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    ask: &mpsc::Sender<Ask>,
    accept: impl AsyncFn() -> io::Result<S>,
) -> io::Result<Infallible> {
    let places = Places::new(CONNECTIONS);
    loop {
        match accept().await {
            Ok(stream) => {
                let (ask, place) = (ask.clone(), Rc::new(places.take().await));
                spawn_local(async move {
                    let served = connection(stream, ask, Rc::clone(&place));
                    let ended_well = tokio::select! {
                        biased;
                        () = place.lost() => false,
                        served = tokio::time::timeout(CONNECTION_LIMIT, served) => {
                            matches!(served, Ok(Ok(())))
                        }
                    };
                    if !ended_well {
                        debug!("metrics: a connection ended early");
                    }
                });
            }
            Err(e) => {
                warn!("metrics: cannot accept a connection: {e}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    ask: mpsc::Sender<Ask>,
    place: Rc<Place>,
) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let (ask, place) = (ask.clone(), Rc::clone(&place));
        async move { Ok::<_, Infallible>(place.keep_during(answer(&request, &ask)).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        // So that a client that does not read its answers does not keep its place.
        .keep_alive(false)
        .header_read_timeout(REQUEST_LIMIT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn answer(request: &Request<Incoming>, ask: &mpsc::Sender<Ask>) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return text(StatusCode::NOT_FOUND, "The metrics are at /metrics.\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD are served.\n");
        refusal.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    let (reply, snapshot) = oneshot::channel();
    let asked = ask.send(reply).await.is_ok();
    let Some(snapshot) = (if asked { snapshot.await.ok() } else { None }) else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "vhost is shutting down.\n");
    };
    let format = wanted_format(request.headers());
    match encode::encode(&snapshot, format) {
        Ok(metrics) => typed(StatusCode::OK, format.content_type(), metrics.into()),
        Err(e) => {
            error!("metrics: {e}");
            text(StatusCode::INTERNAL_SERVER_ERROR, "The metrics cannot be encoded.\n")
        }
    }
}

/// OpenMetrics, if the client takes it.
fn wanted_format(headers: &HeaderMap) -> Format {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let is_open_metrics = |value: &str| value.contains("application/openmetrics-text");
    if accepted.into_iter().any(is_open_metrics) { Format::OpenMetrics } else { Format::Prometheus }
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body.into())
}

fn typed(status: StatusCode, of: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(of));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("m.sock"));
        let first = Bound::bind(&address).unwrap();
        assert!(Bound::bind(&address).is_err());
        drop(first);
        Bound::bind(&address).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        assert!(Bound::bind(&Address::Unix(file.clone())).is_err());
        assert_eq!(std::fs::read(file).unwrap(), b"mine");
    }

    #[test]
    fn open_metrics_is_sent_if_it_is_accepted() {
        let with = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, accept.parse().unwrap());
            wanted_format(&headers)
        };
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
        assert_eq!(with(prometheus), Format::OpenMetrics);
        assert_eq!(with("*/*"), Format::Prometheus);
        assert_eq!(wanted_format(&HeaderMap::new()), Format::Prometheus);
    }
}
