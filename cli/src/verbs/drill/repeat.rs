//! Repeated runs: one run is an anecdote, thirty are a distribution.

use crate::drill::report::Report;
use crate::output::{Form, Table};
use serde_json::json;

/// What one run gave, of each figure that it measured.
pub(super) fn rows(form: Form, reports: &[Report]) -> String {
    const COLUMNS: &[&str] = &["figure", "runs", "p50", "p99", "max"];
    let mut table = Table::new("figure", COLUMNS);
    for (name, values) in figures(reports) {
        let at = |share: f64| percentile(&values, share);
        table.row(vec![json!(name), json!(values.len()), json!(at(0.5)), json!(at(0.99)), json!(at(1.0))]);
    }
    table.render(form)
}

/// The figure's name, and its values in rising order.
fn figures(reports: &[Report]) -> Vec<(&'static str, Vec<u64>)> {
    let of = |figure: fn(&Report) -> Option<u64>| {
        let mut values: Vec<u64> = reports.iter().filter_map(figure).collect();
        values.sort_unstable();
        values
    };
    let all = [
        ("rto writer, ms", of(|r| r.figures.writer.as_ref()?.rto_ms)),
        ("rto caller, ms", of(|r| r.figures.caller.as_ref()?.rto_ms)),
        ("failback, ms", of(|r| r.figures.caller.as_ref()?.failback_ms)),
        ("steady again, ms", of(|r| r.marks.and_then(|m| m.steady_ms?.checked_sub(m.healed_ms)))),
        ("failed calls", of(|r| r.figures.caller.as_ref().map(|c| c.failed))),
        ("failed calls outside", of(|r| r.figures.outside.as_ref().map(|o| o.failed))),
        ("acknowledged writes lost", of(|r| r.figures.ledger.as_ref().map(|l| l.lost))),
        ("writes duplicated", of(|r| r.figures.ledger.as_ref().map(|l| l.duplicated))),
    ];
    all.into_iter().filter(|(_, values)| !values.is_empty()).collect()
}

/// The smallest value that so large a share of all does not exceed (nearest rank).
fn percentile(sorted: &[u64], share: f64) -> u64 {
    let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank.min(sorted.len()).saturating_sub(1)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let thirty: Vec<u64> = (1..=30).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| percentile(&thirty, share)), [15, 30, 30]);
        assert_eq!([percentile(&[7], 0.5), percentile(&[7], 1.0), percentile(&[], 0.5)], [7, 7, 0]);
    }
}
