//! A cell in a test: the real state machine, a real root and issuing key, leaves from commits only.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

pub(crate) mod agent;
pub(crate) mod between;
pub(crate) mod foreign;
pub(crate) mod issuer;
pub(crate) mod local;
pub(crate) mod process;
pub(crate) mod replica;
pub(crate) mod stage;
pub(crate) mod told;
pub(crate) mod tpm;

use ambit_agent::issued::Svid;
use ambit_agent::view::View;
use ambit_identity::tls::certified;
use ambit_identity::{Csr, IssuingKey, JwtKey, Root, SvidKey, issue, issue_jwt};
use ambit_model::appraisal::PcrBank;
use ambit_model::{
    Audience, ClusterId, Entry, EntryExtras, Extras, Generation, Lifetime, NodeId, RaftIndex, Refusal, Stamp, SvidTtl,
    TrustDomain,
};
use ambit_proto::v1;
use ambit_state::command::{Admission, LeafRequest, Seen};
use ambit_state::objects::{AkFacts, BootPcrs, CellRow, Counters, EkFacts, ImaPoint, KeySetRow, Member, PolicyRef};
use ambit_state::{Applied, Command, LogEntry, State};
use rustls::sign::CertifiedKey;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn now() -> Stamp {
    Stamp(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap())
}

pub(crate) struct Cell {
    pub(crate) td: TrustDomain,
    root: Root,
    key: IssuingKey,
    state: State,
    index: u64,
    node: NodeId,
    jwt: Option<JwtKey>,
}

impl Cell {
    /// A cell of one replica with one enrolled node, whose id is made of `node`.
    pub(crate) fn founded(td: &str, node: u8) -> Cell {
        let td: TrustDomain = td.parse().unwrap();
        let root = Root::create(&td, now(), [node; 16]).unwrap();
        let key = SvidKey::generate().unwrap();
        let lifetime = Lifetime { not_before: now().minus_ms(60_000), not_after: now().plus_ms(86_400_000) };
        let intermediate = root.found(1, &Csr::parse(&key.csr().unwrap()).unwrap(), lifetime).unwrap();
        Cell::under(td, node, root, IssuingKey::new(key, intermediate).unwrap())
    }

    /// Whoever holds a downstream authority of this cell, and plays the cell with it: it signs whatever the cell would.
    pub(crate) fn pretender(&mut self) -> Cell {
        let extras = Extras::new(EntryExtras { downstream: true, ..EntryExtras::NONE }).unwrap();
        let nodes = [self.node].into();
        let site =
            Entry { extras, nodes, ..Entry::try_from(&self.entry("plain-site", &["cgroup:site"], &[])).unwrap() };
        self.run(Command::CreateEntries(vec![Entry { id: "site".parse().unwrap(), ..site }])).outcome.unwrap();
        let key = SvidKey::generate().unwrap();
        let csr = Csr::parse(&key.csr().unwrap()).unwrap();
        let leaves = vec![LeafRequest { entry: "site".parse().unwrap(), key_hash: [3; 32] }];
        let authority = self.key.authority().to_owned();
        let issue = Command::Issue { node: self.node, generation: Generation(1), authority, leaves };
        let svid = self.run(issue).into_issuances().unwrap().remove(0).unwrap();
        let committed = self.run(Command::NewDownstream {
            node: self.node,
            generation: Generation(1),
            serial: svid.get().serial,
            key_hash: csr.spki_sha256(),
            lifetime_ms: 86_400_000,
        });
        let intermediate = self.root.downstream(&committed.into_downstream().unwrap(), &csr).unwrap();
        let root_key = SvidKey::from_pkcs8(&self.root.key().pkcs8()).unwrap();
        let root = Root::pair(&self.td, self.root.der().clone(), root_key).unwrap();
        let [node, ..] = self.node.0;
        Cell::under(self.td.clone(), node, root, IssuingKey::new(key, intermediate).unwrap())
    }

