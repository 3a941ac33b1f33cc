//! The state of the screen, and what the keys do to it.

use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::widgets::TableState;

use crate::columns::Sort;
use crate::text;
use crate::view::{ControllerRow, View};
use crate::worker::{Command, Update};

/// How long a message stays on the screen.
const MESSAGE: Duration = Duration::from_secs(5);

/// Limit on a filter, which is longer than names of controllers are.
const FILTER_MAX: usize = 64;

/// What the keys are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Commands.
    Tables,
    /// The text of the filter.
    Filter,
    /// The answer to a question.
    Confirm(Command),
    /// To leave the list of the keys.
    Help,
}

/// Which tables are on the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Panels {
    Both,
    Controllers,
    Reactors,
}

/// The state of the screen.
#[derive(Debug)]
pub(crate) struct App {
    /// What is shown.
    pub(crate) view: Option<View>,
    /// The newest, while another one stays shown.
    newest: Option<View>,
    pub(crate) paused: bool,
    pub(crate) sort: Sort,
    pub(crate) filter: String,
    pub(crate) mode: Mode,
    pub(crate) panels: Panels,
    /// Columns that are scrolled out to the left.
    pub(crate) columns_left: usize,
    /// The selected controller, by name.
    pub(crate) selected: Option<String>,
    /// Scrolled rows of the controllers.
    pub(crate) table: TableState,
    /// The first reactor that is shown.
    pub(crate) first_reactor: usize,
    /// Why there are no new samples.
    pub(crate) trouble: Option<String>,
    message: Option<(String, Instant)>,
    delay: Duration,
    /// When the server has answered last.
    answered: Instant,
    pub(crate) quit: bool,
}

impl App {
    /// Before the first sample.
    pub(crate) fn new(delay: Duration, now: Instant) -> Self {
        Self {
            view: None,
            newest: None,
            paused: false,
            sort: Sort::DEFAULT,
            filter: String::new(),
            mode: Mode::Tables,
            panels: Panels::Both,
            columns_left: 0,
            selected: None,
            table: TableState::new(),
            first_reactor: 0,
            trouble: None,
            message: None,
            delay,
            answered: now,
            quit: false,
        }
    }

    /// The controllers that are shown, in their order.
    pub(crate) fn rows(&self) -> Vec<&ControllerRow> {
        let controllers = self.view.as_ref().map_or(&[][..], |view| &view.controllers);
        self.sort.rows(controllers, &self.filter)
    }

    /// Where the selected controller is; the first if it is gone.
    pub(crate) fn position(&self) -> usize {
        let is_selected = |row: &&ControllerRow| Some(&row.name) == self.selected.as_ref();
        self.rows().iter().position(is_selected).unwrap_or(0)
    }

    /// The line about the connection: trouble first, then a message, then what the server lacks.
    pub(crate) fn status(&self, now: Instant) -> String {
        if let Some(trouble) = &self.trouble {
            return trouble.clone();
        }
        let silent = now.saturating_duration_since(self.answered);
        if silent > self.delay * 2 + Duration::from_secs(1) {
            return format!("no answer from the server for {} s", silent.as_secs());
        }
        let message = self.message.as_ref().filter(|(_, at)| now.duration_since(*at) < MESSAGE);
        if let Some((message, _)) = message {
            return message.clone();
        }
        self.view.as_ref().map_or_else(
            || "waiting for the first sample".to_owned(),
            |view| text::missing(view).unwrap_or_default(),
        )
    }

    /// Takes what the worker reports.
    pub(crate) fn update(&mut self, update: Update, now: Instant) {
        self.answered = now;
        match update {
            Update::View(view) => {
                self.trouble = None;
                if self.paused && self.view.is_some() {
                    self.newest = Some(*view);
                } else {
                    self.view = Some(*view);
                }
            }
            Update::Refused(why) => self.say(why, now),
            Update::Disconnected(why) => {
                self.trouble = Some(format!("disconnected, retrying: {why}"));
            }
            Update::Done(what) => self.say(what.to_owned(), now),
        }
    }

