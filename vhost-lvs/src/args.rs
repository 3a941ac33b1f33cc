//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "vhost-lvs",
    version,
    disable_help_subcommand = true,
    about = "Show, check, export and import logical volumes that no server uses",
    long_about = "Show, check, export and import logical volumes that no server uses.\n\n\
        FILE is a file or block device with a logical volume store of SPDK or of vhost. Only \
        import writes to it.\n\n\
        Exit status: 0 on success; 1 if check has findings, or another command fails; 2 if FILE \
        cannot be read, or the command line is invalid."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the store, its volumes, and which snapshots they depend on
    Inspect {
        /// A file or block device with a logical volume store
        file: PathBuf,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Look for contradictions in the metadata, without changing anything
    Check {
        /// A file or block device with a logical volume store
        file: PathBuf,
    },
    /// Write the content of a volume to a new file or to a block device
    Export {
        /// A file or block device with a logical volume store
        file: PathBuf,
        /// The volume: STORE/VOLUME, or its UUID
        #[arg(value_name = "VOLUME")]
        volume: String,
        /// A file that does not exist, or a block device
        out: PathBuf,
        /// The content of the external snapshot that the volume depends on
        #[arg(long, value_name = "FILE")]
        external: Option<PathBuf>,
    },
    /// Create a volume with the content of a file or block device
    ///
    /// No server may use the store. A file that vhost or QEMU uses is locked, and is refused; SPDK
    /// locks nothing, so stop it first. The volume is called NAME.importing until it is complete.
    Import {
        /// A file or block device with a logical volume store
        file: PathBuf,
        /// The content: a file or block device
        #[arg(value_name = "IN")]
        input: PathBuf,
        /// The name of the new volume
        name: String,
        /// Allocate no clusters for zeroes, and make the volume thin
        #[arg(long)]
        thin: bool,
        /// Also write to a store that was not unloaded, after its recovery
        #[arg(long)]
        recover: bool,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["vhost-lvs", "inspect", "f", "--json"]).is_ok());
        assert!(Args::try_parse_from(["vhost-lvs", "import", "f", "in"]).is_err());
    }
}