    /// Whoever has the key of an authority above the replicas' intermediates, and its name: leaves are under an intermediate
    /// that the cell knows nothing of.
    pub(crate) fn thief(&mut self) -> (Cell, String) {
        let high = Root::create(&self.td, now(), [9; 16]).unwrap();
        let prepare = Command::PrepareRoot(high.der().to_vec(), [(1, vec![1])].into());
        let prepared = self.run(prepare).into_root().unwrap();
        let certified = self.root.cross_sign(&prepared, high.der()).unwrap();
        let key = SvidKey::generate().unwrap();
        let lifetime = Lifetime { not_before: now().minus_ms(60_000), not_after: now().plus_ms(86_400_000) };
        let intermediate = high.found(1, &Csr::parse(&key.csr().unwrap()).unwrap(), lifetime).unwrap();
        let root_key = SvidKey::from_pkcs8(&self.root.key().pkcs8()).unwrap();
        let root = Root::pair(&self.td, self.root.der().clone(), root_key).unwrap();
        let [node, ..] = self.node.0;
        let issuer = IssuingKey::new(key, intermediate).unwrap().under(vec![certified]);
        (Cell::under(self.td.clone(), node, root, issuer), ambit_identity::name_of(high.der()).unwrap())
    }

    fn under(td: TrustDomain, node: u8, root: Root, key: IssuingKey) -> Cell {
        let row = CellRow::founded(td.clone(), root.der().to_vec());
        let member = Member {
            address: "127.0.0.1:1".into(),
            authority: key.authority().to_owned(),
            authority_not_after: key.not_after(),
            wrap_key: vec![],
            record_key: [1; 32],
        };
        let mut cell =
            Cell { td: td.clone(), root, key, state: State::new(), index: 0, node: NodeId([node; 32]), jwt: None };
        let cluster: ClusterId = td.as_str().parse().unwrap();
        cell.run(Command::FoundCell(row, 1, member, KeySetRow::default())).outcome.unwrap();
        cell.run(Command::RegisterCluster(cluster.clone(), vec![], 30_000)).outcome.unwrap();
        cell.run(Command::AllowEk(cluster, vec![cell.node])).outcome.unwrap();
        cell.admit(1);
        cell
    }

    fn run(&mut self, command: Command) -> Applied {
        self.index += 1;
        let entry = LogEntry { stamp: now(), client: [9; 32], request: [0; 16], command };
        self.state.apply(RaftIndex(self.index), &entry)
    }

    /// Admits the node once more: its generation rises.
    pub(crate) fn admit(&mut self, nonce: u8) {
        self.admit_key(nonce, [7; 32]);
    }

    /// The same for the key of `csr`: what a replica would answer, leaf first, and the generation.
    pub(crate) fn admit_csr(&mut self, nonce: u8, csr: &[u8]) -> (Vec<Vec<u8>>, Generation) {
        let csr = Csr::parse(csr).unwrap();
        let committed = self.admit_key(nonce, csr.spki_sha256()).into_issuances().unwrap().remove(0).unwrap();
        let generation = committed.get().binding.unwrap().1;
        let chain = issue(committed, &csr, &self.key).unwrap();
        (chain.iter().map(|c| c.to_vec()).collect(), generation)
    }

    /// What a replica of this cell shows.
    pub(crate) fn replica(&self) -> Arc<CertifiedKey> {
        let key = SvidKey::generate().unwrap();
        let csr = Csr::parse(&key.csr().unwrap()).unwrap();
        let lifetime = Lifetime { not_before: now().minus_ms(60_000), not_after: now().plus_ms(3_600_000) };
        let mut chain = self.key.replica_leaf(1, &self.td, lifetime, &csr).unwrap();
        // Whoever pinned the root has to see it.
        chain.push(self.root.der().clone());
        certified(chain, &key).unwrap()
    }

