//! Buffers of raid5f that a removed member keeps: they are replaced, so that the channel goes on
//! without them if the member hangs.
//!
//! Only the maintenance thread does so, as the buffers are allocated.

use super::parity::OwnBuffer;
use super::{Kind, Lane};
use crate::array::bit;

/// New buffers for those that a member keeps.
pub(crate) struct Replacements(Vec<OwnBuffer>);

impl Replacements {
    /// Allocates buffers of these lengths.
    pub(crate) fn new(lens: Vec<usize>) -> Self {
        Self(lens.into_iter().map(OwnBuffer::new).collect())
    }

    /// Takes a buffer of this length.
    fn take(&mut self, len: usize) -> Option<OwnBuffer> {
        let at = self.0.iter().position(|buffer| buffer.len() == len)?;
        Some(self.0.swap_remove(at))
    }
}

impl Lane {
    /// The lengths of the channel's own buffers that are in use by a member that is leaving.
    pub(crate) fn kept_buffers(&mut self, slot: usize) -> Vec<usize> {
        let indexes = self.at_leaving(slot);
        indexes.into_iter().filter_map(|index| Some(self.buffer(index)?.len())).collect()
    }

    /// Replaces these buffers. The I/O that they belong to goes on as if the member had failed it.
    pub(crate) fn replace_buffers(&mut self, slot: usize, mut new: Replacements) {
        for index in self.at_leaving(slot) {
            let Some(buffer) = self.buffer(index) else { continue };
            let Some(new) = new.take(buffer.len()) else { continue };
            let old = std::mem::replace(buffer, new);
            self.members[slot].kept.push(old);
            self.detach(index, slot);
        }
    }

    fn at_leaving(&self, slot: usize) -> Vec<u16> {
        if self.parity.is_none() || self.members.get(slot).is_none_or(|member| !member.leaving) {
            return vec![];
        }
        let children = (0..).zip(&self.children);
        let at_it = children.filter(|(_, child)| child.used && child.member == slot);
        at_it.map(|(index, _)| index).collect()
    }

    /// The channel's own buffer of a child.
    fn buffer(&mut self, index: u16) -> Option<&mut OwnBuffer> {
        let child = self.children[usize::from(index)];
        let parity = self.parity.as_mut()?;
        match child.kind {
            Kind::Parity(strip) => parity.strip(strip),
            Kind::Source(piece) => parity.source(piece, &child.io),
            Kind::Data | Kind::Detached => None,
        }
    }

    /// Ends a child for its I/O. The member still has it.
    fn detach(&mut self, index: u16, slot: usize) {
        let child = &mut self.children[usize::from(index)];
        let (tag, kind) = (child.tag, std::mem::replace(&mut child.kind, Kind::Detached));
        if let Some(active) = self.of(tag) {
            active.failed |= bit(slot);
        }
        match kind {
            Kind::Parity(strip) => {
                self.free_strip(strip);
                self.leave(tag);
            }
            Kind::Source(piece) => self.end_source(piece, false),
            Kind::Data | Kind::Detached => {}
        }
    }
}
