//! The drill file as written: serde's shapes, and their way into the types of `spec`. Unknown keys are refused.

use super::spec::{
    Abort, Action, Caller, Denial, Drill, Fault, Link, Objectives, Phase, Precondition, Probe, Steady, Target, Writer,
    bad,
};
use crate::duration::Millis;
use ambit_model::{ClusterId, ObjectName, Refusal};
use serde::Deserialize;

/// The drill in a file's text, not yet checked against itself.
pub(super) fn read(text: &str) -> Result<Drill, Refusal> {
    let file: File = serde_norway::from_str(text).map_err(|e| bad("a drill as in deploy/drills", e.to_string()))?;
    if file.api_version != "ambit/v1" || file.kind != "Drill" {
        let found = format!("{} {}", file.api_version, file.kind);
        return Err(bad("apiVersion ambit/v1 and kind Drill", found));
    }
    let File { metadata, spec, .. } = file;
    Ok(Drill {
        name: metadata.name,
        owner: metadata.owner,
        hypothesis: spec.hypothesis,
        clusters: spec.scope.clusters,
        protected: spec.scope.protected,
        preconditions: spec.preconditions.into_iter().map(precondition).collect::<Result<_, _>>()?,
        steady: spec.steady_state,
        writer: spec.probes.writer,
        caller: spec.probes.caller,
        outside: spec.probes.outside,
        phases: spec.phases.into_iter().map(phase).collect::<Result<_, _>>()?,
        abort: spec.abort.into_iter().map(abort).collect::<Result<_, _>>()?,
        objectives: spec.objectives,
        seal_at: spec.report.seal_at.into_cells(),
    })
}

fn phase(written: WrittenPhase) -> Result<Phase, Refusal> {
    let until_steady = written.until.is_some();
    let action = match (written.inject, written.heal, written.lease) {
        (None, None, None) => Action::Watch,
        (None, Some(All::All), None) => Action::Heal,
        (Some(inject), None, Some(lease)) => Action::Inject(fault(inject)?, lease),
        (Some(_), None, None) => return Err(bad(format!("a lease in phase '{}'", written.name), "none")),
        _ => return Err(bad(format!("either inject (with lease) or heal in phase '{}'", written.name), "another mix")),
    };
    Ok(Phase { name: written.name, action, length: written.length, until_steady })
}

fn fault(written: WrittenFault) -> Result<Fault, Refusal> {
    Ok(match written {
        WrittenFault::Kill(text) => Fault::Kill(target(&text)?),
        WrittenFault::Pause(text) => Fault::Pause(target(&text)?),
        WrittenFault::KillSite(site) => Fault::Kill(Target::Site(site)),
        WrittenFault::Cut(text) => Fault::Cut(link(&text)?),
        WrittenFault::Fill(text) => member(&text).map(|(site, role)| Fault::Fill(site, role))?,
        WrittenFault::Ban(text) => member(&text).map(|(site, role)| Fault::Ban(site, role))?,
        WrittenFault::Alter(text) => member(&text).map(|(site, role)| Fault::Alter(site, role))?,
        WrittenFault::Deny(WrittenDenial { cell, target, from }) => {
            Fault::Deny(Denial { cell, target: target.parse()?, from: from.parse()? })
        }
    })
}

/// `leader-of CELL`, or `ROLE`.
fn target(text: &str) -> Result<Target, Refusal> {
    match text.strip_prefix("leader-of ") {
        Some(cell) => Ok(Target::LeaderOf(cell.trim().parse()?)),
        None => member(text).map(|(site, role)| Target::Member(site, role)),
    }
}

/// `ROLE`: a site, a hyphen, and what the lab calls it.
fn member(text: &str) -> Result<(ClusterId, String), Refusal> {
    match text.split_once('-') {
        Some((site, _)) => Ok((site.parse()?, text.parse::<ObjectName>()?.to_string())),
        None => Err(bad("leader-of CELL, or a name of the lab such as west-r2, west-n1 or west-n1-agent", text)),
    }
}

