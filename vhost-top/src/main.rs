//! `vhost-top`: shows what the controllers and reactors of a vhost server do.
//!
//! `rpc` calls the server's methods, and `collect` makes a `sample` of their answers. `view` has
//! the differences of two samples; `columns` and `text` make rows of text of it. This is all that
//! `--once` needs. On a terminal, `worker` takes samples on a thread of its own, `app` is the state
//! that keys and samples change, `draw` draws it, and `screen` is the loop.

#![forbid(unsafe_code)]

mod app;
mod args;
mod collect;
mod columns;
mod draw;
mod histogram;
mod number;
mod rpc;
mod sample;
mod screen;
mod text;
mod view;
mod worker;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::thread;

use clap::Parser;

use crate::args::Args;
use crate::collect::Collector;
use crate::view::View;

fn main() -> ExitCode {
    let args = Args::parse();
    let done =
        if args.once { once(&args).map(|()| None) } else { screen::show(&args.socket, args.delay) };
    match done {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX)),
        Err(error) => {
            // Unlike `eprintln`, this does not panic if the terminal is gone.
            let error = columns::plain(&error.to_string());
            let _ = writeln!(std::io::stderr(), "vhost-top: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the differences of two samples.
fn once(args: &Args) -> Result<(), Box<dyn Error>> {
    let mut collector = Collector::connect(&args.socket)?;
    let before = collector.sample()?;
    thread::sleep(args.delay);
    let view = View::new(Some(&before), &collector.sample()?);
    if let Some(missing) = text::missing(&view) {
        eprintln!("vhost-top: {missing}");
    }
    let shown =
        if args.json { format!("{}\n", serde_json::to_string(&view)?) } else { text::page(&view) };
    // Unlike `print`, this returns an error if the disk is full or the pipe is closed.
    let written = std::io::stdout().lock().write_all(shown.as_bytes());
    written.map_err(|error| format!("cannot print: {error}").into())
}
