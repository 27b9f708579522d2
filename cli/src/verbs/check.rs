//! `ambit check`: the cell seen from outside. Every check is shown, also those that an earlier failure makes unknowable.

use super::{Session, policy, raft};
use crate::ask;
use crate::cell::Cell;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table};
use crate::when::{age, now_ms};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Heads are committed every second and pulled at about that pace; half a minute without one is trouble.
const PEER_AGE_MS_MAX: u64 = 30_000;
/// An issuing certificate is renewed long before; less than a day left means that renewal does not work.
const ISSUER_LEFT_MS_MIN: u64 = 24 * 3600 * 1000;

type View = (SocketAddr, Result<v1::StatusResponse, Refusal>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Good,
    Warning,
    Bad,
}

/// One line of the answer.
#[derive(Debug)]
struct Finding {
    /// Stable, for scripts.
    id: &'static str,
    mark: Mark,
    says: String,
    /// What to do; empty where nothing is to be done.
    remedy: String,
}

fn good(id: &'static str, says: impl Into<String>) -> Finding {
    Finding { id, mark: Mark::Good, says: says.into(), remedy: String::new() }
}
fn warning(id: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { id, mark: Mark::Warning, says: says.into(), remedy: remedy.into() }
}
fn bad(id: &'static str, says: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { id, mark: Mark::Bad, says: says.into(), remedy: remedy.into() }
}
fn unknown(id: &'static str, refusal: &Refusal) -> Finding {
    bad(id, format!("not known: [{}] {}", refusal.code, refusal.found), refusal.code.remedy())
}

pub(super) async fn check(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let seen = raft::views(&cell).await;
    let mut findings = cell_findings(&seen, now_ms());
    match raft::nobody(&seen) {
        // No use in waiting again for replicas that have just not answered.
        Some(refusal) => findings.extend(["agents", "peers"].map(|id| unknown(id, &refusal))),
        None => {
            findings.push(agents(&cell).await);
            findings.extend(peers(&cell).await);
        }
    }
    Ok(answer(session.form, &findings, raft::nobody(&seen)))
}

/// What the replicas' own views tell: pure, so that every combination can be tested.
fn cell_findings(seen: &[View], now_ms: u64) -> Vec<Finding> {
    let mut findings: Vec<Finding> = seen.iter().map(reachable).collect();
    let views: Vec<&v1::StatusResponse> = seen.iter().filter_map(|(_, v)| v.as_ref().ok()).collect();
    findings.push(leader(&views));
    findings.push(quorum(&views));
    findings.push(history(&views));
    if let Some(view) = views.first() {
        findings.extend(view.members.iter().map(|m| member(m, now_ms)));
        findings.push(match view.root_form.as_str() {
            "sealed" | "external, its authority sealed" => good("root", format!("the root is {}", view.root_form)),
            form => {
                warning("root", format!("the root is {form}"), "seal the root to the replicas' TPMs before real use")
            }
        });
    } else {
        findings.push(bad("members", "not known: no replica answers", Code::Unavailable.remedy()));
    }
    findings
}

fn reachable((address, view): &View) -> Finding {
    match view {
        Ok(v) => good("reachable", format!("replica {} answers at {address}", v.replica)),
        Err(r) => bad("reachable", format!("{address}: [{}] {}", r.code, r.found), r.code.remedy()),
    }
}

fn leader(views: &[&v1::StatusResponse]) -> Finding {
    let mut named: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for v in views {
        named.entry(v.leader).or_default().push(v.replica);
    }
    match named.iter().next() {
        None => bad("leader", "not known: no replica answers", Code::Unavailable.remedy()),
        Some((0, _)) if named.len() == 1 => bad("leader", "no leader", "bring back a majority of the replicas"),
        Some((leader, _)) if named.len() == 1 => good(
            "leader",
            format!("replica {leader} leads in term {}", views.iter().map(|v| v.term).max().unwrap_or(0)),
        ),
        Some(_) => {
            let says: Vec<String> = named.iter().map(|(l, by)| format!("{l} (say {by:?})")).collect();
            warning(
                "leader",
                format!("replicas name different leaders: {}", says.join(", ")),
                "ask again: an election may be under way",
            )
        }
    }
}

fn quorum(views: &[&v1::StatusResponse]) -> Finding {
    let Some(view) = views.first() else {
        return bad("quorum", "not known: no replica answers", Code::Unavailable.remedy());
    };
    let voters: Vec<u64> = view.members.iter().filter(|m| m.voter).map(|m| m.id).collect();
    let answering = voters.iter().filter(|id| views.iter().any(|v| v.replica == **id)).count();
    let needed = voters.len() / 2 + 1;
    let says = format!("{answering} of {} voters answer, {needed} needed", voters.len());
    match answering {
        n if n < needed => bad("quorum", says, "start the replicas that do not answer"),
        n if n == needed => {
            warning("quorum", format!("{says}: no further loss can be borne"), "start the missing replicas, or add one")
        }
        _ => good("quorum", says),
    }
}

