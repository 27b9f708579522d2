//! What others did to what this agent put into the kernel.

use super::{Control, State};
use crate::metrics::METRICS;
use std::time::Duration;

/// How often what is in the kernel is compared with what was put there (issue E: every 10 s).
pub(super) const COMPARE_EVERY: Duration = Duration::from_secs(10);

impl Control {
    /// Whether somebody changed what this agent put into the kernel; then all of it is due anew.
    pub(super) async fn drifted(&self, state: &mut State) -> bool {
        if state.installed.is_none() || !state.reconciled || state.parked {
            return false;
        }
        let tables = self.kernel.drift().await;
        let mine = state.guarded.values().filter_map(|g| Some((g.pod.cgroup_id, g.enrolled?))).collect();
        let found = tables.and_then(|tables| Ok((tables, self.kernel.enrolled()? != mine)));
        let (tables, enrolled) = found.unwrap_or_else(|refusal| {
            tracing::error!(%refusal, "the kernel's tables cannot be compared");
            METRICS.component.set(["kernel"], 0.0);
            Default::default()
        });
        for drift in &tables {
            let (map, expected, found) = (drift.map, drift.expected, drift.found);
            tracing::error!(map, expected, found, "others changed a table of the kernel: it is put there anew");
            METRICS.drift.inc([map]);
        }
        if !tables.is_empty() {
            state.installed = None;
        }
        if enrolled {
            tracing::error!(map = "workloads", "others changed who is who in the kernel: it is told anew");
            METRICS.drift.inc(["workloads"]);
            state.guarded.values_mut().for_each(|guarded| guarded.enrolled = None);
            state.reconciled = false;
        }
        enrolled || !tables.is_empty()
    }
}
