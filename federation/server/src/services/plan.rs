//! What a change of documents would do, judged on the state as it is, without making it.

use crate::replica::Replica;
use crate::replica::seen::{Flow, Times, merge};
use ambit_model::{Moment, Refusal, Revision, SpiffeId};
use ambit_policy::{
    Document, EgressSet, Index, PolicySet, egress_flips, egress_text, flips, group_text, policy_text, service_text,
    unmeshed_flips,
};
use ambit_proto::v1;
use ambit_state::objects::{DocumentChange, StoredDocument};
use ambit_state::{DocumentKind, DocumentsChange, State};
use std::collections::{BTreeMap, BTreeSet};

/// Pairs that an answer shows one by one.
pub(super) const SHOWN_MAX: usize = 1_000;

/// What is wanted of documents.
pub(super) enum Wanted {
    /// Write these and delete those.
    Change(DocumentsChange),
    /// As they were right after that change.
    Back(Revision),
}

/// Documents as a change asks for them, in the order of their kinds.
pub(super) fn change_of(documents: Vec<Document>, by: String) -> Result<DocumentsChange, Refusal> {
    let mut change = DocumentsChange { by, ..DocumentsChange::default() };
    for document in documents {
        ambit_policy::check_enforceable(&document)?;
        match document {
            Document::Policy(policy) => change.policies.push(policy),
            Document::Service(service) => change.services.push(service),
            Document::Group(group) => change.groups.push(group),
            Document::Egress(egress) => change.egress.push(egress),
        }
    }
    Ok(change)
}

/// What was there when the change was judged.
struct Ground {
    before: PolicySet,
    after: PolicySet,
    egress_before: EgressSet,
    egress_after: EgressSet,
    known: BTreeSet<SpiffeId>,
    now: Moment,
    over: Revision,
    documents: Vec<v1::PlannedDocument>,
}

/// Judges a change.
///
/// # Errors
/// As the change itself would be refused.
pub(super) async fn plan(replica: &Replica, wanted: Wanted) -> Result<v1::PlanResponse, Refusal> {
    // Before the ground is taken: a replica that is silent takes a second, in which others change documents.
    let super::flows::Known { flows: seen, left_out, silent, .. } = super::flows::everywhere(replica).await?;
    let ground = replica.read(|s| ground(s, wanted)).await??;
    // Comparing takes up to a second: not under the lock of the state, nor in the way of other calls.
    let found = tokio::task::spawn_blocking(move || {
        let Ground { before, after, egress_before, egress_after, known, now, over, documents } = ground;
        let outside = egress_flips(&egress_before, &egress_after, &known, now);
        let inside = unmeshed_flips(&before, &after, &known, now);
        let seen = {
            let (before, after) = (before.compile(), after.compile());
            let judge =
                |set: &Index, flow: &Flow| set.evaluate(&flow.source, &flow.destination, flow.port, now).allowed;
            let seen = Flips::of(seen, |flow| (judge(&before, flow), judge(&after, flow)));
            let count = seen.flips.len() as u64;
            (seen.all, count, super::flows::newest(seen.flips, SHOWN_MAX, false).0)
        };
        (flips(&before, &after, &known, now), (outside, inside), seen, documents, over)
    });
    let (found, (outside, inside), (seen_all, seen_flips, seen), documents, over) =
        found.await.map_err(|e| Refusal::new(ambit_model::Code::Internal, "a plan", e.to_string()))?;
    // Ways out of the mesh and into it first: they are few, and open more than one target, or to more than one caller.
    let ways = outside.pairs.iter().map(super::egress::flip_message).chain(super::unmeshed::shown(&inside));
    let shown = found.pairs.iter().map(|flip| v1::Flip {
        source: flip.source.to_string(),
        destination: flip.destination.to_string(),
        opened: flip.opened.to_string(),
        closed: flip.closed.to_string(),
        at_ms: flip.at.map_or(0, |at| at.0),
    });
    let (opened, closed) = found.counts();
    let of = |closes: bool| {
        let out = outside.pairs.iter().map(|flip| if closes { &flip.closed } else { &flip.opened });
        let inside = inside.pairs.iter().map(|flip| if closes { &flip.closed } else { &flip.opened });
        out.chain(inside).filter(|ports| !ports.is_empty()).count()
    };
    let (opened, closed) = (opened + of(false), closed + of(true));
    Ok(v1::PlanResponse {
        opened: opened as u64,
        closed: closed as u64,
        documents,
        flips: ways.chain(shown).take(SHOWN_MAX).collect(),
        pairs: (found.pairs.len() + outside.pairs.len() + inside.pairs.len()) as u64,
        compared: (found.compared + outside.compared + inside.compared) as u64,
        cut_short: found.cut_short || outside.cut_short || inside.cut_short,
        over: over.0,
        seen_all,
        seen_flips,
        seen,
        seen_left_out: left_out,
        seen_silent: silent,
    })
}

