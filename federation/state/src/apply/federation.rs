//! Peers and what they tell us. A peer speaks only for its own identities and never widens what we allow.

use super::{At, addresses, cell::burn, cell_row, deny::SERIAL_BYTES_MAX, root::ROOT_BYTES_MAX, routing, touch};
use super::{grant, standby};
use crate::authorities::{PeerRoots, root_id};
use crate::command::Reply;
use crate::grant::{ApproverKeys, GrantRecord};
use crate::objects::{ForeignCluster, JwtKeys, Owned, PeerRow, PeerState, TokenScope};
use crate::routing::SteerKey;
use crate::state::State;
use crate::table::{Journal, Table};
use ambit_model::bundle::{BundleRecord, RootEntry, RootState};
use ambit_model::grant::{Naming, Seen};
use ambit_model::policy::{Endpoint, Group, NodeAddress, Peers, Policy, Service};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::routing::{Steer, Versioned};
use ambit_model::{
    Address, Code, Generation, IdDenial, LeafDenial, NodeId, ObjectName, Refusal, Revision, SpiffeId, Stamp,
    TrustDomain, serial_number,
};
use ambit_policy::Document;
use serde::Serialize;
use serde::de::DeserializeOwned;

const PEERS_MAX: usize = 1_000;
/// What one peer may have us hold, so that none fills our memory (I17); what is more is ignored, record by record.
const FOREIGN_CLUSTERS_MAX: usize = 1_000;
const FOREIGN_POLICIES_MAX: usize = 10_000;
const FOREIGN_SERVICES_MAX: usize = 1_000;
const FOREIGN_ENDPOINTS_MAX: usize = 50_000;
const FOREIGN_DENIALS_MAX: usize = 100_000;
/// As many as a cell makes itself.
const FOREIGN_SVID_DENIALS_MAX: usize = 20_000;
const FOREIGN_AUTHORITY_DENIALS_MAX: usize = 1_000;
/// A slice may carry them all: 20,000 take two of its sixteen MiB.
const FOREIGN_NODE_ADDRESSES_MAX: usize = 20_000;
/// Roots in a bundle; a trust domain has two while it rotates.
const FOREIGN_ROOTS_MAX: usize = 8;
/// Roots of a peer that are no more, remembered so that none comes back.
const GONE_ROOTS_MAX: usize = 256;
/// As many as a cell has.
const APPROVERS_MAX: usize = 16;
/// Records in one import; a puller asks for no more.
pub(crate) const IMPORT_MAX: usize = 1_000;

pub(super) fn put_peer(
    s: &mut State,
    at: At,
    td: &TrustDomain,
    row: &PeerRow,
    token: Option<&[u8; 32]>,
) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    if *td == own {
        return Err(Refusal::new(Code::AlreadyExists, "another trust domain", td.as_str()));
    }
    if s.relationships.contains(td) {
        let found = format!("{td}, whose bundle is fetched (ambit federation remove)");
        return Err(Refusal::new(Code::AlreadyExists, "a trust domain without a federation relationship", found));
    }
    if s.peers.len() >= PEERS_MAX && !s.peers.contains(td) {
        return Err(Refusal::new(Code::Busy, format!("at most {PEERS_MAX} peers"), "one more"));
    }
    if let Some(known) = s.peer(td)
        && known.fingerprint != row.fingerprint
        && !s.peer_roots(td).iter().any(|der| root_id(der) == row.fingerprint)
    {
        let (then, now) = (hex::encode(known.fingerprint), hex::encode(row.fingerprint));
        return Err(Refusal::new(Code::FingerprintMismatch, then, now));
    }
    if let Some(sha256) = token {
        burn(
            s,
            at,
            sha256,
            Code::ClusterTokenInvalid,
            Code::ClusterTokenUsed,
            |scope| matches!(scope, TokenScope::Peer(domain, print) if domain == td && *print == row.fingerprint),
        )?;
    }
    let row = match s.peer(td) {
        // Registering again refreshes addresses and keys, never what was imported.
        Some(known) => PeerRow { addresses: row.addresses.clone(), key_set: row.key_set.clone(), ..known.clone() },
        // Who brings no token is approved by nobody: what was learnt of a peer that was removed meanwhile neither.
        None if token.is_none() => {
            PeerRow { state: PeerState::Pending, epoch: 0, seq: 0, hash: [0; 32], ..row.clone() }
        }
        None => row.clone(),
    };
    s.peers.put(&mut s.journal, td.clone(), row);
    touch(s, at);
    Ok(Reply::Done)
}

