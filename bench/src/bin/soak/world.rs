//! The random operations on the server, and the resources that they hold.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bench::servers::{Error, Refusal, Server};
use fastrand::Rng;
use front_end::{Lingering, RawConnection, UnresponsiveSocket};
use serde_json::{Value, json};

use crate::abuse;
use crate::heartbeats::Heartbeats;
use crate::neighbours::{NEIGHBOURS, QUEUES, name as neighbour};
use crate::vm::Vm;

/// Number of controllers that are created and deleted.
const SLOTS: usize = 6;
/// Limit on VMs of one controller.
const VMS: usize = 3;
/// Limit on misbehaving connections of one controller. A controller accepts more than these and
/// VMS.
const RAW: usize = 8;
/// Limit on sockets whose close hangs.
const LINGERING: usize = 4;
/// Limit on RPC clients that stay connected.
const CLIENTS: usize = 8;
/// Number of cores between which queues move.
const CORES: usize = 2;
/// Number of steps that the report of a failure shows.
const RECENT: usize = 25;
const MIB: u64 = 1 << 20;
/// The disk that hangs: an error bdev on the malloc bdev `hangs`.
const HANGS: &str = "EE_hangs";
/// The error code of a busy controller, and of other refusals.
const INVALID: i64 = -32602;
/// `timeout_ms` of a delete that must succeed. It is shorter than this program's wait for an
/// answer.
const DELETE_MS: u64 = 50_000;
/// The name of a controller whose socket a stopped process listens on.
const UNRESPONSIVE: &str = "unresponsive";

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Create,
    Delete,
    DeleteByForce,
    Connect,
    Kill,
    Stop,
    Hang,
    Answer,
    Resize,
    Move,
    MoveNeighbour,
    Log,
    Table,
    Batch,
    Half,
    Unread,
    OddFds,
    Lingering,
    RpcFds,
    UnresponsiveSocket,
    LetGo,
}

/// The operations with their weights.
const WEIGHTS: [(Action, u32); 21] = [
    (Action::Create, 12),
    (Action::Delete, 4),
    (Action::DeleteByForce, 6),
    (Action::Connect, 16),
    (Action::Kill, 6),
    (Action::Stop, 4),
    (Action::Hang, 2),
    (Action::Answer, 3),
    (Action::Resize, 4),
    (Action::Move, 6),
    (Action::MoveNeighbour, 4),
    (Action::Log, 6),
    (Action::Table, 3),
    (Action::Batch, 3),
    (Action::Half, 6),
    (Action::Unread, 3),
    (Action::OddFds, 6),
    (Action::Lingering, 2),
    (Action::RpcFds, 2),
    (Action::UnresponsiveSocket, 2),
    (Action::LetGo, 8),
];

/// A controller that is created and deleted.
#[derive(Default)]
struct Slot {
    /// Its disk. `None` while there is no controller.
    disk: Option<String>,
    vms: Vec<Vm>,
    raw: Vec<RawConnection>,
}

/// The server, and the connections to it.
pub(crate) struct World<'a> {
    pub(crate) server: &'a mut Server,
    heartbeats: Arc<Heartbeats>,
    rng: Rng,
    _unresponsive: UnresponsiveSocket,
    slots: Vec<Slot>,
    lingering: Vec<Lingering>,
    clients: Vec<UnixStream>,
    hung: bool,
    /// The size of the null disk and of the file.
    mib: u64,
    file: PathBuf,
    tally: BTreeMap<Action, u64>,
    recent: VecDeque<String>,
    /// The longest step so far, in heartbeats.
    slowest: (u64, String),
}

impl<'a> World<'a> {
    /// Creates the disks.
    pub(crate) fn new(
        server: &'a mut Server,
        seed: u64,
        heartbeats: Arc<Heartbeats>,
    ) -> Result<Self> {
        let unresponsive = UnresponsiveSocket::bind(&server.socket(UNRESPONSIVE))?;
        let mib = 64;
        let file = server.dir().join("file.img");
        File::create(&file)?.set_len(mib * MIB)?;
        server.bdev("null", "null")?;
        server.bdev("malloc", "hangs")?;
        server.call("bdev_error_create", json!({"base_name": "hangs"}))?;
        let aio = json!({"name": "file", "filename": file, "block_size": 512});
        server.call("bdev_aio_create", aio)?;
        Ok(Self {
            server,
            heartbeats,
            rng: Rng::with_seed(seed),
            _unresponsive: unresponsive,
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            lingering: Vec::new(),
            clients: Vec::new(),
            hung: false,
            mib,
            file,
            tally: BTreeMap::new(),
            recent: VecDeque::new(),
            slowest: (0, String::new()),
        })
    }

