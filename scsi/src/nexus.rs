//! I_T nexuses, and the unit attentions that are pending for each (SAM-5).

use arrayvec::ArrayVec;

use crate::sense::{Code, Key, Sense};

/// Nexuses that are known at a time. More get BUSY until one is lost.
pub const NEXUSES_MAX: usize = 64;

/// An I_T nexus: each front end of a controller is one initiator port, and each of the controller's
/// targets a target port. The caller chooses the number, one for each pair that reaches the logical
/// unit; registrations stay with it when the nexus is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nexus(pub u64);

/// A unit attention. The first of this list is reported first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Attention {
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
    PowerOn = 1 << 0,
    /// BUS DEVICE RESET FUNCTION OCCURRED
    Reset = 1 << 1,
    /// I_T NEXUS LOSS OCCURRED
    NexusLoss = 1 << 2,
    /// REPORTED LUNS DATA HAS CHANGED
    LunsChanged = 1 << 3,
    /// CAPACITY DATA HAS CHANGED
    CapacityChanged = 1 << 4,
    /// REGISTRATIONS PREEMPTED
    RegistrationsPreempted = 1 << 5,
    /// RESERVATIONS PREEMPTED
    ReservationsPreempted = 1 << 6,
    /// RESERVATIONS RELEASED
    ReservationsReleased = 1 << 7,
    /// MODE PARAMETERS CHANGED
    ModeChanged = 1 << 8,
    /// COMMANDS CLEARED BY ANOTHER INITIATOR
    CommandsCleared = 1 << 9,
}

/// All unit attentions, by priority.
const ALL: [Attention; 10] = [
    Attention::PowerOn,
    Attention::Reset,
    Attention::NexusLoss,
    Attention::LunsChanged,
    Attention::CapacityChanged,
    Attention::RegistrationsPreempted,
    Attention::ReservationsPreempted,
    Attention::ReservationsReleased,
    Attention::ModeChanged,
    Attention::CommandsCleared,
];

impl Attention {
    /// Its sense data.
    #[must_use]
    pub const fn sense(self) -> Sense {
        Sense::new(
            Key::UnitAttention,
            match self {
                Self::PowerOn => Code::POWER_ON,
                Self::Reset => Code::BUS_DEVICE_RESET,
                Self::NexusLoss => Code::NEXUS_LOSS,
                Self::LunsChanged => Code::REPORTED_LUNS_CHANGED,
                Self::CapacityChanged => Code::CAPACITY_CHANGED,
                Self::RegistrationsPreempted => Code::REGISTRATIONS_PREEMPTED,
                Self::ReservationsPreempted => Code::RESERVATIONS_PREEMPTED,
                Self::ReservationsReleased => Code::RESERVATIONS_RELEASED,
                Self::ModeChanged => Code::MODE_PARAMETERS_CHANGED,
                Self::CommandsCleared => Code::COMMANDS_CLEARED,
            },
        )
    }
}

/// The known nexuses. The queue of unit attentions of one is a set: SAM-5 allows to
/// report a condition once, however often it was established.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nexuses(ArrayVec<(Nexus, u16), NEXUSES_MAX>);

impl Nexuses {
    /// Adds a nexus, unless it is known, with `first` pending. Fails if there is no place.
    pub(crate) fn attach(&mut self, nexus: Nexus, first: Option<Attention>) -> Result<(), ()> {
        if self.knows(nexus) {
            return Ok(());
        }
        let pending = first.map_or(0, |attention| attention as u16);
        self.0.try_push((nexus, pending)).map_err(|_| ())
    }

    pub(crate) fn detach(&mut self, nexus: Nexus) {
        self.0.retain(|(known, _)| *known != nexus);
    }

    pub(crate) fn knows(&self, nexus: Nexus) -> bool {
        self.0.iter().any(|(known, _)| *known == nexus)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Establishes a unit attention for one nexus.
    pub(crate) fn tell(&mut self, nexus: Nexus, attention: Attention) {
        self.tell_if(attention, |known| known == nexus);
    }

    /// Establishes a unit attention for the nexuses that a condition selects.
    pub(crate) fn tell_if(&mut self, attention: Attention, selected: impl Fn(Nexus) -> bool) {
        for (nexus, pending) in &mut self.0 {
            if selected(*nexus) {
                *pending |= attention as u16;
            }
        }
    }

    /// Forgets one unit attention of a nexus.
    pub(crate) fn withdraw(&mut self, nexus: Nexus, attention: Attention) {
        for (_, pending) in self.0.iter_mut().filter(|(known, _)| *known == nexus) {
            *pending &= !(attention as u16);
        }
    }

    /// Whether a nexus has one pending. A nexus that is not known will: POWER ON.
    pub(crate) fn is_pending(&self, nexus: Nexus) -> bool {
        self.0.iter().find(|(known, _)| *known == nexus).is_none_or(|(_, pending)| *pending != 0)
    }

    /// Removes and returns the most important one of a nexus.
    pub(crate) fn take(&mut self, nexus: Nexus) -> Option<Attention> {
        let (_, pending) = self.0.iter_mut().find(|(known, _)| *known == nexus)?;
        let first = ALL.into_iter().find(|attention| *pending & *attention as u16 != 0)?;
        *pending &= !(first as u16);
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attentions_come_in_the_order_of_their_priority() {
        let (one, two) = (Nexus(1), Nexus(2));
        let mut nexuses = Nexuses::default();
        nexuses.attach(one, Some(Attention::PowerOn)).unwrap();
        nexuses.attach(two, None).unwrap();
        for attention in ALL.iter().rev() {
            nexuses.tell(one, *attention);
            nexuses.tell(one, *attention);
        }
        for attention in ALL {
            assert_eq!(nexuses.take(one), Some(attention));
        }
        assert_eq!(nexuses.take(one), None);
        assert!(!nexuses.is_pending(one) && !nexuses.is_pending(two));
        assert!(nexuses.is_pending(Nexus(3)));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut nexuses = Nexuses::default();
        for number in 0..NEXUSES_MAX as u64 {
            nexuses.attach(Nexus(number), None).unwrap();
        }
        assert!(nexuses.attach(Nexus(1000), None).is_err());
        assert!(nexuses.attach(Nexus(5), None).is_ok());
        nexuses.detach(Nexus(5));
        assert!(nexuses.attach(Nexus(1000), None).is_ok());
    }
}
