//! Attestation results: claims of the present standing, signed; what was altered is refused.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use ambit_identity::result::thumbprint;
use ambit_identity::{ExportedResult, KeySet, RecordKey, Root, fingerprint};
use ambit_model::appraisal::PcrBank;
use ambit_model::trust::TrustVector;
use ambit_model::{Code, Generation, NodeId, RaftIndex, Revision, Stamp, TrustDomain};
use ambit_state::command::{Admission, NodeVerb, Nodes, Seen};
use ambit_state::objects::*;
use ambit_state::{Command, LogEntry, State};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

const NOW: Stamp = Stamp(1_800_000_000_000);
const NODE: NodeId = NodeId([7; 32]);
const BOOT: &str = "ambit.boot";

struct West {
    td: TrustDomain,
    root: Root,
    key: RecordKey,
    state: State,
}

impl West {
    fn new() -> West {
        let td: TrustDomain = "west".parse().unwrap();
        let root = Root::create(&td, NOW, [1; 16]).unwrap();
        let key = RecordKey::generate().unwrap();
        let mut west = West { td: td.clone(), root, key, state: State::new() };
        let row = CellRow::founded(td, west.root.der().to_vec());
        let member = Member {
            address: String::new(),
            authority: "a1".into(),
            authority_not_after: NOW.plus_ms(86_400_000),
            wrap_key: vec![],
            record_key: west.key.public(),
        };
        west.run(Command::FoundCell(row, 1, member, KeySetRow::default()));
        west.run(Command::RegisterCluster("c".parse().unwrap(), vec![], 30_000));
        west.run(Command::AllowEk("c".parse().unwrap(), vec![NODE]));
        let enrolled = json!({"submods": {"node": {
            "ear.status": "none", "ambit.pcrs": {"7": "07".repeat(32), "10": "aa".repeat(32)}, BOOT: {"secure_boot": true}
        }}});
        let admission = Admission {
            node: NODE,
            cluster: "c".parse().unwrap(),
            nonce: [1; 32],
            deadline: NOW.plus_ms(1000),
            join_token: None,
            endorsement_revision: Revision(3),
            policy_revision: Revision(0),
            ak: AkFacts::default(),
            ek: EkFacts { class: "hardware".into(), ..EkFacts::default() },
            seen: seen(1, [7; 32]),
            key_hash: [0; 32],
            authority: "a1".into(),
            claims: enrolled.to_string(),
        };
        west.run(Command::AdmitNode(admission));
        west
    }
    fn at(&mut self, stamp: Stamp, command: Command) {
        let entry = LogEntry { stamp, client: [0; 32], request: [0; 16], command };
        let index = RaftIndex(self.state.applied().0 + 1);
        self.state.apply(index, &entry).outcome.unwrap();
    }
    fn run(&mut self, command: Command) {
        self.at(NOW, command);
    }
    fn jws(&self) -> String {
        self.key.sign_result(&self.state.node_result(&NODE).unwrap()).unwrap()
    }
    fn key_set(&self, keys: Vec<[u8; 32]>) -> (Vec<u8>, Vec<u8>) {
        KeySet::certify(&self.root, &self.td, 1, keys).unwrap()
    }
    fn exported(&self, jws: &str) -> String {
        let (statement, signature) = self.key_set(vec![[9; 32], self.key.public()]);
        ExportedResult::new(&self.td, jws.to_owned(), (&statement, &signature), self.root.der()).text().unwrap()
    }
    fn verify(&self, text: &str) -> Result<Value, Code> {
        ExportedResult::verify(text, &fingerprint(self.root.der())).map(|v| v.claims).map_err(|r| r.code)
    }
    /// The claims as they verify.
    fn claims(&self) -> Value {
        self.verify(&self.exported(&self.jws())).unwrap()["submods"]["node"].clone()
    }
    fn parts(&self) -> Vec<String> {
        self.jws().split('.').map(str::to_owned).collect()
    }
}

