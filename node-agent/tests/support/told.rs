//! What the agent tells of connections. For a process of its own: what one thread's subscriber is told depends on all others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tracing_subscriber::layer::SubscriberExt;

/// The records so far.
#[derive(Clone, Default)]
pub(crate) struct Told(pub(crate) Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>);

impl Told {
    /// Told from now on.
    pub(crate) fn begin() -> Told {
        let told = Told::default();
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(told.clone())).unwrap();
        told
    }
}

struct Fields(BTreeMap<&'static str, String>);

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "ambit::connection" {
            let mut fields = Fields(BTreeMap::new());
            event.record(&mut fields);
            self.0.lock().unwrap().push(fields.0);
        }
    }
}
