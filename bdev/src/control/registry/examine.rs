//! The selection of the bdevs to examine, and of the waiting requests that can create their bdevs.
//! [`crate::control::life::settle`] uses it.

use std::rc::Rc;
use std::sync::Arc;

use super::{BdevId, Errno, Name, Registry, Row, State};
use crate::contract::Bdev;
use crate::control::claims::ClaimKind;
use crate::control::module::Waiting;

impl Registry {
    /// Returns whether all bdevs are examined.
    #[must_use]
    pub fn auto_examine(&self) -> bool {
        self.0.auto_examine.get()
    }

    /// Sets whether all bdevs are examined, or only those named with [`Registry::examine`].
    pub fn set_auto_examine(&self, auto_examine: bool) {
        self.0.auto_examine.set(auto_examine);
    }

    /// Lets the bdev of this name be examined, when it is added or with the next
    /// [`settle`](crate::control::life::settle).
    ///
    /// # Errors
    /// EEXIST if the name was given before.
    pub fn examine(&self, name: &str) -> Result<(), Errno> {
        let mut examined = self.0.examined.borrow_mut();
        if examined.iter().any(|known| known == name) {
            return Err(libc::EEXIST);
        }
        examined.push(name.to_owned());
        Ok(())
    }

    /// Returns the names that [`examine`](Self::examine) was given.
    #[must_use]
    pub fn examined(&self) -> Vec<String> {
        self.0.examined.borrow().clone()
    }

    /// Returns whether examinations are under way.
    #[must_use]
    pub fn is_examining(&self) -> bool {
        self.0.examining.get() > 0
    }

    /// Counts an examination until the value is dropped.
    pub(crate) fn examining(&self) -> Examining {
        self.0.examining.set(self.0.examining.get() + 1);
        Examining(self.clone())
    }

    fn may_examine(&self, row: &Row) -> bool {
        let examined = || self.0.examined.borrow().iter().any(|name| row.has_name(name.as_str()));
        self.auto_examine() || examined()
    }

    /// Returns the first waiting request whose base exists and is free, with that base.
    pub(crate) fn next_to_wake(&self) -> Option<Due> {
        let rows = self.0.rows.borrow();
        rows.iter().find_map(|row| {
            let State::Waiting { waiting, refused } = &row.state else { return None };
            let name = Name::from(waiting.base());
            let base = rows.iter().find(|row| row.live().is_some() && row.has_name(name))?;
            let free = || {
                let claims = &self.0.claims;
                claims.in_the_way(base.id, waiting.claims(), waiting.module()).is_none()
            };
            let wakes = *refused != Some(base.id) && self.may_examine(base) && free();
            let live = base.live().filter(|_| wakes)?;
            let (waiting, base) = (Rc::clone(waiting), Arc::clone(&live.bdev));
            Some(Due { id: row.id, waiting, base })
        })
    }

    /// Records that a request could not create its bdevs on this base.
    pub(crate) fn refuse(&self, id: BdevId, base: &Arc<dyn Bdev>) {
        let base = self.id_of(base);
        let mut rows = self.0.rows.borrow_mut();
        if let Some(row) = rows.iter_mut().find(|row| row.id == id)
            && let State::Waiting { refused, .. } = &mut row.state
        {
            *refused = base;
        }
    }

    /// Returns the first bdev that the modules have not examined and may examine, and marks it as
    /// examined.
    pub(crate) fn next_to_examine(&self) -> Option<Arc<dyn Bdev>> {
        let mut rows = self.0.rows.borrow_mut();
        let is_due = |row: &Row| {
            row.live().is_some_and(|live| !live.examined)
                && self.may_examine(row)
                && self.0.claims.in_the_way(row.id, ClaimKind::Served, "").is_none()
        };
        let at = rows.iter().position(is_due)?;
        let State::Live(live) = &mut rows[at].state else { return None };
        live.examined = true;
        Some(Arc::clone(&live.bdev))
    }

    /// Returns the names of the bdevs that operators have not been told of, and marks them as told.
    pub(crate) fn take_new(&self) -> Vec<String> {
        let mut rows = self.0.rows.borrow_mut();
        let lives = rows.iter_mut().filter_map(|row| match &mut row.state {
            State::Live(live) => Some(live),
            State::Reserved | State::Waiting { .. } => None,
        });
        let new = lives.filter_map(|live| {
            let told = std::mem::replace(&mut live.announced, true);
            (!told).then(|| live.bdev.name().to_owned())
        });
        new.collect()
    }

    /// Tells the program that bdevs were added or removed.
    pub(crate) fn changed(&self) {
        (self.0.changed)();
    }
}

/// A waiting request with its base, which exists.
pub(crate) struct Due {
    pub(crate) id: BdevId,
    pub(crate) waiting: Rc<dyn Waiting>,
    pub(crate) base: Arc<dyn Bdev>,
}

/// An examination under way.
pub(crate) struct Examining(Registry);

impl Drop for Examining {
    fn drop(&mut self) {
        self.0.0.examining.set(self.0.0.examining.get() - 1);
        self.0.changed();
    }
}