pub(super) fn approve(s: &mut State, at: At, td: &TrustDomain, fingerprint: &[u8; 32]) -> Result<Reply, Refusal> {
    let Some(mut row) = s.peer(td).cloned() else {
        return Err(Refusal::new(Code::NotFound, "a registered peer", td.as_str()));
    };
    if row.fingerprint != *fingerprint {
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(row.fingerprint), hex::encode(fingerprint)));
    }
    row.state = PeerState::Active;
    row.trouble = String::new();
    s.peers.put(&mut s.journal, td.clone(), row);
    touch(s, at);
    Ok(Reply::Done)
}

pub(super) fn stop(s: &mut State, td: &TrustDomain, trouble: &str) -> Result<Reply, Refusal> {
    let Some(mut row) = s.peer(td).cloned() else {
        return Err(Refusal::new(Code::NotFound, "a registered peer", td.as_str()));
    };
    // Whom nobody believes is not believed for its trouble.
    if row.state != PeerState::Active {
        return Ok(Reply::Done);
    }
    row.state = PeerState::Stopped;
    row.trouble = trouble.to_owned();
    s.peers.put(&mut s.journal, td.clone(), row);
    Ok(Reply::Done)
}

/// Re-checks the chain against what was imported before, then takes all records or none (I9).
pub(super) fn import(s: &mut State, at: At, head: &Head, records: &[Record]) -> Result<Reply, Refusal> {
    let Some(mut peer) = s.peer(&head.origin).cloned() else {
        return Err(Refusal::new(Code::PeerNotActive, "a registered peer", head.origin.as_str()));
    };
    if peer.state != PeerState::Active {
        return Err(Refusal::new(Code::PeerNotActive, "an active peer", format!("{:?}", peer.state)));
    }
    if records.is_empty() || records.len() > IMPORT_MAX {
        return Err(Refusal::new(Code::BadRequest, format!("1-{IMPORT_MAX} records"), records.len().to_string()));
    }
    // Two imports may overlap after a change of leader: what is known is skipped, and the rest must chain to it.
    let known = records.iter().take_while(|r| r.seq <= peer.seq).count();
    #[cfg(ambit_mutant)]
    if let Some(last) = records.last().filter(|last| last.seq < peer.seq && crate::mutant::is("import-goes-back")) {
        (peer.seq, peer.hash) = (last.seq, last.hash());
        s.peers.put(&mut s.journal, head.origin.clone(), peer);
        return Ok(Reply::Done);
    }
    let Some(records) = records.get(known..).filter(|rest| !rest.is_empty()) else { return Ok(Reply::Done) };
    let broken = |expected: String, found: String| Refusal::new(Code::RecordChainBroken, expected, found);
    for record in records {
        let want = (&head.origin, peer.epoch.max(record.epoch), peer.seq + 1, peer.hash);
        let have = (&record.origin, record.epoch, record.seq, record.prev_hash);
        if want != have {
            let show =
                |(o, e, n, h): (&TrustDomain, u64, u64, [u8; 32])| format!("{o}/{e}/{n} after {}", hex::encode(h));
            return Err(broken(show(want), show(have)));
        }
        peer.epoch = record.epoch;
        peer.seq = record.seq;
        peer.hash = record.hash();
    }
    if peer.seq == head.seq && peer.hash != head.hash {
        return Err(broken(hex::encode(head.hash), hex::encode(peer.hash)));
    }
    let late = |r: &Record| grant::late(s, r).map_or_else(|| decode(r), |late| Ok(Imported::Late(Box::new(late))));
    let decoded: Vec<Imported> = records.iter().map(late).collect::<Result<_, _>>()?;
    let mut room = Room::of(s, &head.origin);
    for (record, object) in records.iter().zip(decoded) {
        if !matches!(object, Imported::Late(_)) {
            grant::overtaken(s, record);
        }
        match object {
            Imported::Bundle(bundle) => take_bundle(s, &head.origin, &mut peer, bundle),
            object => take(s, at, &head.origin, object, &mut room),
        }
    }
    s.peers.put(&mut s.journal, head.origin.clone(), peer);
    touch(s, at);
    Ok(Reply::Done)
}

