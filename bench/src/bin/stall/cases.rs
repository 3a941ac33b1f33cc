//! The events that another VM on the same reactors goes through while the neighbours do I/O.
//!
//! [`Case::prepare`] does as much as possible before a stretch, so that the stretch contains the
//! event ([`Case::strike`]) and little else.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bench::servers::{Kind, Rpc, Server};
use bench::{Load, LoadOptions};
use front_end::{Backing, FrontEnd, GuestRam, LIMIT, Options, Queue, QueueOptions, Request};
use serde_json::json;

use crate::event::Event;
use crate::hung_engine::{ENGINE, HungEngine};
use crate::new_vms;
use crate::untrusted_clients::{Trick, UntrustedClients};

/// VMs that connect or leave in one stretch.
pub(crate) const VMS: usize = 8;
/// Memory of each VM.
const RAM_BYTES: u64 = 32 << 20;
/// Requests in flight of a VM that is killed.
const IN_FLIGHT: usize = 16;
/// Latency of the hung disk: longer than a stretch, so that its I/O is in flight during all of it.
const HANG: Duration = Duration::from_secs(2);
/// How long the control case keeps the client's core busy at a time.
const BURN: Duration = Duration::from_millis(2);
/// Guest-physical address of a second memory.
const FAR: u64 = 1 << 40;
/// Name of the controller and of the bdev that hang.
const HUNG: &str = "hung";
/// The bdev of the other VMs.
pub(crate) const OTHER: &str = "other";
const DELETE: &str = "vhost_delete_controller";

/// A guest beside the neighbours.
struct Vm {
    front_end: FrontEnd,
    /// `None` while a load has the queue.
    queue: Option<Queue>,
    ram: Arc<GuestRam>,
}

impl Vm {
    /// Connects and starts a guest.
    fn start(server: &Server, controller: &str, ram: Arc<GuestRam>) -> Result<Self> {
        let socket = server.socket(controller);
        let mut front_end = FrontEnd::connect(&socket, ram.clone(), Options::default())?;
        let queue = front_end.start_new(1, QueueOptions::default())?.pop();
        Ok(Self { front_end, queue, ram })
    }

    /// Reads once, so that the server has touched its memory.
    fn read(&mut self) -> Result<()> {
        let buffer = self.ram.alloc(4096, 4096)?;
        self.queue()?.run(&Request::read(0, &[buffer]))?;
        Ok(())
    }

    /// Submits several reads without waiting for them.
    fn submit(&mut self) -> Result<()> {
        let buffer = self.ram.alloc(4096, 4096)?;
        for sector in 0..IN_FLIGHT as u64 {
            self.queue()?.submit(&Request::read(sector * 8, &[buffer]))?;
        }
        self.queue()?.kick()?;
        Ok(())
    }

    fn queue(&mut self) -> Result<&mut Queue> {
        self.queue.as_mut().context("a load has the queue")
    }
}

/// An event that can happen again and again.
pub(crate) struct Case<'a> {
    pub(crate) event: Event,
    server: &'a Server,
    /// The directory whose files trigger the slow unmap.
    armory: PathBuf,
    length: Duration,
    rams: Vec<Arc<GuestRam>>,
    /// Memory that the memory table gains.
    more: Option<Arc<GuestRam>>,
    vms: Vec<Vm>,
    /// Kept until the stretch ends, because dropping takes time.
    left: Vec<(Option<Queue>, Arc<GuestRam>)>,
    load: Option<Load>,
    stopping: Option<JoinHandle<front_end::Result<Vec<u16>>>>,
    calls: Vec<(Rpc, &'static str)>,
    untrusted_clients: Option<UntrustedClients<'a>>,
    hung_engine: Option<HungEngine<'a>>,
}

