//! Executes commands that have passed the checks.

use super::{LIST_LENGTH, LogicalUnit, NOT_STARTED, PARAMETERS_MAX, Step, Stop, put_sense};
use crate::cdb::Command;
use crate::copy;
use crate::facts::Port;
use crate::inquiry;
use crate::medium;
use crate::mode::{self, Modes};
use crate::nexus::{Attention, Nexus};
use crate::plan::Plan;
use crate::reply::{Buffers, Reply};
use crate::report::{self, LbaQuery};
use crate::reservation::{self, Request};
use crate::sense::{Code, Sense};

impl LogicalUnit {
    pub(super) fn execute(
        &mut self,
        nexus: Nexus,
        port: Port,
        command: &Command,
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Result<Step, Stop> {
        if let Some(plan) = medium::plan(command, &self.facts, self.gate(nexus), buffers)? {
            return Ok(self.plan(plan, reply));
        }
        match *command {
            Command::Reserve | Command::Release => {
                let release = *command == Command::Release;
                self.reservations.reserve(nexus, release)?;
                self.changed();
            }
            Command::StartStopUnit { start, no_flush } => {
                self.stopped = !start;
                self.changed();
                if !start && !no_flush {
                    return Ok(self.plan(Self::flush(buffers), reply));
                }
            }
            Command::GetLbaStatus { lba, allocation } => {
                return Ok(Step::LbaStatus(LbaQuery::new(&self.facts, lba, allocation, buffers)?));
            }
            Command::Unmap { list } | Command::ExtendedCopy { list } => {
                return self.list(nexus, port, command, list, buffers, reply);
            }
            Command::ModeSelect { format, save, list, .. } => {
                // Parameters without a page format, and saved ones, are not supported.
                if !format && list > 0 {
                    return Err(Sense::in_cdb(1, Some(4)).into());
                }
                if save {
                    return Err(Sense::in_cdb(1, Some(0)).into());
                }
                return self.list(nexus, port, command, list, buffers, reply);
            }
            Command::PersistentReserveOut { list, .. } => {
                if list as usize != reservation::LIST_BYTES {
                    return Err(LIST_LENGTH.into());
                }
                return self.list(nexus, port, command, list, buffers, reply);
            }
            Command::TestUnitReady
            | Command::SendDiagnostic
            | Command::PreventAllowMediumRemoval => {}
            _ => {
                let allocation = self.report(nexus, port, command, reply)?;
                reply.finish(allocation, buffers);
            }
        }
        Ok(Step::Done)
    }

    /// A command with a parameter list: asks for it, or executes the command if it is empty.
    fn list(
        &mut self,
        nexus: Nexus,
        port: Port,
        command: &Command,
        bytes: u32,
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Result<Step, Stop> {
        match bytes {
            0 => self.execute_list(nexus, port, command, &[], buffers, reply),
            // What is longer than any list is refused.
            _ if bytes as usize > PARAMETERS_MAX || u64::from(bytes) > buffers.data_out => {
                Err(LIST_LENGTH.into())
            }
            _ => Ok(Step::Parameters { bytes }),
        }
    }

    pub(super) fn execute_list(
        &mut self,
        nexus: Nexus,
        port: Port,
        command: &Command,
        list: &[u8],
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Result<Step, Stop> {
        match *command {
            Command::Unmap { list: 0 } | Command::ExtendedCopy { list: 0 } => {}
            Command::Unmap { list: bytes } => {
                let list = list.get(..bytes as usize).ok_or(LIST_LENGTH)?;
                let gate = self.gate(nexus);
                medium::unmap_ranges(list, &self.facts, gate, &mut reply.ranges)?;
                let plan = medium::unmap(&self.facts, gate, u64::from(bytes), buffers.data_out);
                return Ok(self.plan(plan, reply));
            }
            Command::ModeSelect { long, list: bytes, .. } => {
                let list = list.get(..bytes as usize).ok_or(LIST_LENGTH)?;
                let selected = mode::select(&self.modes, &self.facts, long, list)?;
                let flush = self.select(nexus, selected);
                reply.took(u64::from(bytes), buffers);
                if flush {
                    let (transfer, buffer) = (u64::from(bytes), buffers.data_out);
                    let plan = Plan { transfer, buffer, ..Self::flush(buffers) };
                    return Ok(self.plan(plan, reply));
                }
            }
            Command::PersistentReserveOut { action, scope, kind, .. } => {
                let list = list.first_chunk().ok_or(LIST_LENGTH)?;
                let request = persistent_request(port, action, scope, kind, list);
                let (nexuses, preempted) = (&mut self.nexuses, &mut reply.aborted);
                let done = self.reservations.out(nexus, &request, nexuses, preempted);
                self.changed();
                done?;
                reply.took(list.len() as u64, buffers);
            }
            Command::ExtendedCopy { list: bytes } => {
                let list = list.get(..bytes as usize).ok_or(LIST_LENGTH)?;
                return Ok(self.copy(nexus, list, buffers, reply)?);
            }
            // Only these four have a list.
            _ => return Err(LIST_LENGTH.into()),
        }
        Ok(Step::Done)
    }

    /// EXTENDED COPY. One that has nothing to do is done.
    fn copy(
        &mut self,
        nexus: Nexus,
        list: &[u8],
        buffers: Buffers,
        reply: &mut Reply,
    ) -> Result<Step, Sense> {
        let plan = copy::plan(list, &self.facts, self.gate(nexus), buffers.data_out)?;
        let step = self.plan(plan, reply);
        match step {
            Step::Io(_) => self.copies.begin(nexus, &plan),
            _ => self.copies.end(nexus, &plan, &self.facts, true),
        }
        Ok(step)
    }

    /// Changes the modes. Returns whether the write cache was turned off, so that written data must
    /// be made durable (SBC-3, WCE).
    fn select(&mut self, nexus: Nexus, selected: Modes) -> bool {
        if selected == self.modes {
            return false;
        }
        let flush = self.modes.write_cache && !selected.write_cache;
        self.modes = selected;
        self.nexuses.tell_if(Attention::ModeChanged, |other| other != nexus);
        self.changed();
        flush
    }

    /// Commands that only return data. Returns the allocation length.
    fn report(
        &mut self,
        nexus: Nexus,
        port: Port,
        command: &Command,
        reply: &mut Reply,
    ) -> Result<u32, Sense> {
        match *command {
            Command::RequestSense { descriptor, allocation } => {
                self.request_sense(nexus, descriptor, reply);
                Ok(allocation)
            }
            Command::Inquiry { vital: false, .. } => {
                self.copies.forget_ended(nexus);
                self.report_state(port, command, reply)
            }
            Command::ReportLuns { select, allocation } => {
                report::luns(select, allocation, reply)?;
                // SPC-4, REPORT LUNS.
                self.nexuses.withdraw(nexus, Attention::LunsChanged);
                self.changed();
                Ok(allocation)
            }
            Command::ReceiveCopyResults { action: copy::action::COPY_STATUS, list, allocation } => {
                self.copies.status(nexus, list, reply)?;
                Ok(allocation)
            }
            _ => self.report_state(port, command, reply),
        }
    }

    /// Those of them that leave everything as it is.
    fn report_state(&self, port: Port, command: &Command, reply: &mut Reply) -> Result<u32, Sense> {
        let facts = &self.facts;
        Ok(match *command {
            Command::Inquiry { vital, page, allocation } => {
                inquiry::inquiry(facts, port, vital, page, reply)?;
                allocation
            }
            Command::ModeSense(query) => {
                mode::sense(&self.modes, facts, &query, reply)?;
                query.allocation
            }
            Command::ReadCapacity10 => {
                report::capacity10(facts, reply);
                8
            }
            Command::ReadCapacity16 { allocation } => {
                report::capacity16(facts, reply);
                allocation
            }
            Command::ReadDefectData { long, lists, allocation } => {
                report::defects(long, lists, reply);
                allocation
            }
            Command::ReceiveDiagnosticResults { valid, page, allocation } => {
                report::diagnostic(valid, page, reply)?;
                allocation
            }
            Command::LogSense { page, subpage, allocation } => {
                report::log(page, subpage, reply)?;
                allocation
            }
            Command::ReceiveCopyResults {
                action: copy::action::OPERATING_PARAMETERS,
                allocation,
                ..
            } => {
                copy::parameters(facts, reply);
                allocation
            }
            Command::PersistentReserveIn { action, allocation } => {
                report::persistent(&self.reservations, action, reply)?;
                allocation
            }
            Command::ReportSupportedOperationCodes(query) => {
                report::opcodes(facts, &query, reply)?;
                query.allocation
            }
            Command::ReportSupportedTaskManagementFunctions { extended, allocation } => {
                report::task_management(extended, allocation, reply)?;
                allocation
            }
            _ => return Err(Sense::illegal(Code::INVALID_OPERATION_CODE)),
        })
    }

    /// REQUEST SENSE (SPC-4): a pending unit attention is reported, and gone.
    fn request_sense(&mut self, nexus: Nexus, descriptor: bool, reply: &mut Reply) {
        let sense = match self.nexuses.take(nexus) {
            Some(attention) => attention.sense(),
            None if self.stopped => NOT_STARTED,
            None => Sense::NONE,
        };
        self.changed();
        put_sense(sense, descriptor, reply);
    }
}

/// The parameter list of PERSISTENT RESERVE OUT (SPC-4).
fn persistent_request(
    port: Port,
    action: u8,
    scope: u8,
    kind: u8,
    list: &[u8; reservation::LIST_BYTES],
) -> Request {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, _, _, _, _, flags, ..] = *list;
    let key = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    let new_key = u64::from_be_bytes([i, j, k, l, m, n, o, p]);
    Request { action, port: port.relative, scope, kind, key, new_key, flags }
}
