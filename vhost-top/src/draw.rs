//! The screen, drawn from the state. Everything is ASCII, and readable without colours.

use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Paragraph, Row, Table};

use crate::app::{App, Mode, Panels};
use crate::columns::Column;
use crate::text::{Grid, header};
use crate::worker::Command;

/// Lines of the reactors' table besides its rows.
const TABLE_LINES: u16 = 2;

/// A reactor is busy above this load, and overloaded above the other one.
const BUSY_PERCENT: f64 = 70.0;
const FULL_PERCENT: f64 = 90.0;

const KEYS: &str = "q quit  ? help  / filter  < > R sort  h histogram  Tab panels  space pause";

const HELP: &str = "\
 up, down, Page Up, Page Down, Home, End   select a controller
 left, right    scroll the columns
 Tab            both tables, only controllers, only reactors
 <, >, s        sort by the column to the left, or to the right
 R              reverse the order
 /              filter controllers by name; Enter keeps, Esc clears the filter
 h              enable or disable the histogram of the controller's bdev (P50, P99)
 r              reset the longest poll iterations, for all programs that read them
 space          pause
 q, Ctrl-C      quit

 LATus          mean latency of reads and writes, in microseconds
 P50us, P99us   percentiles, of all controllers of the bdev
 INFL           requests in flight
 ERR/s, THR/s   failed requests, and requests that a rate limit held back
 QUARANT        guest memory that is kept for I/O in flight of ended sessions
 QUEUES         core:number of queues

 Any key returns.";

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Theme {
    pub(crate) colours: bool,
}

impl Theme {
    fn colour(self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }
}

/// Draws all.
pub(crate) fn draw(frame: &mut Frame<'_>, app: &mut App, theme: Theme, now: Instant) {
    let reactors = app.view.as_ref().map_or(0, |view| view.reactors.len());
    let reactors = u16::try_from(reactors).unwrap_or(u16::MAX).saturating_add(TABLE_LINES);
    let tables = match app.panels {
        // At most a third for reactors.
        Panels::Both => reactors.min((frame.area().height / 3).max(TABLE_LINES + 1)),
        Panels::Controllers => 0,
        Panels::Reactors => u16::MAX,
    };
    let [top, status, upper, lower, bottom] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(1),
        Constraint::Max(tables),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    draw_header(frame, app, theme, top);
    let style = theme.colour(Color::Yellow).add_modifier(Modifier::BOLD);
    frame.render_widget(Line::styled(app.status(now), style), status);
    if app.mode == Mode::Help {
        let area = upper.union(lower);
        frame.render_widget(Paragraph::new(Text::raw(HELP)), area);
    } else {
        draw_reactors(frame, app, theme, upper);
        if app.panels != Panels::Reactors {
            draw_controllers(frame, app, theme, lower);
        }
    }
    frame.render_widget(Line::styled(prompt(app), Modifier::REVERSED), bottom);
}