impl<'a> Case<'a> {
    /// Creates the objects that `event` needs on `server`. A stretch takes `length`.
    pub(crate) fn new(
        event: Event,
        server: &'a Server,
        armory: PathBuf,
        length: Duration,
        more: Option<Arc<GuestRam>>,
    ) -> Result<Self> {
        let untrusted_clients = match event {
            Event::UntrustedClients(trick) => Some(UntrustedClients::new(trick, server)?),
            _ => None,
        };
        let hung_engine = match event {
            Event::EngineHang => Some(HungEngine::new(server, &armory)?),
            _ => None,
        };
        let case = Self {
            event,
            server,
            armory,
            length,
            rams: Vec::new(),
            more,
            vms: Vec::new(),
            left: Vec::new(),
            load: None,
            stopping: None,
            calls: Vec::new(),
            untrusted_clients,
            hung_engine,
        };
        if event.wants_new_vms() && !server.socket(new_vms::NAME).exists() {
            server.controller(new_vms::NAME, OTHER)?;
        }
        // Another case may have created it.
        let hangs = matches!(event, Event::HungIo | Event::HungKilled | Event::HungStopped);
        if hangs && !server.socket(HUNG).exists() {
            let us = HANG.as_secs() * 1_000_000;
            let params = json!({
                "name": HUNG, "base_bdev_name": OTHER,
                "avg_read_latency": us, "p99_read_latency": us,
                "avg_write_latency": us, "p99_write_latency": us,
            });
            server.call("bdev_delay_create", params)?;
            server.controller(HUNG, HUNG)?;
        }
        Ok(case)
    }

    /// Prepares the event.
    pub(crate) fn prepare(&mut self) -> Result<()> {
        match self.event {
            Event::Control => {}
            Event::Connected => {
                for _ in 0..VMS {
                    self.rams.push(touched_ram()?);
                }
            }
            Event::Loaded | Event::Table(_) | Event::SlowUnmap => self.connect(0..1)?,
            Event::Killed | Event::Deleted => self.connect(0..VMS)?,
            Event::HungIo => {
                let vm = Vm::start(self.server, HUNG, touched_ram()?)?;
                self.vms.push(vm);
            }
            Event::HungKilled | Event::HungStopped => {
                let mut vm = Vm::start(self.server, HUNG, touched_ram()?)?;
                vm.submit()?;
                self.vms.push(vm);
            }
            Event::EngineHang => {
                self.hung_engine.iter().try_for_each(HungEngine::prepare)?;
                let vm = Vm::start(self.server, ENGINE, touched_ram()?)?;
                self.vms.push(vm);
            }
            Event::UntrustedClients(trick) => {
                self.untrusted_clients.iter_mut().try_for_each(UntrustedClients::prepare)?;
                if trick == Trick::SlowCloses {
                    self.connect(VMS / 2..VMS)?;
                }
            }
        }
        Ok(())
    }

    /// Triggers the event. Returns before the stretch ends.
    pub(crate) fn strike(&mut self) -> Result<()> {
        match self.event {
            Event::Control => {
                for _ in 0..VMS {
                    let start = Instant::now();
                    while start.elapsed() < BURN {
                        std::hint::spin_loop();
                    }
                    self.pace();
                }
            }
            Event::Connected => {
                for (n, ram) in std::mem::take(&mut self.rams).into_iter().enumerate() {
                    let mut vm = Vm::start(self.server, &controller(n), ram)?;
                    vm.read()?;
                    self.vms.push(vm);
                    self.pace();
                }
            }
            Event::Loaded => self.load()?,
            Event::Killed => self.kill()?,
            Event::Deleted => self.delete()?,
            Event::Table(_) => self.change_table()?,
            Event::SlowUnmap => self.leave_slowly()?,
            Event::HungIo => self.vms.iter_mut().try_for_each(Vm::submit)?,
            Event::HungKilled => {
                for Vm { front_end, queue, ram } in self.vms.drain(..) {
                    front_end.kill();
                    self.left.push((queue, ram));
                }
            }
            Event::HungStopped => {
                for Vm { mut front_end, queue, ram } in self.vms.drain(..) {
                    self.left.push((queue, ram));
                    self.stopping = Some(std::thread::spawn(move || front_end.stop()));
                }
            }
            Event::EngineHang => {
                self.vms.iter_mut().try_for_each(Vm::submit)?;
                self.hung_engine.iter_mut().try_for_each(HungEngine::open)?;
            }
            Event::UntrustedClients(_) => {
                let pause = self.pause();
                self.untrusted_clients.iter_mut().try_for_each(|clients| clients.strike(pause))?;
                self.kill()?;
            }
        }
        Ok(())
    }

