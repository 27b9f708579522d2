use super::*;

fn object(kind: &str, spec: &str) -> String {
    format!("{{apiVersion: {API_VERSION}, kind: {kind}, metadata: {{name: web, labels: {{a: b}}}}, spec: {spec}}}")
}

fn one(kind: &str, spec: &str) -> Result<Objects, Refusal> {
    read(&object(kind, spec), Some(&"west".parse().unwrap()))
}

#[test]
fn a_static_entry_is_an_entry_field_by_field() {
    let node = "ab".repeat(32);
    let spec = format!(
        "{{spiffeID: 'spiffe://west/web', parentID: 'spiffe://west/ambit/node/{node}', className: x,
           selectors: ['unix:uid:1000', 'cgroup:web'], federatesWith: [example.org], x509SVIDTTL: 30m0s,
           jwtSVIDTTL: 5m, dnsNames: [web.west], hint: inner, admin: false, downstream: true}}"
    );
    let entry = one("ClusterStaticEntry", &spec).unwrap().entries.remove(0);
    let expected = v1::Entry {
        id: "web".into(),
        spiffe_id: "spiffe://west/web".into(),
        cluster: "west".into(),
        nodes: vec![node.clone()],
        selectors: vec!["unix:uid:1000".into(), "cgroup:web".into()],
        ttl_seconds: 1_800,
        federates_with: vec!["example.org".into()],
        hint: "inner".into(),
        dns_names: vec!["web.west".into()],
        jwt_ttl_seconds: 300,
        downstream: true,
        ..Default::default()
    };
    assert_eq!(entry, expected);
    let all =
        "{spiffeID: 'spiffe://west/web', parentID: 'spiffe://west/ambit/cluster/south', selectors: ['unix:uid:1']}";
    let entry = one("ClusterStaticEntry", all).unwrap().entries.remove(0);
    assert_eq!((entry.cluster.as_str(), entry.nodes.len(), entry.ttl_seconds), ("south", 0, 0));
    // Who is more than a workload is so on the nodes that are named, as the cell says it.
    let admin = all.replace(']', ", 'tpm:policy:servers'], admin: true").replace("]}", "]");
    let refusal = one("ClusterStaticEntry", &admin).unwrap_err();
    assert!(refusal.expected.contains(&ambit_model::entry::nodes_unnamed().expected), "{refusal}");
    let by_ek = admin.replace("policy:servers", &format!("ek_hash:{node}"));
    assert!(one("ClusterStaticEntry", &by_ek).unwrap().entries[0].admin);
}

#[test]
fn a_cluster_spiffe_id_without_open_templates_is_an_entry_of_every_node() {
    let spec =
        "{spiffeIDTemplate: 'spiffe://west/web', workloadSelectorTemplates: ['cgroup:web'], ttl: 1h, podSelector: {}}";
    let entry = one("ClusterSPIFFEID", spec).unwrap().entries.remove(0);
    assert_eq!((entry.spiffe_id.as_str(), entry.ttl_seconds, entry.nodes.len()), ("spiffe://west/web", 3_600, 0));
    let none = read(&object("ClusterSPIFFEID", spec), None).unwrap_err();
    assert!(none.expected.contains("--cluster"), "{none}");
}

#[test]
fn a_federated_trust_domain_is_a_relationship() {
    let spec = "{trustDomain: example.org, bundleEndpointURL: 'https://b.example.org/', bundleEndpointProfile:
                 {type: https_spiffe, endpointSPIFFEID: 'spiffe://example.org/spire/server'}, trustDomainBundle: '{\"keys\": []}'}";
    let row = one("ClusterFederatedTrustDomain", spec).unwrap().relationships.remove(0);
    assert_eq!((row.trust_domain.as_str(), row.profile.as_str()), ("example.org", "https_spiffe"));
    assert_eq!(row.endpoint_spiffe_id, "spiffe://example.org/spire/server");
    let two = format!(
        "{}\n---\n{}\n---\n",
        object("ClusterFederatedTrustDomain", spec),
        object("ClusterSPIFFEID", "{spiffeIDTemplate: 'spiffe://west/web', workloadSelectorTemplates: ['cgroup:web']}")
    );
    let both = read(&two, Some(&"west".parse().unwrap())).unwrap();
    assert_eq!((both.entries.len(), both.relationships.len()), (1, 1));
}

