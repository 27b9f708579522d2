//! Who verifies by this cell's bundle, and what they show: asked of all replicas, since each hears its own agents and peers.

use super::external::waiting;
use super::{external, shown};
use crate::replica::Replica;
use ambit_model::bundle::RootState;
use ambit_model::{Refusal, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::State;
use ambit_state::authorities::{AuthorityRow, AuthorityState, DownstreamRow, RootId, RootRow};
use ambit_state::objects::{JwtAuthorityRow, JwtAuthorityState, NodeState, PeerState};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A replica that says nothing for this long counts as one that has not heard.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// A peer pulls every second; what it said longer ago may hold no more.
const PEER_AGE_MS_MAX: u64 = 15_000;
/// Names shown of those missing; more would be no help.
const NAMES_MAX: usize = 64;

/// What this replica hears, and what it is itself.
pub(super) fn here(replica: &Replica) -> Vec<v1::Holder> {
    let sequence = replica.local(|s| s.cell().map(|c| c.bundle_sequence).unwrap_or_default());
    let holder = |kind: &str, name: String| v1::Holder { kind: kind.into(), name, ..Default::default() };
    let own = v1::Holder {
        sequence,
        authorities: vec![replica.issuer().authority().to_owned()],
        ..holder("replica", replica.id().to_string())
    };
    let agents = replica.agents().all().into_iter().map(|(node, agent)| v1::Holder {
        sequence: agent.bundle_sequence,
        authorities: agent.authorities,
        ..holder("node", node.to_string())
    });
    let peers = replica.peers_hold().into_iter().map(|(td, held, age)| v1::Holder {
        age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        roots_held: held.roots.iter().map(|id| id.to_vec()).collect(),
        kids_held: held.kids,
        ..holder("peer", td.to_string())
    });
    std::iter::once(own).chain(agents).chain(peers).collect()
}

/// What all replicas hear, by kind and name; of a peer that speaks to several, what it said last.
pub(super) struct Survey {
    holders: BTreeMap<(String, String), v1::Holder>,
}

impl Survey {
    pub(super) async fn of(replica: &Replica) -> Result<Survey, Refusal> {
        let others = replica.known_members();
        let asked = others.into_iter().map(|(id, address)| async move {
            let call = async {
                let channel = replica.dial_replica(id, &address).await?;
                let mut client = v1::local_authority_client::LocalAuthorityClient::new(channel);
                let request = v1::X509AuthorityStateRequest { local_only: true };
                client.get_x509_authority_state(request).await.map_err(|s| from_status(&s))
            };
            match tokio::time::timeout(ANSWER_MAX, call).await {
                Ok(Ok(answer)) => answer.into_inner().holders,
                // Its agents and itself are missing, and so named.
                Ok(Err(_)) | Err(_) => Vec::new(),
            }
        });
        let all = futures::future::join_all(asked).await.into_iter().flatten().chain(here(replica));
        Ok(Survey::new(all))
    }

    fn new(all: impl Iterator<Item = v1::Holder>) -> Survey {
        let mut holders: BTreeMap<_, v1::Holder> = BTreeMap::new();
        for holder in all {
            let key = (holder.kind.clone(), holder.name.clone());
            // Of two streams of a node the one that says more is the living one.
            let newer = holders.get(&key).is_none_or(|known| {
                (holder.age_ms, std::cmp::Reverse(holder.sequence)) < (known.age_ms, std::cmp::Reverse(known.sequence))
            });
            if newer {
                holders.insert(key, holder);
            }
        }
        Survey { holders }
    }

    fn get(&self, kind: &str, name: String) -> Option<&v1::Holder> {
        self.holders.get(&(kind.to_owned(), name))
    }

    /// How many must hold a root.
    fn all(s: &State) -> usize {
        s.members().count() + live_nodes(s).count() + active_peers(s).count()
    }

    /// Who must hold this root and has not said so.
    pub(super) fn missing(&self, s: &State, id: &RootId) -> Vec<String> {
        let since = s.roots().get(id).map_or(u64::MAX, |row| row.sequence);
        self.lacking(s, since, |peer| peer.roots_held.iter().any(|held| held.as_slice() == id.as_slice()))
    }

    /// Who must know this JWT authority and has not said so. No row says with which bundle a key came: whoever holds the
    /// present one has it, and knows what is tainted.
    pub(super) fn missing_jwt(&self, s: &State, row: &JwtAuthorityRow) -> Vec<String> {
        let sequence = s.cell().map_or(u64::MAX, |cell| cell.bundle_sequence);
        let mut missing = self.lacking(s, sequence, |peer| peer.kids_held.contains(&row.kid));
        if matches!(row.state, JwtAuthorityState::Prepared | JwtAuthorityState::Active) {
            let blind = s.members().filter(|(n, _)| !row.wrapped.contains_key(n)).map(|(n, _)| format!("replica {n}"));
            missing.extend(blind);
            missing.sort();
            missing.dedup();
        }
        missing
    }

    /// Replicas and live nodes with an older bundle than that, and active peers of which `peer_holds` does not hold.
    fn lacking(&self, s: &State, since: u64, peer_holds: impl Fn(&v1::Holder) -> bool) -> Vec<String> {
        let holds = |holder: Option<&v1::Holder>| holder.is_some_and(|h| h.sequence >= since);
        let replicas = s.members().filter(|(n, _)| !holds(self.get("replica", n.to_string())));
        let nodes = live_nodes(s).filter(|node| !holds(self.get("node", node.clone())));
        let peers = active_peers(s)
            .filter(|td| !self.get("peer", td.clone()).is_some_and(|h| h.age_ms <= PEER_AGE_MS_MAX && peer_holds(h)));
        let replicas = replicas.map(|(n, _)| format!("replica {n}"));
        let nodes = nodes.map(|node| format!("node {node}"));
        replicas.chain(nodes).chain(peers.map(|td| format!("peer {td}"))).collect()
    }

    /// Who shows something that is under one of these intermediates: of those who are no nodes as [`newest`] has it. A live
    /// node that nobody hears may.
    fn showing(&self, s: &State, newest: &[(String, String)], authorities: &BTreeSet<String>) -> Vec<String> {
        let under = |holder: &v1::Holder| holder.authorities.iter().any(|a| authorities.contains(a));
        // One whose next intermediate is on record may sign by the one before yet.
        let signs = |n: u64| self.get("replica", n.to_string()).is_some_and(under);
        let members = s.members().filter(|(n, m)| authorities.contains(&m.authority) || signs(*n));
        let replicas = members.map(|(n, _)| format!("replica {n}"));
        let nodes = live_nodes(s).filter(|node| match self.get("node", node.clone()) {
            Some(holder) => holder.authorities.is_empty() || under(holder),
            None => true,
        });
        let others = newest.iter().filter(|(authority, _)| authorities.contains(authority)).map(|(_, id)| id.clone());
        replicas.chain(nodes.map(|node| format!("node {node}"))).chain(others).collect()
    }

    /// How many show anything that the cell signed.
    fn users(s: &State, newest: &[(String, String)]) -> usize {
        s.members().count() + live_nodes(s).count() + newest.len()
    }

    /// Who shows something that is under this intermediate. What a cluster's own issuer signed nobody here knows.
    pub(super) fn under(&self, s: &State, authority: &str) -> Vec<String> {
        if s.downstream(authority).is_some() {
            return Vec::new();
        }
        let external = s.external_named(authority).map(|(root, _, _)| root);
        let under: BTreeSet<String> = match external {
            Some(root) => {
                let replaced = |row: &AuthorityRow| row.root == root && !s.is_under_last(row);
                s.authorities().into_iter().filter(|(_, row)| replaced(row)).map(|(name, _)| name).collect()
            }
            None => [authority.to_owned()].into(),
        };
        // They end with the SVID that asked for them, and with what signed them.
        let replaced = |row: &DownstreamRow| external == Some(row.root) && s.is_replaced(&row.root, &row.serial);
        let ends = |row: &DownstreamRow| {
            row.state == AuthorityState::Active && (under.contains(&row.asked_by.0) || replaced(row))
        };
        let given = s.downstreams().filter(|(_, row)| ends(row)).map(|(id, _)| format!("downstream {id}"));
        let mut all = self.showing(s, &newest(s), &under);
        all.extend(given);
        all
    }

    /// Who would be cut off without this root: shows something under it, or does not hold the active one. Under a root
    /// that was merely prepared nobody is.
    pub(super) fn stranded(&self, s: &State, id: &RootId) -> Vec<String> {
        let roots = s.roots();
        if roots.get(id).is_some_and(|row| row.state == RootState::Prepared) {
            return Vec::new();
        }
        let missing = s.active_root().map(|(active, _)| self.missing(s, &active)).unwrap_or_default();
        let mut all = self.showing(s, &newest(s), &under_root(&s.authorities(), id));
        all.extend(missing);
        all.sort();
        all.dedup();
        all
    }

    /// All of it, for operators.
    pub(super) fn state(&self, s: &State) -> v1::X509AuthorityState {
        let (authorities, newest) = (s.authorities(), newest(s));
        let mut roots: Vec<_> = s.roots().into_iter().collect();
        roots.sort_by_key(|(_, row)| (row.state == RootState::Revoked, row.activated));
        v1::X509AuthorityState {
            sequence: s.cell().map(|c| c.bundle_sequence).unwrap_or_default(),
            roots: roots.iter().map(|(id, row)| self.root(s, &newest, &authorities, id, row)).collect(),
            intermediates: authorities.iter().map(|(id, row)| self.intermediate(s, &newest, id, row)).collect(),
            holders: Vec::new(),
            downstreams: s.downstreams().map(downstream).collect(),
            waiting: s.external_request().map(waiting),
        }
    }

    /// JWT authorities, for operators.
    pub(super) fn jwt_state(&self, s: &State) -> v1::JwtAuthorityState {
        v1::JwtAuthorityState {
            sequence: s.cell().map(|c| c.bundle_sequence).unwrap_or_default(),
            authorities: s.jwt_authorities().map(|row| self.jwt(s, row)).collect(),
        }
    }

    fn jwt(&self, s: &State, row: &JwtAuthorityRow) -> v1::JwtKey {
        let gone = row.state == JwtAuthorityState::Revoked;
        let (missing, of) = if gone { (Vec::new(), 0) } else { (self.missing_jwt(s, row), Self::all(s)) };
        let minted = s.minted_tokens().filter(|token| token.kid == row.kid && token.not_after > s.stamp()).count();
        v1::JwtKey {
            kid: row.kid.clone(),
            state: row.state.as_str().into(),
            made_ms: row.made.0,
            leaves_ms: if row.leaves == Stamp(u64::MAX) { 0 } else { row.leaves.0 },
            not_after_ms: row.not_after.0,
            acked: count(of.saturating_sub(missing.len())),
            of: count(of),
            missing: missing.into_iter().take(NAMES_MAX).collect(),
            opened_by: row.wrapped.keys().copied().collect(),
            minted: count(minted),
        }
    }

    fn root(
        &self,
        s: &State,
        newest: &[(String, String)],
        authorities: &BTreeMap<String, AuthorityRow>,
        id: &RootId,
        row: &RootRow,
    ) -> v1::X509Root {
        let gone = row.state == RootState::Revoked;
        let (missing, of) = if gone { (Vec::new(), 0) } else { (self.missing(s, id), Self::all(s)) };
        let using = if gone { Vec::new() } else { self.showing(s, newest, &under_root(authorities, id)) };
        let fingerprint = if gone { hex::encode(id) } else { shown(&row.der) };
        v1::X509Root {
            fingerprint,
            state: row.state.as_str().into(),
            since_ms: row.since.0,
            acked: count(of.saturating_sub(missing.len())),
            of: count(of),
            used_by: count(using.len()),
            users: count(Self::users(s, newest)),
            missing: missing.into_iter().take(NAMES_MAX).collect(),
            using: using.into_iter().take(NAMES_MAX).collect(),
            opened_by: row.wrapped.keys().copied().collect(),
            externals: externals(s, id),
        }
    }

    fn intermediate(
        &self,
        s: &State,
        newest: &[(String, String)],
        id: &str,
        row: &AuthorityRow,
    ) -> v1::X509Intermediate {
        let using = self.showing(s, newest, &[id.to_owned()].into());
        v1::X509Intermediate {
            authority: id.to_owned(),
            replica: row.replica,
            root: hex::encode(row.root),
            state: row.state.as_str().into(),
            not_before_ms: row.lifetime.not_before.0,
            not_after_ms: row.lifetime.not_after.0,
            current: s.members().any(|(_, m)| m.authority == id),
            used_by: count(using.len()),
            users: count(Self::users(s, newest)),
            using: using.into_iter().take(NAMES_MAX).collect(),
        }
    }
}

fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

fn externals(s: &State, id: &RootId) -> Vec<v1::X509External> {
    let last = s.externals_of(id).last().map(|(n, _)| n);
    s.externals_of(id).map(|(n, row)| external::shown(row, Some(n) == last)).collect()
}

fn downstream((id, row): (&String, &DownstreamRow)) -> v1::X509Downstream {
    v1::X509Downstream {
        authority: id.clone(),
        entry: row.entry.to_string(),
        node: row.node.to_string(),
        generation: row.generation.0,
        root: hex::encode(row.root),
        state: row.state.as_str().into(),
        not_before_ms: row.lifetime.not_before.0,
        not_after_ms: row.lifetime.not_after.0,
    }
}

/// Whoever is no node renews by itself: the authority of its newest leaf, which is the one that it shows, and its identity.
fn newest(s: &State) -> Vec<(String, String)> {
    let mut newest = BTreeMap::new();
    for leaf in s.issued().filter(|i| i.binding.is_none() && i.lifetime.not_after > s.stamp()) {
        let known = newest.entry(&leaf.spiffe_id).or_insert(leaf);
        if leaf.index > known.index {
            *known = leaf;
        }
    }
    newest.into_iter().map(|(id, leaf)| (leaf.authority.clone(), id.to_string())).collect()
}

fn under_root(authorities: &BTreeMap<String, AuthorityRow>, id: &RootId) -> BTreeSet<String> {
    authorities.iter().filter(|(_, row)| row.root == *id).map(|(name, _)| name.clone()).collect()
}

/// Nodes that are relied on: others are issued nothing, and what they hold nobody need wait for.
fn live_nodes(s: &State) -> impl Iterator<Item = String> {
    s.nodes().filter(|(id, row)| row.state == NodeState::Admitted && !s.is_late(id)).map(|(id, _)| id.to_string())
}

fn active_peers(s: &State) -> impl Iterator<Item = String> {
    s.peers().filter(|(_, row)| row.state == PeerState::Active).map(|(td, _)| td.to_string())
}