    /// Cleans up, so that the event can happen again.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if let Some(load) = self.load.take() {
            load.stop()?;
        }
        if let Some(thread) = self.stopping.take() {
            thread.join().map_err(|_| anyhow!("a thread has panicked"))?.context("stopping")?;
        }
        for (mut rpc, method) in self.calls.drain(..) {
            rpc.receive(method)?;
        }
        match self.event {
            Event::Deleted => {
                self.vms.clear();
                for n in 0..VMS {
                    self.server.controller(&controller(n), OTHER)?;
                }
            }
            Event::SlowUnmap => {
                wait_until("the end of the slow unmap", || {
                    self.armory.join(slow_munmap::SLEPT).exists()
                })?;
                fs::remove_file(self.armory.join(slow_munmap::SLEPT))?;
                self.server.controller(&controller(0), OTHER)?;
            }
            Event::HungIo | Event::EngineHang => {
                self.hung_engine.iter_mut().try_for_each(HungEngine::delete)?;
                for vm in &mut self.vms {
                    for _ in 0..IN_FLIGHT {
                        vm.queue()?.wait()?;
                    }
                }
            }
            _ => {}
        }
        for vm in self.vms.drain(..) {
            vm.front_end.disconnect()?;
        }
        if self.event == Event::UntrustedClients(Trick::SlowCloses) {
            self.wait_for_ends(VMS / 2..VMS)?;
        }
        self.untrusted_clients.iter_mut().try_for_each(UntrustedClients::settle)?;
        self.hung_engine.iter().try_for_each(HungEngine::settle)?;
        self.wait_for_peace()?;
        self.left.clear();
        Ok(())
    }

    /// Waits until the server has no sessions but the neighbours'.
    fn wait_for_peace(&self) -> Result<()> {
        self.wait_for("the sessions' end", |name| !name.starts_with("neighbour"))
    }

    /// Waits until these controllers have no sessions.
    fn wait_for_ends(&self, controllers: Range<usize>) -> Result<()> {
        let names: Vec<String> = controllers.map(controller).collect();
        self.wait_for("the VMs' end beside closes that hang", |name| {
            names.iter().any(|n| n == name)
        })
    }

    /// Waits until controllers of these names have neither sessions nor fds that are being closed.
    fn wait_for(&self, what: &str, counts: impl Fn(&str) -> bool) -> Result<()> {
        wait_until(what, || {
            let answer = self.server.call("vhost_get_controller_stats", json!({}));
            // SPDK has no such method, and no fds to show.
            let answer = answer.or_else(|_| self.server.call("vhost_get_controllers", json!({})));
            let Ok(answer) = answer else {
                return false;
            };
            answer.as_array().into_iter().flatten().all(|controller| {
                let sessions = controller["sessions"].as_array().map_or(0, Vec::len);
                let closing = controller["fds"]["closing"].as_u64().unwrap_or(0);
                !counts(controller["ctrlr"].as_str().unwrap_or_default())
                    || sessions == 0 && closing == 0
            })
        })
    }

    /// A VM on each of these controllers.
    fn connect(&mut self, controllers: Range<usize>) -> Result<()> {
        for n in controllers {
            let mut vm = Vm::start(self.server, &controller(n), touched_ram()?)?;
            vm.read()?;
            self.vms.push(vm);
        }
        Ok(())
    }

    /// Pauses between two events, so that they are spread over the stretch.
    fn pace(&self) {
        std::thread::sleep(self.pause());
    }

    fn pause(&self) -> Duration {
        self.length.div_f64(VMS as f64 + 2.0)
    }

    /// Starts a load on each VM's queue.
    fn load(&mut self) -> Result<()> {
        for vm in &mut self.vms {
            let options =
                LoadOptions { depth: 32, blocks: 0..4096, verify: false, ..LoadOptions::default() };
            let queue = vm.queue.take().context("a VM has one queue")?;
            self.load = Some(Load::start(vec![queue], options)?);
        }
        Ok(())
    }

    /// Kills the VMs one after the other, each with I/O in flight.
    fn kill(&mut self) -> Result<()> {
        for mut vm in std::mem::take(&mut self.vms) {
            vm.submit()?;
            vm.front_end.kill();
            self.left.push((vm.queue, vm.ram));
            self.pace();
        }
        Ok(())
    }

    fn delete(&mut self) -> Result<()> {
        for n in 0..VMS {
            let mut params = json!({"ctrlr": controller(n)});
            if self.server.spec.kind == Kind::Ours {
                params["force"] = true.into();
            } else {
                // SPDK waits for ever until the VM disconnects, so the VM is killed first.
                let vm = self.vms.remove(0);
                vm.front_end.kill();
                self.left.push((vm.queue, vm.ram));
            }
            self.server.call(DELETE, params)?;
            self.pace();
        }
        Ok(())
    }

    fn change_table(&mut self) -> Result<()> {
        let Event::Table(gib) = self.event else { return Ok(()) };
        let mut more = self.more.as_ref().context("allocated for this event")?.table();
        more.truncate(if gib == 1 { 1 } else { 2 });
        for vm in &mut self.vms {
            let table = vm.ram.table();
            let longer = [&table[..], &more[..]].concat();
            for table in [&longer, &table] {
                vm.front_end.set_memory_table(table)?;
            }
        }
        Ok(())
    }

    /// Calls RPCs while the memory is unmapped. `settle` receives the answers.
    fn leave_slowly(&mut self) -> Result<()> {
        fs::write(self.armory.join(slow_munmap::ARMED), "")?;
        for vm in self.vms.drain(..) {
            vm.front_end.kill();
            self.left.push((vm.queue, vm.ram));
        }
        wait_until("the slow unmap", || self.armory.join(slow_munmap::SLEEPING).exists())?;
        for (method, params) in
            [("vhost_get_controllers", json!({})), (DELETE, json!({"ctrlr": controller(0)}))]
        {
            let mut rpc = Rpc::connect(&self.server.rpc_socket())?;
            rpc.send(method, params)?;
            self.calls.push((rpc, method));
        }
        Ok(())
    }
}

