//! `ambit svid` on certificates that OpenSSL made: every leaf of the SPIFFE standard's rules (reference/identity.md, section
//! 3), bundles in each form, and what OpenSSL and GnuTLS say of the same leaves beside it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with two trust domains' authorities, made by OpenSSL.
struct Made(PathBuf);

impl Made {
    fn new(name: &str) -> Made {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("svid-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let made = Made(path);
        for (td, key) in [("example.org", "ec"), ("other.org", "rsa")] {
            let key: &[&str] = if key == "ec" {
                &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
            } else {
                &["-newkey", "rsa:2048"]
            };
            let (id, usage) = (format!("subjectAltName=URI:spiffe://{td}"), "keyUsage=critical,keyCertSign,cRLSign");
            let ca =
                ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", usage, "-addext", &id, "-days", "3650"];
            let files = ["-keyout", &made.at(&format!("{td}.key")), "-out", &made.at(&format!("{td}.pem"))];
            openssl(&[&["req", "-x509", "-nodes", "-subj", "/O=test"], key, &ca, &files].concat());
        }
        made
    }
    fn at(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
    /// A leaf of `td`'s authority with these extensions.
    fn leaf(&self, td: &str, name: &str, subject: &str, extensions: &str) -> String {
        let (key, csr, ext, out) =
            (self.at("leaf.key"), self.at("csr"), self.at("ext"), self.at(&format!("{name}.pem")));
        if !Path::new(&key).exists() {
            openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &key]);
        }
        openssl(&["req", "-new", "-key", &key, "-subj", subject, "-out", &csr]);
        std::fs::write(&ext, extensions).unwrap();
        let (ca, ca_key) = (self.at(&format!("{td}.pem")), self.at(&format!("{td}.key")));
        let sign = ["-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial", "-days", "30"];
        openssl(&[&["x509", "-req", "-in", &csr, "-extfile", &ext, "-out", &out][..], &sign].concat());
        out
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// RFC 7517 A.1's first key, as a key of JWT-SVIDs.
const JWT_KEY: &str = r#"{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256",
    "x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}"#;

fn openssl(args: &[&str]) {
    let out = Command::new("openssl").args(args).output().unwrap();
    assert!(out.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn ambit(args: &[&str]) -> (i32, String, String) {
    let out: Output =
        Command::new(env!("CARGO_BIN_EXE_ambit")).args(args).env("HOME", "/nonexistent").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

const KU: &str = "keyUsage=critical,digitalSignature";
const EKU: &str = "extendedKeyUsage=serverAuth,clientAuth";
const LEAF: &str = "basicConstraints=critical,CA:FALSE";

/// The extensions of a leaf with this SAN and nothing to object to.
fn with(san: &str) -> String {
    format!("{LEAF}\n{KU}\n{EKU}\nsubjectAltName={san}\n")
}

/// Name, subject, extensions, and the rule that a bad one breaks.
fn leaves() -> Vec<(&'static str, &'static str, String, Option<&'static str>)> {
    let id = "URI:spiffe://example.org/w";
    let usage = |ku: &str| format!("{LEAF}\n{ku}\n{EKU}\nsubjectAltName={id}\n");
    let long = format!("URI:spiffe://example.org/{}", "x".repeat(3_000));
    vec![
        ("good", "/O=w", with(id), None),
        ("good and DNS SAN", "/O=w", with(&format!("{id},DNS:w.example.org")), None),
        ("empty subject, critical SAN", "/", with(&format!("critical,{id}")), None),
        ("no EKU", "/O=w", format!("{LEAF}\n{KU}\nsubjectAltName={id}\n"), None),
        (
            "cA=true",
            "/O=w",
            format!("basicConstraints=critical,CA:TRUE\n{KU}\n{EKU}\nsubjectAltName={id}\n"),
            Some("leaf-not-ca"),
        ),
        ("keyCertSign", "/O=w", usage("keyUsage=critical,digitalSignature,keyCertSign"), Some("leaf-signs-no-more")),
        ("cRLSign", "/O=w", usage("keyUsage=critical,digitalSignature,cRLSign"), Some("leaf-signs-no-more")),
        ("no digitalSignature", "/O=w", usage("keyUsage=critical,keyAgreement"), Some("leaf-signs")),
        ("no KeyUsage", "/O=w", format!("{LEAF}\n{EKU}\nsubjectAltName={id}\n"), Some("key-usage")),
        ("KeyUsage not critical", "/O=w", usage("keyUsage=digitalSignature"), Some("key-usage")),
        ("id without path", "/O=w", with("URI:spiffe://example.org"), Some("spiffe-id")),
        ("id of the root path", "/O=w", with("URI:spiffe://example.org/"), Some("spiffe-id")),
        ("https scheme", "/O=w", with("URI:https://example.org/w"), Some("spiffe-id")),
        ("no URI", "/O=w", with("DNS:w.example.org"), Some("one-uri-san")),
        ("no SAN", "/O=w", format!("{LEAF}\n{KU}\n{EKU}\n"), Some("one-uri-san")),
        ("port in the trust domain", "/O=w", with("URI:spiffe://example.org:443/w"), Some("spiffe-id")),
        ("user in the trust domain", "/O=w", with("URI:spiffe://me@example.org/w"), Some("spiffe-id")),
        ("id of 3,000 bytes", "/O=w", with(&long), Some("spiffe-id")),
        ("two SPIFFE URIs", "/O=w", with(&format!("{id},URI:spiffe://example.org/x")), Some("one-uri-san")),
        ("two trust domains", "/O=w", with(&format!("{id},URI:spiffe://other.org/x")), Some("one-uri-san")),
        (
            "two trust domains, the other first",
            "/O=w",
            with(&format!("URI:spiffe://other.org/x,{id}")),
            Some("one-uri-san"),
        ),
        ("https URI first", "/O=w", with(&format!("URI:https://example.org/,{id}")), Some("one-uri-san")),
        ("dot-dot", "/O=w", with("URI:spiffe://example.org/a/../w"), Some("spiffe-id")),
        ("percent-encoding", "/O=w", with("URI:spiffe://example.org/%77"), Some("spiffe-id")),
        ("query", "/O=w", with("URI:spiffe://example.org/w?a=b"), Some("spiffe-id")),
        ("fragment", "/O=w", with(r"URI:spiffe://example.org/w\#a"), Some("spiffe-id")),
        ("trailing slash", "/O=w", with("URI:spiffe://example.org/w/"), Some("spiffe-id")),
        ("empty segment", "/O=w", with("URI:spiffe://example.org//w"), Some("spiffe-id")),
        ("upper-case trust domain", "/O=w", with("URI:spiffe://EXAMPLE.org/w"), Some("spiffe-id")),
        (
            "serverAuth only",
            "/O=w",
            format!("{LEAF}\n{KU}\nextendedKeyUsage=serverAuth\nsubjectAltName={id}\n"),
            Some("leaf-eku"),
        ),
        ("empty subject, SAN not critical", "/", with(id), Some("san-critical")),
    ]
}

#[test]
fn each_leaf_has_the_verdict_that_the_standard_gives_it() {
    let made = Made::new("leaves");
    let roots = made.at("example.org.pem");
    println!("{:<36} {:<8} {:<8} {:<8}", "leaf", "ours", "openssl", "gnutls");
    for (name, subject, extensions, broken) in leaves() {
        let leaf = made.leaf("example.org", "leaf", subject, &extensions);
        let (exit, out, err) = ambit(&["svid", "verify", &leaf, "--bundle", &roots, "-o", "json"]);
        let answer: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{name}: {e}: {out}{err}"));
        let (lint, findings, _) = ambit(&["svid", "lint", &leaf, "-o", "json"]);
        let findings: Value = serde_json::from_str(&findings).unwrap();
        let musts: Vec<&str> = findings
            .as_array()
            .unwrap()
            .iter()
            .filter(|f| f["level"] == "must")
            .map(|f| f["rule"].as_str().unwrap())
            .collect();
        match broken {
            None => {
                assert_eq!((exit, &answer["verdict"], lint), (0, &"valid".into(), 0), "{name}: {out}");
                assert_eq!(answer["id"], "spiffe://example.org/w");
                assert_eq!(musts, [""; 0], "{name}");
            }
            Some(rule) => {
                assert_eq!((exit, &answer["verdict"], lint), (4, &"refused".into(), 4), "{name}: {out}");
                assert_eq!(answer["code"], "svid_malformed", "{name}: {out}");
                // cA=true makes of a lone certificate an authority, which lint judges as one.
                assert!(name == "cA=true" || musts == [rule], "{name}: {musts:?}");
            }
        }
        let ok = |tool: &str, args: &[&str]| Command::new(tool).args(args).output().unwrap().status.success();
        let theirs = ok("openssl", &["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", &roots, &leaf]);
        let gnutls = ok("certtool", &["--verify", "--load-ca-certificate", &roots, "--infile", &leaf]);
        let said = |accepted: bool| if accepted { "accepts" } else { "refuses" };
        println!("{name:<36} {:<8} {:<8} {:<8}", said(broken.is_none()), said(theirs), said(gnutls));
    }
}

#[test]
fn time_authority_and_trust_domain_decide_too() {
    let made = Made::new("trust");
    let (ours, theirs) = (made.at("example.org.pem"), made.at("other.org.pem"));
    let good = made.leaf("example.org", "good", "/O=w", &with("URI:spiffe://example.org/w"));
    let foreign = made.leaf("other.org", "foreign", "/O=w", &with("URI:spiffe://example.org/w"));
    let other = made.leaf("other.org", "other", "/O=w", &with("URI:spiffe://other.org/w"));
    let both = ["--bundle", ours.as_str(), "--bundle", theirs.as_str()];
    let rows: [(&str, &str, Vec<&str>, i32, &str); 10] = [
        ("good", &good, both.to_vec(), 0, ""),
        ("an RSA authority's", &other, both.to_vec(), 0, ""),
        ("as a server", &good, [&both[..], &["--usage", "server"]].concat(), 0, ""),
        ("expired", &good, [&both[..], &["--at", "2035-01-01T00:00:00Z"]].concat(), 4, "svid_untrusted"),
        ("not yet valid", &good, [&both[..], &["--at", "2020-01-01T00:00:00Z"]].concat(), 4, "svid_untrusted"),
        // Pooled roots would accept this one.
        ("right id, foreign authority", &foreign, both.to_vec(), 4, "svid_untrusted"),
        ("a trust domain without a bundle", &other, vec!["--bundle", &ours], 4, "trust_domain_unknown"),
        (
            "another trust domain than wanted",
            &other,
            [&both[..], &["--trust-domain", "example.org"]].concat(),
            4,
            "svid_untrusted",
        ),
        ("a bad time", &good, [&both[..], &["--at", "tomorrow"]].concat(), 2, ""),
        ("one bundle twice", &good, vec!["--bundle", &ours, "--bundle", &ours], 2, ""),
    ];
    for (what, leaf, more, exit, code) in rows {
        let (found, out, err) = ambit(&[&["svid", "verify", leaf, "-o", "json"], &more[..]].concat());
        assert_eq!(found, exit, "{what}: {out}{err}");
        if !code.is_empty() {
            assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["code"], code, "{what}");
        }
    }
    // A chain with its root is one too; one whose intermediate is a leaf is none.
    let chain = made.at("chain.pem");
    let text = |file: &str| std::fs::read_to_string(file).unwrap();
    std::fs::write(&chain, text(&good) + &text(&ours)).unwrap();
    assert_eq!(ambit(&["svid", "verify", &chain, "--bundle", &ours]).0, 0);
    std::fs::write(&chain, text(&good) + &text(&other)).unwrap();
    let (exit, out, _) = ambit(&["svid", "verify", &chain, "--bundle", &ours]);
    assert!(exit == 4 && out.contains("(authority, X509-SVID 4.1)"), "{out}");
    for bad in ["", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&chain, bad).unwrap();
        let (exit, out, err) = ambit(&["svid", "verify", &chain, "--bundle", &ours]);
        assert!([2, 4].contains(&exit) && !err.contains("panicked"), "{bad}: {out}{err}");
    }
}

#[test]
fn under_a_downstream_authority_workloads_are_valid_and_the_cells_own_are_not() {
    let made = Made::new("downstream");
    let roots = made.at("example.org.pem");
    let mark = "1.3.6.1.4.1.61999.1.2=DER:05:00";
    let authority = |name: &str, constraints: &str, mark: &str| {
        let extensions = format!(
            "basicConstraints=critical,{constraints}\nkeyUsage=critical,keyCertSign,cRLSign\n\
             subjectAltName=URI:spiffe://example.org\n{mark}\n"
        );
        // It signs as an authority of the folder does: by the key of its leaves.
        let out = made.leaf("example.org", name, "/O=issuer", &extensions);
        std::fs::copy(made.at("leaf.key"), made.at(&format!("{name}.key"))).unwrap();
        out
    };
    let marked = authority("marked", "CA:TRUE,pathlen:0", mark);
    let plain = authority("plain", "CA:TRUE,pathlen:0", "");
    let loose = authority("loose", "CA:TRUE", mark);
    let bound = format!(
        "1.3.6.1.4.1.61999.1.1=DER:30:36:04:20{}:04:08{}:04:08{}",
        ":07".repeat(32),
        ":00".repeat(8),
        ":00".repeat(8)
    );
    let text = |file: &str| std::fs::read_to_string(file).unwrap();
    for (what, by, id, more, rule) in [
        ("a workload", ("marked", &marked), "spiffe://example.org/w", "", None),
        ("an administrator", ("marked", &marked), "spiffe://example.org/ambit/admin/x", "", Some("downstream-own-id")),
        (
            "bound to a node",
            ("marked", &marked),
            "spiffe://example.org/w",
            bound.as_str(),
            Some("downstream-node-binding"),
        ),
        ("an administrator of the cell", ("plain", &plain), "spiffe://example.org/ambit/admin/x", "", None),
        ("under one without a bound", ("loose", &loose), "spiffe://example.org/w", "", Some("downstream-last")),
    ] {
        let (name, upper) = by;
        let leaf = made.leaf(name, "under", "/O=w", &(with(&format!("URI:{id}")) + more));
        let chain = made.at("chain.pem");
        std::fs::write(&chain, text(&leaf) + &text(upper)).unwrap();
        let (exit, out, err) = ambit(&["svid", "verify", &chain, "--bundle", &roots, "-o", "json"]);
        assert_eq!(exit, if rule.is_some() { 4 } else { 0 }, "{what}: {out}{err}");
        if rule.is_none() {
            let answer: Value = serde_json::from_str(&out).unwrap();
            assert_eq!(answer["downstream"], name == "marked", "{what}");
        }
        let (lint, findings, _) = ambit(&["svid", "lint", &chain, "-o", "json"]);
        let findings: Value = serde_json::from_str(&findings).unwrap();
        let mut musts =
            findings.as_array().unwrap().iter().filter(|f| f["level"] == "must").map(|f| f["rule"].as_str());
        assert_eq!((lint, musts.next().flatten()), (exit, rule), "{what}: {findings}");
    }
}

#[test]
fn bundles_are_read_in_each_form_and_refused_when_they_are_none() {
    let made = Made::new("bundles");
    let leaf = made.leaf("example.org", "leaf", "/O=w", &with("URI:spiffe://example.org/w"));
    let der = |td: &str| {
        let pem = std::fs::read_to_string(made.at(&format!("{td}.pem"))).unwrap();
        pem.lines().filter(|line| !line.starts_with("-----")).collect::<String>()
    };
    let (ours, theirs) = (der("example.org"), der("other.org"));
    let key = |x5c: &str| format!(r#"{{"kty":"EC","use":"x509-svid","x5c":{x5c}}}"#);
    let bundle = |keys: &str| format!(r#"{{"spiffe_sequence":7,"spiffe_refresh_hint":300,"keys":[{keys}]}}"#);
    let good = bundle(&key(&format!(r#"["{ours}"]"#)));
    let map = |inner: &str| format!(r#"{{"trust_domains":{{{inner}}}}}"#);
    let rows: Vec<(&str, String, i32, &str)> = vec![
        ("a bundle", good.clone(), 0, "valid"),
        ("no sequence, no hint", good.replace(r#""spiffe_sequence":7,"spiffe_refresh_hint":300,"#, ""), 0, "valid"),
        ("two x5c: the first counts", bundle(&key(&format!(r#"["{ours}","{theirs}"]"#))), 0, "valid"),
        ("two x5c, ours second", bundle(&key(&format!(r#"["{theirs}","{ours}"]"#))), 4, "trust_domain_unknown"),
        (
            "an unknown use beside",
            bundle(&format!(r#"{{"kty":"EC","use":"wit-svid"}},{}"#, key(&format!(r#"["{ours}"]"#)))),
            0,
            "valid",
        ),
        (
            "an unknown kty beside",
            bundle(&format!(r#"{{"kty":"XX","use":"x509-svid"}},{}"#, key(&format!(r#"["{ours}"]"#)))),
            0,
            "valid",
        ),
        ("use in another case", bundle(&key(&format!(r#"["{ours}"]"#)).replace("x509-svid", "X509-SVID")), 2, ""),
        ("no keys", bundle(""), 2, ""),
        ("no array of keys", r#"{"spiffe_sequence":7}"#.into(), 2, "bundle_malformed"),
        (
            "kid on an x509 key",
            bundle(&key(&format!(r#"["{ours}"]"#)).replace(r#""use""#, r#""kid":"a","use""#)),
            2,
            "bundle_malformed",
        ),
        ("no kid on a JWT key", bundle(r#"{"kty":"EC","use":"jwt-svid"}"#), 2, "bundle_malformed"),
        ("a JWT key of no curve", bundle(r#"{"kty":"EC","use":"jwt-svid","kid":"a"}"#), 2, "bundle_malformed"),
        ("a kid twice", bundle(&[JWT_KEY; 2].join(",")), 2, "each kid once"),
        ("no x5c", bundle(r#"{"kty":"EC","use":"x509-svid"}"#), 2, "bundle_malformed"),
        ("x5c that is no certificate", bundle(&key(r#"["AAAA"]"#)), 2, "bundle_malformed"),
        ("a hint of 2^63", good.replace("300", "9223372036854775808"), 2, "bundle_malformed"),
        ("a negative sequence", good.replace(":7", ":-7"), 2, "bundle_malformed"),
        ("keys twice", good.replace(r#""keys""#, r#""keys":[],"keys""#), 2, "bundle_malformed"),
        ("a map", map(&format!(r#""example.org":{good}"#)), 0, "valid"),
        (
            "a trust domain twice in a map",
            map(&format!(r#""example.org":{good},"example.org":{good}"#)),
            2,
            "bundle_malformed",
        ),
        ("no JSON", "{".into(), 2, "bundle_malformed"),
    ];
    let file = made.at("bundle.json");
    for (what, document, exit, said) in rows {
        std::fs::write(&file, document).unwrap();
        let (found, out, err) = ambit(&["svid", "verify", &leaf, "--bundle", &file, "-o", "json"]);
        assert_eq!(found, exit, "{what}: {out}{err}");
        assert!(format!("{out}{err}").contains(said), "{what}: {out}{err}");
    }
    // Everything of the trust domain is revoked; and a document that says nothing is only whose it is said to be.
    std::fs::write(&file, bundle("")).unwrap();
    let (exit, out, _) =
        ambit(&["svid", "verify", &leaf, "--bundle", &file, "--trust-domain", "example.org", "-o", "json"]);
    assert_eq!((exit, &serde_json::from_str::<Value>(&out).unwrap()["code"]), (4, &"svid_untrusted".into()));
    std::fs::write(&file, &good).unwrap();
    let other = format!("other.org={file}");
    let (exit, out, _) = ambit(&["svid", "verify", &leaf, "--bundle", &other, "-o", "json"]);
    assert_eq!((exit, &serde_json::from_str::<Value>(&out).unwrap()["code"]), (4, &"trust_domain_unknown".into()));
}
