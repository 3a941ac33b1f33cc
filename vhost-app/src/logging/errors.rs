//! A log that collects errors.

use std::sync::{Arc, Mutex, PoisonError};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

use super::Text;

/// Runs `f`, and returns its result and the errors that it has logged. They do not appear in the
/// log.
pub(crate) fn errors_of<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
    let errors = Errors::default();
    let log = tracing_subscriber::registry().with(errors.clone());
    let result = tracing::subscriber::with_default(log, f);
    let errors = std::mem::take(&mut *errors.0.lock().unwrap_or_else(PoisonError::into_inner));
    (result, errors)
}

#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber> Layer<S> for Errors {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() == Level::ERROR {
            let mut text = String::new();
            event.record(&mut Text(&mut text));
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_are_collected() {
        let (result, errors) = errors_of(|| {
            tracing::error!("a {}", 1);
            tracing::warn!("b");
            tracing::error!("c\nd");
            7
        });
        assert_eq!((result, errors), (7, vec!["a 1".to_owned(), "c d".to_owned()]));
    }
}