/// Name of the `n`th controller of the other VMs.
pub(crate) fn controller(n: usize) -> String {
    format!("other.{n}")
}

/// Memory that memory tables gain, for the largest of `events`: a region of 1 GiB, and another for
/// 8 GiB. Populating it takes long if the host has to allocate the pages first.
pub(crate) fn more_memory(events: &[Event]) -> Result<Option<Arc<GuestRam>>> {
    let sizes: &[u64] = match events {
        events if events.contains(&Event::Table(8)) => &[1 << 30, 7 << 30],
        events if events.contains(&Event::Table(1)) => &[1 << 30],
        _ => return Ok(None),
    };
    let ram = GuestRam::with(sizes, FAR, Backing::Pages)?;
    touch(&ram, FAR..FAR + sizes.iter().sum::<u64>())?;
    Ok(Some(ram))
}

/// Populated memory.
fn touched_ram() -> Result<Arc<GuestRam>> {
    let ram = GuestRam::new(&[RAM_BYTES])?;
    touch(&ram, 0..RAM_BYTES)?;
    Ok(ram)
}

fn touch(ram: &GuestRam, range: Range<u64>) -> Result<()> {
    for page in range.step_by(4096) {
        ram.write(page, &[0])?;
    }
    Ok(())
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is() {
        ensure!(start.elapsed() < LIMIT, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
