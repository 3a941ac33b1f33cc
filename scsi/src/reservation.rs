//! Reservations: PERSISTENT RESERVE OUT and IN (SPC-4), and RESERVE and RELEASE (SPC-2)
//! beside them (SPC-4, exceptions to SPC-2 RESERVE and RELEASE behavior).
//!
//! Registrations are kept in memory only: APTPL is refused, and REPORT CAPABILITIES says so. They
//! stay when their nexus is lost (SPC-4, preserving persistent reservations).

use arrayvec::ArrayVec;

use crate::nexus::{Attention, Nexus, Nexuses};
use crate::sense::{Code, Sense};
use crate::table::{Access, Entry, Kind};

/// Registrations at most. Another gets INSUFFICIENT REGISTRATION RESOURCES.
pub const REGISTRATIONS_MAX: usize = 32;

/// Bytes of the parameter list of PERSISTENT RESERVE OUT (SPC-4).
pub(crate) const LIST_BYTES: usize = 24;

/// Service actions of PERSISTENT RESERVE OUT (SPC-4).
pub(crate) mod out {
    pub(crate) const REGISTER: u8 = 0;
    pub(crate) const RESERVE: u8 = 1;
    pub(crate) const RELEASE: u8 = 2;
    pub(crate) const CLEAR: u8 = 3;
    pub(crate) const PREEMPT: u8 = 4;
    pub(crate) const PREEMPT_AND_ABORT: u8 = 5;
    pub(crate) const REGISTER_AND_IGNORE: u8 = 6;
}

/// The type of a persistent reservation (SPC-4, persistent reservation type codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Type {
    /// Only the holder may write.
    WriteExclusive = 1,
    /// Only the holder may read and write.
    ExclusiveAccess = 3,
    /// Only registrants may write.
    WriteExclusiveRegistrantsOnly = 5,
    /// Only registrants may read and write.
    ExclusiveAccessRegistrantsOnly = 6,
    /// Only registrants may write, and all of them are holders.
    WriteExclusiveAllRegistrants = 7,
    /// Only registrants may read and write, and all of them are holders.
    ExclusiveAccessAllRegistrants = 8,
}

impl Type {
    fn from_field(field: u8) -> Option<Self> {
        Some(match field {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    /// The types in the bits of PERSISTENT RESERVATION TYPE MASK (SPC-4, REPORT CAPABILITIES).
    pub(crate) const MASK: [u8; 2] = [0xea, 0x01];

    fn lets_others_read(self) -> bool {
        use Type::{WriteExclusive, WriteExclusiveAllRegistrants, WriteExclusiveRegistrantsOnly};
        matches!(
            self,
            WriteExclusive | WriteExclusiveRegistrantsOnly | WriteExclusiveAllRegistrants
        )
    }

    fn is_for_all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    /// Registrants have access, whoever is the holder.
    fn is_for_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }
}

/// A registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) nexus: Nexus,
    /// RELATIVE TARGET PORT IDENTIFIER of the port through which it was made.
    pub(crate) port: u16,
    pub(crate) key: u64,
}

/// A persistent reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    /// Who made it. With an all registrants type, every registrant holds it.
    pub(crate) nexus: Nexus,
    pub(crate) kind: Type,
}

/// The parameters of PERSISTENT RESERVE OUT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) action: u8,
    /// RELATIVE TARGET PORT IDENTIFIER of the port through which it came.
    pub(crate) port: u16,
    pub(crate) scope: u8,
    pub(crate) kind: u8,
    pub(crate) key: u64,
    pub(crate) new_key: u64,
    /// Byte 20: SPEC_I_PT, ALL_TG_PT and APTPL.
    pub(crate) flags: u8,
}

/// Why a command on reservations fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// RESERVATION CONFLICT.
    Conflict,
    /// CHECK CONDITION.
    Sense(Sense),
}

/// The initiators whose registrations were preempted.
pub(crate) type Preempted = ArrayVec<u64, REGISTRATIONS_MAX>;

/// The reservations of a logical unit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reservations {
    pub(crate) registrations: ArrayVec<Registration, REGISTRATIONS_MAX>,
    pub(crate) reservation: Option<Reservation>,
    /// PRGENERATION.
    pub(crate) generation: u32,
    /// Who has the logical unit reserved by RESERVE.
    reserved: Option<Nexus>,
}

impl Reservations {
    /// Whether a nexus may execute a command.
    pub(crate) fn allow(&self, nexus: Nexus, entry: &Entry, cdb4: u8) -> bool {
        let access = match entry.access {
            Access::Start => {
                if cdb4 & 1 != 0 {
                    Access::Any
                } else {
                    Access::Write
                }
            }
            Access::Allow => {
                if cdb4 & 3 == 0 {
                    Access::Any
                } else {
                    Access::Write
                }
            }
            access => access,
        };
        if self.reserved.is_some() {
            let persistent =
                matches!(entry.kind, Kind::PersistentReserveIn | Kind::PersistentReserveOut);
            return match access {
                Access::Any => true,
                // SPC-2, reservations: of whichever nexus.
                Access::Own => !persistent,
                _ => self.reserved == Some(nexus),
            };
        }
        self.allow_access(nexus, access)
    }

