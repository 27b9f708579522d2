//! A cluster's own issuer, made of OpenSSL alone: its downstream authority, what is believed under it, and its end. And an
//! administrator by its entry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::tls::certified;
use ambit_proto::v1;
use ambit_proto::v1::administrators_client::AdministratorsClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::local_authority_client::LocalAuthorityClient;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_tests::cell::{Cell, fresh, refusal};
use ambit_tests::machine::{Lies, Machine, identity, join_token, node_identity, register_cluster};
use ambit_tests::operator::say;
use ambit_tests::process::{Folder, Started, binary, free_address, must_run, run};
use ambit_tests::tpm::Maker;
use ambit_transport::Identity;
use std::time::Duration;
use tonic::transport::Channel;

async fn create(cell: &Cell, entry: v1::Entry) {
    let entry = v1::Entry {
        spiffe_id: format!("spiffe://west/{}", entry.id),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1000".into()],
        ..entry
    };
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] };
    let mut entries = EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let done = entries.batch_create_entry(request).await.unwrap().into_inner();
    assert_eq!(done.results[0].code, "ok", "{done:?}");
}

/// An SVID of the entry, issued through the node as its agent would ask for it.
async fn svid(node: &Channel, entry: &str) -> Identity {
    let key = SvidKey::generate().unwrap();
    let items = vec![v1::NewX509svid { entry_id: entry.into(), csr: key.csr().unwrap() }];
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
    let mut svids = SvidClient::new(node.clone());
    let issued = svids.batch_new_x509svid(request).await.unwrap().into_inner().results.remove(0);
    assert_eq!(issued.code, "ok", "{}", issued.message);
    identity(&issued.chain_der, &key).unwrap()
}

/// A folder in which OpenSSL keeps the issuer's key and signs leaves.
struct Site(Folder);

impl Site {
    fn at(&self, name: &str) -> String {
        self.0.path(name).display().to_string()
    }
    fn openssl(&self, args: &[&str]) {
        must_run(&[&["openssl"], args].concat()).unwrap();
    }
    /// A key, and a request that carries it and nothing else, DER.
    fn request(&self, name: &str) -> Vec<u8> {
        let (key, csr) = (self.at(&format!("{name}.key")), self.at(&format!("{name}.csr")));
        self.openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &key]);
        self.openssl(&["req", "-new", "-key", &key, "-subj", "/", "-outform", "DER", "-out", &csr]);
        std::fs::read(csr).unwrap()
    }
    /// A leaf of this SPIFFE ID under the issuer's authority; its chain in PEM.
    fn leaf(&self, name: &str, id: &str, more: &str) -> String {
        self.request(name);
        let (csr, ext, out) =
            (self.at(&format!("{name}.csr")), self.at(&format!("{name}.ext")), self.at(&format!("{name}.crt")));
        let text = format!(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
             extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=critical,URI:{id}\n{more}\n"
        );
        std::fs::write(&ext, text).unwrap();
        let (ca, key) = (self.at("ca.crt"), self.at("ca.key"));
        let sign = ["-CA", &ca, "-CAkey", &key, "-CAcreateserial", "-days", "1", "-extfile", &ext, "-out", &out];
        self.openssl(&[&["x509", "-req", "-inform", "DER", "-in", &csr][..], &sign].concat());
        let chain = self.at(&format!("{name}.pem"));
        let text = std::fs::read_to_string(&out).unwrap() + &std::fs::read_to_string(&ca).unwrap();
        std::fs::write(&chain, text).unwrap();
        chain
    }
    fn identity(&self, name: &str) -> Identity {
        let chain = ambit_identity::keys::certificates_from_pem(&read(&self.at(&format!("{name}.pem")))).unwrap();
        let key = SvidKey::from_pem(&read(&self.at(&format!("{name}.key")))).unwrap();
        Identity::new(Some(certified(chain, &key).unwrap()))
    }
}

fn read(file: &str) -> String {
    std::fs::read_to_string(file).unwrap()
}