/// Two replicas that applied the same index must hold the same state (I2).
fn history(views: &[&v1::StatusResponse]) -> Finding {
    let mut digests: BTreeMap<u64, &[u8]> = BTreeMap::new();
    for v in views {
        if *digests.entry(v.applied_index).or_insert(&v.digest) != v.digest.as_slice() {
            let says = format!("replicas differ at applied index {}", v.applied_index);
            return bad("history", says, "stop the cell and keep every data folder: this must never happen");
        }
    }
    match (digests.keys().next(), digests.keys().next_back()) {
        (Some(low), Some(high)) if high - low > 1000 => warning(
            "history",
            format!("a replica is {} entries behind", high - low),
            "wait, then check that replica's disk and log",
        ),
        (Some(_), Some(high)) => good("history", format!("one history, applied to {high}")),
        _ => bad("history", "not known: no replica answers", Code::Unavailable.remedy()),
    }
}

fn member(m: &v1::Member, now_ms: u64) -> Finding {
    let what = if m.voter { "voter" } else { "learner" };
    if m.intermediate_not_after_ms == 0 {
        return warning(
            "member",
            format!("replica {} ({what}) has no issuing certificate", m.id),
            "other replicas issue for it; check its log",
        );
    }
    match m.intermediate_not_after_ms.checked_sub(now_ms) {
        Some(left) if left >= ISSUER_LEFT_MS_MIN => {
            good("member", format!("replica {} ({what}) may issue for {}", m.id, age(left)))
        }
        Some(left) => warning(
            "member",
            format!("replica {} may issue for {} only", m.id, age(left)),
            "check its log for the renewal's refusal",
        ),
        None => bad(
            "member",
            format!("replica {}'s issuing certificate has ended", m.id),
            "check its log for the renewal's refusal",
        ),
    }
}

async fn agents(cell: &Cell) -> Finding {
    match ask!(cell, PolicyRegistry.status(v1::PolicyStatusRequest::default())) {
        Ok(reply) => agents_finding(&reply.agents),
        Err(refusal) => unknown("agents", &refusal),
    }
}

fn agents_finding(agents: &[v1::AgentRevision]) -> Finding {
    let behind: Vec<&str> =
        agents.iter().filter(|a| !policy::in_step(a)).map(|a| a.node.get(..12).unwrap_or(&a.node)).collect();
    let says = format!("{} of {} agents hold the revision they should", agents.len() - behind.len(), agents.len());
    match (agents.is_empty(), behind.is_empty()) {
        (true, _) => warning("agents", "no agent is enrolled", "enrol a node: ambit node token --cluster NAME"),
        (false, true) => good("agents", says),
        (false, false) => bad(
            "agents",
            format!("{says}; not: {}", behind.join(", ")),
            "ambit policy status; check those agents' logs",
        ),
    }
}

async fn peers(cell: &Cell) -> Vec<Finding> {
    match ask!(cell, ClusterRegistry.list_peers(v1::ListPeersRequest {})) {
        Ok(reply) if reply.peers.is_empty() => vec![good("peers", "no peers")],
        Ok(reply) => reply.peers.iter().map(peer).collect(),
        Err(refusal) => vec![unknown("peers", &refusal)],
    }
}

fn peer(p: &v1::Peer) -> Finding {
    let heard = if p.age_ms == u64::MAX { "never heard".to_owned() } else { format!("heard {} ago", age(p.age_ms)) };
    let says = format!("peer {} is {}, {heard}", p.trust_domain, p.state);
    match p.state.as_str() {
        "active" if p.age_ms <= PEER_AGE_MS_MAX => good("peers", says),
        "active" | "degraded" => warning("peers", says, "check the link to that cell; what it last said still holds"),
        "pending" => {
            warning("peers", says, format!("ambit peer approve {} --fingerprint {}", p.trust_domain, p.fingerprint))
        }
        _ => bad("peers", format!("{says}: {}", p.trouble), "ambit peer list"),
    }
}