    /// Runs one random operation.
    pub(crate) fn step(&mut self) -> Result<()> {
        let mut at = self.rng.u32(0..WEIGHTS.iter().map(|(_, weight)| weight).sum());
        let chosen = WEIGHTS.iter().find(|(_, weight)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let action = chosen.context("the number is less than the sum of the weights")?.0;
        let slot = self.rng.usize(0..SLOTS);
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(format!("{action:?} of {}", name(slot)));
        let start = self.heartbeats.now();
        if self.act(action, slot).with_context(|| format!("{action:?} of {}", name(slot)))? {
            *self.tally.entry(action).or_default() += 1;
        }
        let heartbeats = self.heartbeats.now() - start;
        if heartbeats > self.slowest.0 {
            let disk = self.slots[slot].disk.as_deref().unwrap_or("no disk");
            self.slowest = (heartbeats, format!("{action:?} of {} ({disk})", name(slot)));
        }
        Ok(())
    }

    /// The number of each operation.
    pub(crate) fn tally(&self) -> String {
        let counts: Vec<String> = self.tally.iter().map(|(a, n)| format!("{n} {a:?}")).collect();
        counts.join(", ")
    }

    /// The longest step: its heartbeats and its operation. It may have waited for the hanging disk.
    pub(crate) fn slowest(&self) -> &(u64, String) {
        &self.slowest
    }

    /// The last operations.
    pub(crate) fn recent(&self) -> String {
        self.recent.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Runs an operation. Returns false if it was not possible.
    fn act(&mut self, action: Action, slot: usize) -> Result<bool> {
        match action {
            Action::Create => self.create(slot),
            Action::Delete => self.delete(slot, false),
            Action::DeleteByForce => self.delete(slot, true),
            Action::Connect => self.connect(slot),
            Action::Kill => self.kill(slot),
            Action::Stop => self.stop(slot),
            Action::Hang => self.hang(),
            Action::Answer => self.answer(),
            Action::Resize => self.resize(),
            Action::Move => self.move_queue(slot),
            Action::MoveNeighbour => self.move_neighbour(),
            Action::Log => self.with_vm(slot, Vm::toggle_log),
            Action::Table => self.with_vm(slot, Vm::repeat_table),
            Action::Batch => self.batch(),
            Action::Half => self.raw(slot, abuse::half),
            Action::Unread => self.raw(slot, |socket, _| abuse::unread(socket)),
            Action::OddFds => self.raw(slot, |socket, rng| {
                let mut connection = RawConnection::connect(socket)?;
                abuse::odd_fds(&mut connection, rng)?;
                Ok(connection)
            }),
            Action::Lingering => self.linger(slot),
            Action::RpcFds => self.rpc_fds(),
            Action::UnresponsiveSocket => self.create_over_unresponsive_socket(),
            Action::LetGo => Ok(self.let_go(slot)),
        }
    }

    fn create(&mut self, slot: usize) -> Result<bool> {
        if self.slots[slot].disk.is_some() {
            return Ok(false);
        }
        let own = own_disk(slot);
        let disk = match self.rng.u8(0..4) {
            0 => "null",
            1 => "file",
            2 => HANGS,
            _ => {
                let params = json!({"name": own, "num_blocks": 16 * MIB / 512, "block_size": 512});
                self.server.call("bdev_malloc_create", params)?;
                &own
            }
        };
        let packed = self.rng.bool();
        let params = json!({"ctrlr": name(slot), "dev_name": disk, "packed_ring": packed});
        self.slots[slot].disk = Some(disk.into());
        self.server.call("vhost_create_blk_controller", params)?;
        Ok(true)
    }

    fn delete(&mut self, slot: usize, force: bool) -> Result<bool> {
        let Some(disk) = self.slots[slot].disk.clone() else { return Ok(false) };
        let busy = !self.slots[slot].vms.is_empty() || !self.slots[slot].raw.is_empty();
        let mut params = json!({"ctrlr": name(slot), "force": force});
        let in_vain = busy && !force || self.hangs(slot);
        params["timeout_ms"] = if in_vain { 20 } else { DELETE_MS }.into();
        match self.server.call("vhost_delete_controller", params) {
            Ok(_) => {}
            // A VM that was killed may still have I/O on the disk that hangs.
            Err(Error::Refused { refusal: Refusal { code: INVALID, .. }, .. })
                if !force && in_vain =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        let old = std::mem::take(&mut self.slots[slot]);
        for vm in old.vms {
            vm.kill()?;
        }
        if disk == own_disk(slot) {
            self.server.call("bdev_malloc_delete", json!({"name": disk}))?;
        }
        Ok(true)
    }

    fn connect(&mut self, slot: usize) -> Result<bool> {
        let controller = &mut self.slots[slot];
        if controller.disk.is_none() || controller.vms.len() == VMS {
            return Ok(false);
        }
        match Vm::start(&self.server.socket(&name(slot)), &mut self.rng) {
            Ok(vm) => controller.vms.push(vm),
            // A controller whose closes hang refuses connections, but without a delay.
            Err(error) if self.lingering.is_empty() || is_silence(&error) => {
                return Err(error.into());
            }
            Err(_) => return Ok(false),
        }
        Ok(true)
    }

    fn kill(&mut self, slot: usize) -> Result<bool> {
        let Some(vm) = self.take_vm(slot) else { return Ok(false) };
        vm.kill()?;
        Ok(true)
    }

    fn stop(&mut self, slot: usize) -> Result<bool> {
        if self.hangs(slot) {
            return Ok(false);
        }
        let Some(vm) = self.take_vm(slot) else { return Ok(false) };
        vm.stop()?;
        Ok(true)
    }

    fn hang(&mut self) -> Result<bool> {
        let error = json!({
            "name": HANGS, "io_type": "all", "error_type": "pending", "num": 1_000_000
        });
        self.server.call("bdev_error_inject_error", error)?;
        self.hung = true;
        Ok(true)
    }

    fn answer(&mut self) -> Result<bool> {
        if !self.hung {
            return Ok(false);
        }
        let clear = json!({"name": HANGS, "io_type": "clear", "error_type": "pending"});
        self.server.call("bdev_error_inject_error", clear)?;
        self.server.call("bdev_error_resume_pending", json!({"name": HANGS}))?;
        self.hung = false;
        Ok(true)
    }

    fn resize(&mut self) -> Result<bool> {
        self.mib += 1;
        if self.rng.bool() {
            self.server.call("bdev_null_resize", json!({"name": "null", "new_size": self.mib}))?;
        } else {
            File::options().write(true).open(&self.file)?.set_len(self.mib * MIB)?;
            self.server.call("bdev_aio_rescan", json!({"name": "file"}))?;
        }
        Ok(true)
    }

    fn move_queue(&mut self, slot: usize) -> Result<bool> {
        if self.slots[slot].vms.is_empty() {
            return Ok(false);
        }
        let shown = self.server.call("vhost_get_controller_stats", json!({"name": name(slot)}))?;
        let sessions: Vec<Value> = shown[0]["sessions"].as_array().cloned().unwrap_or_default();
        let Some(session) = self.rng.choice(&sessions) else { return Ok(false) };
        let queues = session["queues"].as_array().map_or(0, Vec::len);
        if queues == 0 {
            return Ok(false);
        }
        let (queue, core) = (self.rng.usize(0..queues), self.rng.usize(0..CORES));
        let to =
            json!({"ctrlr": name(slot), "session": session["id"], "queue": queue, "core": core});
        match self.server.call("vhost_move_queue", to) {
            Ok(_) => Ok(true),
            // A session may end meanwhile.
            Err(Error::Refused { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn move_neighbour(&mut self) -> Result<bool> {
        let name = neighbour(self.rng.usize(0..NEIGHBOURS));
        let (queue, core) = (self.rng.usize(0..QUEUES), self.rng.usize(0..CORES));
        let to = json!({"ctrlr": name, "queue": queue, "core": core});
        self.server.call("vhost_move_queue", to)?;
        Ok(true)
    }

    /// Runs `act` on a random VM of the controller, unless its disk hangs.
    fn with_vm(&mut self, slot: usize, act: fn(&mut Vm) -> Result<()>) -> Result<bool> {
        if self.hangs(slot) || self.slots[slot].vms.is_empty() {
            return Ok(false);
        }
        let vm = self.rng.usize(0..self.slots[slot].vms.len());
        act(&mut self.slots[slot].vms[vm])?;
        Ok(true)
    }

    fn batch(&mut self) -> Result<bool> {
        let client = abuse::batch(&self.server.rpc_socket(), &mut self.rng)?;
        if self.clients.len() < CLIENTS && self.rng.bool() {
            self.clients.push(client);
        }
        Ok(true)
    }

    fn raw(
        &mut self,
        slot: usize,
        connect: impl FnOnce(&std::path::Path, &mut Rng) -> Result<RawConnection>,
    ) -> Result<bool> {
        if self.slots[slot].disk.is_none() || self.slots[slot].raw.len() == RAW {
            return Ok(false);
        }
        let connection = connect(&self.server.socket(&name(slot)), &mut self.rng)?;
        if self.rng.u8(0..4) > 0 {
            self.slots[slot].raw.push(connection);
        }
        Ok(true)
    }

    fn linger(&mut self, slot: usize) -> Result<bool> {
        let controller = &self.slots[slot];
        let is_full = self.lingering.len() == LINGERING || controller.raw.len() == RAW;
        if controller.disk.is_none() || is_full {
            return Ok(false);
        }
        let mut connection = RawConnection::connect(&self.server.socket(&name(slot)))?;
        let process = &mut self.server.process;
        let lingering =
            abuse::lingering(&mut connection, &mut self.rng, process, &self.heartbeats)?;
        self.lingering.push(lingering);
        self.slots[slot].raw.push(connection);
        Ok(true)
    }

    fn rpc_fds(&mut self) -> Result<bool> {
        let mut connection = abuse::rpc_client(&self.server.rpc_socket())?;
        if self.rng.bool() || self.lingering.len() == LINGERING {
            abuse::odd_fds(&mut connection, &mut self.rng)?;
        } else {
            let process = &mut self.server.process;
            self.lingering.push(abuse::lingering(
                &mut connection,
                &mut self.rng,
                process,
                &self.heartbeats,
            )?);
        }
        Ok(true)
    }

    /// Creates a controller whose socket belongs to another process. The server must refuse it
    /// without a delay.
    fn create_over_unresponsive_socket(&self) -> Result<bool> {
        let params = json!({"ctrlr": UNRESPONSIVE, "dev_name": "null"});
        match self.server.call("vhost_create_blk_controller", params) {
            Err(Error::Refused { refusal: Refusal { code: INVALID, .. }, .. }) => Ok(true),
            Err(error) => Err(error.into()),
            Ok(_) => bail!("vhost replaced a socket on which another process listens"),
        }
    }

    /// Closes one connection of each kind.
    fn let_go(&mut self, slot: usize) -> bool {
        self.slots[slot].raw.pop();
        self.lingering.pop();
        self.clients.pop();
        true
    }

    /// Closes all connections and deletes all controllers but the neighbours'.
    pub(crate) fn release(&mut self) -> Result<()> {
        self.recent.push_back("release".into());
        self.lingering.clear();
        self.clients.clear();
        self.answer()?;
        for slot in 0..SLOTS {
            self.slots[slot].raw.clear();
            while let Some(vm) = self.take_vm(slot) {
                if self.rng.bool() { vm.kill()? } else { vm.stop()? }
            }
            self.delete(slot, true)?;
        }
        Ok(())
    }

    fn take_vm(&mut self, slot: usize) -> Option<Vm> {
        let vms = &mut self.slots[slot].vms;
        (!vms.is_empty()).then(|| vms.swap_remove(self.rng.usize(0..vms.len())))
    }

    /// Whether the controller's disk hangs.
    fn hangs(&self, slot: usize) -> bool {
        self.hung && self.slots[slot].disk.as_deref() == Some(HANGS)
    }
}

fn is_silence(error: &bench::Error) -> bool {
    matches!(error, bench::Error::FrontEnd(front_end::Error::NoAnswer { .. }))
}

fn name(slot: usize) -> String {
    format!("soak.{slot}")
}

fn own_disk(slot: usize) -> String {
    format!("own.{slot}")
}