    fn admit_key(&mut self, nonce: u8, key_hash: [u8; 32]) -> Applied {
        let admission = Admission {
            node: self.node,
            cluster: self.td.as_str().parse().unwrap(),
            nonce: [nonce; 32],
            deadline: now().plus_ms(60_000),
            join_token: None,
            endorsement_revision: self.state.cell().unwrap().endorsement_revision,
            policy_revision: self.state.cell().unwrap().policy_revision,
            ak: AkFacts { name: vec![1], ..AkFacts::default() },
            ek: EkFacts { class: "lab".into(), ..EkFacts::default() },
            seen: Seen {
                counters: Counters { resets: 1, restarts: 0, clock: u64::from(nonce) },
                firmware_version: 1,
                ima: ImaPoint::default(),
                pcrs: Some(BootPcrs { bank: PcrBank::Sha256, values: Default::default() }),
                boot_pcrs_sha256: [1; 32],
                boot_log_sha256: [1; 32],
                policy: PolicyRef { name: "any".parse().unwrap(), version: 1 },
                trust: Default::default(),
                evidence_sha256: [1; 32],
                evidence_depth: 0,
            },
            key_hash,
            authority: self.key.authority().to_owned(),
            claims: "{}".into(),
        };
        let applied = self.run(Command::AdmitNode(admission));
        applied.outcome.as_ref().unwrap();
        applied
    }

    /// Registers a workload recognised by `selectors`.
    pub(crate) fn entry(&mut self, id: &str, selectors: &[&str], federates_with: &[&str]) -> v1::Entry {
        let message = v1::Entry {
            id: id.into(),
            spiffe_id: self.id(id),
            cluster: self.td.to_string(),
            selectors: selectors.iter().map(|s| (*s).to_owned()).collect(),
            federates_with: federates_with.iter().map(|s| (*s).to_owned()).collect(),
            ..Default::default()
        };
        let entry = Entry::try_from(&message).unwrap();
        self.run(Command::CreateEntries(vec![entry])).outcome.unwrap();
        message
    }

    /// An SVID of an entry, issued as a replica would: committed, applied, signed.
    pub(crate) fn svid(&mut self, id: &str) -> Arc<Svid> {
        let key = SvidKey::generate().unwrap();
        let csr = Csr::parse(&key.csr().unwrap()).unwrap();
        let command = Command::Issue {
            node: self.node,
            generation: Generation(1),
            authority: self.key.authority().to_owned(),
            leaves: vec![LeafRequest { entry: id.parse().unwrap(), key_hash: csr.spki_sha256() }],
        };
        let committed = self.run(command).into_issuances().unwrap().remove(0).unwrap();
        let not_after = committed.get().lifetime.not_after;
        let chain = issue(committed, &csr, &self.key).unwrap();
        Arc::new(Svid {
            id: self.id(id).parse().unwrap(),
            key_pkcs8: key.pkcs8(),
            chain_der: chain.iter().map(|c| c.to_vec()).collect(),
            generation: Generation(1),
            authority: self.key.authority().to_owned(),
            since: now(),
            not_after,
        })
    }

    /// One of the same identity that is bound to no node, as a downstream authority's or a minted one.
    pub(crate) fn unbound_svid(&mut self, id: &str) -> Arc<Svid> {
        let key = SvidKey::generate().unwrap();
        let csr = Csr::parse(&key.csr().unwrap()).unwrap();
        let spiffe_id = self.id(id).parse().unwrap();
        let command = Command::MintX509 {
            spiffe_id: self.id(id).parse().unwrap(),
            dns_names: vec![],
            ttl: SvidTtl::DEFAULT,
            key_hash: csr.spki_sha256(),
            authority: self.key.authority().to_owned(),
            by: "ada".into(),
        };
        let committed = self.run(command).into_issuances().unwrap().remove(0).unwrap();
        let not_after = committed.get().lifetime.not_after;
        let chain = issue(committed, &csr, &self.key).unwrap();
        Arc::new(Svid {
            id: spiffe_id,
            key_pkcs8: key.pkcs8(),
            chain_der: chain.iter().map(|c| c.to_vec()).collect(),
            generation: Generation(1),
            authority: self.key.authority().to_owned(),
            since: now(),
            not_after,
        })
    }

