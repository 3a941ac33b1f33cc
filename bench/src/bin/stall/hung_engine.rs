//! Storage servers that hang: one completes the handshake of NBD and then answers no request, the
//! other accepts connections and says nothing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Result, anyhow};
use bench::servers::{Rpc, Server};
use serde_json::json;

/// The bdev and the controller on the server that answers no request.
pub(crate) const ENGINE: &str = "hung-engine";
/// The bdev on the server that says nothing.
const NEVER: &str = "hung-open";
const CREATE: &str = "bdev_nbd_create";
const SIZE: u64 = 1 << 30;

/// The two servers.
pub(crate) struct HungEngine<'a> {
    server: &'a Server,
    requests: PathBuf,
    handshakes: PathBuf,
    /// The call that creates the bdev on the second server.
    opening: Option<Rpc>,
}

impl<'a> HungEngine<'a> {
    /// Starts both servers, with their sockets in `dir`.
    pub(crate) fn new(server: &'a Server, dir: &Path) -> Result<Self> {
        let [requests, handshakes] = ["requests", "handshakes"].map(|name| dir.join(name));
        let listener = UnixListener::bind(&requests)?;
        // They end with this process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                thread::spawn(move || greet(client));
            }
        });
        let listener = UnixListener::bind(&handshakes)?;
        thread::spawn(move || listener.incoming().collect::<Vec<_>>());
        Ok(Self { server, requests, handshakes, opening: None })
    }

    /// Creates the bdev whose I/O hangs, with its controller.
    pub(crate) fn prepare(&self) -> Result<()> {
        self.server.call(CREATE, bdev(ENGINE, &self.requests))?;
        self.server.controller(ENGINE, ENGINE)?;
        Ok(())
    }

    /// Starts to create the bdev whose server never completes the handshake.
    pub(crate) fn open(&mut self) -> Result<()> {
        let mut rpc = Rpc::connect(&self.server.rpc_socket())?;
        rpc.send(CREATE, bdev(NEVER, &self.handshakes))?;
        self.opening = Some(rpc);
        Ok(())
    }

    /// Deletes the bdev, which makes its I/O fail.
    pub(crate) fn delete(&mut self) -> Result<()> {
        self.server.call("bdev_nbd_delete", json!({ "name": ENGINE }))?;
        if let Some(mut rpc) = self.opening.take()
            && rpc.receive(CREATE).is_ok()
        {
            return Err(anyhow!("{CREATE} has succeeded without a handshake"));
        }
        Ok(())
    }

    /// Deletes the controller, when its VM is gone.
    pub(crate) fn settle(&self) -> Result<()> {
        self.server.call("vhost_delete_controller", json!({ "ctrlr": ENGINE }))?;
        Ok(())
    }
}

fn bdev(name: &str, socket: &Path) -> serde_json::Value {
    json!({ "name": name, "uri": format!("nbd+unix:///?socket={}", socket.display()) })
}

/// Completes a handshake as an export of 1 GiB, and reads requests for ever.
fn greet(mut client: UnixStream) -> std::io::Result<()> {
    const OPTION_GO: u32 = 7;
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    client.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        client.read_exact(&mut header)?;
        let number = |at: usize| {
            header[at..at + 4].iter().fold(0, |sum: u32, byte| sum << 8 | u32::from(*byte))
        };
        let (option, len) = (number(8), number(12));
        client.read_exact(&mut vec![0; usize::try_from(len).unwrap_or(0).min(1 << 16)])?;
        let reply = |kind: u32, data: &[u8]| {
            let len = u32::try_from(data.len()).unwrap_or(0);
            let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
            [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &len.to_be_bytes(), data]
                .concat()
        };
        if option == OPTION_GO {
            // The information: type 0, the size, and the flags "flags are valid" and "flush".
            let info = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 5]].concat();
            client.write_all(&[reply(3, &info), reply(1, &[])].concat())?;
            break;
        }
        // The server does not know the option.
        client.write_all(&reply(1 << 31 | 1, &[]))?;
    }
    let mut request = [0; 4096];
    while client.read(&mut request)? > 0 {}
    Ok(())
}
