//! Untrusted clients, which try to block a thread, a table or a socket that other clients need.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bench::servers::{Error, Server};
use front_end::raw::{VERSION, message};
use front_end::{LIMIT, Lingering, RawConnection, UnresponsiveSocket};
use serde::de::IgnoredAny;
use serde_json::{Deserializer, Value, json};

use crate::cases::{OTHER, VMS, controller};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
/// Number of misbehaving front ends at a time.
const FRONT_ENDS: usize = 16;
/// Number of messages whose answers are not read: more than the socket's buffer holds.
const QUESTIONS: usize = 5000;
/// Number of disks in an answer to the batch's requests.
const DISKS: usize = 500;
/// Number of requests in the batch.
const BATCH: usize = 2000;
/// The socket of a stopped process.
const UNRESPONSIVE: &str = "unresponsive";

/// A kind of misbehaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trick {
    /// Messages whose payload carries a socket whose close hangs.
    Lingering,
    /// The same before the stretch, so that the closes hang during all of it.
    SlowCloses,
    /// A batch of many RPC requests.
    Batch,
    /// Front ends send half a message and disconnect.
    Half,
    /// Front ends do not read the answers.
    Unread,
    /// A stopped process listens on the socket of a new controller.
    UnresponsiveSocket,
}

impl Trick {
    /// Its name on the command line and in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lingering => "lingering-fds",
            Self::SlowCloses => "slow-closes",
            Self::Batch => "batch",
            Self::Half => "half-messages",
            Self::Unread => "unread-answers",
            Self::UnresponsiveSocket => "unresponsive-socket",
        }
    }

    /// A description for tables.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Lingering => "8 messages carry a socket whose close hangs",
            Self::SlowCloses => "4 VMs are killed while closes of 4 other VMs' fds hang",
            Self::Batch => "a batch requests a list of 500 disks 2,000 times",
            Self::Half => "16 front ends send half a message and disconnect, 8 times",
            Self::Unread => "16 front ends do not read the answers to their messages",
            Self::UnresponsiveSocket => {
                "a stopped process listens on the socket of a new controller, 8 times"
            }
        }
    }
}

/// Untrusted clients, with their connections.
pub(crate) struct UntrustedClients<'a> {
    trick: Trick,
    server: &'a Server,
    connections: Vec<RawConnection>,
    lingering: Vec<Lingering>,
    unresponsive: Option<UnresponsiveSocket>,
    batch: Option<JoinHandle<Result<()>>>,
}

impl<'a> UntrustedClients<'a> {
    /// Creates the objects that they need on `server`.
    pub(crate) fn new(trick: Trick, server: &'a Server) -> Result<Self> {
        let is_there = |name| server.call("bdev_get_bdevs", json!({"name": name})).is_ok();
        if trick == Trick::Batch && !is_there("many.0") {
            for n in 0..DISKS {
                server.bdev("null", &format!("many.{n}"))?;
            }
        }
        let (connections, lingering) = (Vec::new(), Vec::new());
        Ok(Self { trick, server, connections, lingering, unresponsive: None, batch: None })
    }

    /// Prepares the misbehaviour before the stretch.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        match self.trick {
            Trick::Lingering => self.bring_lingering(VMS),
            Trick::SlowCloses => {
                self.bring_lingering(VMS / 2)?;
                self.complete_messages(Duration::ZERO)
            }
            Trick::UnresponsiveSocket => {
                self.unresponsive =
                    Some(UnresponsiveSocket::bind(&self.server.socket(UNRESPONSIVE))?);
                Ok(())
            }
            Trick::Batch | Trick::Half | Trick::Unread => Ok(()),
        }
    }

    /// Misbehaves, with `pause` between two events.
    pub(crate) fn strike(&mut self, pause: Duration) -> Result<()> {
        match self.trick {
            Trick::Lingering => self.complete_messages(pause),
            Trick::SlowCloses => Ok(()),
            Trick::Batch => self.send_batch(),
            Trick::Half => self.send_halves(pause),
            Trick::Unread => self.ask(),
            Trick::UnresponsiveSocket => self.create_over_unresponsive_socket(pause),
        }
    }

    /// Closes all connections.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.lingering.clear();
        self.connections.clear();
        if let Some(batch) = self.batch.take() {
            batch.join().map_err(|_| anyhow!("a thread has panicked"))?.context("a batch")?;
        }
        if self.unresponsive.take().is_some() {
            fs::remove_file(self.server.socket(UNRESPONSIVE))?;
        }
        Ok(())
    }

    /// Sends half a message with a lingering socket, on a connection to each of `count`
    /// controllers. The server keeps the socket until the message is complete, so this process
    /// never holds the last reference.
    fn bring_lingering(&mut self, count: usize) -> Result<()> {
        let whole = message(SET_FEATURES, VERSION, &[0; 8]);
        for n in 0..count {
            let mut connection = RawConnection::connect(&self.server.socket(&controller(n)))?;
            let mut lingering = Lingering::new()?;
            connection.send(&whole[..12], &[])?;
            connection.send(&whole[12..16], &[lingering.fd()])?;
            lingering.is_sent();
            self.connections.push(connection);
            self.lingering.push(lingering);
        }
        Ok(())
    }

    fn complete_messages(&mut self, pause: Duration) -> Result<()> {
        let whole = message(SET_FEATURES, VERSION, &[0; 8]);
        for connection in &mut self.connections {
            connection.send(&whole[16..], &[])?;
            std::thread::sleep(pause);
        }
        Ok(())
    }

    fn send_batch(&mut self) -> Result<()> {
        let member = |id| json!({"jsonrpc": "2.0", "method": "bdev_get_bdevs", "id": id});
        let batch: Vec<Value> = (0..BATCH).map(member).collect();
        let mut client = UnixStream::connect(self.server.rpc_socket())?;
        client.set_read_timeout(Some(LIMIT))?;
        client.write_all(serde_json::to_string(&batch)?.as_bytes())?;
        self.batch = Some(std::thread::spawn(move || {
            let mut answers = Deserializer::from_reader(BufReader::new(client)).into_iter();
            let _: IgnoredAny = answers.next().context("no answer")??;
            Ok(())
        }));
        Ok(())
    }

    fn connect(&self, n: usize) -> Result<RawConnection> {
        Ok(RawConnection::connect(&self.server.socket(&controller(n % VMS)))?)
    }

    fn send_halves(&mut self, pause: Duration) -> Result<()> {
        let whole = message(SET_FEATURES, VERSION, &[0; 8]);
        for _ in 0..VMS {
            self.connections.clear();
            for n in 0..FRONT_ENDS {
                let mut connection = self.connect(n)?;
                connection.send(&whole[..n % whole.len() + 1], &[])?;
                self.connections.push(connection);
            }
            std::thread::sleep(pause);
        }
        Ok(())
    }

    fn ask(&mut self) -> Result<()> {
        let question = message(GET_FEATURES, VERSION, &[]);
        for n in 0..FRONT_ENDS {
            let connection = self.connect(n)?;
            connection.flood(&question, QUESTIONS)?;
            self.connections.push(connection);
        }
        Ok(())
    }

    fn create_over_unresponsive_socket(&mut self, pause: Duration) -> Result<()> {
        for _ in 0..VMS {
            match self.server.controller(UNRESPONSIVE, OTHER) {
                Err(Error::Refused { .. }) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => bail!("vhost replaced a socket on which another process listens"),
            }
            std::thread::sleep(pause);
        }
        Ok(())
    }
}