    /// Whether a nexus may read (`Access::Read`) or write (`Access::Write`).
    pub(crate) fn allow_access(&self, nexus: Nexus, access: Access) -> bool {
        if self.reserved.is_some_and(|holder| holder != nexus) {
            return access == Access::Any;
        }
        let Some(Reservation { kind, .. }) = self.reservation else { return true };
        match access {
            Access::Read if kind.lets_others_read() => true,
            Access::Read | Access::Write | Access::Start | Access::Allow => {
                self.is_holder(nexus) || kind.is_for_registrants() && self.key(nexus).is_some()
            }
            Access::Any | Access::Query | Access::Own => true,
        }
    }

    /// The key of a registered nexus.
    fn key(&self, nexus: Nexus) -> Option<u64> {
        self.registrations.iter().find(|known| known.nexus == nexus).map(|known| known.key)
    }

    /// Whether a nexus holds the persistent reservation.
    pub(crate) fn is_holder(&self, nexus: Nexus) -> bool {
        self.reservation.is_some_and(|Reservation { nexus: holder, kind }| {
            if kind.is_for_all_registrants() { self.key(nexus).is_some() } else { holder == nexus }
        })
    }

    /// The key and the type of the reservation, for READ RESERVATION: with an all registrants type
    /// the key is 0 (SPC-4, READ RESERVATION).
    pub(crate) fn held(&self) -> Option<(u64, Type)> {
        let Reservation { nexus, kind } = self.reservation?;
        let key = if kind.is_for_all_registrants() { None } else { self.key(nexus) };
        Some((key.unwrap_or(0), kind))
    }

    /// RESERVE and RELEASE. SPC-4: with a persistent reservation, those who have access to
    /// it by registration or as holder get GOOD, and nothing changes. SPC-2: with any
    /// registration, others get a conflict.
    pub(crate) fn reserve(&mut self, nexus: Nexus, release: bool) -> Result<(), Refused> {
        let by_registration = self.reservation.is_some_and(|held| held.kind.is_for_registrants())
            && self.key(nexus).is_some();
        if self.is_holder(nexus) || by_registration {
            return Ok(());
        }
        if !self.registrations.is_empty() {
            return Err(Refused::Conflict);
        }
        match (self.reserved, release) {
            (Some(holder), false) if holder != nexus => return Err(Refused::Conflict),
            (_, false) => self.reserved = Some(nexus),
            (Some(holder), true) if holder == nexus => self.reserved = None,
            (_, true) => {}
        }
        Ok(())
    }

    /// Ends a reservation by RESERVE: of this nexus, or of any (SPC-2, RESERVE(6)).
    pub(crate) fn end_reserved(&mut self, nexus: Option<Nexus>) {
        if nexus.is_none() || self.reserved == nexus {
            self.reserved = None;
        }
    }

