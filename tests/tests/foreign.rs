//! Bundles of foreign trust domains, fetched from endpoints that are not always honest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::document::Published;
use ambit_identity::tls::{Clients, SharedTrust, Trust, certified, fixed, public_server_config, server_config};
use ambit_identity::{Csr, IssuingKey, JwtKey, Root, SvidKey, TrustStore};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{JwtAuthority, Lifetime, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::trust_domain_registry_client::TrustDomainRegistryClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::hostile::Endpoint;
use ambit_tests::process::{Folder, free_address, must_run};
use std::time::{SystemTime, UNIX_EPOCH};

fn now() -> Stamp {
    Stamp(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64)
}

/// An authority of a trust domain that is no cell, and an endpoint that shows its SVID.
struct Foreign {
    root: Root,
    endpoint: Endpoint,
}

async fn foreign(td: &str) -> Foreign {
    foreign_that(td, false).await
}

/// One whose endpoint demands a certificate of its clients, which none may (SPIFFE_Federation.md section 5.2), or does not.
async fn foreign_that(td: &str, demands: bool) -> Foreign {
    let td = td.parse().unwrap();
    let root = Root::create(&td, now(), [0x41; 16]).unwrap();
    let (key, tls) = (SvidKey::generate().unwrap(), SvidKey::generate().unwrap());
    let lifetime = Lifetime { not_before: now().minus_ms(60_000), not_after: now().plus_ms(3_600_000) };
    let intermediate = root.found(1, &Csr::parse(&key.csr().unwrap()).unwrap(), lifetime).unwrap();
    let issuer = IssuingKey::new(key, intermediate).unwrap();
    let chain = issuer.replica_leaf(1, &td, lifetime, &Csr::parse(&tls.csr().unwrap()).unwrap()).unwrap();
    let identity = fixed(certified(chain, &tls).unwrap());
    let config = if demands {
        let own = Bundle::<Own>::new(td, 1, vec![root.der().to_vec()]);
        let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&own).unwrap()));
        server_config(trust, Clients::Certified, identity, &[b"http/1.1"]).unwrap()
    } else {
        public_server_config(identity).unwrap()
    };
    Foreign { root, endpoint: Endpoint::start(config).await.unwrap() }
}

fn bundle(sequence: u64, roots: &[&Root]) -> String {
    let roots: Vec<Vec<u8>> = roots.iter().map(|root| root.der().to_vec()).collect();
    Published { sequence, refresh_hint_s: 60, roots: &roots, jwt_keys: &[] }.bundle().unwrap()
}

/// A bundle with the keys of these.
fn with_keys(sequence: u64, roots: &[&Root], keys: &[&JwtKey]) -> String {
    let roots: Vec<Vec<u8>> = roots.iter().map(|root| root.der().to_vec()).collect();
    let key = |key: &&JwtKey| JwtAuthority {
        kid: key.kid().to_owned(),
        spki_der: key.spki().to_vec(),
        not_after: Stamp(u64::MAX),
    };
    let jwt_keys: Vec<_> = keys.iter().map(key).collect();
    Published { sequence, refresh_hint_s: 60, roots: &roots, jwt_keys: &jwt_keys }.bundle().unwrap()
}

async fn registry(cell: &Cell) -> TrustDomainRegistryClient<tonic::transport::Channel> {
    TrustDomainRegistryClient::new(cell.admin(1).await.unwrap())
}

fn relationship(f: &Foreign) -> v1::FederationRelationship {
    v1::FederationRelationship {
        request_id: fresh(),
        trust_domain: "example.org".into(),
        url: format!("https://{}/bundle", f.endpoint.at),
        profile: "https_spiffe".into(),
        endpoint_spiffe_id: "spiffe://example.org/ambit/replica/1".into(),
        roots_der: vec![f.root.der().to_vec()],
        ..Default::default()
    }
}

async fn put(cell: &Cell, row: v1::FederationRelationship) -> String {
    match registry(cell)
        .await
        .put_federation_relationship(v1::FederationRelationship { request_id: fresh(), ..row })
        .await
    {
        Ok(_) => "ok".into(),
        Err(status) => from_status(&status).code.to_string(),
    }
}

/// Fetches now: `ok`, or the code.
async fn refresh(cell: &Cell) -> String {
    let request = v1::FederationRelationshipRef { request_id: fresh(), trust_domain: "example.org".into() };
    match registry(cell).await.refresh_bundle(request).await {
        Ok(_) => "ok".into(),
        Err(status) => from_status(&status).code.to_string(),
    }
}

