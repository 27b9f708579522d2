//! A slice after parsing: everything this node knows, of one revision, in types. Replaced whole, never edited.

use crate::denials::{Denials, authority_name};
use crate::pods::Pod;
use ambit_model::policy::{Egress, Endpoint, NodeAddress, Policy, Service};
use ambit_model::{
    Address, Bundle, ClusterId, Code, Entry, EntryId, Foreign, NodeId, NumericIdentity, Own, Refusal, Revision,
    Routing, Selector, SpiffeId, Stamp, TrustDomain,
};
use ambit_policy::{EgressSet, Index, PolicySet};
use ambit_proto::routing::routing;
use ambit_proto::{convert, v1};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// What the slice of one revision says.
#[derive(Clone, Debug)]
pub struct View {
    /// The cell's revision.
    pub revision: Revision,
    /// When it was made (the leader's time).
    pub stamp: Stamp,
    /// The own trust domain.
    pub trust_domain: TrustDomain,
    /// The own cluster.
    pub cluster: ClusterId,
    /// The own roots.
    pub own: Bundle<Own>,
    /// The roots of peers.
    pub foreign: Vec<Bundle<Foreign>>,
    /// What may run here.
    pub entries: Vec<Entry>,
    /// Who may speak to whom.
    pub policies: PolicySet,
    /// The same, compiled: what every decision asks.
    pub rules: Index,
    /// Virtual services.
    pub services: Vec<Service>,
    /// Whose they are, by address and port.
    pub origins: BTreeMap<(Address, u16), TrustDomain>,
    /// Where their calls go beside distance and weights.
    pub routing: Routing,
    /// Who is behind which address.
    pub endpoints: BTreeMap<IpAddr, Endpoint>,
    /// From where tunnels of nodes may come, by whose they are: who calls from elsewhere is refused, whatever it shows.
    pub callers: BTreeMap<(TrustDomain, NodeId), NodeAddress>,
    /// The kernel's names of identities.
    pub numbers: BTreeMap<SpiffeId, NumericIdentity>,
    /// Whom to refuse, as of this revision. In force is what [`crate::denials::Lane`] says: newer lists come ahead of slices.
    pub denials: Denials,
    /// Intermediates of the own cell whose leaves are to be asked for anew.
    pub tainted: BTreeSet<String>,
    /// JWT authorities of the own cell whose tokens are to be asked for anew.
    pub tainted_jwt: BTreeSet<String>,
    /// Where workloads of this node may connect to outside of the mesh.
    pub egress: EgressSet,
    /// Addresses in ranges of these that are not outside, whoever may reach them in a tunnel.
    pub meshed: BTreeSet<Ipv4Addr>,
    /// Addresses that are of the mesh, in the ranges from which policies let callers in by address: nobody comes from there so.
    pub claimed: BTreeSet<Ipv4Addr>,
    /// How far peers' records are in, handed back in the acknowledgement.
    pub imported: Vec<v1::ImportedSeq>,
}

impl View {
    /// Parses a slice sent to a node of `cluster` in `trust_domain`. Anything unclear refuses the slice whole: what is
    /// in force stays in force.
    pub fn parse(slice: v1::Slice, trust_domain: &TrustDomain, cluster: &ClusterId) -> Result<Self, Refusal> {
        let expect = |what: &str, expected: &str, found: &str| match expected == found {
            true => Ok(()),
            false => Err(Refusal::new(Code::BadRequest, format!("a slice of {what} {expected}"), found)),
        };
        expect("trust domain", trust_domain.as_str(), &slice.trust_domain)?;
        expect("cluster", cluster.as_str(), &slice.cluster)?;
        let (own, foreign) = bundles(&slice.bundles, trust_domain)?;
        let known = foreign.iter().map(|b| b.trust_domain().clone()).chain([trust_domain.clone()]).collect();
        let policies = policies(&slice.policies, &slice.unmeshed, known)?;
        Ok(Self {
            revision: Revision(slice.revision),
            stamp: Stamp(slice.stamp_ms),
            trust_domain: trust_domain.clone(),
            cluster: cluster.clone(),
            own,
            foreign,
            entries: slice.entries.iter().map(Entry::try_from).collect::<Result<_, _>>()?,
            rules: policies.compile(),
            policies,
            services: slice.services.iter().map(Service::try_from).collect::<Result<_, _>>()?,
            origins: origins(&slice.services)?,
            routing: routing(&slice.clusters, &slice.steers)?,
            endpoints: endpoints(&slice.endpoints, trust_domain)?,
            callers: callers(&slice.callers)?,
            numbers: numbers(&slice.identities)?,
            denials: Denials::parse(Revision(slice.revision), &slice.denials, &slice.authority_denials)?
                .with_svids(&slice.id_denials, &slice.leaf_denials)?,
            tainted: slice.tainted_authorities.iter().map(|name| authority_name(name)).collect::<Result<_, _>>()?,
            tainted_jwt: slice.tainted_jwt_authorities.into_iter().collect(),
            egress: egress(&slice.egress)?,
            meshed: slice.meshed.iter().map(|address| convert::address(address)).collect::<Result<_, _>>()?,
            claimed: slice.claimed.iter().map(|address| convert::address(address)).collect::<Result<_, _>>()?,
            imported: slice.imported,
        })
    }

