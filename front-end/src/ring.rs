//! The place of one virtqueue in guest memory, its eventfds, and raw access to a split ring's
//! fields.

use std::sync::{Arc, Mutex, PoisonError};

use crate::descriptor::{Descriptor, Used};
use crate::error::{Error, Result};
use crate::event::{EventFd, event_fd};
use crate::guest::{GuestRam, Window};
use crate::packed::PackedFields;
use crate::split::SplitFields;

/// The layout of a ring in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingLayout {
    /// Descriptors, an available ring and a used ring (virtio 1.2, 2.7).
    #[default]
    Split,
    /// One ring of descriptors, which both sides write (virtio 1.2, 2.8).
    Packed,
}

/// A virtqueue's rings and eventfds. [`crate::Queue`] drives it, the front end announces it to the
/// back end, and a test may write any value anywhere in it.
#[derive(Debug)]
pub struct Ring {
    index: usize,
    size: u16,
    descriptors: Window,
    available: Window,
    used: Window,
    kick: EventFd,
    call: Mutex<Arc<EventFd>>,
}

impl Ring {
    /// Allocates memory for queue `index` with `size` descriptors, all zero.
    ///
    /// # Errors
    /// The size is not a power of two, no memory is left, or the eventfd cannot be created.
    pub fn new(ram: &Arc<GuestRam>, index: usize, size: u16) -> Result<Self> {
        if !size.is_power_of_two() {
            return Err(Error::Size(size));
        }
        let n = u32::from(size);
        Ok(Self {
            index,
            size,
            descriptors: ram.window(16 * n, 16)?,
            // Separate cache lines, as each side writes one of the rings.
            available: ram.window(6 + 2 * n, 64)?,
            used: ram.window(6 + 8 * n, 64)?,
            kick: event_fd()?,
            call: Mutex::new(Arc::new(event_fd()?)),
        })
    }

    /// Returns its queue index.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns its number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses in this process of the descriptors, the available ring and the used
    /// ring.
    #[must_use]
    pub fn user_addrs(&self) -> [u64; 3] {
        [&self.descriptors, &self.available, &self.used].map(Window::user_addr)
    }

    /// Returns the guest-physical addresses of the descriptors, the available ring and the used
    /// ring.
    #[must_use]
    pub fn addrs(&self) -> [u64; 3] {
        [&self.descriptors, &self.available, &self.used].map(Window::gpa)
    }

    /// Returns the windows of the descriptors, the available ring and the used ring.
    pub(crate) fn windows(&self) -> [&Window; 3] {
        [&self.descriptors, &self.available, &self.used]
    }

    /// Returns the guest memory that it lies in.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.descriptors.ram()
    }

    /// Returns the kick eventfd, which the driver writes.
    #[must_use]
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// Kicks the device.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.kick.write(1).map_err(Error::system("cannot kick"))
    }

    /// Returns the call eventfd, which the device writes.
    #[must_use]
    pub fn call_fd(&self) -> Arc<EventFd> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the call fd with a new eventfd, and returns the old one.
    ///
    /// # Errors
    /// The eventfd cannot be created.
    pub(crate) fn renew_call_fd(&self) -> Result<Arc<EventFd>> {
        let new = Arc::new(event_fd()?);
        Ok(std::mem::replace(&mut *self.call.lock().unwrap_or_else(PoisonError::into_inner), new))
    }

    /// Returns its fields as those of a split ring.
    #[inline]
    pub(crate) fn split(&self) -> SplitFields<'_> {
        SplitFields::new(self.windows(), self.size)
    }

    /// Returns its fields as those of a packed ring.
    #[inline]
    pub(crate) fn packed(&self) -> PackedFields<'_> {
        PackedFields::new(self.windows(), self.size)
    }

    /// Reads descriptor `index` of a split ring.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> Descriptor {
        self.split().descriptor(index)
    }

    /// Writes descriptor `index` of a split ring.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.split().set_descriptor(index, descriptor);
    }

    /// Sets the available ring's flags. 1: the driver wants no calls.
    pub fn set_available_flags(&self, flags: u16) {
        self.split().set_available_flags(flags);
    }

    /// Returns the available ring's index, which only the driver writes.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.split().available_index()
    }

    /// Publishes the available ring up to `index`, with all data that was written before.
    pub fn set_available_index(&self, index: u16) {
        self.split().set_available_index(index);
    }

    /// Writes the element of the available ring at position `index` (modulo the size).
    pub fn set_available_element(&self, index: u16, head: u16) {
        self.split().set_available_element(index, head);
    }

    /// With EVENT_IDX: sets the used index after which the driver wants a call.
    pub fn set_used_event(&self, index: u16) {
        self.split().set_used_event(index);
    }

    /// Returns the used ring's flags. 1: the device wants no kicks.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.split().used_flags()
    }

    /// Returns the used ring's index. All data that the device wrote before is visible.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.split().used_index()
    }

    /// Returns the element of the used ring at position `index` (modulo the size).
    #[must_use]
    pub fn used_element(&self, index: u16) -> Used {
        self.split().used_element(index)
    }

    /// With EVENT_IDX: returns the available index after which the device wants a kick.
    #[must_use]
    pub fn available_event(&self) -> u16 {
        self.split().available_event()
    }

    /// Zeroes all three parts, as a guest that boots again does.
    pub(crate) fn clear(&self) {
        self.descriptors.clear();
        self.available.clear();
        self.used.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor::{NEXT, WRITE};

    #[test]
    fn the_layout_follows_the_specification() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let ring = Ring::new(&ram, 0, 8).unwrap();
        let [descriptors, available, used] = ring.addrs();
        let bytes = |gpa: u64, len: usize| {
            let mut to = vec![0; len];
            ram.read(gpa, &mut to).unwrap();
            to
        };
        let descriptor = Descriptor { addr: 0x1122_3344, len: 0x55, flags: NEXT | WRITE, next: 7 };
        ring.set_descriptor(2, descriptor);
        assert_eq!(ring.descriptor(2), descriptor);
        assert_eq!(
            bytes(descriptors + 32, 16),
            [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, 0x55, 0, 0, 0, 3, 0, 7, 0]
        );
        ring.set_available_flags(1);
        ring.set_available_index(9);
        ring.set_available_element(9, 0x0203);
        ring.set_used_event(0x0405);
        let mut expected = vec![1, 0, 9, 0, 0, 0, 3, 2];
        expected.resize(20, 0);
        expected.extend([5, 4]);
        assert_eq!(bytes(available, 22), expected);
        let mut theirs = vec![1, 0, 9, 0];
        theirs.resize(4 + 8, 0);
        theirs.extend([2, 0, 0, 0, 0, 2, 0, 0]);
        theirs.resize(4 + 64, 0);
        theirs.extend([6, 7]);
        ram.write(used, &theirs).unwrap();
        assert_eq!((ring.used_flags(), ring.used_index()), (1, 9));
        assert_eq!(ring.used_element(9), Used { id: 2, len: 512 });
        assert_eq!(ring.available_event(), 0x0706);
    }

    #[test]
    fn a_size_that_is_not_a_power_of_two_is_refused() {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        assert!(matches!(Ring::new(&ram, 0, 100), Err(Error::Size(100))));
        assert!(matches!(Ring::new(&ram, 0, 0), Err(Error::Size(0))));
    }
}