/// `ambit svid verify`: what it says and how it ends.
fn verify(chain: &str, roots: &str) -> (Option<i32>, String) {
    let ambit = binary("ambit").unwrap().display().to_string();
    let out = run(&[&ambit, "svid", "verify", chain, "--bundle", roots]).unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The code with which the cell answers somebody who asks for its status; `handshake` where it ends there.
async fn answered(cell: &Cell, who: Identity) -> String {
    let Ok(channel) = cell.channel_as(who, 1).await else { return "handshake".into() };
    match MembershipClient::new(channel).status(v1::StatusRequest {}).await {
        Ok(_) => "ok".into(),
        Err(status) => match status.metadata().get("ambit-code") {
            Some(code) => code.to_str().unwrap().to_owned(),
            None => "handshake".into(),
        },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_issues_by_itself_under_a_downstream_authority_until_it_is_revoked() {
    let cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let (verdict, answer) = machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap().unwrap();
    let node = cell.channel_as(node_identity(&verdict, &answer.key).unwrap(), 1).await.unwrap();
    let nodes = vec![machine.node()];
    create(&cell, v1::Entry { id: "site".into(), downstream: true, nodes: nodes.clone(), ..Default::default() }).await;
    create(&cell, v1::Entry { id: "ops".into(), admin: true, nodes, ..Default::default() }).await;
    let both = v1::Entry {
        id: "both".into(),
        spiffe_id: "spiffe://west/both".into(),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1".into()],
        admin: true,
        downstream: true,
        ..Default::default()
    };
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![both] };
    let mut entries = EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let answer = entries.batch_create_entry(request).await.unwrap().into_inner();
    assert_eq!((answer.results[0].code.as_str(), answer.revision), ("bad_request", 0));

    // The issuer's key is made by OpenSSL; the SVID of its entry asks for the certificate.
    let site = Site(Folder::new().unwrap());
    let issuer = svid(&node, "site").await;
    let mut svids = SvidClient::new(cell.channel_as(issuer.clone(), 1).await.unwrap());
    let request = v1::NewIntermediateCaRequest { request_id: fresh(), csr: site.request("ca"), lifetime_seconds: 0 };
    let given = svids.new_intermediate_ca(request.clone()).await.unwrap().into_inner();
    let again = svids.new_intermediate_ca(request).await.unwrap().into_inner();
    assert_eq!(given.authority, again.authority, "the same request is the same authority");
    std::fs::write(site.at("ca.crt"), certificates_to_pem(given.chain_der.iter().map(Vec::as_slice))).unwrap();
    std::fs::write(site.at("roots.pem"), certificates_to_pem(given.roots_der.iter().map(Vec::as_slice))).unwrap();
    let (ca, roots) = (site.at("ca.crt"), site.at("roots.pem"));
    let text = must_run(&["openssl", "x509", "-in", &ca, "-noout", "-text"]).unwrap();
    for line in ["CA:TRUE, pathlen:0", "1.3.6.1.4.1.61999.1.2", "URI:spiffe://west", "west downstream site"] {
        assert!(text.contains(line), "{line}: {text}");
    }

    // What it signs for its workloads is believed, here and by a server of OpenSSL's that holds the bundle.
    let good = site.leaf("good", "spiffe://west/site/web", "");
    let (exit, said) = verify(&good, &roots);
    assert!(exit == Some(0) && said.contains("under: a downstream authority"), "{said}");
    assert!(server_lets_in(&site, &roots, "good"));
    assert_eq!(answered(&cell, site.identity("good")).await, "permission_denied", "a workload, of no role");
    // What only the cell says is not, though nothing is amiss for anybody else.
    let binding = format!(
        "1.3.6.1.4.1.61999.1.1=DER:30:36:04:20:{}04:08:{}04:08:{}",
        "07:".repeat(32),
        "00:".repeat(8),
        "00:".repeat(7) + "01"
    );
    for (name, id, more) in [
        ("admin", "spiffe://west/ambit/admin/founder", ""),
        ("replica", "spiffe://west/ambit/replica/1", ""),
        ("bound", "spiffe://west/web", binding.trim_end_matches(':')),
        ("foreign", "spiffe://east/web", ""),
    ] {
        let chain = site.leaf(name, id, more);
        must_run(&["openssl", "verify", "-CAfile", &roots, "-untrusted", &ca, &site.at(&format!("{name}.crt"))])
            .unwrap();
        assert_eq!(verify(&chain, &roots).0, Some(4), "{name}");
        assert_eq!(answered(&cell, site.identity(name)).await, "handshake", "{name}");
    }

    // Operators see it, taint it and revoke it; then nobody of the cell believes what it signed.
    let mut authorities = LocalAuthorityClient::new(cell.admin(1).await.unwrap());
    let state = authorities.get_x509_authority_state(v1::X509AuthorityStateRequest { local_only: false });
    let listed = state.await.unwrap().into_inner().downstreams;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].entry.as_str(), listed[0].authority.as_str()), ("site", given.authority.as_str()));
    let named =
        || v1::X509AuthorityRequest { request_id: fresh(), authority: given.authority.clone(), ..Default::default() };
    authorities.taint_x509_authority(named()).await.unwrap();
    let after = authorities.revoke_x509_authority(named()).await.unwrap().into_inner().state.unwrap();
    assert_eq!(after.downstreams[0].state, "revoked");
    ended(&cell, &site).await;

    // A second one ends with the node through which it was asked for.
    let request = v1::NewIntermediateCaRequest { request_id: fresh(), csr: site.request("ca"), lifetime_seconds: 600 };
    let given = svids.new_intermediate_ca(request).await.unwrap().into_inner();
    std::fs::write(&ca, certificates_to_pem(given.chain_der.iter().map(Vec::as_slice))).unwrap();
    site.leaf("good", "spiffe://west/site/web", "");
    assert_eq!(answered(&cell, site.identity("good")).await, "permission_denied");
    by_entry(&cell, &node).await;
    let ops = svid(&node, "ops").await;
    assert_eq!(answered(&cell, ops.clone()).await, "ok");
    say(&cell, "ban", &[machine.node()]).await.unwrap();
    ended(&cell, &site).await;
    assert_ne!(answered(&cell, ops).await, "ok", "its node is banned");
    let request = v1::NewIntermediateCaRequest { request_id: fresh(), csr: site.request("ca"), lifetime_seconds: 0 };
    assert!(svids.new_intermediate_ca(request).await.is_err());
}