/// An operator's word on a record of a fenced epoch: taken after all, or dropped.
pub(super) fn judge_late(s: &mut State, at: At, origin: &TrustDomain, seq: u64, keep: bool) -> Result<Reply, Refusal> {
    let record = grant::held(s, origin, seq, keep)?;
    if keep {
        let unknown = || Refusal::new(Code::NotFound, "a registered peer", origin.as_str());
        let mut peer = s.peer(origin).cloned().ok_or_else(unknown)?;
        let (object, mut room) = (decode(&record)?, Room::of(s, origin));
        match object {
            Imported::Bundle(bundle) => {
                take_bundle(s, origin, &mut peer, bundle);
                s.peers.put(&mut s.journal, origin.clone(), peer);
            }
            object => take(s, at, origin, object, &mut room),
        }
    }
    grant::judged(s, origin, seq);
    touch(s, at);
    Ok(Reply::Done)
}

/// A record whose object may be taken, or may not: then the sequence moves on and the object is ignored.
enum Imported {
    Cluster(ambit_model::ClusterId, Option<ambit_model::routing::ClusterTraits>),
    Policy(ObjectName, Option<Policy>),
    Service(ObjectName, Option<Service>),
    Group(ObjectName, Option<Group>),
    Endpoint(Address, Option<Endpoint>),
    NodeDenial(NodeId, Generation),
    JwtKeys(JwtKeys),
    IdDenial(SpiffeId, IdDenial),
    LeafDenial(String, Vec<u8>, LeafDenial),
    Bundle(BundleRecord),
    AuthorityDenial(String, Stamp),
    NodeAddress(NodeId, Option<NodeAddress>),
    Steer(SteerKey, Steer),
    Standby(u64, Option<Naming>),
    Approvers(ApproverKeys),
    Grant(TrustDomain, Box<GrantRecord>),
    Seen(TrustDomain, Seen),
    Late(Box<Record>),
    Ignored,
}

fn decode(r: &Record) -> Result<Imported, Refusal> {
    let address = || {
        r.key.parse::<Address>().map_err(|_| Refusal::new(Code::RecordChainBroken, "an address for key", r.key.clone()))
    };
    Ok(match r.kind {
        Kind::Cluster => Imported::Cluster(r.key.parse()?, routing::traits_in(&r.payload)),
        Kind::Bundle => bundle(r)?.map_or(Imported::Ignored, Imported::Bundle),
        Kind::AuthorityDenial => {
            let until = object(r)?.unwrap_or_default();
            if is_authority(&r.key) { Imported::AuthorityDenial(r.key.clone(), until) } else { Imported::Ignored }
        }
        Kind::Policy => {
            let policy: Option<Policy> = object(r)?;
            // What a cell tells its agents is not what it tells its peers.
            let resolved = |p: &Policy| p.from.iter().chain([&p.target]).any(|set| matches!(set, Peers::Ids(..)));
            let ours = policy
                .clone()
                .is_none_or(|p| !resolved(&p) && ambit_policy::check_owner(&Document::Policy(p), &r.origin).is_ok());
            if ours { Imported::Policy(r.key.parse()?, policy) } else { Imported::Ignored }
        }
        Kind::Service => {
            let service: Option<Service> = object(r)?;
            let ours =
                service.clone().is_none_or(|v| ambit_policy::check_owner(&Document::Service(v), &r.origin).is_ok());
            if ours { Imported::Service(r.key.parse()?, service) } else { Imported::Ignored }
        }
        Kind::Group => {
            let group: Option<Group> = object(r)?;
            let fits = |g: &Group| g.name.as_str() == r.key && g.members.len() <= ambit_policy::MEMBERS_MAX;
            let ours = group.as_ref().is_none_or(fits);
            if ours { Imported::Group(r.key.parse()?, group) } else { Imported::Ignored }
        }
        Kind::Endpoint => {
            let endpoint: Option<Endpoint> = object(r)?;
            let address = address()?;
            let ours = endpoint.as_ref().is_none_or(|e| e.spiffe_id.trust_domain() == r.origin && e.address == address);
            if ours { Imported::Endpoint(address, endpoint) } else { Imported::Ignored }
        }
        Kind::NodeDenial => {
            let generation = object(r)?.unwrap_or_default();
            Imported::NodeDenial(r.key.parse()?, generation)
        }
        Kind::NodeAddress => {
            // Whose node it is says the origin: a peer's word is about leaves of its own trust domain only.
            // One that is no machine's leaves the node with none: its leaves are refused.
            let address: Option<NodeAddress> = object(r)?;
            Imported::NodeAddress(r.key.parse()?, address.filter(|a| super::node_address::is_of_a_node(a.address)))
        }
        Kind::JwtKeys if r.key == r.origin.as_str() => object(r)?.map_or(Imported::Ignored, Imported::JwtKeys),
        Kind::JwtKeys => Imported::Ignored,
        Kind::Standby if r.key == r.origin.as_str() => Imported::Standby(r.seq, object(r)?),
        Kind::Approvers if r.key == r.origin.as_str() => Imported::Approvers(object(r)?.unwrap_or_default()),
        Kind::Standby | Kind::Approvers => Imported::Ignored,
        Kind::Grant => {
            object(r)?.map_or(Ok(Imported::Ignored), |said| Ok(Imported::Grant(r.key.parse()?, Box::new(said))))?
        }
        Kind::Seen => object(r)?.map_or(Ok(Imported::Ignored), |seen| Ok(Imported::Seen(r.key.parse()?, seen)))?,
        Kind::IdDenial => {
            let id: SpiffeId = r.key.parse()?;
            // A peer speaks for its own identities; and a denial is never taken back by leaving it out.
            match object(r)? {
                Some(denial) if id.trust_domain() == r.origin => Imported::IdDenial(id, denial),
                Some(_) | None => Imported::Ignored,
            }
        }
        Kind::LeafDenial => {
            let key = r
                .key
                .split_once('/')
                .and_then(|(of, serial)| Some((of.to_owned(), serial_number(&hex::decode(serial).ok()?).to_vec())));
            let bad = || Refusal::new(Code::RecordChainBroken, "a key of authority and serial", r.key.clone());
            let (authority, serial) = key.ok_or_else(bad)?;
            let fits = is_authority(&authority) && (1..=SERIAL_BYTES_MAX).contains(&serial.len());
            let denial = object(r)?.filter(|_| fits);
            denial.map_or(Imported::Ignored, |denial| Imported::LeafDenial(authority, serial, denial))
        }
        Kind::Steer => {
            let steer: Option<Versioned<Steer>> = object(r)?;
            let key = routing::steer_key(&r.origin, &r.key)?;
            steer.map_or(Imported::Ignored, |steer| Imported::Steer(key, steer.get().clone()))
        }
    })
}

