//! What a change would flip, shown before it is made, and the limit above which it is not made.

use super::super::Session;
use super::flows;
use crate::args::MaxFlips;
use crate::ask;
use crate::cell::Cell;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::utc;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

/// Pairs that a refusal names.
const NAMED: usize = 3;

/// Asks the cell what a change would flip.
pub(super) async fn planned(cell: &Cell, request: v1::PlanRequest) -> Result<v1::PlanResponse, Refusal> {
    ask!(cell, PolicyRegistry.plan(request))
}

/// Shows the plan; ends as a guard does where it is above the limit.
pub(super) async fn plan(session: &Session, request: v1::PlanRequest, limit: MaxFlips) -> Result<Answer, Refusal> {
    let plan = planned(&session.cell()?, request).await?;
    let answer = Answer::ok(shown(session.form, &plan, limit));
    match limit {
        MaxFlips::Any => Ok(answer),
        MaxFlips::Pairs(flips_max) => match within(&plan, flips_max) {
            Ok(()) => Ok(answer),
            Err(refusal) => Ok(answer.note(crate::exit::refusal_text(&refusal)).ending(Exit::of(&refusal))),
        },
    }
}

/// Whether the plan stays below the limit.
pub(super) fn within(plan: &v1::PlanResponse, flips_max: u64) -> Result<(), Refusal> {
    if plan.pairs <= flips_max && !plan.cut_short {
        return Ok(());
    }
    let count = if plan.cut_short {
        format!("more pairs than are compared, {} of the first {} among them", plan.pairs, plan.compared)
    } else {
        counted(usize::try_from(plan.pairs).unwrap_or(usize::MAX), "pair")
    };
    let named: Vec<String> = plan.flips.iter().take(NAMED).map(flip_text).collect();
    let seen = if plan.seen_flips == 0 { String::new() } else { format!(" ({})", flows::flips_text(plan)) };
    let found = format!("{count}{seen}: {}", named.join("; "));
    let expected = format!("at most {flips_max} pairs of known identities whose connections change");
    Err(Refusal::new(Code::PolicyBlastRadius, expected, found))
}

/// A line for who makes the change.
pub(super) fn summary(plan: &v1::PlanResponse) -> String {
    let pairs = |count: u64| counted(usize::try_from(count).unwrap_or(usize::MAX), "pair");
    format!(
        "flips: opens ports of {}, closes ports of {}; {}",
        pairs(plan.opened),
        pairs(plan.closed),
        flows::flips_text(plan)
    )
}

fn when(flip: &v1::Flip) -> String {
    if flip.at_ms == 0 { "at once".to_owned() } else { utc(flip.at_ms) }
}

fn flip_text(flip: &v1::Flip) -> String {
    let mut text = format!("{} -> {}", flip.source, flip.destination);
    for (word, ports) in [("opens", &flip.opened), ("closes", &flip.closed)] {
        if ports != "none" {
            text.push_str(&format!(" {word} {ports}"));
        }
    }
    if flip.at_ms > 0 {
        text.push_str(&format!(" at {}", when(flip)));
    }
    text
}

fn shown(form: Form, plan: &v1::PlanResponse, limit: MaxFlips) -> String {
    if form == Form::Json {
        let document = |d: &v1::PlannedDocument| json!({"kind": d.kind, "name": d.name, "change": d.change, "before": d.before, "after": d.after});
        let flip = |f: &v1::Flip| json!({"source": f.source, "destination": f.destination, "opened": f.opened, "closed": f.closed, "at": when(f)});
        let flips_max = match limit {
            MaxFlips::Pairs(pairs) => json!(pairs),
            MaxFlips::Any => json!("any"),
        };
        return pretty(&json!({
            "documents": plan.documents.iter().map(document).collect::<Vec<Value>>(),
            "flips": plan.flips.iter().map(flip).collect::<Vec<Value>>(),
            "pairs": plan.pairs, "opened": plan.opened, "closed": plan.closed, "compared": plan.compared, "cut_short": plan.cut_short, "max_flips": flips_max,
            "seen": plan.seen.iter().map(flows::row).collect::<Vec<Value>>(), "seen_flips": plan.seen_flips, "seen_all": plan.seen_all, "seen_left_out": plan.seen_left_out, "seen_silent": plan.seen_silent,
            "over": plan.over,
        }));
    }
    let mut out: String = plan.documents.iter().map(document_text).collect();
    let mut table = Table::new("pair", &["source", "destination", "opens", "closes", "when"]);
    for flip in &plan.flips {
        let (opened, closed) = (json!(flip.opened), json!(flip.closed));
        table.row(vec![json!(flip.source), json!(flip.destination), opened, closed, json!(when(flip))]);
    }
    if plan.flips.is_empty() {
        out.push_str("no pair of known identities changes");
    } else {
        out.push_str(&table.render(form));
        out.push_str(" of known identities change");
        if plan.pairs > plan.flips.len() as u64 {
            out.push_str(&format!(", the first of {}", plan.pairs));
        }
    }
    let rest = if plan.cut_short { " of more: there may be others" } else { "" };
    out.push_str(&format!(" ({} compared{rest})\n", plan.compared));
    if !plan.seen.is_empty() {
        out.push_str(&format!("{}\n", flows::table(form, &plan.seen)));
    }
    out + &flows::flips_text(plan)
}

