//! SPIRE's three Kubernetes object shapes (spire-controller-manager, spire.spiffe.io/v1alpha1), read for what they say here:
//! entries and relationships with foreign trust domains. What cannot be said here is refused with the field that says it, and
//! nothing is guessed: an object that is taken means what its writer meant.

use ambit_model::{ClusterId, Code, NodeId, ObjectName, Refusal, Selector, SpiffeId, TrustDomain};
use ambit_proto::v1;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_norway::Value;

const API_VERSION: &str = "spire.spiffe.io/v1alpha1";
/// Objects in one file.
const OBJECTS_MAX: usize = 1_000;
const NODE_PATH: &str = "/ambit/node/";
const CLUSTER_PATH: &str = "/ambit/cluster/";

/// What a file says.
#[derive(Debug, Default, PartialEq)]
pub struct Objects {
    /// Of ClusterStaticEntry and ClusterSPIFFEID.
    pub entries: Vec<v1::Entry>,
    /// Of ClusterFederatedTrustDomain.
    pub relationships: Vec<v1::FederationRelationship>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Object {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: Value,
}

/// Labels, annotations and what a Kubernetes API server adds are of no meaning to the object.
#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StaticEntry {
    #[serde(rename = "spiffeID")]
    spiffe_id: String,
    #[serde(rename = "parentID")]
    parent_id: String,
    selectors: Vec<String>,
    #[serde(rename = "federatesWith", default)]
    federates_with: Vec<String>,
    #[serde(rename = "x509SVIDTTL")]
    x509_ttl: Option<String>,
    #[serde(rename = "jwtSVIDTTL")]
    jwt_ttl: Option<String>,
    #[serde(rename = "dnsNames", default)]
    dns_names: Vec<String>,
    #[serde(default)]
    hint: String,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    downstream: bool,
    #[serde(rename = "storeSVID", default)]
    store_svid: bool,
    // Which controller looks after the object says nothing of the entry.
    #[serde(rename = "className", default)]
    _class_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterSpiffeId {
    #[serde(rename = "spiffeIDTemplate")]
    spiffe_id: String,
    #[serde(rename = "workloadSelectorTemplates", default)]
    selectors: Vec<String>,
    #[serde(rename = "podSelector", default)]
    pod_selector: Value,
    #[serde(rename = "namespaceSelector", default)]
    namespace_selector: Value,
    #[serde(rename = "federatesWith", default)]
    federates_with: Vec<String>,
    ttl: Option<String>,
    #[serde(rename = "jwtTtl")]
    jwt_ttl: Option<String>,
    #[serde(rename = "dnsNameTemplates", default)]
    dns_names: Vec<String>,
    #[serde(default)]
    hint: String,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    downstream: bool,
    #[serde(rename = "autoPopulateDNSNames", default)]
    auto_populate_dns_names: bool,
    #[serde(default)]
    fallback: bool,
    #[serde(rename = "className", default)]
    _class_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FederatedTrustDomain {
    #[serde(rename = "trustDomain")]
    trust_domain: String,
    #[serde(rename = "bundleEndpointURL")]
    url: String,
    #[serde(rename = "bundleEndpointProfile")]
    profile: EndpointProfile,
    #[serde(rename = "trustDomainBundle", default)]
    bundle: String,
    #[serde(rename = "className", default)]
    _class_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EndpointProfile {
    r#type: String,
    #[serde(rename = "endpointSPIFFEID", default)]
    endpoint_spiffe_id: String,
}

/// Reads all objects of a file, or refuses all. `cluster`: whose entries they are that do not say it in their parentID.
///
/// # Errors
/// [`Code::BadRequest`], naming the object and the field.
pub fn read(text: &str, cluster: Option<&ClusterId>) -> Result<Objects, Refusal> {
    let mut out = Objects::default();
    for (n, document) in serde_norway::Deserializer::from_str(text).enumerate() {
        let at = format!("object {}", n + 1);
        let value = Value::deserialize(document).map_err(|e| bad(&at, "YAML", e.to_string()))?;
        if value.is_null() {
            continue;
        }
        if n >= OBJECTS_MAX {
            return Err(bad(&at, &format!("at most {OBJECTS_MAX} objects"), "more"));
        }
        let object: Object = parse(&at, value)?;
        let at = format!("{} {}", object.kind, object.metadata.name);
        if object.api_version != API_VERSION {
            return Err(bad(&format!("{at}: apiVersion"), API_VERSION, object.api_version));
        }
        match object.kind.as_str() {
            "ClusterStaticEntry" => {
                let spec = parse(&format!("{at}: spec"), object.spec)?;
                out.entries.push(static_entry(&At(&at), &object.metadata.name, spec, cluster)?);
            }
            "ClusterSPIFFEID" => {
                let spec = parse(&format!("{at}: spec"), object.spec)?;
                out.entries.push(cluster_spiffe_id(&At(&at), &object.metadata.name, spec, cluster)?);
            }
            "ClusterFederatedTrustDomain" => {
                let spec = parse(&format!("{at}: spec"), object.spec)?;
                out.relationships.push(relationship(&At(&at), spec)?);
            }
            other => {
                let kinds = "ClusterStaticEntry, ClusterSPIFFEID or ClusterFederatedTrustDomain (ambit policy apply \
                             takes Policy and Service)";
                return Err(bad(&format!("{at}: kind"), kinds, other));
            }
        }
    }
    Ok(out)
}

fn bad(at: &str, expected: &str, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::BadRequest, format!("{at}: {expected}"), found)
}

fn parse<T: DeserializeOwned>(at: &str, value: Value) -> Result<T, Refusal> {
    serde_norway::from_value(value).map_err(|e| bad(at, "the fields of that kind", e.to_string()))
}

/// An object, to name its fields in.
struct At<'a>(&'a str);

impl At<'_> {
    fn bad(&self, field: &str, expected: &str, found: impl Into<String>) -> Refusal {
        bad(&format!("{}: spec.{field}", self.0), expected, found)
    }
    fn parsed<T: std::str::FromStr<Err = Refusal>>(&self, field: &str, text: &str) -> Result<T, Refusal> {
        text.parse().map_err(|r: Refusal| self.bad(field, &r.expected, text))
    }
    /// A flag that means something that is not built here.
    fn unset(&self, field: &str, flag: bool) -> Result<(), Refusal> {
        if flag { Err(self.bad(field, "false: entries here do not say it", "true")) } else { Ok(()) }
    }
    /// A template in which nothing is left open.
    fn constant(&self, field: &str, text: &str) -> Result<(), Refusal> {
        if text.contains("{{") { Err(self.bad(field, "a value without a template's {{ }}", text)) } else { Ok(()) }
    }
    fn selectors(&self, field: &str, texts: &[String]) -> Result<Vec<String>, Refusal> {
        let one = |(n, text): (usize, &String)| {
            self.parsed::<Selector>(&format!("{field}[{n}]"), text).map(|selector| selector.to_string())
        };
        texts.iter().enumerate().map(one).collect()
    }
    /// What the cell would refuse is refused before anything is sent, in its words.
    fn placed(&self, entry: v1::Entry) -> Result<v1::Entry, Refusal> {
        let by_ek = |text: &String| matches!(text.parse(), Ok(Selector::TpmEkHash(_)));
        if entry.nodes.is_empty() && (entry.admin || entry.downstream) && !entry.selectors.iter().any(by_ek) {
            let field = if entry.admin { "admin" } else { "downstream" };
            let Refusal { expected, found, .. } = ambit_model::entry::nodes_unnamed();
            return Err(self.bad(field, &expected, found));
        }
        Ok(entry)
    }
    fn domains(&self, texts: &[String]) -> Result<Vec<String>, Refusal> {
        let one = |(n, text): (usize, &String)| {
            self.parsed::<TrustDomain>(&format!("federatesWith[{n}]"), text).map(|td| td.to_string())
        };
        texts.iter().enumerate().map(one).collect()
    }
    /// Seconds of a duration as Go writes it: `1h`, `30m`, `1h30m0s`. 0: not said.
    fn seconds(&self, field: &str, text: Option<&String>) -> Result<u32, Refusal> {
        let Some(text) = text else { return Ok(0) };
        let refuse = || self.bad(field, "a duration in whole seconds, as 1h30m0s", text.clone());
        let (mut total, mut digits) = (0u32, String::new());
        for c in text.chars() {
            let factor = match c {
                '0'..='9' => {
                    digits.push(c);
                    continue;
                }
                'h' => 3_600,
                'm' => 60,
                's' => 1,
                _ => return Err(refuse()),
            };
            let number: u32 = digits.parse().map_err(|_| refuse())?;
            total = number.checked_mul(factor).and_then(|s| total.checked_add(s)).ok_or_else(refuse)?;
            digits.clear();
        }
        if total > 0 && digits.is_empty() { Ok(total) } else { Err(refuse()) }
    }
}

