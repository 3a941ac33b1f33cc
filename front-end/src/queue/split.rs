//! A queue of any requests on a split ring (virtio 1.2, 2.7.13 and 5.2.6).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Calls, wait};
use crate::descriptor::{Buffer, Descriptor, INDIRECT, NEXT, Used};
use crate::error::{Error, Result};
use crate::guest::{GuestRam, Segment, Window};
use crate::request::{Completion, Heads, QueueOptions, Request, Tag};
use crate::ring::Ring;
use crate::split::{SplitDriver, put};
use crate::words::words;

/// Drives one [`Ring`]: keeps its free descriptors, its indices and the requests in flight.
#[derive(Debug)]
pub struct Queue {
    ring: Arc<Ring>,
    options: QueueOptions,
    driver: SplitDriver,
    heads: Heads,
    tables: Vec<Window>,
    /// Free descriptors. The last one is taken first.
    free: Vec<u16>,
    /// For each descriptor that heads a chain in flight, the whole chain.
    chains: Vec<Vec<u16>>,
    /// The index up to which the device was kicked, or wanted no kick.
    kicked: u16,
    in_flight: usize,
}

impl Queue {
    /// Makes a queue on a ring of its own. `event_idx`: VIRTIO_RING_F_EVENT_IDX is negotiated.
    /// [`crate::FrontEnd::start_new`] makes queues that match the negotiation.
    ///
    /// # Errors
    /// No memory is left, the eventfd cannot be created, or the size is invalid.
    pub fn new(
        ram: &Arc<GuestRam>,
        index: usize,
        options: QueueOptions,
        event_idx: bool,
    ) -> Result<Self> {
        let ring = Arc::new(Ring::new(ram, index, options.size)?);
        let heads = Heads::new(ram, options.size)?;
        let table_bytes = options.table_bytes()?;
        let table = |_| ram.window(table_bytes, 16);
        let tables = if options.indirect { options.size } else { 0 };
        let mut queue = Self {
            ring,
            options,
            driver: SplitDriver::new(event_idx),
            heads,
            tables: (0..tables).map(table).collect::<Result<_>>()?,
            free: Vec::new(),
            chains: vec![Vec::new(); usize::from(options.size)],
            kicked: 0,
            in_flight: 0,
        };
        queue.boot();
        Ok(queue)
    }

    /// Returns the ring, for a front end to start, and for raw access.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Returns the number of requests that the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits `request` to the device, without a kick: see [`Queue::kick`].
    ///
    /// # Errors
    /// [`Error::Full`] if too few descriptors are free; [`Error::Segments`] if the request never
    /// fits.
    pub fn submit(&mut self, request: &Request) -> Result<Tag> {
        let head = self.fill(request)?;
        self.make_available(head);
        Ok(Tag(head))
    }

    /// Submits a chain of any buffers to the device, without a kick. The status of its completion
    /// has no meaning.
    ///
    /// # Errors
    /// As [`Queue::submit`]. Two buffers do not count as segments of data.
    pub fn submit_chain(&mut self, chain: &[Buffer]) -> Result<Tag> {
        let head = self.take_chain(chain.len())?;
        self.put_chain(head, chain.len(), chain.iter().map(|buffer| buffer.flagged()));
        self.make_available(head);
        Ok(Tag(head))
    }