/// `SITE`, `ROLE`, `SITE:SITE` or `ROLE>ROLE`.
fn link(text: &str) -> Result<Link, Refusal> {
    if let Some((from, to)) = text.split_once('>') {
        let ((site, from), (other, to)) = (member(from)?, member(to)?);
        return if site == other && from != to {
            Ok(Link::OneWay(site, from, to))
        } else {
            Err(bad("two machines of one site, as west-r1>west-r2", text))
        };
    }
    if let Some((a, b)) = text.split_once(':') {
        let (a, b): (ClusterId, ClusterId) = (a.parse()?, b.parse()?);
        return if a == b { Err(bad("two sites, as west:east", text)) } else { Ok(Link::Sites(a, b)) };
    }
    match text.contains('-') {
        true => member(text).map(|(site, role)| Link::Member(site, role)),
        false => Ok(Link::Site(text.parse()?)),
    }
}

fn precondition(w: WrittenPrecondition) -> Result<Precondition, Refusal> {
    match (w.quorum_survives, w.quorum, w.peers_fresh, w.agents_in_step) {
        (Some(c), None, None, None) => Ok(Precondition::QuorumSurvives(c)),
        (None, Some(c), None, None) => Ok(Precondition::Quorum(c)),
        (None, None, Some(p), None) => Ok(Precondition::PeersFresh(p.at, p.max)),
        (None, None, None, Some(c)) => Ok(Precondition::AgentsInStep(c)),
        _ => Err(bad("one of quorumSurvives, quorum, peersFresh, agentsInStep in each precondition", "another mix")),
    }
}

fn abort(w: WrittenAbort) -> Result<Abort, Refusal> {
    match (w.probe, w.failing_for, w.longer) {
        (Some(probe), Some(time), None) => Ok(Abort::FailingFor(probe, time)),
        (None, None, Some(time)) => Ok(Abort::Longer(time)),
        _ => Err(bad("abort: {probe, failingFor} or {longer}", "another mix")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: ObjectName,
    owner: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Spec {
    hypothesis: String,
    scope: Scope,
    preconditions: Vec<WrittenPrecondition>,
    steady_state: Vec<Steady>,
    probes: Probes,
    phases: Vec<WrittenPhase>,
    abort: Vec<WrittenAbort>,
    objectives: Objectives,
    report: WrittenReport,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scope {
    clusters: Vec<ClusterId>,
    #[serde(default)]
    protected: Vec<ClusterId>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenPrecondition {
    quorum_survives: Option<ClusterId>,
    quorum: Option<ClusterId>,
    peers_fresh: Option<PeersFresh>,
    agents_in_step: Option<ClusterId>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PeersFresh {
    at: ClusterId,
    max: Millis,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Probes {
    writer: Option<Writer>,
    caller: Option<Caller>,
    outside: Option<Caller>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPhase {
    name: String,
    #[serde(default, with = "serde_norway::with::singleton_map")]
    inject: Option<WrittenFault>,
    lease: Option<Millis>,
    heal: Option<All>,
    #[serde(rename = "for")]
    length: Millis,
    until: Option<SteadyWord>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum All {
    All,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum SteadyWord {
    Steady,
}

/// One of them: a mapping with one key.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WrittenFault {
    Kill(String),
    KillSite(ClusterId),
    Pause(String),
    Cut(String),
    Fill(String),
    Ban(String),
    Alter(String),
    Deny(WrittenDenial),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenDenial {
    cell: ClusterId,
    target: String,
    from: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenAbort {
    probe: Option<Probe>,
    failing_for: Option<Millis>,
    longer: Option<Millis>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenReport {
    seal_at: WrittenCells,
}

/// One cell, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenCells {
    One(ClusterId),
    Several(Vec<ClusterId>),
}

impl WrittenCells {
    fn into_cells(self) -> Vec<ClusterId> {
        match self {
            Self::One(cell) => vec![cell],
            Self::Several(cells) => cells,
        }
    }
}