    /// Whether the mesh knows somebody at this address: it is reached in a tunnel, or not at all.
    pub fn knows(&self, address: Ipv4Addr) -> bool {
        self.endpoints.contains_key(&IpAddr::V4(address))
            || self.meshed.contains(&address)
            || self.services.iter().any(|service| service.address == address)
    }

    /// Whether somebody at this address is of the mesh, as far as this node knows: who comes from there comes as who it is, or not
    /// at all.
    pub fn claims(&self, address: Ipv4Addr) -> bool {
        self.knows(address) || self.claimed.contains(&address)
    }

    /// The entry that a process or pod with the selectors `found` has in the mesh: the one that asks for most; of equals
    /// the first by name, so that every agent decides alike.
    pub fn entry_of(&self, found: &BTreeSet<Selector>) -> Option<&Entry> {
        self.entries_of(found).max_by(|a, b| a.selectors.len().cmp(&b.selectors.len()).then_with(|| b.id.cmp(&a.id)))
    }

    /// Every entry that recognises the selectors `found` (SPIFFE: a workload may have several identities).
    pub fn entries_of<'a, 'b>(
        &'a self,
        found: &'b BTreeSet<Selector>,
    ) -> impl Iterator<Item = &'a Entry> + use<'a, 'b> {
        self.entries.iter().filter(|e| e.cluster == self.cluster && e.recognises(found))
    }

    /// Whether a process with the selectors `found` may be a workload if its program has the right SHA-256.
    pub fn asks_sha256(&self, found: &BTreeSet<Selector>) -> bool {
        let is_hash = |selector: &Selector| matches!(selector, Selector::UnixSha256(_));
        let holds = |selector: &Selector| selector.is_of_node() || is_hash(selector) || found.contains(selector);
        let of_us = self.entries.iter().filter(|e| e.cluster == self.cluster);
        of_us.into_iter().any(|e| e.selectors.iter().any(is_hash) && e.selectors.iter().all(holds))
    }

    /// Every entry that one of the pods can show (its Workload API answer), not only its entry in the mesh.
    pub fn entries_of_pods<'a>(&self, pods: impl IntoIterator<Item = &'a Pod>) -> BTreeSet<EntryId> {
        let of_pod = |pod: &Pod| self.entries_of(&pod.selectors()).map(|e| e.id.clone()).collect::<Vec<_>>();
        pods.into_iter().flat_map(of_pod).collect()
    }

    /// The pods that are somebody, by pod name.
    pub fn workloads<'a>(&self, pods: impl IntoIterator<Item = &'a Pod>) -> BTreeMap<String, Workload> {
        pods.into_iter()
            .filter_map(|pod| {
                let entry = self.entry_of(&pod.selectors())?;
                let number = *self.numbers.get(&entry.spiffe_id)?;
                Some((pod.name.clone(), Workload { pod: pod.clone(), entry: entry.clone(), number }))
            })
            .collect()
    }
}

/// A pod of this node that an entry recognises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The pod.
    pub pod: Pod,
    /// Who it is.
    pub entry: Entry,
    /// The kernel's name of that identity.
    pub number: NumericIdentity,
}

fn bundles(found: &[v1::Bundle], own_name: &TrustDomain) -> Result<(Bundle<Own>, Vec<Bundle<Foreign>>), Refusal> {
    let mut seen = BTreeSet::new();
    let (mut own, mut foreign) = (None, Vec::new());
    for message in found {
        if !seen.insert(message.trust_domain.as_str()) {
            return Err(Refusal::new(Code::BadRequest, "one bundle per trust domain", message.trust_domain.as_str()));
        }
        if message.trust_domain == own_name.as_str() {
            own = Some(convert::bundle::<Own>(message)?);
        } else {
            foreign.push(convert::bundle::<Foreign>(message)?);
        }
    }
    let own = own.ok_or_else(|| Refusal::new(Code::BadRequest, format!("the bundle of {own_name}"), "none"))?;
    Ok((own, foreign))
}