fn static_entry(at: &At<'_>, name: &str, e: StaticEntry, cluster: Option<&ClusterId>) -> Result<v1::Entry, Refusal> {
    at.unset("storeSVID", e.store_svid)?;
    let id: SpiffeId = at.parsed("spiffeID", &e.spiffe_id)?;
    let parent: SpiffeId = at.parsed("parentID", &e.parent_id)?;
    let node = parent.path().strip_prefix(NODE_PATH).and_then(|id| id.parse::<NodeId>().ok());
    let named = parent.path().strip_prefix(CLUSTER_PATH).and_then(|name| name.parse::<ClusterId>().ok());
    let whose = match (node, &named) {
        (Some(_), _) => cluster,
        (None, Some(named)) => Some(named),
        (None, None) => {
            let expected = "a node spiffe://TD/ambit/node/ID, or all of a cluster, spiffe://TD/ambit/cluster/NAME";
            return Err(at.bad("parentID", expected, e.parent_id));
        }
    };
    if parent.trust_domain() != id.trust_domain() {
        return Err(at.bad("parentID", &format!("a parent of {}", id.trust_domain()), e.parent_id));
    }
    at.placed(v1::Entry {
        id: entry_id(at, name)?,
        spiffe_id: id.to_string(),
        cluster: of_cluster(at, whose)?,
        nodes: node.iter().map(ToString::to_string).collect(),
        selectors: at.selectors("selectors", &e.selectors)?,
        ttl_seconds: at.seconds("x509SVIDTTL", e.x509_ttl.as_ref())?,
        federates_with: at.domains(&e.federates_with)?,
        hint: e.hint,
        dns_names: e.dns_names,
        jwt_ttl_seconds: at.seconds("jwtSVIDTTL", e.jwt_ttl.as_ref())?,
        admin: e.admin,
        downstream: e.downstream,
        ..v1::Entry::default()
    })
}

