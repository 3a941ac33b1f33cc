//! The size of a disk, which grows when the server's disk does.

use std::cmp;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// The size of a disk. The thread that talks to the server changes it, and a task on the control
/// thread then tells the disk's users.
#[derive(Debug)]
pub(crate) struct Size {
    blocks: AtomicU64,
    /// In bytes; not 0.
    block_size: u32,
    news: Mutex<News>,
}

#[derive(Debug, Default)]
struct News {
    grown: bool,
    ended: bool,
    task: Option<Waker>,
}

impl Size {
    /// `block_size` is in bytes, and not 0.
    pub(crate) fn new(blocks: u64, block_size: u32) -> Self {
        Self { blocks: AtomicU64::new(blocks), block_size, news: Mutex::default() }
    }

    /// In blocks.
    pub(crate) fn blocks(&self) -> u64 {
        // Relaxed suffices: no other data is published with the number.
        self.blocks.load(Ordering::Relaxed)
    }

    /// In bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks() * u64::from(self.block_size)
    }

    /// Adopts the server's size in bytes. Returns how it compares with the disk's size, which never
    /// shrinks: the server fails I/O beyond its end.
    pub(crate) fn adopt(&self, bytes: u64) -> cmp::Ordering {
        let now = bytes / u64::from(self.block_size);
        let before = self.blocks.fetch_max(now, Ordering::Relaxed);
        if now > before {
            self.tell(|news| news.grown = true);
        }
        now.cmp(&before)
    }

    /// The disk is deleted.
    pub(crate) fn end(&self) {
        self.tell(|news| news.ended = true);
    }

    /// Waits until the disk has grown. Returns `false` when the disk is deleted. For one task.
    pub(crate) async fn grown(&self) -> bool {
        poll_fn(|context| {
            let mut news = self.news();
            if news.ended {
                Poll::Ready(false)
            } else if std::mem::take(&mut news.grown) {
                Poll::Ready(true)
            } else {
                news.task = Some(context.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    fn tell(&self, change: impl FnOnce(&mut News)) {
        let mut news = self.news();
        change(&mut news);
        let task = news.task.take();
        drop(news);
        if let Some(task) = task {
            task.wake();
        }
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let size = Size::new(4, 512);
        assert_eq!(size.adopt(2048), cmp::Ordering::Equal);
        assert_eq!(size.adopt(2047), cmp::Ordering::Less, "a part of a block is not used");
        assert_eq!((size.blocks(), size.bytes()), (4, 2048));
        assert_eq!(size.adopt(4096), cmp::Ordering::Greater);
        assert_eq!(size.blocks(), 8);
    }

    #[test]
    fn the_task_is_woken_by_growth_and_by_the_end() {
        let size = Size::new(4, 512);
        let count = Arc::new(Count::default());
        let waker = Arc::clone(&count).into();
        let mut context = Context::from_waker(&waker);
        let mut poll = || pin!(size.grown()).poll(&mut context);
        assert_eq!(poll(), Poll::Pending);
        size.adopt(1024);
        assert_eq!((count.0.load(Ordering::Relaxed), poll()), (0, Poll::Pending));
        size.adopt(4096);
        size.adopt(8192);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(poll(), Poll::Ready(true));
        assert_eq!(poll(), Poll::Pending);
        size.end();
        assert_eq!((count.0.load(Ordering::Relaxed), poll()), (2, Poll::Ready(false)));
    }
}