fn draw_header(frame: &mut Frame<'_>, app: &App, theme: Theme, area: Rect) {
    let Some(view) = &app.view else { return };
    let mut lines: Vec<Line<'_>> = header(view).into_iter().map(Line::raw).collect();
    if app.paused {
        lines[0].spans.push("   PAUSED".into());
    }
    if !view.stuck_closes.is_empty() {
        lines[2].style = theme.colour(Color::Red);
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// The last line: keys, or what is typed.
fn prompt(app: &App) -> String {
    match &app.mode {
        Mode::Filter => format!("filter: {}_", app.filter),
        Mode::Confirm(Command::EnableHistogram { bdev, enable: true }) => {
            let bdev = crate::columns::plain(bdev);
            format!("enable the histogram of {bdev}? Each I/O costs a little more. y/n")
        }
        Mode::Confirm(Command::EnableHistogram { bdev, enable: false }) => {
            let bdev = crate::columns::plain(bdev);
            format!("disable the histogram of {bdev}, for all programs that read it? y/n")
        }
        _ => KEYS.to_owned(),
    }
}

/// A heading that fills the line.
fn title(frame: &mut Frame<'_>, text: String, area: Rect) -> Rect {
    let [first, rest] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    frame.render_widget(Line::styled(text, Modifier::BOLD), first);
    rest
}

fn draw_reactors(frame: &mut Frame<'_>, app: &App, theme: Theme, area: Rect) {
    let Some(view) = app.view.as_ref().filter(|_| area.height > 0) else { return };
    let grid = Grid::reactors(view);
    let shown = usize::from(area.height.saturating_sub(TABLE_LINES));
    let count = grid.rows.len();
    let first = if app.panels == Panels::Reactors { app.first_reactor } else { 0 };
    let last = (first + shown).min(count);
    let of = if last - first.min(last) < count {
        format!("REACTORS {}-{last} of {count} (Tab)", first + 1)
    } else {
        format!("REACTORS {count}")
    };
    let area = title(frame, of, area);
    let columns: Vec<usize> = (0..grid.titles.len()).collect();
    let rows = grid.rows.iter().zip(&view.reactors).skip(first).map(|(cells, reactor)| {
        let style = match reactor.load_percent {
            Some(load) if load > FULL_PERCENT => theme.colour(Color::Red),
            Some(load) if load > BUSY_PERCENT => theme.colour(Color::Yellow),
            _ => Style::new(),
        };
        Line::styled(grid.line(cells, &columns), style)
    });
    let heading = Line::styled(grid.line(&grid.titles, &columns), Modifier::UNDERLINED);
    let lines: Vec<Line<'_>> = [heading].into_iter().chain(rows).collect();
    frame.render_widget(Paragraph::new(lines), area);
}

fn draw_controllers(frame: &mut Frame<'_>, app: &mut App, theme: Theme, area: Rect) {
    let Some(view) = app.view.as_ref().filter(|_| area.height > 0) else { return };
    let grid = Grid::controllers(view, app.sort, &app.filter);
    let (columns, left, more) = visible(&grid, app.columns_left, usize::from(area.width));
    let text = controllers_title(app, view.controllers.len(), grid.rows.len(), left > 0, more);
    app.columns_left = left;
    let area = title(frame, text, area);
    let errors = Column::ALL.iter().position(|column| *column == Column::Errors);
    let rows = grid.rows.iter().map(|cells| {
        let fails = errors.is_some_and(|n| !matches!(cells[n].as_str(), "0" | "-"));
        let style = if fails { theme.colour(Color::Red) } else { Style::new() };
        Row::new([grid.line(cells, &columns)]).style(style)
    });
    let heading = Row::new([grid.line(&grid.titles, &columns)]).style(Modifier::UNDERLINED);
    let table = Table::new(rows, [Constraint::Fill(1)])
        .header(heading)
        .row_highlight_style(Modifier::REVERSED);
    let position = app.position();
    app.table.select((!grid.rows.is_empty()).then_some(position));
    frame.render_stateful_widget(table, area, &mut app.table);
}

fn controllers_title(app: &App, all: usize, shown: usize, left: bool, right: bool) -> String {
    let mut text = format!("CONTROLLERS {all}");
    if !app.filter.is_empty() {
        text = format!("CONTROLLERS {shown} of {all} with \"{}\"", app.filter);
    }
    let order = if app.sort.descends() { "descending" } else { "ascending" };
    text.push_str(&format!("   by {} {order}", app.sort.column.title()));
    match (left, right) {
        (true, true) => text.push_str("   more columns: left, right"),
        (true, false) => text.push_str("   more columns: left"),
        (false, true) => text.push_str("   more columns: right"),
        (false, false) => {}
    }
    text
}

/// The columns that fit: the first, and others after `skip` of them; how many are skipped, and
/// whether there are more to the right. No more are skipped than needed to see the last one.
fn visible(grid: &Grid, skip: usize, width: usize) -> (Vec<usize>, usize, bool) {
    let count = grid.widths.len();
    let fitting = |from: usize| {
        let mut used = grid.widths[0];
        let fits = |n: &usize| {
            used += 1 + grid.widths[*n];
            used <= width
        };
        (from..count).take_while(fits).last().map_or(from, |last| last + 1)
    };
    let enough = (1..count).find(|from| fitting(*from) == count).unwrap_or(count - 1);
    let from = (1 + skip).min(enough);
    let end = fitting(from);
    ([0].into_iter().chain(from..end).collect(), from - 1, end < count)
}

#[cfg(test)]
#[path = "draw/tests.rs"]
mod tests;
