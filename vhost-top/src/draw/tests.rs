//! Screens of two sizes, and of very small ones.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::KeyCode;

use super::*;
use crate::app::tests::{app, press};

const PLAIN: Theme = Theme { colours: false };

/// The lines of a screen, without the spaces at their ends.
fn screen(app: &mut App, now: Instant, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app, PLAIN, now)).unwrap();
    let buffer = terminal.backend().buffer();
    let lines = buffer.content().chunks(usize::from(width));
    lines
        .map(|cells| {
            let line: String = cells.iter().map(|cell| cell.symbol()).collect();
            line.trim_end().to_owned()
        })
        .collect()
}

#[test]
fn a_small_screen_has_the_most_important_columns() {
    let (mut app, now) = app();
    app.filter = "VHOST".to_owned();
    let lines = screen(&mut app, now, 80, 24);
    let expected = [
        "SPDK v26.05, pid 4242",
        "controllers 3, sessions 3   IOPS - (R -, W -)   MiB/s R -, W -",
        "in flight 0   errors/s -   quarantined 0 B   stuck closes 0",
        "",
        "REACTORS 2",
        "CORE LOAD% QUEUES SLEEPS/s   ITER/s LONGESTus CAUSES",
        "   1  93.2      2        0    1.50M      87.6 fetch call",
        "   2     -      2        0    1.50M      87.6 fetch call",
        "CONTROLLERS 2 of 3 with \"VHOST\"   by IOPS descending   more columns: right",
        "CONTROLLER STATE    IOPS   R/s   W/s RMiB/s WMiB/s LATus P50us P99us INFL ERR/s",
        "vhost.0    running  10.0  10.0     -      -      - 100k      -     -    1     -",
    ];
    let shown: Vec<&str> = lines.iter().take(9).map(String::as_str).collect();
    assert_eq!(shown, expected[..9]);
    assert_eq!(lines[9], expected[9]);
    assert!(lines[10].starts_with("vhost.0    running  10.0  10.0"), "{lines:#?}");
    assert_eq!(lines[23], KEYS);
}

#[test]
fn a_large_screen_has_all_columns() {
    let (mut app, now) = app();
    let lines = screen(&mut app, now, 200, 50);
    assert!(lines[8].ends_with("by IOPS descending"), "{}", lines[8]);
    Column::ALL.iter().for_each(|column| assert!(lines[9].contains(column.title()), "{column:?}"));
    assert!(lines[10].starts_with("longlong") && lines[10].contains("1:2 3:1 disk-longlong"));
}

#[test]
fn columns_are_scrolled_and_the_name_stays() {
    let (mut app, now) = app();
    press(&mut app, &[KeyCode::Right; 100]);
    let lines = screen(&mut app, now, 80, 24);
    assert!(lines[8].ends_with("more columns: left"), "{}", lines[8]);
    assert!(lines[9].starts_with("CONTROLLER") && lines[9].ends_with("BDEV"), "{}", lines[9]);
    press(&mut app, &[KeyCode::Left; 100]);
    assert!(screen(&mut app, now, 80, 24)[8].ends_with("more columns: right"));
}

#[test]
fn panels_and_prompts() {
    let (mut app, now) = app();
    press(&mut app, &[KeyCode::Tab]);
    assert!(screen(&mut app, now, 80, 24)[4].starts_with("CONTROLLERS 3"));
    press(&mut app, &[KeyCode::Tab, KeyCode::Down]);
    let lines = screen(&mut app, now, 80, 24);
    assert_eq!(lines[4], "REACTORS 2-2 of 2 (Tab)");
    assert!(lines[6].starts_with("   2 ") && lines[7].is_empty());
    press(&mut app, &[KeyCode::Tab, KeyCode::Char('h')]);
    let last = screen(&mut app, now, 80, 24).pop().unwrap();
    assert!(last.starts_with("enable the histogram of disk-longlong"), "{last}");
    press(&mut app, &[KeyCode::Esc, KeyCode::Char('/'), KeyCode::Char('a')]);
    assert_eq!(screen(&mut app, now, 80, 24)[23], "filter: a_");
    press(&mut app, &[KeyCode::Esc, KeyCode::Char('?')]);
    let help = screen(&mut app, now, 80, 24);
    assert!(help[22].ends_with("Any key returns.") || help[23] == KEYS, "{help:#?}");
    assert!(help.iter().any(|line| line.contains("Any key returns.")), "it fits: {help:#?}");
}

#[test]
fn a_long_list_scrolls_to_the_selection_and_no_size_panics() {
    let (mut app, now) = app();
    let view = app.view.as_mut().unwrap();
    let (row, reactor) = (view.controllers[0].clone(), view.reactors[0].clone());
    let named = |n: usize| crate::view::ControllerRow { name: format!("c{n:03}"), ..row.clone() };
    view.controllers = (0..500).map(named).collect();
    view.reactors = vec![reactor; 64];
    view.stuck_closes = vec!["c1".to_owned()];
    press(&mut app, &[KeyCode::End]);
    let lines = screen(&mut app, now, 80, 24);
    assert_eq!(lines[4], "REACTORS 1-6 of 64 (Tab)");
    assert!(lines[22].starts_with("c499"), "{lines:#?}");
    for (width, height) in [(1, 1), (5, 3), (20, 8), (80, 5), (300, 2), (10, 100)] {
        for key in [KeyCode::Tab, KeyCode::Right, KeyCode::Char('?'), KeyCode::Char('/')] {
            press(&mut app, &[key]);
            screen(&mut app, now, width, height);
            press(&mut app, &[KeyCode::Esc]);
        }
    }
    let colours = Theme { colours: true };
    let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
    terminal.draw(|frame| draw(frame, &mut app, colours, now)).unwrap();
    assert_eq!(terminal.backend().buffer()[(0, 2)].fg, Color::Red);
}