    /// Kicks the device if it wants a kick for the requests submitted since the last call. Returns
    /// whether it did.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn kick(&mut self) -> Result<bool> {
        // If the driver's index comes first, a device that then asks for kicks sees the requests;
        // if the device's request comes first, this sees it. Without the fence, both may miss the
        // other.
        fence(Ordering::SeqCst);
        let unkicked = self.driver.next.wrapping_sub(self.kicked);
        let wanted = self.driver.wants_kick(&self.ring.split(), unkicked);
        self.kicked = self.driver.next;
        if wanted {
            self.kick_anyway()?;
        }
        Ok(wanted)
    }

    /// Kicks the device, whether or not it wants a kick.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn kick_anyway(&self) -> Result<()> {
        self.ring.kick()
    }

    /// Takes the next request that the device has used, in the device's order.
    ///
    /// # Errors
    /// [`Error::NotHeld`] for a request that the device does not hold: returned twice, or never
    /// submitted.
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        let Some(used) = self.poll_raw() else { return Ok(None) };
        let not_held = Error::NotHeld { id: used.id };
        let Ok(head) = u16::try_from(used.id) else { return Err(not_held) };
        let Some(chain) = self.chains.get_mut(usize::from(head)) else { return Err(not_held) };
        if chain.is_empty() {
            return Err(not_held);
        }
        self.free.extend(chain.drain(..).rev());
        self.in_flight -= 1;
        let status = self.heads.status(head);
        Ok(Some(Completion { tag: Tag(head), status, used_len: used.len }))
    }

    /// Takes the next element of the used ring unchecked, and frees no descriptors.
    pub fn poll_raw(&mut self) -> Option<Used> {
        let ring = self.ring.split();
        let (first, count) = self.driver.take(&ring, 1);
        (count == 1).then(|| ring.used_element(first))
    }

    /// Waits on the call eventfd for the next completion.
    ///
    /// # Errors
    /// [`Error::Stalled`] after [`LIMIT`], and as [`Queue::poll`].
    ///
    /// [`LIMIT`]: crate::LIMIT
    pub fn wait(&mut self) -> Result<Completion> {
        wait(self)
    }

    /// Submits `request`, kicks, and waits for the next completion. It is the request's own if no
    /// other request is in flight.
    ///
    /// # Errors
    /// As [`Queue::submit`], [`Queue::kick`] and [`Queue::wait`].
    pub fn run(&mut self, request: &Request) -> Result<Completion> {
        self.submit(request)?;
        self.kick()?;
        self.wait()
    }

    /// Lays `request` out in descriptors, as [`Queue::submit`] does, but does not make it
    /// available, so that a test may corrupt it first. Returns the head.
    ///
    /// # Errors
    /// As [`Queue::submit`].
    pub fn fill(&mut self, request: &Request) -> Result<u16> {
        let parts = request.data.len() + 2;
        let head = self.take_chain(parts)?;
        let buffers = self.heads.lay(head, request);
        self.put_chain(head, parts, buffers);
        Ok(head)
    }

    /// Takes descriptors for a chain of `parts` buffers. Returns the head.
    fn take_chain(&mut self, parts: usize) -> Result<u16> {
        let (segments, most) = (parts.saturating_sub(2), self.options.segments_max);
        let fits = self.options.indirect || parts <= usize::from(self.options.size);
        if parts == 0 || segments > most || !fits {
            return Err(Error::Segments { have: segments, most });
        }
        let needed = if self.options.indirect { 1 } else { parts };
        let Some(rest) = self.free.len().checked_sub(needed) else { return Err(Error::Full) };
        let Some(&head) = self.free.last() else { return Err(Error::Full) };
        let chain = &mut self.chains[usize::from(head)];
        chain.extend(self.free.drain(rest..).rev());
        self.in_flight += 1;
        Ok(head)
    }

    /// Writes the descriptors of a chain of `parts` buffers, each with its flags.
    fn put_chain(&self, head: u16, parts: usize, buffers: impl Iterator<Item = (Segment, u16)>) {
        let next_flag = |i: usize| if i + 1 < parts { NEXT } else { 0 };
        let part = |i: usize, segment: Segment, flags: u16, next: u16| {
            let Segment { gpa: addr, len } = segment;
            Descriptor { addr, len, flags: flags | next_flag(i), next }
        };
        if let Some(table) = self.tables.get(usize::from(head)) {
            for (next, (i, (segment, flags))) in (1..).zip(buffers.enumerate()) {
                put(words(table), i, part(i, segment, flags, next).split());
            }
            let len = u32::try_from(16 * parts).expect("at most the size of a table");
            let addr = table.gpa();
            self.ring.set_descriptor(head, Descriptor { addr, len, flags: INDIRECT, next: 0 });
        } else {
            let chain = &self.chains[usize::from(head)];
            for (i, (segment, flags)) in buffers.enumerate() {
                let next = chain.get(i + 1).copied().unwrap_or(0);
                self.ring.set_descriptor(chain[i], part(i, segment, flags, next));
            }
        }
    }

    /// Makes the chain that begins at `head` available, valid or not.
    pub fn make_available(&mut self, head: u16) {
        self.driver.publish(&self.ring.split(), std::iter::once(head));
    }

    /// Takes `n` free descriptors, which a test writes through [`Queue::ring`] and requests do not
    /// use.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn take_descriptors(&mut self, n: usize) -> Result<Vec<u16>> {
        let rest = self.free.len().checked_sub(n).ok_or(Error::Full)?;
        Ok(self.free.split_off(rest))
    }

    /// Returns the addresses of the header and the status byte of the request at `head`.
    #[must_use]
    pub fn head_addrs(&self, head: u16) -> (u64, u64) {
        self.heads.addrs(head)
    }

    /// Returns the address of the indirect table of the request at `head`, if the queue uses
    /// tables.
    #[must_use]
    pub fn table_addr(&self, head: u16) -> Option<u64> {
        self.tables.get(usize::from(head)).map(Window::gpa)
    }

    /// Resets the queue, as a guest that boots again does: zero rings, no request in flight. Only
    /// while no back end uses the ring.
    pub fn reset(&mut self) {
        self.ring.clear();
        self.boot();
    }

    fn boot(&mut self) {
        self.free = (0..self.options.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        (self.driver.next, self.driver.taken, self.kicked, self.in_flight) = (0, 0, 0, 0);
        self.refuse_calls();
    }

    /// Returns how far it has taken used requests.
    pub(crate) fn base(&self) -> u16 {
        self.driver.taken
    }
}