    /// The chain for a CSR under an entry, as a replica would answer.
    pub(crate) fn leaf(&mut self, entry: &str, csr: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let csr = Csr::parse(csr)?;
        let command = Command::Issue {
            node: self.node,
            generation: self.state.node(&self.node).unwrap().generation,
            authority: self.key.authority().to_owned(),
            leaves: vec![LeafRequest { entry: entry.parse()?, key_hash: csr.spki_sha256() }],
        };
        let committed = self.run(command).into_issuances()?.remove(0)?;
        Ok(issue(committed, &csr, &self.key)?.iter().map(|der| der.to_vec()).collect())
    }

    /// A key that signs tokens from now on, in place of the one before.
    pub(crate) fn jwt_authority(&mut self) {
        let key = JwtKey::generate().unwrap();
        let wrapped = std::collections::BTreeMap::from([(1, vec![1])]);
        self.run(Command::PutJwtAuthority(key.spki().to_vec(), wrapped)).outcome.unwrap();
        self.jwt = Some(key);
    }

    /// Another key signs from now on, at an operator's word, and tokens by the one before are to be had anew.
    pub(crate) fn taint_jwt(&mut self) {
        let former = self.jwt.as_ref().expect("a JWT authority").kid().to_owned();
        self.jwt_authority();
        let kid = self.jwt.as_ref().expect("a JWT authority").kid().to_owned();
        self.run(Command::ActivateJwtAuthority(kid)).outcome.unwrap();
        self.run(Command::TaintJwtAuthority(former)).outcome.unwrap();
    }
    /// Names of the keys whose tokens are to be had anew.
    pub(crate) fn tainted_jwt(&self) -> Vec<String> {
        self.state.tainted_jwt().into_iter().collect()
    }

    /// A token of an entry, issued as a replica would: committed, applied, signed.
    pub(crate) fn token(&mut self, entry: &str, audience: &[String]) -> Result<String, Refusal> {
        let audience = Audience::new(audience.to_vec())?;
        let (node, generation) = (self.node, self.state.node(&self.node).unwrap().generation);
        let kid = self.jwt.as_ref().expect("a JWT authority").kid().to_owned();
        let (entry, audience_sha256) = (entry.parse().unwrap(), audience.sha256());
        let committed = self.run(Command::IssueJwt { node, generation, kid, entry, audience_sha256 }).into_token()?;
        Ok(issue_jwt(committed, &audience, None, self.jwt.as_ref().unwrap())?.to_string())
    }

    pub(crate) fn id(&self, path: &str) -> String {
        format!("spiffe://{}/{path}", self.td)
    }
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }
    pub(crate) fn bundle(&self) -> v1::Bundle {
        let roots_der = vec![self.root.der().to_vec()];
        let known = self.state.jwt_bundles().remove(&self.td).unwrap_or_default();
        let jwt_authorities = known.iter().map(Into::into).collect();
        v1::Bundle { trust_domain: self.td.to_string(), sequence: 1, roots_der, jwt_authorities }
    }
    /// A slice of this cell that knows the bundles of `peers`.
    pub(crate) fn slice(&self, revision: u64, peers: &[&Cell]) -> v1::Slice {
        v1::Slice {
            revision,
            stamp_ms: now().0,
            trust_domain: self.td.to_string(),
            cluster: self.td.to_string(),
            bundles: std::iter::once(self.bundle()).chain(peers.iter().map(|p| p.bundle())).collect(),
            ..Default::default()
        }
    }
    pub(crate) fn view(&self, slice: v1::Slice) -> Arc<View> {
        let cluster = self.td.as_str().parse().unwrap();
        Arc::new(View::parse(slice, &self.td, &cluster).unwrap())
    }
}

pub(crate) fn allow(name: &str, target: &str, from: &str, ports: &[u16]) -> v1::Policy {
    v1::Policy {
        origin: target.split('/').nth(2).unwrap().into(),
        name: name.into(),
        target: target.into(),
        action: v1::Action::Allow as i32,
        from: vec![from.into()],
        ports: ports.iter().map(|p| u32::from(*p)).collect(),
        resolved: true,
        ..Default::default()
    }
}
