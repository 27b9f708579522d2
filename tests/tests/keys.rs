//! The key that signs JWT-SVIDs, replaced by an operator: real replicas of two cells, a node that follows its cell, and
//! PyJWT, which nobody here wrote, to judge tokens by what each place says of the keys.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::v1;
use ambit_proto::v1::bundle_registry_client::BundleRegistryClient;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Machine, join_token, register_cluster};
use ambit_tests::node::Node;
use ambit_tests::operator::{create_entry, within};
use ambit_tests::peering::peer;
use ambit_tests::process::{Folder, binary, free_address, must_run, run};
use ambit_tests::tpm::Maker;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const AUDIENCE: &str = "https://a.example";

/// One question a line: a token and keys, each by kid and SubjectPublicKeyInfo or as a JWKS. The answer is the token's
/// subject or the name of what was raised.
const JUDGE: &str = "
import json, sys, jwt
from cryptography.hazmat.primitives.serialization import load_der_public_key
for line in sys.stdin:
    asked = json.loads(line)
    keys = {k['kid']: load_der_public_key(bytes.fromhex(k['spki'])) for k in asked.get('keys', [])}
    for k in asked.get('jwks', {}).get('keys', []):
        if 'kid' in k:
            keys[k['kid']] = jwt.PyJWK({**k, 'alg': 'ES256'}).key
    try:
        key = keys[jwt.get_unverified_header(asked['token'])['kid']]
        said = dict(algorithms=['ES256'], audience=asked['audience'], issuer=asked.get('issuer'), leeway=2)
        print(jwt.decode(asked['token'], key, **said)['sub'])
    except (KeyError, jwt.InvalidTokenError) as e:
        print(type(e).__name__)
    sys.stdout.flush()
";

/// PyJWT in a process of its own.
struct Judge {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Judge {
    fn start() -> Judge {
        let mut python = Command::new("/usr/bin/python3");
        let mut child = python.args(["-c", JUDGE]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (ask, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Judge { child, ask, answers }
    }
    fn say(&mut self, token: &str, name: &str, keys: Value) -> String {
        self.answer(&json!({"token": token, "audience": AUDIENCE, name: keys}))
    }
    /// The same, of a relying party of OIDC: the token must name this issuer.
    fn say_of(&mut self, issuer: &Value, token: &str, jwks: Value) -> String {
        self.answer(&json!({"token": token, "audience": AUDIENCE, "jwks": jwks, "issuer": issuer}))
    }
    fn answer(&mut self, asked: &Value) -> String {
        writeln!(self.ask, "{asked}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn mint(cell: &Cell, replica: usize) -> Option<String> {
    let request = v1::MintJwtsvidRequest {
        request_id: fresh(),
        spiffe_id: "spiffe://west/ci".into(),
        audience: vec![AUDIENCE.to_owned()],
        ttl_seconds: 600,
    };
    let minted = SvidClient::new(cell.admin(replica).await.ok()?).mint_jwtsvid(request).await;
    minted.ok().map(|answer| answer.into_inner().token)
}

/// The keys of west as the first replica of a cell tells of them.
async fn keys(cell: &Cell) -> Value {
    let mut client = BundleRegistryClient::new(cell.admin(1).await.unwrap());
    let request = v1::GetBundleRequest { trust_domain: "west".into() };
    let known = client.get_bundle(request).await.unwrap().into_inner().jwt_authorities;
    known.iter().map(|key| json!({"kid": key.kid, "spki": hex::encode(&key.spki_der)})).collect()
}

fn document(url: &str) -> Value {
    serde_json::from_str(&must_run(&["curl", "--silent", "--insecure", "--max-time", "10", url]).unwrap()).unwrap()
}

fn ambit(cell: &Cell, args: &[&str]) -> Output {
    let (program, context) = (binary("ambit").unwrap().display().to_string(), cell.admin_file("context.json"));
    run(&[&[program.as_str(), "--context", &context.display().to_string()], args].concat()).unwrap()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout))
}

/// What `ambit ... -o json` told.
fn told(cell: &Cell, args: &[&str]) -> Value {
    let out = ambit(cell, &[args, &["-o", "json"]].concat());
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&out)))
}