async fn row(cell: &Cell) -> v1::FederationRelationship {
    let all = registry(cell).await.list_federation_relationships(v1::ListFederationRelationshipsRequest {}).await;
    all.unwrap().into_inner().relationships.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_bundle_only_grows_and_its_endpoint_is_who_it_should_be() {
    let cell = Cell::start("west", 1).await.unwrap();
    let (f, other) = (foreign("example.org").await, foreign("example.org").await);
    // What is not wholly and clearly said is refused.
    type Spoil = fn(&mut v1::FederationRelationship);
    let spoils: &[(&str, Spoil)] = &[
        ("http", |r| r.url = r.url.replace("https", "http")),
        ("a user", |r| r.url = r.url.replace("https://", "https://u@")),
        ("no identity", |r| r.endpoint_spiffe_id.clear()),
        ("an identity of another trust domain", |r| r.endpoint_spiffe_id = "spiffe://example.com/a".into()),
        ("an identity with https_web", |r| r.profile = "https_web".into()),
        ("another profile", |r| r.profile = "http".into()),
        ("no bootstrap bundle", |r| r.roots_der.clear()),
        ("a root that is none", |r| r.roots_der = vec![vec![1, 2, 3]]),
    ];
    for (what, spoil) in spoils {
        let mut wrong = relationship(&f);
        spoil(&mut wrong);
        let code = put(&cell, wrong).await;
        assert!(["bad_request", "svid_malformed"].contains(&code.as_str()), "{what}: {code}");
    }
    assert_eq!(
        put(
            &cell,
            v1::FederationRelationship {
                trust_domain: "west".into(),
                endpoint_spiffe_id: "spiffe://west/a".into(),
                ..relationship(&f)
            }
        )
        .await,
        "already_exists"
    );

    f.endpoint.serve(&bundle(7, &[&f.root]), "ETag: \"one\"\r\n");
    assert_eq!(put(&cell, relationship(&f)).await, "ok");
    assert_eq!(refresh(&cell).await, "ok");
    let taken = row(&cell).await;
    assert_eq!((taken.sequence, taken.refresh_hint_s, taken.trouble.as_str()), (7, 60, ""));
    // The same again is not sent again.
    assert_eq!(refresh(&cell).await, "ok");
    let last = f.endpoint.asked().pop().unwrap().to_lowercase();
    assert!(last.contains("if-none-match: \"one\"") && last.starts_with("get /bundle http/1.1"), "{last}");

    // Older, another under the same sequence, none, empty: refused, named, and what was taken stays.
    for (document, code) in [
        (bundle(6, &[&f.root]), "bundle_rollback"),
        (bundle(7, &[&f.root, &other.root]), "bundle_equivocation"),
        (bundle(8, &[&f.root]).replace("spiffe_sequence", "sequence"), "bundle_rollback"),
        (bundle(9, &[]), "bundle_shrunk"),
        ("{}".into(), "bundle_malformed"),
        (bundle(9, &[&f.root]).replace("\"keys\":", "\"keys\":[],\"keys\":"), "bundle_malformed"),
        (format!("{} ", "x".repeat(2 << 20)), "endpoint_refused"),
    ] {
        f.endpoint.serve(&document, "");
        assert_eq!(refresh(&cell).await, code, "{}", &document[..document.len().min(200)]);
        let held = row(&cell).await;
        assert_eq!((held.sequence, held.roots_der.len()), (7, 1), "{code}");
    }
    // Redirects: within the host, for a while, a few. And other answers.
    for (answer, code) in [
        ("302 Found\r\nLocation: https://127.0.0.9:1/x", "endpoint_refused"),
        ("302 Found\r\nLocation: http://127.0.0.1/x", "endpoint_refused"),
        ("302 Found\r\nLocation: /again", "endpoint_refused"),
        ("301 Moved Permanently\r\nLocation: /x", "endpoint_refused"),
        ("302 Found", "endpoint_refused"),
        ("304 Not Modified", "endpoint_refused"),
        ("500 Internal Server Error", "endpoint_refused"),
    ] {
        f.endpoint.say(&format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
        assert_eq!(refresh(&cell).await, code, "{answer}");
    }
    f.endpoint.say("SSH-2.0-nonsense\r\n");
    assert_eq!(refresh(&cell).await, "endpoint_refused");
    // A new root is published before it is used; it verifies the endpoint from then on.
    f.endpoint.serve(&bundle(10, &[&f.root, &other.root]), "");
    assert_eq!(refresh(&cell).await, "ok");
    assert_eq!((row(&cell).await.roots_der.len(), row(&cell).await.trouble.as_str()), (2, ""));
    the_endpoint_is_verified(&cell, &f).await;
    keys_of_tokens_go_by_the_same_rules(&cell, &f).await;
    empty_needs_a_word(&cell, &f).await;
}

async fn confirm(cell: &Cell, sha256: String) -> Result<v1::FederationRelationship, tonic::Status> {
    let request = v1::ConfirmBundleRequest { request_id: fresh(), trust_domain: "example.org".into(), sha256 };
    registry(cell).await.confirm_bundle(request).await.map(tonic::Response::into_inner)
}

async fn keys_of_tokens_go_by_the_same_rules(cell: &Cell, f: &Foreign) {
    let [one, two] = [JwtKey::generate().unwrap(), JwtKey::generate().unwrap()];
    let kids = async || {
        let held = row(cell).await;
        held.jwt_authorities.into_iter().map(|key| key.kid).collect::<Vec<_>>()
    };
    for (document, code, then) in [
        (with_keys(20, &[&f.root], &[&one]), "ok", vec![one.kid()]),
        (with_keys(21, &[&f.root], &[&one, &two]), "ok", vec![one.kid(), two.kid()]),
        (with_keys(20, &[&f.root], &[&one]), "bundle_rollback", vec![one.kid(), two.kid()]),
        (with_keys(21, &[&f.root], &[&two]), "bundle_equivocation", vec![one.kid(), two.kid()]),
        (with_keys(22, &[&f.root], &[&one, &one]), "bundle_malformed", vec![one.kid(), two.kid()]),
        (with_keys(22, &[&f.root], &[&two]), "ok", vec![two.kid()]),
        (with_keys(23, &[&f.root], &[]), "bundle_shrunk", vec![two.kid()]),
    ] {
        f.endpoint.serve(&document, "");
        assert_eq!(refresh(cell).await, code, "{document}");
        assert_eq!(kids().await, then, "{code}");
    }
    // None any more, because an operator says so too: the roots stay.
    let confirmed = confirm(cell, row(cell).await.held_sha256).await.unwrap();
    assert_eq!((confirmed.roots_der.len(), confirmed.jwt_authorities.len(), confirmed.sequence), (1, 0, 23));
}

/// What a bundle says of when it wants to be asked again is bounded, and beyond belief it is no bundle. An endpoint that wants
/// a certificate gets none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_are_bounded_and_an_endpoint_that_demands_a_certificate_gets_none() {
    let cell = Cell::start("west", 1).await.unwrap();
    let f = foreign("example.org").await;
    f.endpoint.serve(&bundle(1, &[&f.root]), "");
    assert_eq!(put(&cell, relationship(&f)).await, "ok");
    for (sequence, hint, code, then) in [
        (2, "0", "ok", 60),
        (3, "1", "ok", 60),
        (4, "86401", "ok", 86_400),
        (5, "31536001000", "bundle_malformed", 86_400),
        (5, "18446744073709551616", "bundle_malformed", 86_400),
        (5, "-1", "bundle_malformed", 86_400),
        (5, "\"300\"", "bundle_malformed", 86_400),
        (5, "300", "ok", 300),
    ] {
        let document = bundle(sequence, &[&f.root]);
        let (before, after) = ("\"spiffe_refresh_hint\":60", format!("\"spiffe_refresh_hint\":{hint}"));
        assert!(document.contains(before), "{document}");
        f.endpoint.serve(&document.replace(before, &after), "");
        assert_eq!(refresh(&cell).await, code, "{hint}");
        assert_eq!(row(&cell).await.refresh_hint_s, then, "{hint}");
    }
    let demanding = foreign_that("example.org", true).await;
    demanding.endpoint.serve(&bundle(9, &[&demanding.root]), "");
    assert_eq!(put(&cell, relationship(&demanding)).await, "ok");
    assert_eq!(refresh(&cell).await, "endpoint_refused");
    assert!(demanding.endpoint.asked().is_empty());
}

/// Another authority of the same name, or another identity, is not who it should be.
async fn the_endpoint_is_verified(cell: &Cell, f: &Foreign) {
    let stranger = foreign("example.org").await;
    stranger.endpoint.serve(&bundle(99, &[&stranger.root]), "");
    let elsewhere = format!("https://{}/", stranger.endpoint.at);
    assert_eq!(put(cell, v1::FederationRelationship { url: elsewhere, ..relationship(f) }).await, "ok");
    assert_eq!(refresh(cell).await, "endpoint_refused");
    assert!(stranger.endpoint.asked().is_empty(), "nothing is asked of who was not verified");
    f.endpoint.serve(&bundle(11, &[&f.root]), "");
    let id = "spiffe://example.org/ambit/replica/2".to_owned();
    assert_eq!(put(cell, v1::FederationRelationship { endpoint_spiffe_id: id, ..relationship(f) }).await, "ok");
    assert_eq!(refresh(cell).await, "endpoint_refused");
    assert_eq!(put(cell, relationship(f)).await, "ok");
    assert_eq!(refresh(cell).await, "ok");
}

async fn empty_needs_a_word(cell: &Cell, f: &Foreign) {
    f.endpoint.serve(&bundle(24, &[]), "");
    assert_eq!(refresh(cell).await, "bundle_shrunk");
    let held = row(cell).await;
    assert_eq!(from_status(&confirm(cell, "00".repeat(32)).await.unwrap_err()).code.as_str(), "not_found");
    let confirmed = confirm(cell, held.held_sha256.clone()).await.unwrap();
    assert!(confirmed.roots_der.is_empty() && confirmed.sequence == 24, "{confirmed:?}");
    let request = v1::DeleteFederationRelationshipRequest {
        request_id: fresh(),
        trust_domain: "example.org".into(),
        approved: None,
    };
    registry(cell).await.delete_federation_relationship(request).await.unwrap();
    assert_eq!(refresh(cell).await, "not_found");
}

/// One cell reads another's endpoint as any site of the web, by the authorities that its configuration names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_endpoint_is_read_by_its_name_and_authorities() {
    let folder = Folder::new().unwrap();
    let path = |name: &str| folder.path(name).display().to_string();
    let (ca, ca_key, cert, key, csr) =
        (path("ca.pem"), path("ca.key"), path("web.pem"), path("web.key"), path("web.csr"));
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    must_run(
        &[
            &["openssl", "req", "-x509", "-subj", "/CN=web root", "-days", "2", "-keyout", &ca_key, "-out", &ca][..],
            &ec,
        ]
        .concat(),
    )
    .unwrap();
    must_run(&[&["openssl", "req", "-new", "-subj", "/CN=x", "-keyout", &key, "-out", &csr][..], &ec].concat())
        .unwrap();
    std::fs::write(path("names"), "subjectAltName = IP:127.0.0.1\nbasicConstraints = CA:FALSE\n").unwrap();
    let sign = ["openssl", "x509", "-req", "-in", &csr, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial", "-days", "2"];
    must_run(&[&sign[..], &["-extfile", &path("names"), "-out", &cert]].concat()).unwrap();
    must_run(&["chmod", "600", &key]).unwrap();
    let at = free_address().unwrap();
    let profile = format!(
        "[bundle_endpoint]\nlisten = \"{at}\"\nprofile = \"https_web\"\ncertificate = \"{cert}\"\nkey = \"{key}\"\n"
    );
    let east = Cell::configured(folder, "east", 1, &profile).await.unwrap();
    let roots = format!("web_roots = \"{}\"\n", east.file("ca.pem").display());
    let west = Cell::configured(Folder::new().unwrap(), "west", 1, &roots).await.unwrap();
    let blind = Cell::start("north", 1).await.unwrap();
    let web = v1::FederationRelationship {
        trust_domain: "east".into(),
        url: format!("https://{at}/"),
        profile: "https_web".into(),
        ..Default::default()
    };
    for (cell, code) in [(&west, "ok"), (&blind, "endpoint_refused")] {
        assert_eq!(put(cell, web.clone()).await, "ok");
        let request = v1::FederationRelationshipRef { request_id: fresh(), trust_domain: "east".into() };
        let answer = registry(cell).await.refresh_bundle(request).await;
        assert_eq!(answer.as_ref().map_or_else(|s| from_status(s).code.as_str(), |_| "ok"), code, "{answer:?}");
        let known = row(cell).await;
        assert_eq!(known.roots_der.len(), usize::from(code == "ok"), "{known:?}");
    }
    let root = std::fs::read(east.seat_of(1).unwrap().data.join("identity/root.der")).unwrap();
    assert_eq!(row(&west).await.roots_der, [root]);
}

/// What SPIRE's controller has as objects, as they are moved here: what can be written is, and each is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_of_spires_controller_are_applied_to_a_cell() {
    let cell = Cell::start("west", 1).await.unwrap();
    let cluster = v1::RegisterClusterRequest {
        request_id: fresh(),
        name: "west".into(),
        ek_root_classes: vec![],
        ek_roots_der: vec![],
        attest_interval_s: 10,
    };
    let register = |channel| {
        let cluster = cluster.clone();
        async move { v1::cluster_registry_client::ClusterRegistryClient::new(channel).register_cluster(cluster).await }
    };
    cell.insist(register).await.unwrap();
    let f = foreign("example.org").await;
    let object = |kind: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: spire.spiffe.io/v1alpha1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n  {}\n---\n",
            spec.replace('\n', "\n  ")
        )
    };
    let federated = |td: &str| {
        format!(
            "trustDomain: {td}\nbundleEndpointURL: https://{}/bundle\nbundleEndpointProfile: {{type: https_spiffe, \
             endpointSPIFFEID: 'spiffe://{td}/ambit/replica/1'}}\ntrustDomainBundle: '{}'",
            f.endpoint.at,
            bundle(1, &[&f.root])
        )
    };
    let entry = |id: &str, more: &str| {
        format!(
            "spiffeID: {id}\nparentID: spiffe://west/ambit/cluster/west\nselectors: ['unix:uid:1000']\nhint: inner\n{more}"
        )
    };
    let text = [
        object("ClusterFederatedTrustDomain", "own", &federated("west")),
        object("ClusterFederatedTrustDomain", "there", &federated("example.org")),
        object("ClusterStaticEntry", "web", &entry("spiffe://west/web", "federatesWith: [example.org]")),
        object(
            "ClusterStaticEntry",
            "lost",
            &entry("spiffe://west/lost", "").replace("cluster/west", "cluster/nowhere"),
        ),
        object(
            "ClusterSPIFFEID",
            "db",
            "spiffeIDTemplate: spiffe://west/db\nworkloadSelectorTemplates: ['cgroup:db']\nttl: 1h",
        ),
    ];
    let file = cell.file("spire.yaml");
    std::fs::write(&file, text.concat()).unwrap();
    let (program, context) = (ambit_tests::process::binary("ambit").unwrap(), cell.admin_file("context.json"));
    let apply = |more: &[&str]| {
        let (program, context, file) =
            (program.display().to_string(), context.display().to_string(), file.display().to_string());
        let line = [program.as_str(), "--context", &context, "apply", "-f", &file, "--cluster", "west", "-o", "json"];
        let out = ambit_tests::process::run(&[&line[..], more].concat()).unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let rows: serde_json::Value = serde_json::from_slice(&out.stdout).expect(&said);
        let rows = rows.as_array().unwrap().clone();
        let told = rows.iter().map(|row| ["name", "status"].map(|k| row[k].as_str().unwrap().to_owned())).collect();
        (out.status.code(), told)
    };
    let row = |name: &str, status: &str| [name.to_owned(), status.to_owned()];
    let names = ["west", "example.org", "web", "lost", "db"];
    let dry = apply(&["--dry-run"]);
    assert_eq!(dry.0, Some(0));
    assert_eq!(
        registry(&cell)
            .await
            .list_federation_relationships(v1::ListFederationRelationshipsRequest {})
            .await
            .unwrap()
            .into_inner()
            .relationships
            .len(),
        0,
        "a dry run writes nothing"
    );
    // Twice: the same again is what it was.
    for _ in 0..2 {
        let (code, told): (_, Vec<[String; 2]>) = apply(&[]);
        assert_eq!(code, Some(1));
        let mut by_name: Vec<[String; 2]> = told.clone();
        by_name.sort();
        let ok = |name: &str| told.contains(&row(name, "ok"));
        assert!(ok("example.org") && ok("web") && ok("db"), "{told:?}");
        assert!(names.iter().all(|name| by_name.iter().any(|r| r[0] == *name)), "{told:?}");
        assert!(!ok("west") && !ok("lost"), "{told:?}");
    }
    let listed = v1::entry_registry_client::EntryRegistryClient::new(cell.admin(1).await.unwrap())
        .list_entries(v1::ListEntriesRequest::default())
        .await
        .unwrap()
        .into_inner()
        .entries;
    let web = listed.iter().find(|e| e.id == "web").unwrap();
    assert_eq!(
        (web.spiffe_id.as_str(), web.hint.as_str(), &web.federates_with[..]),
        ("spiffe://west/web", "inner", &["example.org".to_owned()][..])
    );
    assert!(listed.iter().any(|e| e.id == "db" && e.ttl_seconds == 3_600) && listed.len() == 2, "{listed:?}");
    assert_eq!(self::row(&cell).await.trust_domain, "example.org");
}