    /// PERSISTENT RESERVE OUT (SPC-4). Fills `preempted`, for PREEMPT
    /// AND ABORT.
    pub(crate) fn out(
        &mut self,
        nexus: Nexus,
        request: &Request,
        nexuses: &mut Nexuses,
        preempted: &mut Preempted,
    ) -> Result<(), Refused> {
        let ignore = request.action == out::REGISTER_AND_IGNORE;
        let register = ignore || request.action == out::REGISTER;
        let key = self.key(nexus);
        let key_is_right = match key {
            Some(key) => ignore || key == request.key,
            None => register && (ignore || request.key == 0),
        };
        if !key_is_right {
            return Err(Refused::Conflict);
        }
        // SPEC_I_PT is not supported, nor are ALL_TG_PT and APTPL, which count for registering
        // only.
        let unsupported = request.flags & if register { 0x0d } else { 0x08 };
        if let Some(bit) = unsupported.checked_ilog2() {
            return Err(Refused::Sense(Sense::in_list(20, u8::try_from(bit).ok())));
        }
        match request.action {
            out::RESERVE => return self.reserve_persistently(nexus, request),
            out::RELEASE => return self.release(nexus, request, nexuses),
            out::CLEAR => self.clear(nexus, nexuses),
            out::PREEMPT => {
                self.preempt(nexus, request, nexuses, preempted)?;
                preempted.clear();
            }
            out::PREEMPT_AND_ABORT => self.preempt(nexus, request, nexuses, preempted)?,
            _ => self.register(nexus, request, nexuses)?,
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }

    /// SPC-4, registering. A new key of 0 removes the registration.
    fn register(
        &mut self,
        nexus: Nexus,
        request: &Request,
        nexuses: &mut Nexuses,
    ) -> Result<(), Refused> {
        let Request { new_key: key, port, .. } = *request;
        if key == 0 {
            self.unregister(nexus, nexuses);
            return Ok(());
        }
        if let Some(known) = self.registrations.iter_mut().find(|known| known.nexus == nexus) {
            known.key = key;
            return Ok(());
        }
        self.registrations
            .try_push(Registration { nexus, port, key })
            .map_err(|_| Refused::Sense(Sense::illegal(Code::INSUFFICIENT_REGISTRATION_RESOURCES)))
    }

    /// SPC-4, unregistering: the reservation ends with the registration of its holder, or, if all
    /// registrants hold it, of the last one.
    pub(crate) fn unregister(&mut self, nexus: Nexus, nexuses: &mut Nexuses) {
        let held = self.is_holder(nexus);
        self.registrations.retain(|known| known.nexus != nexus);
        let Some(Reservation { kind, .. }) = self.reservation.filter(|_| held) else { return };
        if kind.is_for_all_registrants() && !self.registrations.is_empty() {
            return;
        }
        self.reservation = None;
        if kind.is_for_registrants() {
            self.tell_registrants(nexuses, nexus, Attention::ReservationsReleased);
        }
    }

    fn tell_registrants(&self, nexuses: &mut Nexuses, except: Nexus, attention: Attention) {
        nexuses.tell_if(attention, |nexus| nexus != except && self.key(nexus).is_some());
    }

    /// Scope and type: only that of the whole logical unit is defined (SPC-4).
    fn kind_of(request: &Request) -> Result<Type, Refused> {
        if request.scope != 0 {
            return Err(Refused::Sense(Sense::in_cdb(2, Some(7))));
        }
        Type::from_field(request.kind).ok_or(Refused::Sense(Sense::in_cdb(2, Some(3))))
    }

    /// SPC-4, reserving.
    fn reserve_persistently(&mut self, nexus: Nexus, request: &Request) -> Result<(), Refused> {
        let kind = Self::kind_of(request)?;
        match self.reservation {
            None => self.reservation = Some(Reservation { nexus, kind }),
            Some(held) if self.is_holder(nexus) && held.kind == kind => {}
            Some(_) => return Err(Refused::Conflict),
        }
        Ok(())
    }

    /// SPC-4, releasing.
    fn release(
        &mut self,
        nexus: Nexus,
        request: &Request,
        nexuses: &mut Nexuses,
    ) -> Result<(), Refused> {
        let Some(Reservation { kind, .. }) = self.reservation.filter(|_| self.is_holder(nexus))
        else {
            return Ok(());
        };
        if request.scope != 0 || request.kind != kind as u8 {
            return Err(Refused::Sense(Sense::illegal(Code::INVALID_RELEASE)));
        }
        self.reservation = None;
        if kind.is_for_registrants() {
            self.tell_registrants(nexuses, nexus, Attention::ReservationsReleased);
        }
        Ok(())
    }

    /// SPC-4, clearing.
    fn clear(&mut self, nexus: Nexus, nexuses: &mut Nexuses) {
        self.tell_registrants(nexuses, nexus, Attention::ReservationsPreempted);
        self.registrations.clear();
        self.reservation = None;
    }

    /// SPC-4, preempting: the reservation is taken over if its holder
    /// has the key, or if all registrants hold it and the key is 0. Otherwise, registrations with
    /// the key are removed.
    fn preempt(
        &mut self,
        nexus: Nexus,
        request: &Request,
        nexuses: &mut Nexuses,
        preempted: &mut Preempted,
    ) -> Result<(), Refused> {
        let key = request.new_key;
        let takes_over = self.reservation.is_some_and(|held| {
            if held.kind.is_for_all_registrants() {
                key == 0
            } else {
                self.key(held.nexus) == Some(key)
            }
        });
        if takes_over {
            let kind = Self::kind_of(request)?;
            self.remove(nexuses, preempted, nexus, |known| {
                known.nexus != nexus && (key == 0 || known.key == key)
            });
            if self.reservation.is_some_and(|held| held.kind != kind) {
                self.tell_registrants(nexuses, nexus, Attention::ReservationsReleased);
            }
            self.reservation = Some(Reservation { nexus, kind });
            return Ok(());
        }
        if key == 0 {
            return Err(Refused::Sense(Sense::in_list(8, None)));
        }
        if !self.registrations.iter().any(|known| known.key == key) {
            return Err(Refused::Conflict);
        }
        self.remove(nexuses, preempted, nexus, |known| known.key == key);
        if self.registrations.is_empty() {
            self.reservation = None;
        }
        Ok(())
    }

    /// Removes registrations, and tells those who had them, except the one that does it.
    fn remove(
        &mut self,
        nexuses: &mut Nexuses,
        preempted: &mut Preempted,
        by: Nexus,
        selected: impl Fn(&Registration) -> bool,
    ) {
        self.registrations.retain(|known| {
            let remove = selected(known);
            if remove && known.nexus != by {
                nexuses.tell(known.nexus, Attention::RegistrationsPreempted);
                // It has a place for each registration.
                let _ = preempted.try_push(known.nexus.0);
            }
            !remove
        });
    }
}
