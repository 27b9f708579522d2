//! What must hold before a drill starts. Anything not known counts as not holding.

use super::spec::{Drill, Fault, Link, Precondition, Target};
use crate::cell::Cell;
use crate::verbs::{in_step, views};
use crate::{ask, duration::Millis};
use ambit_model::{ClusterId, Code, Refusal};
use ambit_proto::v1;
use std::collections::BTreeMap;

/// The cells of a drill by name. A cell is named as its trust domain is.
pub type Cells = BTreeMap<String, Cell>;

/// The cell of this name.
pub fn cell<'a>(cells: &'a Cells, name: &ClusterId) -> Result<&'a Cell, Refusal> {
    let known = || cells.keys().cloned().collect::<Vec<_>>().join(", ");
    cells.get(name.as_str()).ok_or_else(|| refused(format!("a context for cell {name} (--cell FILE)"), known()))
}

/// Checks every precondition; the first that does not hold refuses the drill.
pub async fn check(drill: &Drill, cells: &Cells) -> Result<Vec<String>, Refusal> {
    for name in drill.cells() {
        cell(cells, &name)?;
    }
    let mut held = Vec::new();
    for precondition in &drill.preconditions {
        held.push(one(precondition, cells).await?);
    }
    Ok(held)
}

/// Whether one precondition holds, and by what.
pub async fn one(precondition: &Precondition, cells: &Cells) -> Result<String, Refusal> {
    match precondition {
        Precondition::QuorumSurvives(c) => quorum(cells, c, 1).await,
        Precondition::Quorum(c) => quorum(cells, c, 0).await,
        Precondition::PeersFresh(c, max) => peers_fresh(cells, c, *max).await,
        Precondition::AgentsInStep(c) => agents_in_step(cells, c).await,
    }
}

/// A majority of the voters answers and names one leader, and would still be one with `lost` fewer.
async fn quorum(cells: &Cells, name: &ClusterId, lost: usize) -> Result<String, Refusal> {
    let seen = views(cell(cells, name)?).await;
    let answers: Vec<&v1::StatusResponse> = seen.iter().filter_map(|(_, v)| v.as_ref().ok()).collect();
    quorum_of(name, &answers, lost)
}

fn quorum_of(name: &ClusterId, answers: &[&v1::StatusResponse], lost: usize) -> Result<String, Refusal> {
    let voters: Vec<u64> =
        answers.first().map(|v| v.members.iter().filter(|m| m.voter).map(|m| m.id).collect()).unwrap_or_default();
    let up = voters.iter().filter(|id| answers.iter().any(|v| v.replica == **id)).count();
    let needed = voters.len() / 2 + 1;
    let says = format!("{up} of {} voters of {name} answer", voters.len());
    if voters.is_empty() || up < needed + lost {
        return Err(refused(format!("at least {} voters of {name} that answer", needed + lost), says));
    }
    if answers.iter().any(|v| v.leader == 0 || v.leader != answers[0].leader) {
        return Err(refused(format!("one leader of {name}, named by all"), "an election".to_owned()));
    }
    Ok(format!("{says}, {needed} needed"))
}

async fn peers_fresh(cells: &Cells, name: &ClusterId, max: Millis) -> Result<String, Refusal> {
    let peers = ask!(cell(cells, name)?, ClusterRegistry.list_peers(v1::ListPeersRequest {}))?.peers;
    match peers.iter().find(|p| p.state != "active" || p.age_ms > max.0) {
        Some(p) => {
            let found = format!("{} is {}, {} ms old", p.trust_domain, p.state, p.age_ms);
            Err(refused(format!("every peer of {name} active and heard within {max}"), found))
        }
        None if peers.is_empty() => Err(refused(format!("a peer of {name}"), "none".to_owned())),
        None => Ok(format!("{} of {name} active, heard within {max}", crate::output::counted(peers.len(), "peer"))),
    }
}

async fn agents_in_step(cells: &Cells, name: &ClusterId) -> Result<String, Refusal> {
    let agents = ask!(cell(cells, name)?, PolicyRegistry.status(v1::PolicyStatusRequest::default()))?.agents;
    let behind = agents.iter().filter(|a| !in_step(a)).count();
    if behind > 0 || agents.is_empty() {
        let found = format!("{behind} of {} are not", agents.len());
        return Err(refused(format!("every agent of {name} at the revision it should hold"), found));
    }
    Ok(format!("{} of {name} in step", crate::output::counted(agents.len(), "agent")))
}

/// What the lab is asked for: `ambit-lab inject ACTION TARGET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Its action.
    pub action: &'static str,
    /// Whom, by the lab's own names.
    pub target: String,
}

/// What the lab must do for this fault; nothing for one that a cell injects.
pub async fn order(fault: &Fault, cells: &Cells) -> Result<Option<Order>, Refusal> {
    let (action, target) = match fault {
        Fault::Kill(whom) => ("kill", target(whom, cells).await?),
        Fault::Pause(whom) => ("pause", target(whom, cells).await?),
        Fault::Cut(link) => ("cut", cut(link)),
        Fault::Fill(_, role) => ("fill", role.clone()),
        Fault::Ban(_, role) => ("ban", role.clone()),
        Fault::Alter(_, role) => ("alter", role.clone()),
        Fault::Deny(_) => return Ok(None),
    };
    Ok(Some(Order { action, target }))
}

async fn target(target: &Target, cells: &Cells) -> Result<String, Refusal> {
    match target {
        Target::Site(site) => Ok(site.to_string()),
        Target::Member(_, role) => Ok(role.clone()),
        Target::LeaderOf(name) => {
            let status = ask!(cell(cells, name)?, Membership.status(v1::StatusRequest {}))?;
            match status.leader {
                0 => Err(refused(format!("a leader of {name}"), "none".to_owned())),
                leader => Ok(format!("{name}-r{leader}")),
            }
        }
    }
}

fn cut(link: &Link) -> String {
    match link {
        Link::Site(site) => site.to_string(),
        Link::Member(_, role) => role.clone(),
        Link::Sites(a, b) => format!("{a}:{b}"),
        Link::OneWay(_, from, to) => format!("{from}>{to}"),
    }
}

fn refused(expected: String, found: String) -> Refusal {
    Refusal::new(Code::DrillGuard, expected, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_that_cannot_bear_the_loss_refuses() {
        let view = |replica, leader| {
            let member = |id| v1::Member { id, voter: true, ..Default::default() };
            v1::StatusResponse { replica, leader, members: (1..=3).map(member).collect(), ..Default::default() }
        };
        let west: ClusterId = "west".parse().unwrap();
        let check = |answers: &[v1::StatusResponse], lost| {
            quorum_of(&west, &answers.iter().collect::<Vec<_>>(), lost).map_err(|r| r.code)
        };
        let guard = Err(Code::DrillGuard);
        assert!(check(&[view(1, 2), view(2, 2), view(3, 2)], 1).is_ok());
        assert_eq!(check(&[view(1, 2), view(2, 2)], 1), guard);
        assert!(check(&[view(1, 2), view(2, 2)], 0).is_ok());
        assert_eq!(check(&[view(1, 2)], 0), guard);
        assert_eq!(check(&[], 0), guard);
        assert_eq!(check(&[view(1, 2), view(2, 2), view(3, 3)], 1), guard);
        assert_eq!(check(&[view(1, 0), view(2, 0), view(3, 0)], 1), guard);
    }
}
