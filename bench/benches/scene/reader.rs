//! A reader of a published value.
#![expect(unsafe_code, reason = "follows a published pointer")]

use qsbr::{Domain, Published, Reader};

/// A reader that is online, and a value for it.
pub(crate) struct Qsbr {
    reader: Reader,
    value: Published<u64>,
}

impl Qsbr {
    pub(crate) fn new() -> Self {
        let domain = Domain::new(1);
        let mut reader = domain.reader().unwrap();
        reader.online();
        Self { reader, value: Published::new(&domain, Box::new(1)) }
    }

    /// A turn: says that the last one has ended, and follows the pointer.
    #[inline]
    pub(crate) fn turn(&mut self) -> u64 {
        self.reader.quiesce();
        // SAFETY: online, and of the value's domain.
        *unsafe { self.value.load(&self.reader) }
    }
}
