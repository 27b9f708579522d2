//! The shape of a lab: sites, members, names and addresses. Pure.

use ambit_model::{Refusal, refusal::Code};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// Sites a lab can have, with the octet of their network 10.<octet>.0.0/16.
const SITES: [(&str, u8); 4] = [("west", 71), ("east", 72), ("north", 73), ("south", 74)];
/// A lab name is part of namespace, cgroup and folder names. No hyphen: `amb-<lab>-` must be no other lab's prefix.
const NAME_CHARS_MAX: usize = 12;
/// Nodes of a site; node n has the address .20+n and the pod network 10.<octet>.<100+n>.0/24.
const NODES_MAX: u8 = 9;
/// Pods of a node; pod p has the address .10+p.
pub const PODS_MAX: u8 = 200;
/// Where everything of a running lab lives.
pub const RUN_DIR: &str = "/run/ambit-lab";
/// Port on which replicas serve gRPC.
pub const REPLICA_PORT: u16 = 7443;
/// Port of the metrics of every process.
pub const METRICS_PORT: u16 = 9464;
/// The operator's namespace and the router's end of its link.
pub const OPERATOR: Ipv4Addr = Ipv4Addr::new(10, 70, 0, 2);
/// The router's end of the operator's link.
pub const OPERATOR_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 70, 0, 1);

/// What the lab consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The lab's name: `[a-z][a-z0-9]{0,11}`.
    pub name: String,
    /// The sites; each is a cluster with its own cell.
    pub sites: Vec<Site>,
}

/// One site: a bridge, its replicas and its nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Name, also the cluster's and the trust domain's.
    pub name: String,
    /// Second octet of its network.
    pub octet: u8,
    /// Federation replicas: 1, 3 or 5.
    pub replicas: u8,
    /// Nodes.
    pub nodes: u8,
}

/// What a member of a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A federation replica with its number.
    Replica(u8),
    /// A node with its number.
    Node(u8),
}

/// One machine of the lab: a namespace on its site's bridge, with a TPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its site's name.
    pub site: String,
    /// Its site's octet.
    pub octet: u8,
    /// Replica or node.
    pub kind: Kind,
}

impl Member {
    /// Name within the site, also the name of its port on the site's bridge: `r1`, `n2`.
    pub fn port(&self) -> String {
        match self.kind {
            Kind::Replica(n) => format!("r{n}"),
            Kind::Node(n) => format!("n{n}"),
        }
    }
    /// Name within the lab: `west-r1`, `east-n2`.
    pub fn role(&self) -> String {
        format!("{}-{}", self.site, self.port())
    }
    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        let host = match self.kind {
            Kind::Replica(n) => 10 + n,
            Kind::Node(n) => 20 + n,
        };
        Ipv4Addr::new(10, self.octet, 0, host)
    }
    /// The router's address on its site, its default route.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.octet, 0, 1)
    }
    /// Address `host` of the network of its pods; none for a replica.
    pub fn pod_address(&self, host: u8) -> Option<Ipv4Addr> {
        match self.kind {
            Kind::Replica(_) => None,
            Kind::Node(n) => Some(Ipv4Addr::new(10, self.octet, 100 + n, host)),
        }
    }
}

impl Site {
    /// Replicas, then nodes.
    pub fn members(&self) -> Vec<Member> {
        let member = |kind| Member { site: self.name.clone(), octet: self.octet, kind };
        let replicas = (1..=self.replicas).map(|n| member(Kind::Replica(n)));
        replicas.chain((1..=self.nodes).map(|n| member(Kind::Node(n)))).collect()
    }
}

