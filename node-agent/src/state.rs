//! Whether the node hears its cell, and how long what it holds is good without it. Pure.
//!
//! A cell that is away changes nothing for who holds an SVID, until it ends: so an operator must see the time that is left.

use crate::issued::{Known, Svid};
use crate::staleness::{FailMode, Staleness, Worth};
use ambit_model::Stamp;
use serde::Serialize;
use std::time::Duration;

/// What `/state` says, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct State {
    /// See [`Cell`].
    pub cell: Cell,
    /// Since the cell's last word, seconds; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_s: Option<f64>,
    /// What ends where the cell is not heard for too long.
    pub fail_mode: FailMode,
    /// What is held is good for: `all`, those connections that are `open`, or `nothing`.
    pub good_for: Worth,
    /// The revision of the slice held; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// SVIDs held and good.
    pub svids: usize,
    /// Of these, past the time at which they should have been renewed.
    pub overdue: usize,
    /// Entries whose SVID the cell refuses.
    pub refused: usize,
    /// Until the first of the held SVIDs ends, seconds; absent where none is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_s: Option<f64>,
}

/// Whether the node hears its cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cell {
    /// It never did.
    Starting,
    /// Its stream is open.
    Connected,
    /// Its stream is lost: what is held serves until it ends.
    Away,
}

impl State {
    /// As of `now`; `age` is the time since the cell's last word.
    pub fn of(known: &Known, stream_open: bool, age: Option<Duration>, rule: Staleness, now: Stamp) -> Self {
        let cell = match (stream_open, known.view.is_some()) {
            (true, _) => Cell::Connected,
            (false, true) => Cell::Away,
            (false, false) => Cell::Starting,
        };
        let good = || known.svids.values().flatten().filter(|svid| svid.not_after > now);
        let left = good().map(|svid| svid.not_after.0 - now.0).min();
        Self {
            cell,
            age_s: age.map(|age| age.as_secs_f64()),
            fail_mode: rule.mode,
            // Before the first slice there is nothing that it could be good for.
            good_for: if known.view.is_none() { Worth::Nothing } else { rule.worth(age) },
            revision: known.view.as_ref().map(|view| view.revision.0),
            svids: good().count(),
            overdue: good().filter(|svid| is_overdue(svid, now)).count(),
            refused: known.svids.values().filter(|svid| svid.is_err()).count(),
            left_s: left.map(|ms| Duration::from_millis(ms).as_secs_f64()),
        }
    }

    /// The same as figures for Prometheus.
    pub fn figures(&self) -> String {
        let gauge = |name: &str, help: &str, rows: &[(&str, Option<f64>)]| {
            let rows: String = rows.iter().filter_map(|(l, v)| v.map(|v| format!("{name}{l} {v}\n"))).collect();
            if rows.is_empty() { rows } else { format!("# HELP {name} {help}\n# TYPE {name} gauge\n{rows}") }
        };
        let count = |n: usize| Some(n as f64);
        let states = [
            ("{state=\"held\"}", count(self.svids)),
            ("{state=\"overdue\"}", count(self.overdue)),
            ("{state=\"refused\"}", count(self.refused)),
        ];
        let stale = f64::from(u8::from(self.good_for != Worth::All));
        gauge("ambit_agent_stale", "1 where the cell was not heard for too long.", &[("", Some(stale))])
            + &gauge("ambit_agent_cell_age_seconds", "Time since the cell's last word.", &[("", self.age_s)])
            + &gauge("ambit_agent_svids", "Workload SVIDs held, of these not renewed in time, and refused.", &states)
            + &gauge("ambit_agent_svid_left_seconds", "Time until the first SVID held ends.", &[("", self.left_s)])
    }
}

/// Renewal falls before six tenths of the lifetime; a seventh is for a cell that changes its leader.
fn is_overdue(svid: &Svid, now: Stamp) -> bool {
    let life = svid.not_after.0.saturating_sub(svid.since.0);
    now.0 > svid.since.0 + life / 10 * 7
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{slice, view};
    use ambit_model::{Code, Generation, Refusal};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn svid(since: u64, not_after: u64) -> Result<Arc<Svid>, Refusal> {
        Ok(Arc::new(Svid {
            id: "spiffe://west/web".parse().unwrap(),
            key_pkcs8: Vec::new().into(),
            chain_der: vec![],
            generation: Generation(1),
            authority: "aa".repeat(20),
            since: Stamp(since),
            not_after: Stamp(not_after),
        }))
    }

    #[test]
    fn a_lost_cell_is_told_with_the_time_that_is_left() {
        let refused = Err(Refusal::new(Code::NotFound, "", ""));
        let rows = [("fresh", svid(0, 100_000)), ("late", svid(0, 50_000)), ("over", svid(0, 40_000)), ("no", refused)];
        let svids = rows.into_iter().map(|(name, svid)| (name.parse().unwrap(), svid)).collect::<BTreeMap<_, _>>();
        let known = Known { view: Some(Arc::new(view(slice()).unwrap())), svids: Arc::new(svids) };
        let rule = Staleness { mode: FailMode::Strict, ..Staleness::default() };
        let state = State::of(&known, false, Some(Duration::from_millis(2500)), rule, Stamp(40_000));
        let told = serde_json::to_string(&state).unwrap();
        let expected = r#"{"cell":"away","age_s":2.5,"fail_mode":"strict","good_for":"all","revision":7,"svids":2,"overdue":1,"refused":1,"left_s":10.0}"#;
        assert_eq!(told, expected);
        assert!(state.figures().contains("\nambit_agent_stale 0\n"), "{}", state.figures());
        let over = State::of(&known, false, Some(Duration::from_hours(24)), rule, Stamp(0));
        assert_eq!(over.good_for, Worth::Nothing);
        assert!(over.figures().contains("\nambit_agent_stale 1\n"), "{}", over.figures());
        assert!(state.figures().contains("\nambit_agent_svid_left_seconds 10\n"), "{}", state.figures());

        let nothing = State::of(&Known::default(), false, None, Staleness::default(), Stamp(0));
        assert_eq!(
            serde_json::to_string(&nothing).unwrap(),
            r#"{"cell":"starting","fail_mode":"closed","good_for":"nothing","svids":0,"overdue":0,"refused":0}"#
        );
        assert_eq!(State::of(&known, true, None, rule, Stamp(0)).cell, Cell::Connected);
    }
}