/// Of connections that were seen, those that would be judged otherwise.
struct Flips {
    all: u64,
    /// With the verdict as it would be.
    flips: BTreeMap<Flow, Times>,
}

impl Flips {
    fn of(seen: BTreeMap<Flow, Times>, judge: impl Fn(&Flow) -> (bool, bool)) -> Self {
        let (mut all, mut flips) = (BTreeSet::new(), BTreeMap::new());
        for (flow, times) in seen {
            // What was let through before and refused later is one.
            let (before, after) = judge(&flow);
            let flow = Flow { allowed: after, ..flow };
            if before != after {
                merge(&mut flips, flow.clone(), times);
            }
            all.insert(flow);
        }
        Self { all: all.len() as u64, flips }
    }
}

fn ground(s: &State, wanted: Wanted) -> Result<Ground, Refusal> {
    let change = match wanted {
        Wanted::Change(change) => change,
        Wanted::Back(to) => s.change_back(to)?,
    };
    s.check_documents(&change)?;
    Ok(Ground {
        before: s.policy_set(),
        after: s.policy_set_after(&change),
        egress_before: s.egress_set(),
        egress_after: s.egress_set_after(&change),
        known: s.known_identities(),
        now: s.moment(),
        over: s.document_revision(),
        documents: planned(s, change),
    })
}

fn planned(s: &State, change: DocumentsChange) -> Vec<v1::PlannedDocument> {
    let gone = change.delete.into_iter().map(|(kind, name)| (kind, name, None));
    let groups = change.groups.into_iter().map(StoredDocument::Group);
    let policies = change.policies.into_iter().map(StoredDocument::Policy);
    let services = change.services.into_iter().map(StoredDocument::Service);
    let egress = change.egress.into_iter().map(StoredDocument::Egress);
    let written = groups.chain(policies).chain(services).chain(egress);
    let written = written.map(|document| (document.kind(), document.name().clone(), Some(document)));
    let all = gone.chain(written).map(|(kind, name, after)| {
        let before = s.document(kind, &name);
        document_message(&DocumentChange { kind, name, before, after })
    });
    all.collect()
}

/// One document as it was and as it is.
pub(super) fn document_message(change: &DocumentChange) -> v1::PlannedDocument {
    let word = match (&change.before, &change.after) {
        (None, None) => "absent",
        (None, Some(_)) => "added",
        (Some(_), None) => "removed",
        (Some(before), Some(after)) if before == after => "unchanged",
        (Some(_), Some(_)) => "changed",
    };
    let text = |document: &Option<StoredDocument>| match document {
        Some(StoredDocument::Policy(policy)) => policy_text(policy),
        Some(StoredDocument::Service(service)) => service_text(service),
        Some(StoredDocument::Group(group)) => group_text(group),
        Some(StoredDocument::Egress(egress)) => egress_text(egress),
        None => String::new(),
    };
    v1::PlannedDocument {
        kind: change.kind.as_str().to_owned(),
        name: change.name.to_string(),
        change: word.to_owned(),
        before: text(&change.before),
        after: text(&change.after),
    }
}

/// The kind that a request names.
pub(super) fn kind_of(text: &str) -> Result<DocumentKind, Refusal> {
    let unknown = || Refusal::new(ambit_model::Code::BadRequest, "kind Policy, Service, Group or Egress", text);
    DocumentKind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(unknown)
}
