//! A bdev as the device of a blobstore.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bdev::{Bdev, Buffer, EndedRequest, Error, Op, Request, Rights, Tag, ThreadChannel};
use blobstore::{Device, DeviceError, Properties};

use crate::externals::Externals;

/// I/Os of a store at a time.
const DEPTH: u16 = 32;
/// Bytes that are written at once where the bdev cannot write zeroes itself.
const ZEROES: u64 = 1 << 20;

/// The base of a store, and the external snapshots of its volumes. Clones share the channels. The
/// holder of the store's lock uses it; it blocks in [`run`](Base::run) only.
#[derive(Clone)]
pub(crate) struct Base {
    state: Arc<Mutex<State>>,
    pub(crate) externals: Arc<Externals>,
}

struct State {
    properties: Properties,
    flushes: bool,
    zeroes: bool,
    /// `None`: the store is closed.
    channel: Option<Opened>,
}

struct Opened {
    bdev: Arc<dyn Bdev>,
    channel: ThreadChannel,
    ended: HashMap<Tag, EndedRequest>,
    /// The futures that wait for an I/O to end.
    waiting: Vec<Waker>,
}

impl Base {
    /// Opens a channel to a bdev. Blocks.
    pub(crate) fn open(bdev: &Arc<dyn Bdev>, rights: Rights) -> Result<Self, Error> {
        let features = bdev.features();
        let properties = Properties {
            size: bdev.size_bytes(),
            block_size: bdev.block_size(),
            unmap: features.unmap,
            unmap_zeroes: false,
        };
        let channel = Opened {
            bdev: Arc::clone(bdev),
            channel: ThreadChannel::open(bdev, DEPTH, rights)?,
            ended: HashMap::new(),
            waiting: vec![],
        };
        let (flushes, zeroes, channel) = (features.flush, features.write_zeroes, Some(channel));
        let state = Arc::new(Mutex::new(State { properties, flushes, zeroes, channel }));
        Ok(Self { state, externals: Arc::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the channels. I/O fails with ENODEV from now on.
    pub(crate) fn close(&self) {
        let channel = self.lock().channel.take();
        drop(channel);
        self.externals.remove(|_| true);
    }

    /// Runs an operation of the store to its end. Blocks.
    pub(crate) fn run<T>(&self, operation: impl Future<Output = T>) -> T {
        let mut operation = pin!(operation);
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(value) = operation.as_mut().poll(&mut context) {
                return value;
            }
            let woken = match &mut self.lock().channel {
                Some(opened) => opened.wait(),
                None => vec![],
            };
            woken.into_iter().for_each(Waker::wake);
        }
    }

    /// Does one I/O on the base.
    async fn io(&self, request: Request) -> Result<Buffer, DeviceError> {
        let mut request = Some(request);
        let mut tag = None;
        poll_fn(|context| {
            let mut state = self.lock();
            let Some(opened) = &mut state.channel else {
                return Poll::Ready(Err(DeviceError { errno: libc::ENODEV }));
            };
            if tag.is_none() && !opened.channel.is_full() {
                tag = request.take().map(|request| opened.channel.start(request));
            }
            if let Some(tag) = tag
                && let Some(ended) = opened.ended.remove(&tag)
            {
                let result = ended.result.map(|()| ended.request.buffer);
                return Poll::Ready(result.map_err(|errno| DeviceError { errno }));
            }
            opened.waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    async fn plain(&self, op: Op, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.io(Request::plain(op, offset, len)).await.map(drop)
    }
}

impl Opened {
    /// Waits until an I/O has ended. Returns the futures to wake.
    fn wait(&mut self) -> Vec<Waker> {
        loop {
            while let Some(ended) = self.channel.poll() {
                self.ended.insert(ended.tag, ended);
            }
            if !self.ended.is_empty() {
                return std::mem::take(&mut self.waiting);
            }
            // An error of `poll(2)` makes this look again.
            let _ = self.channel.sleep(&mut []);
        }
    }
}

impl Device for Base {
    fn properties(&self) -> Properties {
        let mut state = self.lock();
        if let Some(opened) = &state.channel {
            state.properties.size = opened.bdev.size_bytes();
        }
        state.properties
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let buffer = self.io(Request::read(offset, len)).await?;
        Ok(buffer.bytes().to_vec())
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        let mut buffer = Buffer::new(data.len());
        buffer.bytes_mut().copy_from_slice(&data);
        self.io(Request::write(offset, buffer)).await.map(drop)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        if !self.lock().flushes {
            return Ok(());
        }
        self.plain(Op::Flush, 0, 0).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        if self.lock().zeroes {
            return self.plain(Op::WriteZeroes, offset, len).await;
        }
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let piece = ZEROES.min(end - at);
            let len = usize::try_from(piece).map_err(|_| DeviceError { errno: libc::EINVAL })?;
            self.io(Request::write(at, Buffer::new(len))).await?;
            at += piece;
        }
        Ok(())
    }

    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.plain(Op::Unmap, offset, len).await
    }

    async fn read_external(
        &self,
        id: &[u8],
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, DeviceError> {
        self.externals.read(id, offset, len)
    }
}
