//! What outsiders get of a cell, by programs that nobody here wrote: curl, openssl, python.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::tls::certified;
use ambit_model::Code;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::operator::within;
use ambit_tests::peering::grant;
use ambit_tests::process::{Folder, free_address, must_run, run};
use ambit_transport::Identity;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const DAYS: &str = "2";

/// Fetches with curl, which verifies nothing but what `more` says.
fn curl(at: SocketAddr, path: &str, more: &[&str]) -> (String, String) {
    let url = format!("https://{at}{path}");
    let fixed =
        ["curl", "--silent", "--show-error", "--max-time", "10", "--dump-header", "-", "--output", "/dev/stdout"];
    let out = must_run(&[&fixed[..], more, &[&url]].concat()).unwrap();
    let (head, body) = out.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn status(at: SocketAddr, path: &str, more: &[&str]) -> u16 {
    let (head, _) = curl(at, path, &[&["--insecure"], more].concat());
    head.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn header(head: &str, name: &str) -> String {
    let line = head.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:"))).expect(name);
    line.split_once(':').unwrap().1.trim().to_owned()
}

async fn endpoint(profile: &str, folder: Folder) -> (Cell, SocketAddr) {
    let at = free_address().unwrap();
    let more = format!("[bundle_endpoint]\nlisten = \"{at}\"\n{profile}\n");
    (Cell::configured(folder, "west", 1, &more).await.unwrap(), at)
}

/// The public point of a certificate's key as openssl shows it: 04, x, y in hexadecimal digits.
fn point(pem: &str) -> String {
    let script = format!("openssl x509 -in {pem} -pubkey -noout | openssl pkey -pubin -text -noout");
    let text = must_run(&["sh", "-c", &script]).unwrap();
    let digits = text.lines().filter(|line| line.starts_with("    ")).flat_map(|line| line.trim().split(':'));
    digits.collect::<String>()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bundle_is_served_to_the_letter_by_the_replicas_own_svid() {
    let oidc = "profile = \"https_spiffe\"\nrefresh_hint_s = 120\noidc_issuer = \"https://id.example.org/west\"";
    let (cell, at) = endpoint(oidc, Folder::new().unwrap()).await;
    let root_pem = cell.admin_file("root.pem").display().to_string();
    // The first key of JWT-SVIDs is made within a tick or two of the founding, and is a change of the bundle.
    let (head, body) = within("a key of JWT-SVIDs", async || {
        let (head, body) = curl(at, "/", &["--insecure"]);
        body.contains("jwt-svid").then_some((head, body))
    })
    .await;
    assert_eq!(header(&head, "content-type"), "application/json");

    // Each member as the standard has it, read by another's JSON reader, the key's numbers by openssl.
    let check = r#"
import base64, json, subprocess, sys
doc, der, point = json.load(sys.stdin), open(sys.argv[1], "rb").read(), bytes.fromhex(sys.argv[2])
assert set(doc) == {"keys", "spiffe_sequence", "spiffe_refresh_hint"}, doc
assert doc["spiffe_sequence"] == (1 << 40 | 2) and doc["spiffe_refresh_hint"] == 120, doc
key, jwt = doc["keys"]
assert set(key) == {"kty", "crv", "x", "y", "use", "x5c"}, key
assert (key["kty"], key["crv"], key["use"]) == ("EC", "P-256", "x509-svid"), key
[x5c] = key["x5c"]
assert base64.b64decode(x5c, validate=True) == der
un = lambda s: base64.urlsafe_b64decode(s + "=" * (-len(s) % 4))
assert b"\x04" + un(key["x"]) + un(key["y"]) == point and "=" not in key["x"] + key["y"]
assert set(jwt) == {"kty", "crv", "x", "y", "use", "kid"} and jwt["kid"] and jwt["use"] == "jwt-svid", jwt
print("ok")
"#;
    let der = cell.file("root.der").display().to_string();
    must_run(&["openssl", "x509", "-in", &root_pem, "-outform", "DER", "-out", &der]).unwrap();
    let document = cell.file("bundle.json").display().to_string();
    std::fs::write(&document, &body).unwrap();
    let script = cell.file("check.py").display().to_string();
    std::fs::write(&script, check).unwrap();
    let python = format!("python3 {script} {der} {} < {document}", point(&root_pem));
    assert_eq!(must_run(&["sh", "-c", &python]).unwrap().trim(), "ok");
    // And the reader that we use for others' bundles takes it, strict as it is.
    assert_eq!(ambit_identity::bundle::roots(&body).unwrap(), [std::fs::read(&der).unwrap()]);

    // The endpoint is the replica: its chain ends at the root, it carries its SPIFFE ID, and no client certificate is asked.
    let client = |version: &str| {
        let verify = ["-CAfile", &root_pem, "-verify_return_error", "-msg", "-showcerts", version];
        must_run(&["sh", "-c", &format!("echo | openssl s_client -connect {at} {} 2>&1", verify.join(" "))]).unwrap()
    };
    for version in ["-tls1_2", "-tls1_3"] {
        let said = client(version);
        assert!(said.contains("Verify return code: 0 (ok)"), "{said}");
        assert!(said.contains("Certificate") && !said.contains("CertificateRequest"), "{said}");
        assert_eq!(said.matches("BEGIN CERTIFICATE").count(), 2, "leaf and intermediate: {said}");
        assert!(!said.contains("NewSessionTicket"), "a session that can be resumed: {said}");
    }
    // Nor is one of the cell's own RPCs, before or after a client says who it is.
    let rpc = cell.address(1).unwrap();
    let (admin, key) =
        (cell.admin_file("admin.pem").display().to_string(), cell.admin_file("admin.key").display().to_string());
    for client in [String::new(), format!("-cert {admin} -key {key} -cert_chain {admin}")] {
        let tls = format!("-connect {rpc} -alpn h2 -msg -CAfile {root_pem} -verify_return_error {client}");
        let said = must_run(&["sh", "-c", &format!("sleep 1 | openssl s_client {tls} 2>&1; true")]).unwrap();
        assert!(said.contains("ALPN protocol: h2") && said.contains("Verify return code: 0 (ok)"), "{said}");
        assert!(!said.contains("NewSessionTicket") && !said.contains("Early data was accepted"), "{said}");
    }
    let leaf = format!("echo | openssl s_client -connect {at} 2>/dev/null | openssl x509 -noout -ext subjectAltName");
    assert!(must_run(&["sh", "-c", &leaf]).unwrap().contains("URI:spiffe://west/ambit/replica/1"));

    // Unchanged content is said to be so, and nothing but GET and these paths is answered.
    let etag = header(&head, "etag");
    let (again, nothing) = curl(at, "/", &["--insecure", "--header", &format!("If-None-Match: {etag}")]);
    assert!(again.contains(" 304") && nothing.is_empty() && header(&again, "etag") == etag, "{again}");
    assert_eq!(status(at, "/", &["--header", "If-None-Match: \"x\""]), 200);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        assert_eq!(status(at, "/", &["--request", method]), 405, "{method}");
    }
    for path in ["/bundle", "/..%2f", "//", "/metrics", "/.well-known/spiffe", "/keys/"] {
        assert_eq!(status(at, path, &["--path-as-is"]), 404, "{path}");
    }
    let (_, discovery) = curl(at, "/.well-known/openid-configuration", &["--insecure"]);
    let discovery: serde_json::Value = serde_json::from_str(&discovery).unwrap();
    assert_eq!(discovery["issuer"], "https://id.example.org/west");
    assert_eq!(discovery["jwks_uri"], "https://id.example.org/west/keys");
    let (_, keys) = curl(at, "/keys", &["--insecure"]);
    // Another's library finds the keys in both documents, by their names.
    let td = spiffe::TrustDomain::new("west").unwrap();
    let kids = |text: &str| {
        let keys = serde_json::from_str::<serde_json::Value>(text).unwrap()["keys"].take();
        let named = keys.as_array().unwrap().iter().filter(|key| key.get("kid").is_some());
        let named: Vec<_> = named.cloned().collect();
        let document = serde_json::json!({ "keys": named }).to_string();
        let bundle = spiffe::JwtBundle::from_jwt_authorities(td.clone(), document.as_bytes()).unwrap();
        bundle.jwt_authorities().map(|key| key.key_id().to_owned()).collect::<Vec<_>>()
    };
    assert!(kids(&keys).len() == 1 && kids(&keys) == kids(&body), "{keys}");
    let alg = &serde_json::from_str::<serde_json::Value>(&keys).unwrap()["keys"][0];
    assert!(alg["alg"] == "ES256" && alg["use"] == "sig", "{keys}");
    revoked_leaves_stand_in_the_crl(&cell, at).await;
    strangers_hold_few_connections(at);
}

/// openssl verifies the CRL's signature by the issuer, and refuses by it whom the cell refuses, and nobody else.
async fn revoked_leaves_stand_in_the_crl(cell: &Cell, at: SocketAddr) {
    grant(cell, "eve", &["operator"]).await.unwrap();
    grant(cell, "ada", &["operator"]).await.unwrap();
    let (path, root_pem) = (|name: &str| cell.file(name).display().to_string(), cell.admin_file("root.pem"));
    let mut authority = String::new();
    for name in ["eve", "ada"] {
        let key = SvidKey::generate().unwrap();
        let request = v1::CertifyAdminRequest { request_id: fresh(), name: name.into(), csr: key.csr().unwrap() };
        let mut admins = v1::administrators_client::AdministratorsClient::new(cell.admin(1).await.unwrap());
        let chain = admins.certify_admin(request).await.unwrap().into_inner().chain_der;
        for (part, der) in [("leaf", &chain[0]), ("issuer", &chain[1])] {
            let pem = certificates_to_pem([der.as_slice()]);
            std::fs::write(path(&format!("{name}.{part}.pem")), pem).unwrap();
        }
        let identity = Identity::new(Some(certified(chain.iter().cloned().map(Into::into).collect(), &key).unwrap()));
        let channel = cell.channel_as(identity, 1).await.unwrap();
        let status = || async { MembershipClient::new(channel.clone()).status(v1::StatusRequest {}).await };
        status().await.unwrap();
        let ski =
            must_run(&["openssl", "x509", "-in", &path("eve.issuer.pem"), "-noout", "-ext", "subjectKeyIdentifier"]);
        authority = ski.unwrap().lines().last().unwrap().trim().replace(':', "").to_lowercase();
        if name == "eve" {
            let serial = must_run(&["openssl", "x509", "-in", &path("eve.leaf.pem"), "-noout", "-serial"]).unwrap();
            let serial = serial.trim().strip_prefix("serial=").unwrap().to_lowercase();
            let mut revocation = v1::revocation_client::RevocationClient::new(cell.admin(1).await.unwrap());
            let authority = authority.clone();
            revocation.deny_svid(v1::DenySvidRequest { request_id: fresh(), authority, serial }).await.unwrap();
            // On the connection that it has open, too.
            assert_eq!(from_status(&status().await.unwrap_err()).code, Code::SvidRevoked);
        }
    }
    let (crl, pem) = (path("crl.der"), path("crl.pem"));
    must_run(&["curl", "--silent", "--insecure", "--output", &crl, &format!("https://{at}/crl/{authority}")]).unwrap();
    must_run(&["openssl", "crl", "-inform", "DER", "-in", &crl, "-out", &pem]).unwrap();
    let said = run(&["openssl", "crl", "-in", &pem, "-CAfile", &path("eve.issuer.pem"), "-noout", "-text"]).unwrap();
    let text = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    assert!(text.contains("verify OK") && text.contains("X509v3 CRL Number"), "{text}");
    assert_eq!(text.matches("Serial Number:").count(), 1, "{text}");
    for (name, good) in [("eve", false), ("ada", true)] {
        let (issuer, leaf) = (path(&format!("{name}.issuer.pem")), path(&format!("{name}.leaf.pem")));
        let trusted = ["openssl", "verify", "-CAfile", root_pem.to_str().unwrap(), "-untrusted", &issuer];
        let verified = run(&[&trusted[..], &["-crl_check", "-CRLfile", &pem, &leaf]].concat()).unwrap();
        let said = String::from_utf8_lossy(&[verified.stdout, verified.stderr].concat()).into_owned();
        assert_eq!(verified.status.success(), good, "{name}: {said}");
        assert_eq!(said.contains("certificate revoked"), !good, "{name}: {said}");
    }
    // The replica goes on to another intermediate: the list of the former is signed with its key still, and served.
    let mut authorities = v1::local_authority_client::LocalAuthorityClient::new(cell.admin(1).await.unwrap());
    let taint = v1::X509AuthorityRequest { request_id: fresh(), authority: authority.clone(), ..Default::default() };
    authorities.taint_x509_authority(taint).await.unwrap();
    cell.wait_for("another intermediate", |all| all[0].members[0].authority != authority).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    must_run(&["curl", "--silent", "--insecure", "--output", &crl, &format!("https://{at}/crl/{authority}")]).unwrap();
    let said =
        run(&["openssl", "crl", "-inform", "DER", "-in", &crl, "-CAfile", &path("eve.issuer.pem"), "-noout", "-text"]);
    let said = said.unwrap();
    let again = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    assert!(again.contains("verify OK") && again.matches("Serial Number:").count() == 1, "{again}");
    assert!(again != text, "of now, not the one that was kept");
    assert_eq!(status(at, "/crl/00ff", &[]), 404);
    assert_eq!(status(at, &format!("/crl/{}", "a".repeat(8_000)), &[]), 404);
}

/// Open connections without a word: of one address a bounded number, and others' documents are served all the same.
fn strangers_hold_few_connections(at: SocketAddr) {
    let mut held: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(at).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(300));
    let mut closed = 0;
    for stream in &mut held {
        stream.set_nonblocking(true).unwrap();
        closed += usize::from(matches!(stream.read(&mut [0; 1]), Ok(0)));
    }
    assert_eq!(closed, 40 - 32);
    let other = must_run(&["curl", "--silent", "--insecure", "--interface", "127.0.0.9", &format!("https://{at}/")]);
    assert!(other.unwrap().contains("spiffe_sequence"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_endpoint_is_verified_as_any_site_and_serves_no_oidc_unasked() {
    let folder = Folder::new().unwrap();
    let path = |name: &str| folder.path(name).display().to_string();
    let (ca, ca_key, cert, key, csr) =
        (path("ca.pem"), path("ca.key"), path("web.pem"), path("web.key"), path("web.csr"));
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let root = ["openssl", "req", "-x509", "-subj", "/CN=web root", "-days", DAYS, "-keyout", &ca_key, "-out", &ca];
    must_run(&[&root[..], &ec].concat()).unwrap();
    let ask = ["openssl", "req", "-new", "-subj", "/CN=west", "-keyout", &key, "-out", &csr];
    must_run(&[&ask[..], &ec].concat()).unwrap();
    let names = path("names");
    std::fs::write(&names, "subjectAltName = IP:127.0.0.1\nbasicConstraints = CA:FALSE\n").unwrap();
    let sign =
        ["openssl", "x509", "-req", "-in", &csr, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial", "-days", DAYS];
    must_run(&[&sign[..], &["-extfile", &names, "-out", &cert]].concat()).unwrap();
    must_run(&["chmod", "600", &key]).unwrap();
    let profile = format!("profile = \"https_web\"\ncertificate = \"{cert}\"\nkey = \"{key}\"");
    let (cell, at) = endpoint(&profile, folder).await;
    let ca = cell.file("ca.pem").display().to_string();
    let (head, body) = curl(at, "/", &["--cacert", &ca]);
    assert!(head.contains(" 200") && body.contains("x509-svid"), "{head}");
    let unverified = run(&["curl", "--silent", &format!("https://{at}/")]).unwrap();
    assert!(!unverified.status.success(), "a certificate that no authority of this machine gave");
    for path in ["/.well-known/openid-configuration", "/keys"] {
        assert_eq!(status(at, path, &[]), 404, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_cannot_be_as_configured_keeps_the_replica_from_starting() {
    let folder = Folder::new().unwrap();
    let at = free_address().unwrap();
    let (cert, key) = (folder.path("no.pem").display().to_string(), folder.path("no.key").display().to_string());
    let more = format!(
        "[bundle_endpoint]\nlisten = \"{at}\"\nprofile = \"https_web\"\ncertificate = \"{cert}\"\nkey = \"{key}\"\n"
    );
    let seat = ambit_tests::cell::Seat::new(&folder, "r1", &more).unwrap();
    let out = folder.path("admin").display().to_string();
    assert!(seat.ambitd("init", &["--trust-domain", "west", "--admin-out", &out]).unwrap().status.success());
    let ran = seat.ambitd("run", &[]).unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(!ran.status.success() && said.contains("config_invalid") && said.contains("no.pem"), "{said}");
}