fn answer(form: Form, findings: &[Finding], unreachable: Option<Refusal>) -> Answer {
    let count = |mark| findings.iter().filter(|f| f.mark == mark).count();
    let text = match form {
        Form::Json => {
            let mut table = Table::new("check", &["id", "result", "says", "try"]);
            for f in findings {
                let result = match f.mark {
                    Mark::Good => "ok",
                    Mark::Warning => "warning",
                    Mark::Bad => "failed",
                };
                table.row(vec![json!(f.id), json!(result), json!(f.says), json!(f.remedy)]);
            }
            table.render(Form::Json)
        }
        Form::Table => {
            let mut text = String::new();
            for f in findings {
                let mark = match f.mark {
                    Mark::Good => '✓',
                    Mark::Warning => '‼',
                    Mark::Bad => '×',
                };
                text.push_str(&format!("{mark} {:9} {}\n", f.id, f.says));
                if !f.remedy.is_empty() {
                    text.push_str(&format!("            try: {}\n", f.remedy));
                }
            }
            let (ok, warned, failed) = (count(Mark::Good), count(Mark::Warning), count(Mark::Bad));
            text.push_str(&format!("{} checks: {ok} ok, {warned} warnings, {failed} failed", findings.len()));
            text
        }
    };
    let exit = match (unreachable, count(Mark::Bad)) {
        (Some(refusal), _) => Exit::of(&refusal),
        (None, 0) => Exit::Ok,
        (None, _) => Exit::Failed,
    };
    Answer::ok(text).ending(exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;

    fn view(replica: u64, leader: u64) -> v1::StatusResponse {
        let member = |id| v1::Member {
            id,
            address: format!("10.71.0.1{id}:7443"),
            role: String::new(),
            voter: true,
            authority: String::new(),
            intermediate_not_after_ms: YEAR_MS,
            ..Default::default()
        };
        v1::StatusResponse {
            trust_domain: "west".into(),
            replica,
            leader,
            term: 4,
            applied_index: 90,
            digest: vec![7; 32],
            members: vec![member(1), member(2), member(3)],
            root_form: "unsealed".into(),
            ..Default::default()
        }
    }

    fn seen(views: Vec<Option<v1::StatusResponse>>) -> Vec<View> {
        let silence = || Refusal::new(Code::Unavailable, "an answer", "connection refused");
        let at = |i: usize| SocketAddr::from(([10, 71, 0, 11 + u8::try_from(i).unwrap()], 7443));
        views.into_iter().enumerate().map(|(i, v)| (at(i), v.ok_or_else(silence))).collect()
    }

    fn marks(seen: &[View]) -> String {
        let mark = |f: &Finding| match f.mark {
            Mark::Good => format!("{} ", f.id),
            Mark::Warning => format!("{}? ", f.id),
            Mark::Bad => format!("{}! ", f.id),
        };
        cell_findings(seen, 1000).iter().map(mark).collect::<String>().trim_end().to_owned()
    }

    #[test]
    fn each_state_of_a_cell_has_its_findings() {
        let whole = seen(vec![Some(view(1, 2)), Some(view(2, 2)), Some(view(3, 2))]);
        assert_eq!(marks(&whole), "reachable reachable reachable leader quorum history member member member root?");
        let one_down = seen(vec![Some(view(1, 2)), None, Some(view(3, 2))]);
        assert_eq!(
            marks(&one_down),
            "reachable reachable! reachable leader quorum? history member member member root?"
        );
        let alone = seen(vec![None, None, Some(view(3, 0))]);
        assert_eq!(marks(&alone), "reachable! reachable! reachable leader! quorum! history member member member root?");
        let election = seen(vec![Some(view(1, 1)), Some(view(2, 2)), Some(view(3, 2))]);
        assert_eq!(marks(&election), "reachable reachable reachable leader? quorum history member member member root?");
        let mut other = view(3, 2);
        other.digest = vec![8; 32];
        let torn = seen(vec![Some(view(1, 2)), Some(view(2, 2)), Some(other)]);
        assert_eq!(marks(&torn), "reachable reachable reachable leader quorum history! member member member root?");
    }

    #[test]
    fn nothing_is_hidden_when_nobody_answers() {
        let nobody = seen(vec![None, None, None]);
        assert_eq!(marks(&nobody), "reachable! reachable! reachable! leader! quorum! history! members!");
        let refusal = raft::nobody(&nobody);
        let text = answer(Form::Table, &cell_findings(&nobody, 0), refusal);
        assert_eq!(text.exit, Exit::Unreachable);
        assert!(text.text.ends_with("7 checks: 0 ok, 0 warnings, 7 failed"), "{}", text.text);
        assert!(
            text.text.starts_with("× reachable 10.71.0.11:7443: [unavailable] connection refused\n            try: ")
        );
    }

    #[test]
    fn peers_and_agents_are_judged() {
        let p = |state: &str, age_ms| peer(&v1::Peer { state: state.into(), age_ms, ..Default::default() }).mark;
        assert_eq!(
            [p("active", 900), p("degraded", u64::MAX), p("pending", 0), p("suspended", 0)],
            [Mark::Good, Mark::Warning, Mark::Warning, Mark::Bad]
        );
        let agent = |applied| v1::AgentRevision { desired: 5, applied, connected: true, ..Default::default() };
        assert_eq!(agents_finding(&[]).mark, Mark::Warning);
        assert_eq!(agents_finding(&[agent(5), agent(6)]).mark, Mark::Good);
        assert_eq!(agents_finding(&[agent(5), agent(4)]).mark, Mark::Bad);
    }
}