/// Revoked authorities reach the handshakes of a replica with its next look at the state.
async fn ended(cell: &Cell, site: &Site) {
    for _ in 0..100 {
        if answered(cell, site.identity("good")).await == "handshake" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("what it signed is still believed");
}

/// An SVID of the entry administers with the roles that its identity was given, and with nothing before.
async fn by_entry(cell: &Cell, node: &Channel) {
    let ops = svid(node, "ops").await;
    assert_eq!(answered(cell, ops.clone()).await, "permission_denied", "without a role");
    let mut admins = AdministratorsClient::new(cell.admin(1).await.unwrap());
    let name = "spiffe://west/ops".to_owned();
    let request = v1::ChangeRolesRequest {
        request_id: fresh(),
        name: name.clone(),
        grant: vec!["operator".into()],
        ..Default::default()
    };
    admins.change_roles(request).await.unwrap();
    assert_eq!(answered(cell, ops.clone()).await, "ok");
    let listed = admins.list_admins(v1::ListAdminsRequest {}).await.unwrap().into_inner().admins;
    assert!(listed.iter().any(|admin| admin.name == name && admin.roles == ["operator"]), "{listed:?}");
    // No more than that, and no certificate below /ambit/admin/.
    let channel = cell.channel_as(ops, 1).await.unwrap();
    let more = v1::ChangeRolesRequest {
        request_id: fresh(),
        name,
        grant: vec!["federation-admin".into()],
        ..Default::default()
    };
    let refused = refusal(AdministratorsClient::new(channel.clone()).change_roles(more).await).unwrap();
    assert_eq!(refused.code.as_str(), "permission_denied");
    let csr = SvidKey::generate().unwrap().csr().unwrap();
    let renew = v1::RenewAdminRequest { request_id: fresh(), csr };
    assert_eq!(refusal(SvidClient::new(channel).renew_admin(renew).await).unwrap().code.as_str(), "permission_denied");
}

/// Whether OpenSSL's server, which asks for a certificate under the bundle, takes this one.
fn server_lets_in(site: &Site, roots: &str, name: &str) -> bool {
    let at = free_address().unwrap().to_string();
    let (chain, key) = (site.at(&format!("{name}.pem")), site.at(&format!("{name}.key")));
    let own = ["-cert", &chain, "-cert_chain", &chain, "-key", &key];
    let ask = ["openssl", "s_server", "-accept", &at, "-CAfile", roots, "-Verify", "3", "-verify_return_error", "-www"];
    let _server = Started::start(&[&ask[..], &own].concat(), &site.0.path("server.log")).unwrap();
    let call = format!(
        "for n in $(seq 50); do printf 'GET / HTTP/1.0\\r\\n\\r\\n' | openssl s_client -connect {at} -CAfile {roots} -cert {chain} \
         -cert_chain {chain} -key {key} -verify_return_error -ign_eof 2>&1 && exit 0; sleep 0.1; done; exit 1"
    );
    run(&["sh", "-c", &call]).unwrap().status.success()
}
