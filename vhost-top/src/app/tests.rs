//! Keys and updates.

use super::*;
use crate::columns::Column;
use crate::text::tests::view;

/// The state after a sample.
pub(crate) fn app() -> (App, Instant) {
    let now = Instant::now();
    let mut app = App::new(Duration::from_secs(1), now);
    app.update(Update::View(Box::new(view())), now);
    (app, now)
}

/// Presses keys; the commands that they gave.
pub(crate) fn press(app: &mut App, keys: &[KeyCode]) -> Vec<Command> {
    let press = |key: &KeyCode| app.key((*key).into(), Instant::now());
    keys.iter().filter_map(press).collect()
}

fn text(app: &mut App, text: &str) -> Vec<Command> {
    let keys: Vec<KeyCode> = text.chars().map(KeyCode::Char).collect();
    press(app, &keys)
}

fn names(app: &App) -> Vec<&str> {
    app.rows().iter().map(|row| row.name.as_str()).collect()
}

#[test]
fn a_filter_is_typed_and_cleared() {
    let (mut app, _) = app();
    text(&mut app, "/VHOSTx");
    assert_eq!((names(&app).len(), &app.mode), (0, &Mode::Filter));
    press(&mut app, &[KeyCode::Backspace, KeyCode::Enter]);
    assert_eq!((names(&app), &app.mode), (vec!["vhost.0", "vhost.1"], &Mode::Tables));
    press(&mut app, &[KeyCode::Esc]);
    assert_eq!(names(&app).len(), 3);
    text(&mut app, "/q");
    press(&mut app, &[KeyCode::Esc]);
    assert!(app.filter.is_empty() && !app.quit);
    text(&mut app, &format!("/{}", "x".repeat(1000)));
    assert_eq!(app.filter.len(), FILTER_MAX);
}

#[test]
fn the_selection_follows_its_controller() {
    let (mut app, _) = app();
    assert_eq!(names(&app)[1], "vhost.0");
    press(&mut app, &[KeyCode::Down]);
    assert_eq!((app.selected.as_deref(), app.position()), (Some("vhost.0"), 1));
    text(&mut app, "<<");
    assert_eq!((app.sort.column, app.position()), (Column::Name, 1));
    text(&mut app, "R/0");
    assert_eq!((names(&app), app.position()), (vec!["vhost.0"], 0));
    press(&mut app, &[KeyCode::Esc, KeyCode::End]);
    assert_eq!(app.position(), 2);
    press(&mut app, &[KeyCode::PageUp, KeyCode::Up]);
    assert_eq!(app.position(), 0);
}

#[test]
fn histograms_are_changed_after_a_confirmation() {
    let (mut app, now) = app();
    press(&mut app, &[KeyCode::Down]);
    assert!(text(&mut app, "hn").is_empty() && app.mode == Mode::Tables);
    let enable = Command::EnableHistogram { bdev: "disk-vhost.0".into(), enable: true };
    assert_eq!(text(&mut app, "hy"), [enable]);
    assert_eq!(text(&mut app, "r"), [Command::ResetLongest]);
    app.update(Update::Done("done"), now);
    assert_eq!(app.status(now), "done");
    assert_eq!(app.status(now + Duration::from_secs(7)), "no answer from the server for 7 s");
}

#[test]
fn a_paused_screen_shows_the_newest_sample_afterwards() {
    let (mut app, now) = app();
    text(&mut app, " ");
    let mut newer = view();
    newer.controllers.clear();
    app.update(Update::View(Box::new(newer)), now);
    assert_eq!(names(&app).len(), 3);
    text(&mut app, " ");
    assert_eq!(names(&app).len(), 0);
    text(&mut app, "h");
    assert_eq!(app.status(now), "no controller is selected");
}

#[test]
fn trouble_is_shown_until_the_next_sample() {
    let (mut app, now) = app();
    app.update(Update::Disconnected("gone".into()), now);
    assert_eq!(app.status(now), "disconnected, retrying: gone");
    app.update(Update::Refused("no".into()), now);
    app.update(Update::View(Box::new(view())), now);
    assert_eq!(app.status(now), "no");
    text(&mut app, "?x");
    assert_eq!(app.mode, Mode::Tables);
    text(&mut app, "/");
    app.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL), now);
    assert!(app.quit);
}