/// Those about callers in the mesh, and those about callers outside of it.
fn policies(
    meshed: &[v1::Policy],
    unmeshed: &[v1::Policy],
    known: BTreeSet<TrustDomain>,
) -> Result<PolicySet, Refusal> {
    let mut set = PolicySet::new(known);
    for (message, by_address) in meshed.iter().map(|m| (m, false)).chain(unmeshed.iter().map(|m| (m, true))) {
        let policy = Policy::try_from(message)?;
        if policy.extras.unmeshed.is_empty() == by_address {
            let expected = "policies about callers by identity, and others about callers by address";
            return Err(Refusal::new(Code::BadRequest, expected, message.name.as_str()));
        }
        set.insert(message.origin.parse()?, policy);
    }
    Ok(set)
}

/// One cell writes them, each name once.
fn egress(found: &[v1::Egress]) -> Result<EgressSet, Refusal> {
    let all = found.iter().map(Egress::try_from).collect::<Result<Vec<_>, _>>()?;
    let names: BTreeSet<_> = all.iter().map(|egress| &egress.name).collect();
    if names.len() < all.len() {
        return Err(Refusal::new(Code::BadRequest, "each egress document once", "one twice"));
    }
    Ok(all.into_iter().collect())
}

/// Nobody can say who answers at an address that two claim. A workload of the own cell keeps its address; what only
/// others claim is reached by nobody. The rest of the slice stands: one peer's record must not hold up all news.
fn endpoints(found: &[v1::Endpoint], own: &TrustDomain) -> Result<BTreeMap<IpAddr, Endpoint>, Refusal> {
    let (mut ours, mut theirs, mut disputed) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    for message in found {
        let endpoint = Endpoint::try_from(message)?;
        let address = endpoint.address.ip();
        if endpoint.spiffe_id.trust_domain() == *own {
            if ours.insert(address, endpoint).is_some() {
                return Err(Refusal::new(Code::BadRequest, "one own endpoint per address", address.to_string()));
            }
        } else if theirs.insert(address, endpoint).is_some() {
            disputed.insert(address);
        }
    }
    theirs.retain(|address, endpoint| {
        let clear = !disputed.contains(address) && !ours.contains_key(address);
        if !clear {
            tracing::warn!(%address, id = %endpoint.spiffe_id, "endpoint left out: another one claims its address");
        }
        clear
    });
    ours.append(&mut theirs);
    Ok(ours)
}

/// Of two services at one address the first stands.
fn origins(found: &[v1::Service]) -> Result<BTreeMap<(Address, u16), TrustDomain>, Refusal> {
    let mut origins = BTreeMap::new();
    for message in found {
        let service = Service::try_from(message)?;
        let origin = message.origin.parse()?;
        origins.entry((service.address, service.port)).or_insert(origin);
    }
    Ok(origins)
}

fn callers(found: &[v1::NodeAddress]) -> Result<BTreeMap<(TrustDomain, NodeId), NodeAddress>, Refusal> {
    let mut by_node = BTreeMap::new();
    for message in found {
        let (node, address) = convert::node_address(message)?;
        if by_node.insert(node, address).is_some() {
            return Err(Refusal::new(Code::BadRequest, "one address per node", message.node.as_str()));
        }
    }
    Ok(by_node)
}