impl Spec {
    /// A lab of `clusters` equal sites named west, east, north, south.
    pub fn standard(name: &str, clusters: u8, nodes: u8, replicas: u8) -> Result<Spec, Refusal> {
        let name = parse_name(name)?;
        let bad = |expected: String, found: u8| Err(Refusal::new(Code::BadRequest, expected, found.to_string()));
        if clusters == 0 || usize::from(clusters) > SITES.len() {
            return bad(format!("1 to {} clusters", SITES.len()), clusters);
        }
        if nodes > NODES_MAX {
            return bad(format!("at most {NODES_MAX} nodes"), nodes);
        }
        if ![1, 3, 5].contains(&replicas) {
            return bad("1, 3 or 5 replicas".into(), replicas);
        }
        let site = |&(name, octet): &(&str, u8)| Site { name: name.into(), octet, replicas, nodes };
        Ok(Spec { name, sites: SITES.iter().take(clusters.into()).map(site).collect() })
    }
    /// Every machine, site by site.
    pub fn members(&self) -> Vec<Member> {
        self.sites.iter().flat_map(Site::members).collect()
    }
    /// The machine with this role.
    pub fn member(&self, role: &str) -> Option<Member> {
        self.members().into_iter().find(|m| m.role() == role)
    }
    /// The site of this name.
    pub fn site(&self, name: &str) -> Option<&Site> {
        self.sites.iter().find(|s| s.name == name)
    }
    /// The namespace of a role: `router`, `operator`, a site (its bridge), a member or a pod.
    pub fn namespace(&self, role: &str) -> String {
        format!("{}{role}", namespace_prefix(&self.name))
    }
    /// Where this lab's files are.
    pub fn root(&self) -> PathBuf {
        root(&self.name)
    }
}

/// The lab name, if it is one.
pub fn parse_name(name: &str) -> Result<String, Refusal> {
    let fits = (1..=NAME_CHARS_MAX).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    if fits {
        return Ok(name.to_owned());
    }
    let expected = format!("a lab name of at most {NAME_CHARS_MAX} characters, [a-z][a-z0-9]*");
    Err(Refusal::new(Code::BadRequest, expected, name.chars().take(64).collect::<String>()))
}

/// What every namespace of the lab begins with, and no other's does.
pub fn namespace_prefix(lab: &str) -> String {
    format!("amb-{lab}-")
}

/// Where a lab's files are.
pub fn root(lab: &str) -> PathBuf {
    PathBuf::from(RUN_DIR).join(lab)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_those_agreed() {
        let spec = Spec::standard("demo", 2, 2, 3).unwrap();
        let text: Vec<String> =
            spec.members().iter().map(|m| format!("{} {} via {}", m.role(), m.address(), m.gateway())).collect();
        assert_eq!(
            text,
            [
                "west-r1 10.71.0.11 via 10.71.0.1",
                "west-r2 10.71.0.12 via 10.71.0.1",
                "west-r3 10.71.0.13 via 10.71.0.1",
                "west-n1 10.71.0.21 via 10.71.0.1",
                "west-n2 10.71.0.22 via 10.71.0.1",
                "east-r1 10.72.0.11 via 10.72.0.1",
                "east-r2 10.72.0.12 via 10.72.0.1",
                "east-r3 10.72.0.13 via 10.72.0.1",
                "east-n1 10.72.0.21 via 10.72.0.1",
                "east-n2 10.72.0.22 via 10.72.0.1",
            ]
        );
        let node = spec.member("east-n2").unwrap();
        assert_eq!(node.pod_address(11), Some(Ipv4Addr::new(10, 72, 102, 11)));
        assert_eq!(spec.namespace("east-n2"), "amb-demo-east-n2");
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (name, clusters, nodes, replicas) in [
            ("", 2, 2, 3),
            ("de-mo", 2, 2, 3),
            ("Demo", 2, 2, 3),
            ("../x", 2, 2, 3),
            ("demo", 0, 2, 3),
            ("demo", 5, 2, 3),
            ("demo", 2, 10, 3),
            ("demo", 2, 2, 2),
        ] {
            let refusal = Spec::standard(name, clusters, nodes, replicas).unwrap_err();
            assert_eq!(refusal.code, Code::BadRequest);
        }
    }
}