/// The name of an intermediate: its key identifier, 20 bytes, hexadecimal.
fn is_authority(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn object<T: DeserializeOwned>(r: &Record) -> Result<Option<T>, Refusal> {
    if r.payload.is_empty() {
        return Ok(None);
    }
    postcard::from_bytes(&r.payload)
        .map(Some)
        .map_err(|e| Refusal::new(Code::RecordChainBroken, format!("a readable {:?}", r.kind), e.to_string()))
}

/// What a record of a bundle says. Those of 0.1 named a sequence only, and said nothing of roots.
fn bundle(r: &Record) -> Result<Option<BundleRecord>, Refusal> {
    if r.key != r.origin.as_str() || postcard::take_from_bytes::<u64>(&r.payload).is_ok_and(|(_, rest)| rest.is_empty())
    {
        return Ok(None);
    }
    object(r)
}

/// A bundle is taken whole or not at all: later than the one known, neither empty nor without its one active root, and
/// nothing in it that was in a former one and left it.
fn take_bundle(s: &mut State, origin: &TrustDomain, peer: &mut PeerRow, bundle: BundleRecord) {
    let mut known = s.peer_roots.get(origin).cloned().unwrap_or_else(|| PeerRoots {
        roots: vec![RootEntry { der: peer.root_der.clone(), state: RootState::Active }],
        gone: Vec::new(),
    });
    let back = |root: &RootEntry| known.gone.contains(&root_id(&root.der)) || root.state == RootState::Revoked;
    let active = bundle.roots.iter().filter(|root| root.state == RootState::Active).count();
    if bundle.sequence <= peer.bundle_sequence
        || active != 1
        || bundle.roots.len() > FOREIGN_ROOTS_MAX
        || bundle.roots.iter().any(back)
        || bundle.roots.iter().any(|root| !(1..=ROOT_BYTES_MAX).contains(&root.der.len()))
    {
        return;
    }
    for root in &known.roots {
        if !bundle.roots.iter().any(|kept| kept.der == root.der) {
            known.gone.push(root_id(&root.der));
        }
    }
    let excess = known.gone.len().saturating_sub(GONE_ROOTS_MAX);
    known.gone.drain(..excess);
    known.roots = bundle.roots;
    if let Some(active) = known.roots.iter().find(|root| root.state == RootState::Active) {
        (peer.root_der, peer.fingerprint) = (active.der.clone(), root_id(&active.der));
    }
    peer.bundle_sequence = bundle.sequence;
    s.peer_roots.put(&mut s.journal, origin.clone(), known);
}

/// How many more objects of each kind may be taken from one origin.
struct Room {
    clusters: usize,
    policies: usize,
    services: usize,
    groups: usize,
    endpoints: usize,
    denials: usize,
    ids: usize,
    leaves: usize,
    authority_denials: usize,
    node_addresses: usize,
}

impl Room {
    fn of(s: &State, origin: &TrustDomain) -> Room {
        let left = |max: usize, held: usize| max.saturating_sub(held);
        let of_origin = |td: &&TrustDomain| *td == origin;
        let clusters = s.foreign_clusters.iter().map(|(_, c)| &c.origin).filter(of_origin).count();
        let policies = s.policies.iter().map(|((td, _), _)| td).filter(of_origin).count();
        let services = s.services.iter().map(|((td, _), _)| td).filter(of_origin).count();
        let groups = s.groups.iter().map(|((td, _), _)| td).filter(of_origin).count();
        let endpoints = s.endpoints.from((origin.clone(), Address::FIRST)).map(|((td, _), _)| td);
        let denials = s.node_denials.from((origin.clone(), NodeId([0; 32]))).map(|((td, _), _)| td);
        let ids = s.id_denials.iter().map(|((td, _), _)| td).filter(of_origin).count();
        let leaves = s.leaf_denials.iter().map(|((td, _, _), _)| td).filter(of_origin).count();
        let authorities = s.authority_denials.from((origin.clone(), String::new())).map(|((td, _), _)| td);
        let nodes = s.node_addresses.from((origin.clone(), NodeId([0; 32]))).map(|((td, _), _)| td);
        Room {
            ids: left(FOREIGN_SVID_DENIALS_MAX, ids),
            leaves: left(FOREIGN_SVID_DENIALS_MAX, leaves),
            clusters: left(FOREIGN_CLUSTERS_MAX, clusters),
            policies: left(FOREIGN_POLICIES_MAX, policies),
            services: left(FOREIGN_SERVICES_MAX, services),
            groups: left(FOREIGN_SERVICES_MAX, groups),
            endpoints: left(FOREIGN_ENDPOINTS_MAX, endpoints.take_while(of_origin).count()),
            denials: left(FOREIGN_DENIALS_MAX, denials.take_while(of_origin).count()),
            authority_denials: left(FOREIGN_AUTHORITY_DENIALS_MAX, authorities.take_while(of_origin).count()),
            node_addresses: left(FOREIGN_NODE_ADDRESSES_MAX, nodes.take_while(of_origin).count()),
        }
    }
}

/// Writes or removes one object of a peer, within its room.
fn put<K, V>(journal: &mut Journal, table: &mut Table<K, V>, room: &mut usize, key: K, value: Option<V>)
where
    K: Ord + Clone + Serialize + DeserializeOwned,
    V: Clone + Serialize + DeserializeOwned,
{
    match value {
        Some(value) if table.contains(&key) => table.put(journal, key, value),
        Some(value) if *room > 0 => {
            *room -= 1;
            table.put(journal, key, value);
        }
        Some(_) => {}
        None => *room += usize::from(table.remove(journal, &key).is_some()),
    }
}

fn take(s: &mut State, at: At, origin: &TrustDomain, object: Imported, room: &mut Room) {
    let (revision, by) = (Revision(at.index.0), format!("peer {origin}"));
    match object {
        Imported::Cluster(id, traits) => {
            // A name belongs to the first who claimed it; endpoints are taken only under their origin's own names.
            if !s.clusters.contains(&id) && !s.foreign_clusters.contains(&id) {
                let row = ForeignCluster { origin: origin.clone() };
                put(&mut s.journal, &mut s.foreign_clusters, &mut room.clusters, id.clone(), Some(row));
            }
            if let Some(traits) = traits {
                routing::take_traits(s, origin, &id, traits);
            }
        }
        Imported::Policy(name, object) => {
            let key = (origin.clone(), name);
            let row = object.map(|object| Owned { object, revision, written_by: by });
            s.reindex_policy(&key, |s| put(&mut s.journal, &mut s.policies, &mut room.policies, key.clone(), row));
        }
        Imported::Group(name, object) => {
            let row = object.map(|object| Owned { object, revision, written_by: by });
            put(&mut s.journal, &mut s.groups, &mut room.groups, (origin.clone(), name), row);
        }
        Imported::Service(name, object) => {
            // The first to claim a virtual address keeps it; a peer cannot take over one that is in use.
            let key = (origin.clone(), name);
            let taken = object.as_ref().is_some_and(|o| {
                s.services().any(|(k, row)| *k != key && row.object.address == o.address)
                    || addresses::endpoint_origin(s, o.address).is_some()
            });
            if !taken {
                let row = object.map(|object| Owned { object, revision, written_by: by });
                put(&mut s.journal, &mut s.services, &mut room.services, key, row);
            }
        }
        Imported::Endpoint(address, object) => {
            if object.as_ref().is_none_or(|e| may_be_at(s, origin, e)) {
                let key = (origin.clone(), address);
                let id = object.as_ref().map(|e| e.spiffe_id.clone());
                if object.is_none()
                    && let Some(left) = s.endpoints.get(&key).map(|row| row.object.clone())
                {
                    // The peer's denial came first.
                    let put_out =
                        s.node_denials.get(&(origin.clone(), left.node)).is_some_and(|g| *g >= left.generation);
                    let denied = s.id_denials.get(&(origin.clone(), left.spiffe_id.clone())).is_some();
                    s.leave(at.stamp, [address], put_out || denied);
                }
                let row = object.map(|object| Owned { object, revision, written_by: by });
                put(&mut s.journal, &mut s.endpoints, &mut room.endpoints, key.clone(), row);
                if let Some(id) = id.filter(|_| s.endpoints.contains(&key)) {
                    super::objects::number(s, &id);
                }
            }
        }
        Imported::NodeDenial(node, generation) => {
            let key = (origin.clone(), node);
            let known = s.node_denials.get(&key).copied().unwrap_or_default();
            put(&mut s.journal, &mut s.node_denials, &mut room.denials, key, Some(known.max(generation)));
        }
        Imported::JwtKeys(keys) => super::jwt::foreign(s, origin, keys),
        Imported::IdDenial(id, denial) => {
            let key = (origin.clone(), id);
            let row = s.id_denials.get(&key).map_or(denial, |known| known.then(denial));
            put(&mut s.journal, &mut s.id_denials, &mut room.ids, key, Some(row));
        }
        Imported::LeafDenial(authority, serial, denial) => {
            let key = (origin.clone(), authority, serial);
            put(&mut s.journal, &mut s.leaf_denials, &mut room.leaves, key, Some(denial));
        }
        Imported::AuthorityDenial(id, until) => {
            let key = (origin.clone(), id);
            let known = s.authority_denials.get(&key).copied().unwrap_or_default();
            let until = Some(known.max(until));
            put(&mut s.journal, &mut s.authority_denials, &mut room.authority_denials, key, until);
        }
        Imported::NodeAddress(node, address) => {
            let key = (origin.clone(), node);
            let (former, now) = (s.node_addresses.get(&key).map(|row| row.address), address.map(|row| row.address));
            if let Some(former) = former.filter(|former| Some(*former) != now) {
                s.leave(at.stamp, [former.into()], now.is_none());
            }
            put(&mut s.journal, &mut s.node_addresses, &mut room.node_addresses, key, address);
        }
        Imported::Steer(key, steer) => routing::take_steer(s, key, steer),
        Imported::Standby(seq, naming) => drop(standby::heard(s, origin, seq, naming)),
        Imported::Approvers(keys) => {
            // More than a cell may have are none.
            let keys = if keys.len() <= APPROVERS_MAX { keys } else { ApproverKeys::new() };
            s.approver_keys.put(&mut s.journal, origin.clone(), keys);
        }
        Imported::Grant(home, said) => grant::heard(s, at, origin, &home, *said),
        Imported::Seen(home, Seen::Grant(epoch)) => grant::was_heard(s, at, origin, &home, epoch),
        Imported::Seen(home, Seen::Naming(seq)) => {
            if s.cell().is_some_and(|cell| cell.trust_domain == home) {
                standby::was_heard(s, origin, seq);
            }
        }
        Imported::Late(record) => grant::hold(s, *record),
        Imported::Bundle(_) | Imported::Ignored => {}
    }
}

/// A peer's endpoint stands in a cluster of that peer, at an address that nobody else holds.
fn may_be_at(s: &State, origin: &TrustDomain, endpoint: &Endpoint) -> bool {
    s.foreign_clusters.get(&endpoint.cluster).is_some_and(|c| c.origin == *origin)
        && addresses::endpoint_origin(s, endpoint.address).is_none_or(|holder| holder == *origin)
        && addresses::service_at(s, endpoint.address).is_none()
}