/// The kid in this state, as `ambit trust` tells.
fn kid(from: &Value, state: &str) -> Option<String> {
    let all = from["jwt_authorities"].as_array().unwrap();
    all.iter().find(|key| key["state"] == state).map(|key| key["kid"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_key_is_replaced_at_once_and_refused_everywhere_and_no_good_token_fails_meanwhile() {
    let at = free_address().unwrap();
    let endpoint = format!(
        "[bundle_endpoint]\nlisten = \"{at}\"\nprofile = \"https_spiffe\"\noidc_issuer = \"https://id.example.org/west\"\n"
    );
    let mut west = Cell::configured(Folder::new().unwrap(), "west", 1, &endpoint).await.unwrap();
    west.configure("");
    west.add(2).await.unwrap();
    west.add(3).await.unwrap();
    let mut east = Cell::start("east", 1).await.unwrap();
    peer(&west, &east).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "m1").await.unwrap();
    register_cluster(&west, "west", &maker).await.unwrap();
    create_entry(&west, "web", "west").await.unwrap();
    let token = join_token(&west, "west").await.unwrap();
    let node = Node::start(&west, machine, "west", token, "web").unwrap();
    within("an SVID", async || node.is_ready().then_some(())).await;

    let mut judge = Judge::start();
    let stolen = within("a token", async || mint(&west, 1).await).await;
    within("west's key at east", async || (keys(&east).await != json!([])).then_some(())).await;
    let urls = [format!("https://{at}/"), format!("https://{at}/keys")];
    assert_eq!(judge.say(&stolen, "keys", keys(&east).await), "spiffe://west/ci");
    for url in &urls {
        assert_eq!(judge.say(&stolen, "jwks", document(url)), "spiffe://west/ci", "{url}");
    }
    let issuer = &document(&format!("https://{at}/.well-known/openid-configuration"))["issuer"];
    assert_eq!(judge.say_of(issuer, &stolen, document(&urls[1])), "spiffe://west/ci");
    let another = json!("https://id.example.org/east");
    assert_eq!(judge.say_of(&another, &stolen, document(&urls[1])), "InvalidIssuerError");
    let former = kid(&told(&west, &["trust", "show"]), "active").unwrap();
    for (verb, name) in [("taint", former.as_str()), ("revoke", &former)] {
        let refused = ambit(&west, &["trust", verb, name]);
        assert!(!refused.status.success() && said(&refused).contains("root_state"), "{verb}: {}", said(&refused));
    }

    // While a peer is away nothing is activated: it would refuse the tokens.
    east.kill(1).unwrap();
    let waited = ambit(&west, &["trust", "rotate", "--jwt", "--wait", "2s"]);
    assert_eq!(waited.status.code(), Some(5), "{}", said(&waited));
    assert!(said(&waited).contains("acks_missing") && said(&waited).contains("peer east"), "{}", said(&waited));
    let plan = told(&west, &["trust", "rotate", "--jwt", "--dry-run"]);
    // What was made ready then is old by now: a thief of the one may have it too.
    assert_eq!(plan, json!({"next": "drop what was to sign next", "missing": []}));
    assert_eq!(kid(&told(&west, &["trust", "show"]), "active").as_deref(), Some(former.as_str()));
    east.restart(1).unwrap();
    east.wait_for_voters().await.unwrap();

    // Tokens by each replica in turn, judged by what the other cell says at that moment.
    let (west, east) = (Arc::new(west), Arc::new(east));
    let (stop, done, failed) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(vec![])));
    let judging = {
        let (west, east, stop, done, failed) = (west.clone(), east.clone(), stop.clone(), done.clone(), failed.clone());
        tokio::spawn(async move {
            let (mut judge, mut replica) = (Judge::start(), 0);
            while !stop.load(Ordering::Relaxed) {
                replica = replica % 3 + 1;
                match mint(&west, replica).await {
                    Some(token) => match judge.say(&token, "keys", keys(&east).await).as_str() {
                        "spiffe://west/ci" => drop(done.fetch_add(1, Ordering::Relaxed)),
                        other => failed.lock().unwrap().push(other.to_owned()),
                    },
                    None => failed.lock().unwrap().push(format!("no token of replica {replica}")),
                }
            }
        })
    };
    let rotated = {
        let west = west.clone();
        tokio::task::spawn_blocking(move || ambit(&west, &["trust", "rotate", "--jwt", "--wait", "60s"]))
    };
    let rotated = rotated.await.unwrap();
    assert!(rotated.status.success(), "{}", said(&rotated));
    println!("{}", said(&rotated));

    // The other cell hears of it with its next pull; the documents are of now.
    let refused = within("refused at the peer", async || {
        let verdict = judge.say(&stolen, "keys", keys(&east).await);
        (verdict != "spiffe://west/ci").then_some(verdict)
    });
    assert_eq!(refused.await, "KeyError", "no such key");
    let fresh_one = mint(&west, 2).await.unwrap();
    for url in &urls {
        assert_eq!(judge.say(&stolen, "jwks", document(url)), "KeyError", "{url}");
        assert_eq!(judge.say(&fresh_one, "jwks", document(url)), "spiffe://west/ci", "{url}");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    judging.await.unwrap();
    let (done, failed) = (done.load(Ordering::Relaxed), failed.lock().unwrap().clone());
    println!("{done} tokens verified, {} failed", failed.len());
    assert!(failed.is_empty() && done > 20, "{failed:?}");

    let show = told(&west, &["trust", "show"]);
    assert_eq!(show["jwt_authorities"].as_array().unwrap().len(), 1, "{show}");
    assert_ne!(kid(&show, "active"), Some(former.clone()));
    let check = ambit(&west, &["trust", "check"]);
    assert!(check.status.success() && said(&check).contains("revoked"), "{}", said(&check));
    let again = ambit(&west, &["trust", "revoke", &former]);
    assert!(!again.status.success() && said(&again).contains("root_state"), "{}", said(&again));
    let foreign = told(&east, &["trust", "show", "west"]);
    assert_eq!(kid(&foreign, "published"), kid(&show, "active"), "{foreign}");
}
