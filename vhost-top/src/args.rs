//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Limits on the interval: a server must not be kept busy by answers, and an hour is enough.
const DELAY_S: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

#[derive(Debug, Parser)]
#[command(
    name = "vhost-top",
    version,
    about = "Show what the controllers and reactors of a vhost server do",
    long_about = "Show what the controllers and reactors of a vhost server do: IOPS, throughput, \
        latencies, errors, and the load of each reactor.\n\n\
        vhost-top calls methods on the server's JSON-RPC socket and shows the differences between \
        two samples. It changes nothing on the server unless the keys h or r are pressed; ? lists \
        the keys. With SPDK's vhost, it shows what SPDK's methods return.\n\n\
        Exit status: 0 on success; 1 if the server cannot be reached or is not a vhost server; 2 \
        if the command line is invalid; 128 + N after signal N."
)]
pub(crate) struct Args {
    /// The server's RPC socket
    #[arg(short, long, default_value = "/var/tmp/spdk.sock", value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Seconds between two samples, from 0.1 to 3600
    #[arg(short, long, default_value = "1", value_parser = seconds, value_name = "SECONDS")]
    pub(crate) delay: Duration,
    /// Take two samples, print one table, and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// With --once: print a JSON object instead of a table
    #[arg(long, requires = "once")]
    pub(crate) json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("expected a number: {error}"))?;
    if !DELAY_S.contains(&seconds) {
        return Err(format!("expected {} to {}", DELAY_S.start(), DELAY_S.end()));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent_and_intervals_have_limits() {
        Args::command().debug_assert();
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["0", "-1", "NaN", "inf", "1e9", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert!(Args::try_parse_from(["vhost-top", "--json"]).is_err());
    }
}