fn seen(clock: u64, pcr: [u8; 32]) -> Seen {
    Seen {
        counters: Counters { resets: 1, restarts: 0, clock },
        firmware_version: 1,
        ima: ImaPoint::default(),
        pcrs: Some(BootPcrs { bank: PcrBank::Sha256, values: [(7, pcr.to_vec())].into() }),
        boot_pcrs_sha256: pcr,
        boot_log_sha256: [1; 32],
        policy: PolicyRef { name: "servers".parse().unwrap(), version: 3 },
        trust: TrustVector { instance_identity: 2, hardware: 2, executables: 3, configuration: 2, file_system: 0 },
        evidence_sha256: [5; 32],
        evidence_depth: 0,
    }
}
fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

/// RFC 8037, appendix A.3.
#[test]
fn the_thumbprint_is_that_of_the_rfc() {
    let key = URL_SAFE_NO_PAD.decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo").unwrap();
    assert_eq!(thumbprint(&key.try_into().unwrap()), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
}

#[test]
fn openssl_verifies_what_was_signed_and_the_claims_are_of_the_present_standing() {
    let west = West::new();
    let jws = west.jws();
    let parts = west.parts();
    let header = json!({"alg": "EdDSA", "typ": "eat+jwt", "kid": thumbprint(&west.key.public())});
    assert_eq!(decoded(&parts[0]), header);
    let public =
        openssl::pkey::PKey::public_key_from_raw_bytes(&west.key.public(), openssl::pkey::Id::ED25519).unwrap();
    let mut verifier = openssl::sign::Verifier::new_without_digest(&public).unwrap();
    let (input, signature) = jws.rsplit_once('.').unwrap();
    assert!(verifier.verify_oneshot(&URL_SAFE_NO_PAD.decode(signature).unwrap(), input.as_bytes()).unwrap());

    let claims = west.verify(&west.exported(&jws)).unwrap();
    assert_eq!(claims, decoded(&parts[1]));
    assert_eq!((claims["iss"].as_str(), claims["iat"].as_u64()), (Some("spiffe://west"), Some(NOW.0 / 1000)));
    let node = &claims["submods"]["node"];
    for (name, expected) in [
        ("ear.status", json!("affirming")),
        ("ear.appraisal-policy-id", json!("servers@3")),
        ("ambit.node", json!("07".repeat(32))),
        ("ambit.state", json!("admitted")),
        ("ambit.generation", json!(1)),
        ("ambit.last-verdict-ms", json!(NOW.0)),
        ("ambit.counters", json!({"reset": 1, "restart": 0, "clock_ms": 1})),
        ("ambit.pcrs", json!({"7": "07".repeat(32)})),
        (BOOT, json!({"secure_boot": true})),
    ] {
        assert_eq!(node[name], expected, "{name}");
    }
}

#[test]
fn the_status_follows_the_node_and_never_its_enrolment() {
    let mut west = West::new();
    let verdict = |clock, pcr| {
        let verdict = ambit_state::command::RoundVerdict {
            node: NODE,
            generation: Generation(1),
            policy_revision: Revision(0),
            seen: seen(clock, pcr),
        };
        Command::PutVerdicts(vec![verdict])
    };
    west.at(NOW.plus_ms(5_000), verdict(9, [8; 32]));
    let node = west.claims();
    assert_eq!(node["ambit.last-verdict-ms"], NOW.0 + 5_000);
    assert_eq!(node["ambit.pcrs"]["7"], "08".repeat(32));
    assert!(node.get(BOOT).is_none(), "what the enrolment said was of another boot");

    for s in 6..=100 {
        west.at(NOW.plus_ms(s * 1_000), Command::Tick);
    }
    assert_eq!((&west.claims()["ear.status"], &west.claims()["ambit.state"]), (&json!("none"), &json!("late")));
    west.at(NOW.plus_ms(101_000), verdict(10, [8; 32]));
    assert_eq!(west.claims()["ear.status"], "affirming");

    let denial = DenialRow {
        stamp: NOW,
        node: NODE,
        code: Code::ImaFileNotAllowed.to_string(),
        diverged: "IMA entry 7 (/secret)".into(),
        expected: "secret-expected".into(),
        found: "secret-found".into(),
    };
    west.run(Command::Distrust(Generation(1), Revision(0), denial));
    let node = west.claims();
    let vector =
        json!({"instance-identity": 0, "hardware": 0, "executables": 96, "configuration": 0, "file-system": 96});
    for (name, expected) in [
        ("ear.status", json!("contraindicated")),
        ("ear.trustworthiness-vector", vector),
        ("ambit.state", json!("untrusted")),
        ("ambit.code", json!("ima_file_not_allowed")),
    ] {
        assert_eq!(node[name], expected, "{name}");
    }
    assert!(!node.to_string().contains("secret"), "what operators are told is for operators");

    for (verb, status) in [
        (NodeVerb::Release, "none"),
        (NodeVerb::Quarantine, "contraindicated"),
        (NodeVerb::Ban, "contraindicated"),
        (NodeVerb::Unban, "none"),
        (NodeVerb::Evict, "contraindicated"),
    ] {
        west.run(Command::SetNodes(verb, Nodes::Ids(vec![NODE])));
        assert_eq!(west.claims()["ear.status"], status, "{verb:?}");
    }
}

#[test]
fn what_was_altered_or_is_anothers_is_refused() {
    let west = West::new();
    let parts = west.parts();
    let invalid = Err(Code::ResultInvalid);
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let with = |part: usize, value: String| {
        let mut parts = parts.clone();
        parts[part] = value;
        parts.join(".")
    };
    let header = |name: &str, value: &str| {
        let mut header = decoded(&parts[0]);
        header[name] = value.into();
        // Signed again, so that only the header is wrong.
        let input = format!("{}.{}", encode(&header), parts[1]);
        let pkey = openssl::pkey::PKey::private_key_from_der(west.key.pkcs8()).unwrap();
        let mut signer = openssl::sign::Signer::new_without_digest(&pkey).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signer.sign_oneshot_to_vec(input.as_bytes()).unwrap()))
    };
    let mut claims = decoded(&parts[1]);
    claims["submods"]["node"]["ear.status"] = "warning".into();
    for (jws, why) in [
        (with(1, encode(&claims)), "other claims"),
        (with(2, URL_SAFE_NO_PAD.encode([0; 64])), "another signature"),
        (with(2, String::new()), "no signature"),
        (header("alg", "none"), "alg none"),
        (header("typ", "JWT"), "another type"),
        (header("kid", "x"), "an unknown key"),
        (header("kid", &thumbprint(&[9; 32])), "another key of the set"),
        (header("crit", "x"), "a header that is not understood"),
        (format!("{}.", west.jws()), "a part too many"),
        (parts[..2].join("."), "a part too few"),
        (format!("{}=", west.jws()), "padding"),
        ("a".repeat(70_000), "too long"),
    ] {
        assert_eq!(west.verify(&west.exported(&jws)), invalid, "{why}");
    }

    let text = west.exported(&west.jws());
    assert!(west.verify(&text).is_ok());
    assert_eq!(ExportedResult::verify(&text, &[3; 32]).unwrap_err().code, Code::ResultInvalid, "another root");
    let other = West::new();
    assert_eq!(other.verify(&text), invalid, "another cell of the same name");
    assert_eq!(west.verify(&west.exported(&other.jws())), invalid, "signed by a key that the root does not know");
    for (from, to) in [("\"west\"", "\"east\""), ("result/1", "result/2"), ("\"format\"", "\"more\": 1, \"format\"")] {
        assert_ne!(text.replacen(from, to, 1), text);
        assert_eq!(west.verify(&text.replacen(from, to, 1)), invalid, "{to}");
    }
    for n in [0, text.len() / 2] {
        assert_eq!(west.verify(&text[..n]), invalid);
    }
}
