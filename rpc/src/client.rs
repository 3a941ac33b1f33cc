//! The client of a call, for methods.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use tokio::sync::watch;

use crate::load::{Hold, Load, Paused};

/// The client of a call, which may disconnect before the answer is ready.
///
/// A method may stop when its client has disconnected:
///
/// ```
/// # use rpc::{Params, RpcError};
/// # use serde_json::Value;
/// # async fn drain() -> Result<Value, RpcError> { Ok(Value::Bool(true)) }
/// async fn delete(params: Params) -> Result<Value, RpcError> {
///     tokio::select! {
///         done = drain() => done,
///         () = params.client().gone() => Err(RpcError::errno(125)),
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Client {
    /// `None` for a call from within the process.
    gone: Option<watch::Receiver<bool>>,
    load: Rc<Load>,
    /// Whether this call has yielded.
    paused: Rc<Cell<bool>>,
    /// Holds back the next request, until the call lets it start.
    hold: Rc<RefCell<Option<Hold>>>,
}

impl Client {
    /// The client of a call from within the process, which never disconnects.
    pub(crate) fn local() -> Self {
        Self { gone: None, load: Rc::default(), paused: Rc::default(), hold: Rc::default() }
    }

    pub(crate) fn remote(gone: watch::Receiver<bool>, load: &Rc<Load>) -> Self {
        let hold = Rc::new(RefCell::new(Some(Hold::of_connection(load))));
        Self { gone: Some(gone), load: Rc::clone(load), paused: Rc::default(), hold }
    }

    /// The same client, for a member of its batch. The second value is true until the member ends
    /// or lets the next one start.
    pub(crate) fn for_member(&self) -> (Self, Rc<Cell<bool>>) {
        let hold = Hold::of_member(&self.load);
        let taken = hold.taken();
        let hold = Rc::new(RefCell::new(Some(hold)));
        (Self { paused: Rc::default(), hold, ..self.clone() }, taken)
    }

    /// Yields to other tasks. The client's next request does not start before this returns.
    pub(crate) async fn yield_now(&self) {
        let _paused = Paused::new(&self.paused, &self.load);
        tokio::task::yield_now().await;
    }

    /// Lets the client's next request start before this call ends.
    ///
    /// The requests of one connection run one after the other, so that each sees the effects of
    /// those before it, as in SPDK. A method that waits where SPDK's method would let the next
    /// request start, for example for a front end to disconnect, calls this before it waits.
    pub fn let_next_start(&self) {
        self.hold.take();
    }

    /// Whether this call has yielded and resumes without an event.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// Whether the client or the server has closed the connection. A client that has only shut down
    /// its sending direction is still connected.
    pub fn is_gone(&self) -> bool {
        self.gone.as_ref().is_some_and(|gone| *gone.borrow() || gone.has_changed().is_err())
    }

    /// Waits until the client has disconnected. Never returns for a call from within the process.
    pub async fn gone(&self) {
        match self.gone.clone() {
            // An error means that the sender was dropped with its connection.
            Some(mut gone) => drop(gone.wait_for(|gone| *gone).await),
            None => std::future::pending().await,
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("gone", &self.is_gone()).finish_non_exhaustive()
    }
}
