//! The thread that talks to the server, so that a server that hangs does not delay the keys.

use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use crate::collect::Collector;
use crate::rpc::Error;
use crate::sample::Sample;
use crate::view::View;

/// The longest time between two attempts to connect.
const RETRY_MAX: Duration = Duration::from_secs(1);

/// Updates that the screen has not taken. While it takes none, there are no samples.
const UPDATES_MAX: usize = 4;

/// What the thread is asked to do between two samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Enable or disable the histogram of a bdev.
    EnableHistogram {
        /// Its name.
        bdev: String,
        /// Which of the two.
        enable: bool,
    },
    /// Restrict the longest poll iterations to those from now on.
    ResetLongest,
}

/// What the thread reports.
#[derive(Debug)]
pub(crate) enum Update {
    /// A new sample, with its differences to the one before.
    View(Box<View>),
    /// The server refused a call.
    Refused(String),
    /// The connection is broken, or was not made.
    Disconnected(String),
    /// A command was executed.
    Done(&'static str),
}

/// Starts the thread with a connection. It ends when its commands are dropped.
pub(crate) fn start(
    collector: Collector,
    socket: PathBuf,
    delay: Duration,
) -> std::io::Result<(Sender<Command>, Receiver<Update>)> {
    let (commands, to_do) = mpsc::channel();
    let (report, updates) = mpsc::sync_channel(UPDATES_MAX);
    let mut worker =
        Worker { collector: Some(collector), socket, delay, before: None, to_do, report };
    let thread = thread::Builder::new().name("rpc".to_owned());
    thread.spawn(move || while worker.step().is_some() {})?;
    Ok((commands, updates))
}

struct Worker {
    collector: Option<Collector>,
    socket: PathBuf,
    delay: Duration,
    before: Option<Sample>,
    to_do: Receiver<Command>,
    report: SyncSender<Update>,
}

impl Worker {
    /// Takes a sample, and executes commands until the next is due. `None` if the screen is gone.
    fn step(&mut self) -> Option<()> {
        let due = Instant::now() + self.delay;
        let taken = self.connected(Collector::sample);
        let due = match taken {
            Some(sample) => {
                let view = View::new(self.before.as_ref(), &sample);
                self.before = Some(sample);
                self.report.send(Update::View(Box::new(view))).ok()?;
                due
            }
            None => due.min(Instant::now() + RETRY_MAX),
        };
        loop {
            match self.to_do.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(command) => self.execute(&command)?,
                Err(RecvTimeoutError::Timeout) => return Some(()),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn execute(&mut self, command: &Command) -> Option<()> {
        let done = self.connected(|collector| match command {
            Command::EnableHistogram { bdev, enable } => {
                let done = if *enable { "histogram enabled" } else { "histogram disabled" };
                collector.enable_histogram(bdev, *enable).map(|()| done)
            }
            Command::ResetLongest => {
                collector.reset_longest().map(|()| "longest poll iterations reset")
            }
        });
        done.map_or(Some(()), |done| self.report.send(Update::Done(done)).ok())
    }

    /// Calls the server, after connecting if there is no connection, and reports an error.
    fn connected<T>(&mut self, call: impl FnOnce(&mut Collector) -> Result<T, Error>) -> Option<T> {
        let socket = &self.socket;
        let collector = match self.collector.take() {
            Some(collector) => Ok(collector),
            None => Collector::connect(socket),
        };
        let called = collector.and_then(|mut collector| {
            let called = call(&mut collector);
            if called.as_ref().err().is_none_or(Error::is_answer) {
                self.collector = Some(collector);
            }
            called
        });
        let update = match called {
            Ok(value) => return Some(value),
            Err(error) if error.is_answer() => Update::Refused(error.to_string()),
            Err(error) => Update::Disconnected(error.to_string()),
        };
        // If the screen is gone, the thread ends when it asks for commands.
        let _ = self.report.send(update);
        None
    }
}
