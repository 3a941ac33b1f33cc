//! The terminal: keys, signals, and its restoration.

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use rustix::event::{PollFd, PollFlags, Timespec};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::app::App;
use crate::collect::Collector;
use crate::draw::{Theme, draw};
use crate::worker::{self, Command, Update};

/// How long a sample or a signal may wait for the screen. Keys do not wait.
const PAUSE: Duration = Duration::from_millis(100);

/// How often the screen is drawn if nothing happens: messages end, and times without an answer grow.
const REDRAW: Duration = Duration::from_secs(1);

/// Shows the server until the user quits (`None`), or until a signal, which is returned. Whatever
/// ends it, also a panic, the terminal is restored.
pub(crate) fn show(socket: &Path, delay: Duration) -> Result<Option<i32>, Box<dyn Error>> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err("this is not a terminal; --once prints a table".into());
    }
    // Before the screen changes, so that a wrong path is reported like any error.
    let collector = Collector::connect(socket)?;
    let (commands, updates) = worker::start(collector, socket.to_owned(), delay)?;
    let signal = Arc::new(AtomicUsize::new(0));
    for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        let value = usize::try_from(number)?;
        signal_hook::flag::register_usize(number, Arc::clone(&signal), value)?;
    }
    let _restored = Restored;
    let terminal = ratatui::try_init()?;
    let app = App::new(delay, Instant::now());
    let events = start_input()?;
    Screen { terminal, app, commands, updates, events, signal }.run()
}

/// Restores the terminal when it is dropped. After a panic, the hook of `try_init` has done so
/// before the message.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // It fails if the terminal is gone, and then there is nobody to tell.
        let _ = ratatui::try_restore();
    }
}

struct Screen {
    terminal: DefaultTerminal,
    app: App,
    commands: Sender<Command>,
    updates: Receiver<Update>,
    events: Receiver<io::Result<Event>>,
    signal: Arc<AtomicUsize>,
}

impl Screen {
    fn run(mut self) -> Result<Option<i32>, Box<dyn Error>> {
        let theme = Theme { colours: std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) };
        let mut drawn: Option<Instant> = None;
        while !self.app.quit {
            let changed = self.take_updates()?;
            if changed || drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) {
                let app = &mut self.app;
                self.terminal.draw(|frame| draw(frame, app, theme, Instant::now()))?;
                drawn = Some(Instant::now());
            }
            // Every event is followed by a drawing, which finds a new size of the terminal.
            match self.events.recv_timeout(PAUSE) {
                Ok(event) => {
                    drawn = None;
                    self.handle(&event?);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err("the input has ended".into()),
            }
            let number = self.signal.load(Ordering::Relaxed);
            if number > 0 {
                return Ok(Some(i32::try_from(number)?));
            }
            if has_hung_up()? {
                return Err("the terminal is gone".into());
            }
        }
        Ok(None)
    }

    /// Whether there were some.
    fn take_updates(&mut self) -> Result<bool, &'static str> {
        let mut changed = false;
        loop {
            match self.updates.try_recv() {
                Ok(update) => self.app.update(update, Instant::now()),
                Err(TryRecvError::Empty) => return Ok(changed),
                Err(TryRecvError::Disconnected) => return Err("the thread of RPCs has ended"),
            }
            changed = true;
        }
    }

    fn handle(&mut self, event: &Event) {
        let Event::Key(key) = event else { return };
        if key.kind == KeyEventKind::Release {
            return;
        }
        if let Some(command) = self.app.key(*key, Instant::now()) {
            // An error means that the thread has ended, which `take_updates` finds.
            let _ = self.commands.send(command);
        }
    }
}

/// Reads keys on a thread of its own: crossterm never returns from a terminal that has hung up.
fn start_input() -> io::Result<Receiver<io::Result<Event>>> {
    let (send, events) = mpsc::channel();
    let thread = thread::Builder::new().name("keys".to_owned());
    thread.spawn(move || while send.send(event::read()).is_ok() {})?;
    Ok(events)
}

/// Whether the terminal is gone.
fn has_hung_up() -> io::Result<bool> {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(&stdin, PollFlags::empty())];
    match rustix::event::poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {
            Ok(fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
        }
        Err(error) => Err(error.into()),
    }
}