/// Pods are not looked up here: what is left of the object is one identity for one kind of workload, on every node.
fn cluster_spiffe_id(
    at: &At<'_>,
    name: &str,
    e: ClusterSpiffeId,
    cluster: Option<&ClusterId>,
) -> Result<v1::Entry, Refusal> {
    let open = |field, value: &Value| {
        let empty = value.is_null() || value.as_mapping().is_some_and(|map| map.is_empty());
        let expected = "none: workloads are recognised by workloadSelectorTemplates here, pods are not looked up";
        if empty { Ok(()) } else { Err(at.bad(field, expected, "a selector")) }
    };
    open("podSelector", &e.pod_selector)?;
    open("namespaceSelector", &e.namespace_selector)?;
    at.unset("autoPopulateDNSNames", e.auto_populate_dns_names)?;
    at.unset("fallback", e.fallback)?;
    at.constant("spiffeIDTemplate", &e.spiffe_id)?;
    for (n, text) in e.selectors.iter().enumerate() {
        at.constant(&format!("workloadSelectorTemplates[{n}]"), text)?;
    }
    for (n, text) in e.dns_names.iter().enumerate() {
        at.constant(&format!("dnsNameTemplates[{n}]"), text)?;
    }
    if e.selectors.is_empty() {
        let expected = "at least one selector of the workload: without one every process would be meant";
        return Err(at.bad("workloadSelectorTemplates", expected, "none"));
    }
    let id: SpiffeId = at.parsed("spiffeIDTemplate", &e.spiffe_id)?;
    at.placed(v1::Entry {
        id: entry_id(at, name)?,
        spiffe_id: id.to_string(),
        cluster: of_cluster(at, cluster)?,
        selectors: at.selectors("workloadSelectorTemplates", &e.selectors)?,
        ttl_seconds: at.seconds("ttl", e.ttl.as_ref())?,
        federates_with: at.domains(&e.federates_with)?,
        hint: e.hint,
        dns_names: e.dns_names,
        jwt_ttl_seconds: at.seconds("jwtTtl", e.jwt_ttl.as_ref())?,
        admin: e.admin,
        downstream: e.downstream,
        ..v1::Entry::default()
    })
}

fn entry_id(at: &At<'_>, name: &str) -> Result<String, Refusal> {
    let id: ObjectName =
        name.parse().map_err(|r: Refusal| bad(&format!("{}: metadata.name", at.0), &r.expected, name))?;
    Ok(id.to_string())
}

fn of_cluster(at: &At<'_>, cluster: Option<&ClusterId>) -> Result<String, Refusal> {
    let none = || bad(at.0, "the cluster that it is of (--cluster)", "none");
    cluster.map(ToString::to_string).ok_or_else(none)
}

fn relationship(at: &At<'_>, e: FederatedTrustDomain) -> Result<v1::FederationRelationship, Refusal> {
    let td: TrustDomain = at.parsed("trustDomain", &e.trust_domain)?;
    let roots_der = match e.bundle.trim() {
        "" => Vec::new(),
        text => ambit_identity::bundle::roots(text).map_err(|r| at.bad("trustDomainBundle", &r.expected, r.found))?,
    };
    let endpoint_spiffe_id = match (e.profile.r#type.as_str(), e.profile.endpoint_spiffe_id.as_str()) {
        ("https_web", "") => String::new(),
        ("https_web", id) => return Err(at.bad("bundleEndpointProfile.endpointSPIFFEID", "none with https_web", id)),
        ("https_spiffe", id) => at.parsed::<SpiffeId>("bundleEndpointProfile.endpointSPIFFEID", id)?.to_string(),
        (other, _) => return Err(at.bad("bundleEndpointProfile.type", "https_web or https_spiffe", other)),
    };
    if !e.url.starts_with("https://") {
        return Err(at.bad("bundleEndpointURL", "https://host/path", e.url));
    }
    Ok(v1::FederationRelationship {
        trust_domain: td.to_string(),
        url: e.url,
        profile: e.profile.r#type,
        endpoint_spiffe_id,
        roots_der,
        ..v1::FederationRelationship::default()
    })
}

#[cfg(test)]
#[path = "spire_tests.rs"]
mod tests;