/// `policy db: changed`, what was below it and what is to be.
pub(super) fn document_text(document: &v1::PlannedDocument) -> String {
    let mut out = format!("{} {}: {}\n", document.kind.to_lowercase(), document.name, document.change);
    if document.before != document.after {
        for (sign, text) in [('-', &document.before), ('+', &document.after)] {
            if !text.is_empty() {
                out.push_str(&format!("  {sign} {text}\n"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(pairs: u64) -> v1::PlanResponse {
        let flip = |n: u64| v1::Flip {
            source: format!("spiffe://w/c{n}"),
            destination: "spiffe://w/db".into(),
            opened: "none".into(),
            closed: "80, 443".into(),
            at_ms: 0,
        };
        let document = v1::PlannedDocument {
            kind: "Policy".into(),
            name: "db".into(),
            change: "changed".into(),
            before: "allow spiffe://w/* to spiffe://w/db on 80, 443".into(),
            after: "allow spiffe://w/* to spiffe://w/db on 22".into(),
        };
        v1::PlanResponse {
            documents: vec![document],
            flips: (0..pairs).map(flip).collect(),
            pairs,
            closed: pairs,
            compared: 9,
            ..Default::default()
        }
    }

    #[test]
    fn above_the_limit_is_refused_with_examples_and_a_way_on() {
        assert_eq!(within(&plan(2), 2), Ok(()));
        let refusal = within(&plan(5), 2).unwrap_err();
        assert_eq!((refusal.code, Exit::of(&refusal)), (Code::PolicyBlastRadius, Exit::Drift));
        assert!(refusal.found.starts_with("5 pairs: spiffe://w/c0 -> spiffe://w/db closes 80, 443; "), "{refusal}");
        // Nobody knows how many there are: that is above every limit.
        assert!(within(&v1::PlanResponse { cut_short: true, ..plan(0) }, 10).is_err());
    }

    #[test]
    fn a_plan_reads_as_one() {
        assert_eq!(
            shown(Form::Table, &plan(1), MaxFlips::Any),
            "policy db: changed\n  - allow spiffe://w/* to spiffe://w/db on 80, 443\n  + allow spiffe://w/* to spiffe://w/db \
             on 22\nSOURCE         DESTINATION    OPENS  CLOSES   WHEN\nspiffe://w/c0  spiffe://w/db  none   80, 443  at once\n1 \
             pair of known identities change (9 compared)\nof 0 flows seen in the last day, 0 would be judged otherwise"
        );
        let table = |plan: &v1::PlanResponse| shown(Form::Table, plan, MaxFlips::Any);
        assert!(table(&plan(0)).contains("no pair of known identities changes (9 compared)\n"));
        let flow = v1::SeenFlow {
            source: "spiffe://w/c0".into(),
            destination: "spiffe://w/db".into(),
            port: 80,
            allowed: false,
            times: 12,
            last_ms: 1_795_442_606_000,
            ..Default::default()
        };
        let seen = v1::PlanResponse { seen: vec![flow], seen_all: 7, seen_flips: 1, ..plan(1) };
        assert!(table(&seen).ends_with(
            "SOURCE         DESTINATION    PORT  JUDGED  TIMES  LAST\nspiffe://w/c0  spiffe://w/db  80    denied  12     \
             2026-11-23T14:03:26Z\n1 flow\nof 7 flows seen in the last day, 1 would be judged otherwise"
        ), "{}", table(&seen));
        let refusal = within(&seen, 0).unwrap_err();
        assert!(
            refusal.found.starts_with("1 pair (of 7 flows seen in the last day, 1 would be judged otherwise): "),
            "{refusal}"
        );
        let cut = v1::PlanResponse { cut_short: true, ..plan(0) };
        assert!(table(&cut).contains("(9 compared of more: there may be others)\n"));
        // The counts are of all pairs, not of those that are shown one by one.
        let more = v1::PlanResponse { pairs: 5_000, opened: 7, closed: 4_999, ..plan(2) };
        assert_eq!(
            summary(&more),
            "flips: opens ports of 7 pairs, closes ports of 4999 pairs; of 0 flows seen in the last day, 0 would be judged otherwise"
        );
        let mut later = plan(1);
        later.flips[0].at_ms = 1_795_442_606_000;
        assert!(table(&later).contains("80, 443  2026-11-23T14:03:26Z"));
        assert!(within(&later, 0).unwrap_err().found.ends_with("closes 80, 443 at 2026-11-23T14:03:26Z"));
    }
}