impl Calls for Queue {
    fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn poll(&mut self) -> Result<Option<Completion>> {
        self.poll()
    }

    fn ask_for_call(&self) {
        self.driver.ask_for_call(&self.ring.split());
        // If the driver's request for a call comes first, the device sees it and calls; if the
        // device's index comes first, the caller's next check sees the completion.
        fence(Ordering::SeqCst);
    }

    fn refuse_calls(&self) {
        self.driver.refuse_calls(&self.ring.split());
    }

    fn has_completion(&self) -> bool {
        self.driver.has_completion(&self.ring.split())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::STATUS_UNWRITTEN;

    /// Makes a queue. The test is the device.
    fn queue(event_idx: bool) -> Queue {
        let ram = GuestRam::new(&[1 << 20]).unwrap();
        let options = QueueOptions { size: 8, ..QueueOptions::default() };
        Queue::new(&ram, 0, options, event_idx).unwrap()
    }

    /// Returns `id` to the driver in the element before used index `index`, as a device does.
    fn give_back(queue: &Queue, index: u16, id: u16) {
        let ring = queue.ring();
        let used = ring.addrs()[2];
        let element = [u32::from(id).to_le_bytes(), 1_u32.to_le_bytes()].concat();
        ring.ram().write(used + 4 + u64::from((index - 1) % 8) * 8, &element).unwrap();
        ring.ram().write(used + 2, &index.to_le_bytes()).unwrap();
    }

    #[test]
    fn a_buffer_returned_twice_or_out_of_range_is_an_error_once() {
        let mut queue = queue(false);
        let tag = queue.submit(&Request::flush()).unwrap();
        give_back(&queue, 1, tag.0);
        let done = queue.poll().unwrap().unwrap();
        assert_eq!((done.tag, done.status), (tag, STATUS_UNWRITTEN));
        give_back(&queue, 2, tag.0);
        assert!(matches!(queue.poll(), Err(Error::NotHeld { .. })));
        give_back(&queue, 3, 8);
        assert!(matches!(queue.poll(), Err(Error::NotHeld { id: 8 })));
        assert!(queue.poll().unwrap().is_none());
        assert_eq!(queue.in_flight(), 0);
    }

    #[test]
    fn kicks_follow_the_flag_of_the_device() {
        let mut queue = queue(false);
        queue.submit(&Request::flush()).unwrap();
        assert!(queue.kick().unwrap());
        assert!(!queue.kick().unwrap(), "no new request");
        queue.ring().ram().write(queue.ring().addrs()[2], &[1, 0]).unwrap();
        queue.submit(&Request::flush()).unwrap();
        assert!(!queue.kick().unwrap(), "the device wants no kicks");
    }

    #[test]
    fn kicks_are_sent_at_the_index_that_the_device_names() {
        let mut queue = queue(true);
        let want_at = |queue: &Queue, index: u16| {
            let at = queue.ring().addrs()[2] + 4 + 8 * 8;
            queue.ring().ram().write(at, &index.to_le_bytes()).unwrap();
        };
        want_at(&queue, 1);
        queue.submit(&Request::flush()).unwrap();
        assert!(!queue.kick().unwrap(), "the device waits for index 1, not 0");
        queue.submit(&Request::flush()).unwrap();
        queue.submit(&Request::flush()).unwrap();
        assert!(queue.kick().unwrap(), "index 1 is one of these two");
    }

    #[test]
    fn requests_that_do_not_fit_are_refused_and_take_no_descriptors() {
        let mut queue = queue(false);
        let data = [Segment::new(0, 512); 33];
        assert!(matches!(queue.submit(&Request::read(0, &data)), Err(Error::Segments { .. })));
        assert!(matches!(queue.submit(&Request::read(0, &data[..7])), Err(Error::Segments { .. })));
        queue.submit(&Request::read(0, &data[..6])).unwrap();
        assert!(matches!(queue.submit(&Request::flush()), Err(Error::Full)));
        assert_eq!(queue.in_flight(), 1);
    }
}
