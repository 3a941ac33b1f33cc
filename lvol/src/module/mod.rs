//! `bdev_lvol_*`, and the stores that are found on new bdevs.
//!
//! [`state`] has the open stores; [`examine`] opens and closes them, and makes the bdevs of their
//! volumes, whose entries are in [`entry`]. [`stores`], [`volumes`], [`parents`] and [`copy`] have
//! the methods, [`show`] what they show.

mod copy;
mod entry;
mod examine;
mod parents;
mod show;
mod state;
mod stores;
mod volumes;

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::{Answer, LocalFuture, Method, Params};
use bdev::{Bdev, BdevModule, Host};

use self::state::State;

const NAME: &str = "lvol";

/// SPDK's module `lvol`.
#[derive(Default)]
pub struct LvolModule {
    state: Rc<State>,
}

impl LvolModule {
    /// Makes a method that parses its parameters first.
    fn method<T, P, F, R>(&self, name: &'static str, parse: P, handler: F) -> Method
    where
        T: 'static,
        P: Fn(&Params) -> Result<T, bdev::method::MethodError> + 'static,
        F: Fn(Rc<State>, Rc<dyn Host>, T) -> R + 'static,
        R: Future<Output = Answer> + 'static,
    {
        let state = Rc::clone(&self.state);
        Method::parsed(name, parse, move |host, _, given| handler(Rc::clone(&state), host, given))
    }
}

impl BdevModule for LvolModule {
    fn name(&self) -> &'static str {
        NAME
    }

    fn methods(self: Rc<Self>) -> Vec<Method> {
        let mut methods = stores::methods(&self);
        methods.extend(volumes::methods(&self));
        methods.extend(parents::methods(&self));
        methods.extend(copy::methods(&self));
        methods
    }

    fn examine<'a>(
        &'a self,
        host: &'a Rc<dyn Host>,
        bdev: &'a Arc<dyn Bdev>,
    ) -> LocalFuture<'a, ()> {
        Box::pin(examine::examine(&self.state, host, bdev))
    }

    fn removed(&self, host: &Rc<dyn Host>, bdev: &Arc<dyn Bdev>) {
        examine::removed(&self.state, host, bdev);
    }

    fn release(&self, host: &Rc<dyn Host>) -> Option<LocalFuture<'static, ()>> {
        let (host, all) = (Rc::clone(host), self.state.take_all());
        (!all.is_empty()).then(|| Box::pin(examine::close_all(host, all)) as _)
    }
}
