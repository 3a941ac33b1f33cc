//! A `vhost` that ends and is started again with the same configuration and the same sockets.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::servers::{Error, Process, Result, Rpc, setpriv};

/// The server, whichever process it is just now.
pub(crate) struct Server {
    program: PathBuf,
    args: Vec<String>,
    core: usize,
    dir: TempDir,
    process: Option<Process>,
}

impl Server {
    /// Creates a server whose configuration has these calls, each a method and its parameters. Does
    /// not start it.
    pub(crate) fn new(
        program: &Path,
        args: &[String],
        core: usize,
        dir: TempDir,
        bdevs: &[(&str, Value)],
        controllers: &[(&str, Value)],
    ) -> Result<Self> {
        let calls = |calls: &[(&str, Value)]| -> Vec<Value> {
            let call = |(method, params)| json!({"method": method, "params": params});
            calls.iter().cloned().map(call).collect()
        };
        let config = json!({"subsystems": [
            {"subsystem": "bdev", "config": calls(bdevs)},
            {"subsystem": "vhost_blk", "config": calls(controllers)},
        ]});
        let written = std::fs::write(dir.path().join("config.json"), config.to_string());
        written.map_err(Error::system("cannot write a configuration"))?;
        let (program, args) = (program.to_owned(), args.to_vec());
        Ok(Self { program, args, core, dir, process: None })
    }

    pub(crate) fn start(&mut self) -> Result<()> {
        let at = |name| self.dir.path().join(name);
        let mut command = setpriv(&self.program);
        command.args(["-m", &format!("{:#x}", 1_u64 << self.core), "-u"]);
        command.arg("--disable-cpumask-locks").arg("-S").arg(self.dir.path());
        command.arg("-r").arg(at("rpc.sock")).arg("-c").arg(at("config.json"));
        command.args(&self.args);
        self.process = Some(Process::start("vhost", command, at("log"))?);
        Ok(())
    }

    /// The process, which was started.
    pub(crate) fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("it was started")
    }

    /// Calls `connect` with the socket of a controller until somebody listens there.
    pub(crate) fn until_it_listens(
        &mut self,
        controller: &str,
        mut connect: impl FnMut(PathBuf) -> crate::Result<()>,
    ) -> Result<()> {
        let socket = self.dir.path().join(controller);
        let process = self.process.as_mut().expect("it was started");
        let mut connected = Ok(());
        process.wait_until("socket", || {
            connected = connect(socket.clone());
            !matches!(connected, Err(crate::Error::FrontEnd(front_end::Error::Connect { .. })))
        })?;
        connected.map_err(|source| Error::TakeOver { source, log: process.log() })
    }

    /// Calls an RPC on a connection of its own.
    pub(crate) fn call(&self, method: &str, params: Value) -> Result<Value> {
        Rpc::connect(&self.dir.path().join("rpc.sock"))?.call(method, params)
    }

    /// SIGKILL; returns when it has ended.
    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM; returns when it has ended.
    pub(crate) fn terminate(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), Process::terminate)
    }
}
