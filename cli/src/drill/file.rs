//! The drill file as written: serde's shapes, and their way into the types of `spec`. Unknown keys are refused.

use super::spec::{Abort, Action, Caller, Drill, Fault, Objectives, Phase, Precondition, Probe, Steady, Writer, bad};
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
        phases: spec.phases.into_iter().map(phase).collect::<Result<_, _>>()?,
        abort: spec.abort.into_iter().map(abort).collect::<Result<_, _>>()?,
        objectives: spec.objectives,
        seal_at: spec.report.seal_at,
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
    match (written.kill, written.kill_site) {
        (Some(kill), None) => match kill.strip_prefix("leader-of ") {
            Some(cell) => Ok(Fault::KillLeader(cell.trim().parse()?)),
            None => match kill.split_once('-') {
                Some((site, _)) => Ok(Fault::KillMember(site.parse()?, kill.parse::<ObjectName>()?.to_string())),
                None => Err(bad("kill: leader-of CELL, or kill: ROLE such as west-r2", kill)),
            },
        },
        (None, Some(site)) => Ok(Fault::KillSite(site)),
        _ => Err(bad("inject: {kill: ..} or inject: {kill-site: ..}", "another mix")),
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPhase {
    name: String,
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenFault {
    kill: Option<String>,
    kill_site: Option<ClusterId>,
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
    seal_at: ClusterId,
}