#[test]
fn what_cannot_be_said_is_refused_with_its_field() {
    let parent = "parentID: 'spiffe://west/ambit/cluster/west'";
    let id = "spiffeID: 'spiffe://west/web'";
    let uid = "selectors: ['unix:uid:1']";
    let template = "spiffeIDTemplate: 'spiffe://west/web'";
    let cgroup = "workloadSelectorTemplates: ['cgroup:web']";
    let web = "trustDomain: example.org, bundleEndpointURL: 'https://b.example.org/'";
    for (kind, spec, field) in [
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, storeSVID: true}}"), "spec.storeSVID"),
        (
            "ClusterStaticEntry",
            format!("{{{id}, {uid}, parentID: 'spiffe://west/spire/agent/k8s_psat/x'}}"),
            "spec.parentID",
        ),
        (
            "ClusterStaticEntry",
            format!("{{{id}, {uid}, parentID: 'spiffe://east/ambit/cluster/west'}}"),
            "spec.parentID",
        ),
        (
            "ClusterStaticEntry",
            format!("{{{id}, {parent}, selectors: ['unix:uid:1', 'k8s:ns:default']}}"),
            "spec.selectors[1]",
        ),
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, x509SVIDTTL: 1.5h}}"), "spec.x509SVIDTTL"),
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, jwtSVIDTTL: '300'}}"), "spec.jwtSVIDTTL"),
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, federatesWith: [Example]}}"), "spec.federatesWith[0]"),
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, colour: red}}"), "colour"),
        ("ClusterStaticEntry", format!("{{{parent}, {uid}}}"), "spiffeID"),
        (
            "ClusterSPIFFEID",
            format!("{{{template}, {cgroup}, podSelector: {{matchLabels: {{a: b}}}}}}"),
            "spec.podSelector",
        ),
        (
            "ClusterSPIFFEID",
            format!("{{{template}, {cgroup}, namespaceSelector: {{matchLabels: {{a: b}}}}}}"),
            "spec.namespaceSelector",
        ),
        (
            "ClusterSPIFFEID",
            format!("{{{cgroup}, spiffeIDTemplate: 'spiffe://{{{{ .TrustDomain }}}}/x'}}"),
            "spec.spiffeIDTemplate",
        ),
        (
            "ClusterSPIFFEID",
            format!("{{{template}, workloadSelectorTemplates: ['cgroup:{{{{ .X }}}}']}}"),
            "spec.workloadSelectorTemplates[0]",
        ),
        ("ClusterSPIFFEID", format!("{{{template}}}"), "spec.workloadSelectorTemplates"),
        ("ClusterSPIFFEID", format!("{{{template}, {cgroup}, admin: true}}"), "spec.admin"),
        ("ClusterStaticEntry", format!("{{{id}, {parent}, {uid}, downstream: true}}"), "spec.downstream"),
        (
            "ClusterSPIFFEID",
            format!("{{{template}, {cgroup}, dnsNameTemplates: ['{{{{ .PodMeta.Name }}}}']}}"),
            "spec.dnsNameTemplates[0]",
        ),
        (
            "ClusterSPIFFEID",
            format!("{{{template}, {cgroup}, autoPopulateDNSNames: true}}"),
            "spec.autoPopulateDNSNames",
        ),
        ("ClusterSPIFFEID", format!("{{{template}, {cgroup}, fallback: true}}"), "spec.fallback"),
        (
            "ClusterFederatedTrustDomain",
            format!("{{{web}, bundleEndpointProfile: {{type: http}}}}"),
            "spec.bundleEndpointProfile.type",
        ),
        (
            "ClusterFederatedTrustDomain",
            format!("{{{web}, bundleEndpointProfile: {{type: https_spiffe}}}}"),
            "spec.bundleEndpointProfile.endpointSPIFFEID",
        ),
        (
            "ClusterFederatedTrustDomain",
            format!("{{{web}, bundleEndpointProfile: {{type: https_web}}, trustDomainBundle: 'x'}}"),
            "spec.trustDomainBundle",
        ),
        (
            "ClusterFederatedTrustDomain",
            "{trustDomain: example.org, bundleEndpointURL: 'http://x/', bundleEndpointProfile: {type: https_web}}"
                .into(),
            "spec.bundleEndpointURL",
        ),
        ("Policy", "{}".into(), "kind"),
    ] {
        let refusal = one(kind, &spec).unwrap_err();
        assert_eq!(refusal.code, Code::BadRequest);
        assert!(format!("{} {}", refusal.expected, refusal.found).contains(field), "{kind} {spec}: {refusal}");
    }
    let other = object("ClusterStaticEntry", "{}").replace("v1alpha1", "v1");
    assert!(read(&other, None).unwrap_err().expected.contains("apiVersion"));
}
