//! Writes the manual pages and shell completions of the programs into a directory.
//!
//! `cargo run -p vhost-app --example manual -- DIR`. The definitions of the command lines are the
//! programs' own files. The generators are dependencies of this example only, so that the programs
//! do not contain them. A new program is added to [`programs`].
#![expect(
    dead_code,
    unused_imports,
    reason = "of the programs' files, only the definitions are used"
)]

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

/// What `vhost::cli` uses of its crate.
#[expect(unsafe_code, reason = "flags are matched by a function of libc")]
#[path = "../src/logging/flags.rs"]
mod logging;

#[path = "../src"]
mod vhost {
    pub(crate) mod cli;
}

#[path = "../../bench/src/bin/vhost-perf/args.rs"]
mod perf;

/// What `perf` uses of its crate.
#[path = "../../bench/src/bin/vhost-perf/values.rs"]
mod values;

#[path = "../../vhost-top/src/args.rs"]
mod top;

#[path = "../../vhost-lvs/src/args.rs"]
mod lvs;

/// A program with a manual page.
struct Program {
    command: Command,
    section: &'static str,
    /// What follows the options, in roff.
    more: &'static str,
}

fn programs() -> Vec<Program> {
    vec![
        Program { command: vhost::cli::Args::command(), section: "8", more: VHOST },
        Program { command: perf::Args::command(), section: "1", more: VHOST_PERF },
        Program { command: top::Args::command(), section: "1", more: VHOST_TOP },
        Program { command: lvs::Args::command(), section: "1", more: VHOST_LVS },
    ]
}

const VHOST: &str = r#"
.SH "EXIT STATUS"
0 after SIGINT or SIGTERM, 2 if the command line cannot be parsed, and another number if the start failed; the log has the reason.
.SH FILES
.TP
/etc/default/vhost
Options of the service.
.TP
/etc/vhost/vhost.json
The configuration that the service loads. \fBspdk\-rpc save_config\fR prints the current one.
.TP
/run/vhost
The sockets of the service's disks.
.TP
/run/vhost\-rpc/rpc.sock
The RPC socket of the service.
.SH ENVIRONMENT
.TP
NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID
Where and how often to report to the service manager: see \fBsd_notify\fR(3).
.SH "SEE ALSO"
\fBvhost\-perf\fR(1), \fBvhost\-top\fR(1), and the book in /usr/share/doc/vhost
"#;

const VHOST_PERF: &str = r#"
.SH "SEE ALSO"
\fBvhost\fR(8), and the book in /usr/share/doc/vhost
"#;

const VHOST_TOP: &str = r#"
.SH FILES
.TP
/run/vhost\-rpc/rpc.sock
The RPC socket of the service.
.SH ENVIRONMENT
.TP
NO_COLOR
If it is set and not empty, no colours are used.
.SH "SEE ALSO"
\fBvhost\fR(8), and the book in /usr/share/doc/vhost, whose chapter vhost\-top describes the columns and the keys of the JSON object
"#;

const VHOST_LVS: &str = r#"
.SH "SEE ALSO"
\fBvhost\fR(8), \fBvhost\-lvs\fR(1), and the book in /usr/share/doc/vhost, whose chapter lvs\-tool has examples
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: manual DIR")?);
    fs::create_dir_all(&dir)?;
    for program in programs() {
        write_page(&program, &dir)?;
        let Program { mut command, .. } = program;
        let name = command.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            clap_complete::generate_to(shell, &mut command, &name, &dir)?;
        }
    }
    Ok(())
}

fn write_page(program: &Program, dir: &Path) -> Result<(), Box<dyn Error>> {
    let Program { command, section, more } = program;
    let name = command.get_name();
    // Not the version's text, which for vhost begins with that of SPDK.
    let source = format!("vhost {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).section(*section).source(source);
    let mut page = File::create(dir.join(format!("{name}.{section}")))?;
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.write_all(more.as_bytes())?;
    command.get_subcommands().try_for_each(|sub| {
        // clap takes names that live for ever.
        let name: &'static str = Box::leak(format!("{name}-{}", sub.get_name()).into_boxed_str());
        let command = sub.clone().name(name).bin_name(name);
        write_page(&Program { command, section, more }, dir)
    })
}
