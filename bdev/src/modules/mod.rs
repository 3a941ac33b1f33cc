//! The kinds of bdevs, one folder each: the device, its RPC methods, its configuration, its tests.

use std::rc::Rc;

use crate::control::module::BdevModule;

mod blocks;

pub(crate) mod delay;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod malloc;
pub(crate) mod null;
pub(crate) mod passthru;
pub(crate) mod split;

/// All modules. A new one needs a folder and a line here.
#[must_use]
pub fn all() -> Vec<Rc<dyn BdevModule>> {
    vec![
        Rc::new(malloc::module::Module::default()),
        Rc::new(null::module::Module),
        Rc::new(file::module::Module(file::Flavour::Aio)),
        Rc::new(file::module::Module(file::Flavour::Uring)),
        Rc::new(delay::module::Module),
        Rc::new(error::module::Module),
        Rc::new(passthru::module::Module),
        Rc::new(split::module::Module),
    ]
}