    fn say(&mut self, message: String, now: Instant) {
        self.message = Some((message, now));
    }

    /// Does what a key is for. A command is for the worker.
    pub(crate) fn key(&mut self, key: KeyEvent, now: Instant) -> Option<Command> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && key.code == KeyCode::Char('c') {
            self.quit = true;
            return None;
        }
        match self.mode.clone() {
            Mode::Tables => self.command(key.code, now),
            Mode::Filter => {
                self.edit_filter(key.code, control);
                None
            }
            Mode::Confirm(command) => {
                self.mode = Mode::Tables;
                let agreed = matches!(key.code, KeyCode::Char('y' | 'Y'));
                agreed.then_some(command)
            }
            Mode::Help => {
                self.mode = Mode::Tables;
                None
            }
        }
    }

    fn command(&mut self, key: KeyCode, now: Instant) -> Option<Command> {
        match key {
            KeyCode::Char('q') => self.quit = true,
            KeyCode::Char('?') => self.mode = Mode::Help,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('<') => self.sort.step(-1),
            KeyCode::Char('>' | 's') => self.sort.step(1),
            KeyCode::Char('R') => self.sort.reversed = !self.sort.reversed,
            KeyCode::Char(' ') => self.pause(),
            KeyCode::Char('h') => self.ask_for_histogram(now),
            KeyCode::Char('r') => return Some(Command::ResetLongest),
            KeyCode::Tab => {
                self.panels = match self.panels {
                    Panels::Both => Panels::Controllers,
                    Panels::Controllers => Panels::Reactors,
                    Panels::Reactors => Panels::Both,
                }
            }
            KeyCode::Left => self.columns_left = self.columns_left.saturating_sub(1),
            // Drawing limits it.
            KeyCode::Right => self.columns_left += 1,
            KeyCode::Up | KeyCode::Char('k') => self.scroll(-1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll(1),
            KeyCode::PageUp => self.scroll(-10),
            KeyCode::PageDown => self.scroll(10),
            KeyCode::Home => self.scroll(isize::MIN),
            KeyCode::End => self.scroll(isize::MAX),
            _ => {}
        }
        None
    }

    fn edit_filter(&mut self, key: KeyCode, control: bool) {
        match key {
            KeyCode::Enter => self.mode = Mode::Tables,
            KeyCode::Esc => {
                self.filter.clear();
                self.mode = Mode::Tables;
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char('u') if control => self.filter.clear(),
            KeyCode::Char(c) if !control && self.filter.chars().count() < FILTER_MAX => {
                self.filter.push(c);
            }
            _ => {}
        }
    }

    fn pause(&mut self) {
        self.paused = !self.paused;
        if let Some(newest) = self.newest.take().filter(|_| !self.paused) {
            self.view = Some(newest);
        }
    }

    fn scroll(&mut self, steps: isize) {
        if self.panels == Panels::Reactors {
            let last = self.view.as_ref().map_or(0, |v| v.reactors.len().saturating_sub(1));
            self.first_reactor = self.first_reactor.saturating_add_signed(steps).min(last);
            return;
        }
        let rows = self.rows();
        let to = self.position().saturating_add_signed(steps).min(rows.len().saturating_sub(1));
        self.selected = rows.get(to).map(|row| row.name.clone());
    }

    fn ask_for_histogram(&mut self, now: Instant) {
        let row = self.rows().get(self.position()).map(|row| (row.bdev.clone(), row.histogram));
        match row {
            Some((Some(bdev), histogram)) => {
                self.mode = Mode::Confirm(Command::EnableHistogram { bdev, enable: !histogram });
            }
            Some((None, _)) => {
                self.say("the controller has no bdev, or has several".to_owned(), now)
            }
            None => self.say("no controller is selected".to_owned(), now),
        }
    }
}

#[cfg(test)]
#[path = "app/tests.rs"]
pub(crate) mod tests;
