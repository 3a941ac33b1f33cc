//! `notify_*`: the last events, for programs that poll for them.

use std::cell::RefCell;
use std::collections::VecDeque;

use bdev::BdevEvent;
use rpc::{DecodeFailure, Params, Phases};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, App, Methods};

/// The number of events that are kept, as in SPDK.
const KEPT: usize = 1024;

/// The length to which a name is cut, in bytes, as in SPDK.
const CONTEXT_MAX: usize = 127;

pub(super) fn register(methods: &mut Methods<'_>) {
    methods.add_plain("notify_get_types", Phases::Runtime, |_, params| {
        params.none("No parameters required")?;
        // No fsdev exists here, but programs may look for these types.
        Ok(json!([
            "fsdev_register",
            "fsdev_unregister",
            name(BdevEvent::Registered),
            name(BdevEvent::Unregistered),
            name(BdevEvent::Resized),
        ]))
    });
    methods.add_plain("notify_get_notifications", Phases::Runtime, get);
}

fn name(event: BdevEvent) -> &'static str {
    match event {
        BdevEvent::Registered => "bdev_register",
        BdevEvent::Unregistered => "bdev_unregister",
        BdevEvent::Resized => "bdev_resize",
    }
}

/// The last [`KEPT`] events.
#[derive(Debug, Default)]
pub(crate) struct Notifications(RefCell<Events>);

#[derive(Debug, Default)]
struct Events {
    /// The id of the first kept event. Ids start at 0 and have no gaps.
    first: u64,
    kept: VecDeque<(&'static str, String)>,
}

impl Notifications {
    /// Adds an event of a bdev.
    pub(super) fn add(&self, event: BdevEvent, bdev: &str) {
        let mut events = self.0.borrow_mut();
        if events.kept.len() == KEPT {
            events.kept.pop_front();
            events.first += 1;
        }
        let ends = (0..=CONTEXT_MAX.min(bdev.len())).rev();
        let end = { ends }.find(|end| bdev.is_char_boundary(*end)).unwrap_or(0);
        events.kept.push_back((name(event), bdev[..end].to_owned()));
    }

    /// Up to `max` events from this id on, or from the first kept one.
    fn from(&self, id: u64, max: u64) -> Vec<Value> {
        let events = self.0.borrow();
        let skip = usize::try_from(id.saturating_sub(events.first)).unwrap_or(usize::MAX);
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let numbered = (events.first..).zip(&events.kept);
        let show =
            |(id, (of, ctx)): (u64, &(&str, String))| json!({ "type": of, "ctx": ctx, "id": id });
        numbered.skip(skip).take(max).map(show).collect()
    }
}

fn get(app: &App, params: &Params) -> Answer {
    #[derive(Deserialize)]
    struct Request {
        #[serde(default)]
        id: u64,
        max: Option<u64>,
    }
    let p: Request = params.decode(DecodeFailure::INVALID_ARGUMENT)?;
    Ok(app.notifications.from(p.id, p.max.unwrap_or(u64::MAX)).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_kept_and_ids_go_on() {
        let all = Notifications::default();
        assert!(all.from(0, 9).is_empty());
        for n in 0..KEPT + 6 {
            all.add(BdevEvent::Registered, &n.to_string());
        }
        let shown = all.from(0, 1);
        assert_eq!(shown, [json!({"type": "bdev_register", "ctx": "6", "id": 6})]);
        assert_eq!(all.from(6, u64::MAX).len(), KEPT);
        let last = u64::try_from(KEPT).unwrap() + 5;
        assert_eq!(all.from(last, u64::MAX)[0]["id"], last);
        assert!(all.from(last + 1, u64::MAX).is_empty() && all.from(u64::MAX, 1).is_empty());
    }

    #[test]
    fn long_names_are_cut_between_characters() {
        let all = Notifications::default();
        all.add(BdevEvent::Resized, &format!("{}é", "x".repeat(CONTEXT_MAX - 1)));
        assert_eq!(all.from(0, 1)[0]["ctx"], "x".repeat(CONTEXT_MAX - 1));
    }
}