fn numbers(found: &[v1::NumericIdentity]) -> Result<BTreeMap<SpiffeId, NumericIdentity>, Refusal> {
    let (mut by_id, mut used) = (BTreeMap::new(), BTreeSet::new());
    for message in found {
        let number = NumericIdentity(message.number);
        let given = NumericIdentity::FIRST..NumericIdentity::END;
        if !given.contains(&number) || !used.insert(number) {
            let expected = format!("numeric identities of {} to {}, each once", given.start.0, given.end.0 - 1);
            return Err(Refusal::new(Code::BadRequest, expected, message.number.to_string()));
        }
        by_id.insert(message.spiffe_id.parse()?, number);
    }
    Ok(by_id)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn entry(id: &str, spiffe_id: &str, selectors: &[&str]) -> v1::Entry {
        v1::Entry {
            id: id.into(),
            spiffe_id: spiffe_id.into(),
            cluster: "west".into(),
            selectors: selectors.iter().map(|s| (*s).to_owned()).collect(),
            ..Default::default()
        }
    }

    pub(crate) fn slice() -> v1::Slice {
        let bundle = |td: &str| v1::Bundle { trust_domain: td.into(), sequence: 1, ..v1::Bundle::default() };
        let number = |id: &str, number| v1::NumericIdentity { spiffe_id: id.into(), number };
        v1::Slice {
            revision: 7,
            trust_domain: "west".into(),
            cluster: "west".into(),
            bundles: vec![bundle("west"), bundle("east")],
            entries: vec![
                entry("web", "spiffe://west/web", &["cgroup:web"]),
                entry("web-root", "spiffe://west/web-root", &["cgroup:web", "unix:uid:0"]),
                entry("any", "spiffe://west/any", &["unix:uid:7"]),
            ],
            identities: vec![
                number("spiffe://west/web", 256),
                number("spiffe://west/web-root", 257),
                number("spiffe://east/db", 258),
            ],
            ..Default::default()
        }
    }

    pub(crate) fn pod(name: &str, uid: u32, cgroup_id: u64) -> Pod {
        Pod {
            name: name.into(),
            cgroup: name.into(),
            cgroup_id,
            netns: "/run/netns/x".into(),
            netns_id: (1, 2),
            address: Ipv4Addr::new(10, 71, 101, u8::try_from(cgroup_id).unwrap()),
            address6: None,
            uid,
        }
    }

    fn denial(td: &str, node: &str, generation: u64) -> v1::NodeDenial {
        v1::NodeDenial { node: node.into(), generation, trust_domain: td.into() }
    }

    fn endpoint(td: &str, last: u8) -> v1::Endpoint {
        v1::Endpoint {
            spiffe_id: format!("spiffe://{td}/db"),
            address: format!("10.70.101.{last}"),
            cluster: td.into(),
            node_address: "10.70.0.21".into(),
            node: "ab".repeat(32),
            generation: 1,
        }
    }

    pub(crate) fn egress(name: &str) -> v1::Egress {
        v1::Egress {
            name: name.into(),
            from: vec!["spiffe://west/web".into()],
            to: vec!["192.0.2.0/24".into()],
            protocols: vec!["tcp".into()],
            transport: "passthrough".into(),
            ..Default::default()
        }
    }

    fn caller(td: &str, address: &str) -> v1::NodeAddress {
        let (trust_domain, node) = (td.to_owned(), "ab".repeat(32));
        v1::NodeAddress { trust_domain, node, generation: 1, address: address.into() }
    }

    pub(crate) fn view(slice: v1::Slice) -> Result<View, Refusal> {
        View::parse(slice, &"west".parse().unwrap(), &"west".parse().unwrap())
    }

    #[test]
    fn the_most_specific_entry_wins_and_no_number_means_nobody() {
        let view = view(slice()).unwrap();
        let pods = [pod("web", 1000, 11), pod("other", 1000, 12), pod("numberless", 7, 13)];
        let found = view.workloads(&pods);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["web"]);
        assert_eq!((found["web"].entry.id.as_str(), found["web"].number), ("web", NumericIdentity(256)));
        assert_eq!(view.workloads(&[pod("web", 0, 11)])["web"].entry.id.as_str(), "web-root");
    }

    #[test]
    fn unclear_slices_are_refused_whole() {
        type Spoil = fn(&mut v1::Slice);
        let cases: &[(&str, Spoil)] = &[
            ("another cell's", |s| s.trust_domain = "east".into()),
            ("another cluster's", |s| s.cluster = "east".into()),
            ("no own bundle", |s| drop(s.bundles.remove(0))),
            ("two bundles of one", |s| s.bundles.push(s.bundles[1].clone())),
            ("number twice", |s| s.identities[1].number = 256),
            ("reserved number", |s| s.identities[1].number = 255),
            ("a range's number", |s| s.identities[1].number = 1 << 31),
            ("an egress document twice", |s| s.egress = vec![egress("e"), egress("e")]),
            ("an egress document without transport", |s| {
                s.egress = vec![v1::Egress { transport: String::new(), ..egress("e") }];
            }),
            ("a meshed address that is none", |s| s.meshed = vec!["10.0.0".into()]),
            ("bad entry", |s| s.entries[0].selectors.clear()),
            ("bad denial", |s| s.denials.push(denial("west", "aa", 1))),
            ("nobody's denial", |s| s.denials.push(denial("", &"ab".repeat(32), 1))),
            ("no address", |s| s.callers.push(caller("west", "10.70.0"))),
            ("two addresses of one node", |s| {
                s.callers = ["10.70.0.21", "10.70.0.22"].map(|a| caller("west", a)).into()
            }),
            ("two own endpoints at one address", |s| s.endpoints = vec![endpoint("west", 1), endpoint("west", 1)]),
        ];
        for (name, spoil) in cases {
            let mut slice = slice();
            spoil(&mut slice);
            assert!(view(slice).is_err(), "{name} was taken");
        }
    }

    #[test]
    fn a_disputed_address_is_our_own_workloads_or_nobodys() {
        let mut s = slice();
        let claims = [("east", 1), ("west", 1), ("east", 2), ("north", 2), ("east", 3), ("west", 4)];
        s.endpoints = claims.iter().map(|(td, last)| endpoint(td, *last)).collect();
        let view = view(s).unwrap();
        let found: Vec<_> =
            view.endpoints.values().map(|e| (e.address.v4().unwrap().octets()[3], e.spiffe_id.to_string())).collect();
        let of = |td: &str| format!("spiffe://{td}/db");
        assert_eq!(found, [(1, of("west")), (3, of("east")), (4, of("west"))]);
    }
}
