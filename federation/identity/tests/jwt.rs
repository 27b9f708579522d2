//! JWT-SVIDs: ours judged by OpenSSL, OpenSSL's judged by us, and every form that the standard refuses.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_identity::{JwtKey, JwtTrust, issue_jwt, verify_jwt};
use ambit_model::{Audience, Code, Entry, JwtAuthority, RaftIndex, Refusal, Selector, Stamp, SvidTtl, TrustDomain};
use ambit_state::command::LogEntry;
use ambit_state::{Applied, Command, Committed, JwtIssuance, State};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use common::{NODE, NOW, admission, founding};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::ecdsa::EcdsaSig;
use openssl::hash::{MessageDigest, hash};
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Signer, Verifier};
use std::collections::BTreeMap;

const NOW_S: u64 = 1_800_000_000;

/// A cell with a node, an entry and a JWT authority.
struct Cell {
    state: State,
    index: u64,
}

impl Cell {
    fn new(key: &JwtKey) -> Cell {
        let mut cell = Cell { state: State::new(), index: 0 };
        for command in founding("west".parse().unwrap(), vec![1], "a1", NOW.plus_ms(86_400_000)) {
            cell.run(command).outcome.unwrap();
        }
        cell.run(admission("a1", [1; 32])).outcome.unwrap();
        let entry = Entry {
            id: "web".parse().unwrap(),
            spiffe_id: "spiffe://west/web".parse().unwrap(),
            cluster: "c".parse().unwrap(),
            nodes: Default::default(),
            selectors: [Selector::UnixUid(1)].into(),
            ttl: SvidTtl::DEFAULT,
            federates_with: Default::default(),
            extras: Default::default(),
        };
        cell.run(Command::CreateEntries(vec![entry])).outcome.unwrap();
        let wrapped = BTreeMap::from([(1, vec![1])]);
        cell.run(Command::PutJwtAuthority(key.spki().to_vec(), wrapped)).outcome.unwrap();
        cell
    }
    fn run(&mut self, command: Command) -> Applied {
        self.index += 1;
        let entry = LogEntry { stamp: NOW, client: [0; 32], request: [0; 16], command };
        self.state.apply(RaftIndex(self.index), &entry)
    }
    fn issue(&mut self, kid: &str, audience: &Audience) -> Result<Committed<JwtIssuance>, Refusal> {
        let generation = self.state.node(&NODE).unwrap().generation;
        let (entry, audience_sha256) = ("web".parse().unwrap(), audience.sha256());
        self.run(Command::IssueJwt { node: NODE, generation, kid: kid.to_owned(), entry, audience_sha256 }).into_token()
    }
}

fn audience(to: &[&str]) -> Audience {
    Audience::new(to.iter().map(|one| (*one).to_owned()).collect()).unwrap()
}

fn td(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

#[test]
fn a_committed_token_verifies_here_and_in_openssl() {
    let key = JwtKey::generate().unwrap();
    // As a replica opens it: what is wrapped is the private number.
    let key = JwtKey::open(&key.private().unwrap(), key.spki()).unwrap();
    let mut cell = Cell::new(&key);
    let to = audience(&["spiffe://west/db", "https://db.example"]);
    let token = issue_jwt(cell.issue(key.kid(), &to).unwrap(), &to, None, &key).unwrap();

    let mut trust = JwtTrust::default();
    trust.put(&td("west"), cell.state.jwt_bundles().get(&td("west")).unwrap()).unwrap();
    let svid = verify_jwt(&token, "https://db.example", &trust, NOW).unwrap();
    assert_eq!((svid.id().as_str(), svid.kid()), ("spiffe://west/web", key.kid()));
    assert_eq!(svid.audience(), to.recipients());
    assert_eq!(svid.not_after(), NOW.plus_ms(300_000), "five minutes where the entry says nothing");
    assert_eq!(verify_jwt(&token, "https://other", &trust, NOW).unwrap_err().code, Code::JwtAudience);
    let late = verify_jwt(&token, "https://db.example", &trust, NOW.plus_ms(300_000)).unwrap_err();
    assert_eq!(late.code, Code::JwtUntrusted);

    let parts: Vec<&str> = token.split('.').collect();
    let json = |part: &str| serde_json::from_slice::<serde_json::Value>(&B64.decode(part).unwrap()).unwrap();
    assert_eq!(json(parts[0]), serde_json::json!({ "alg": "ES256", "kid": key.kid(), "typ": "JWT" }));
    let jti = hex::encode([&0x4000_0001u32.to_be_bytes()[..], &cell.index.to_be_bytes(), &[0; 4]].concat());
    let claims = serde_json::json!({
        "sub": "spiffe://west/web", "aud": ["spiffe://west/db", "https://db.example"],
        "iat": NOW_S, "exp": NOW_S + 300, "jti": jti,
    });
    assert_eq!(json(parts[1]), claims);

    let issuer = "https://id.example/west".parse().unwrap();
    let named = issue_jwt(cell.issue(key.kid(), &to).unwrap(), &to, Some(&issuer), &key).unwrap();
    let svid = verify_jwt(&named, "https://db.example", &trust, NOW).unwrap();
    assert_eq!(svid.claims()["iss"], "https://id.example/west");

    let public = PKey::public_key_from_der(key.spki()).unwrap();
    let raw = B64.decode(parts[2]).unwrap();
    let (r, s) = raw.split_at(32);
    let signature =
        EcdsaSig::from_private_components(BigNum::from_slice(r).unwrap(), BigNum::from_slice(s).unwrap()).unwrap();
    let mut verifier = Verifier::new(MessageDigest::sha256(), &public).unwrap();
    verifier.update(format!("{}.{}", parts[0], parts[1]).as_bytes()).unwrap();
    assert!(verifier.verify(&signature.to_der().unwrap()).unwrap());
}

#[test]
fn a_token_is_signed_for_what_was_committed_and_by_whom() {
    let (key, other) = (JwtKey::generate().unwrap(), JwtKey::generate().unwrap());
    let (to, another) = (audience(&["a"]), audience(&["b"]));
    let mut cell = Cell::new(&key);
    let code = |r: Result<_, Refusal>| r.map(|_: zeroize::Zeroizing<String>| ()).unwrap_err().code;
    let committed = cell.issue(key.kid(), &to).unwrap();
    assert_eq!(code(issue_jwt(committed, &another, None, &key)), Code::AuthorityMismatch);
    let committed = cell.issue(key.kid(), &to).unwrap();
    assert_eq!(code(issue_jwt(committed, &to, None, &other)), Code::AuthorityMismatch);
    assert_eq!(cell.issue(other.kid(), &to).unwrap_err().code, Code::AuthorityMismatch);
    assert!(JwtKey::open(&key.private().unwrap(), other.spki()).is_err());
    assert!(JwtKey::open(&[0; 32], key.spki()).is_err());
    assert!(JwtKey::open(&[], &[]).is_err());
}

/// Keys and tokens made by OpenSSL.
enum Theirs {
    Ec(PKey<Private>, usize),
    Rsa(PKey<Private>),
}

impl Theirs {
    fn ec(curve: Nid, bytes: usize) -> Theirs {
        let group = EcGroup::from_curve_name(curve).unwrap();
        Theirs::Ec(PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap(), bytes)
    }
    fn rsa(bits: u32) -> Theirs {
        Theirs::Rsa(PKey::from_rsa(Rsa::generate(bits).unwrap()).unwrap())
    }
    fn spki(&self) -> Vec<u8> {
        match self {
            Theirs::Ec(key, ..) | Theirs::Rsa(key) => key.public_key_to_der().unwrap(),
        }
    }
    fn sign(&self, alg: &str, text: &str) -> Vec<u8> {
        let digest = match alg.get(2..) {
            Some("384") => MessageDigest::sha384(),
            Some("512") => MessageDigest::sha512(),
            _ => MessageDigest::sha256(),
        };
        match self {
            Theirs::Ec(key, bytes) => {
                let hashed = hash(digest, text.as_bytes()).unwrap();
                let signature = EcdsaSig::sign(&hashed, &key.ec_key().unwrap()).unwrap();
                let width = i32::try_from(*bytes).unwrap();
                [signature.r().to_vec_padded(width).unwrap(), signature.s().to_vec_padded(width).unwrap()].concat()
            }
            Theirs::Rsa(key) => {
                let mut signer = Signer::new(digest, key).unwrap();
                if alg.starts_with("PS") {
                    signer.set_rsa_padding(Padding::PKCS1_PSS).unwrap();
                    signer.set_rsa_pss_saltlen(RsaPssSaltlen::DIGEST_LENGTH).unwrap();
                }
                signer.sign_oneshot_to_vec(text.as_bytes()).unwrap()
            }
        }
    }
    fn token(&self, alg: &str, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", B64.encode(header), B64.encode(claims));
        let signature = B64.encode(self.sign(alg, &signed));
        format!("{signed}.{signature}")
    }
}

fn trust_in(kid: &str, key: &Theirs) -> JwtTrust {
    let mut trust = JwtTrust::default();
    let authority = JwtAuthority { kid: kid.into(), spki_der: key.spki(), not_after: Stamp(u64::MAX) };
    trust.put(&td("west"), &[authority]).unwrap();
    trust
}

fn claims() -> String {
    format!(r#"{{"sub":"spiffe://west/web","aud":["a","b"],"exp":{}}}"#, NOW_S + 60)
}

#[test]
fn every_algorithm_of_the_standard_is_verified_with_a_key_of_its_kind_and_no_other() {
    let keys = [
        ("ES256", Theirs::ec(Nid::X9_62_PRIME256V1, 32)),
        ("ES384", Theirs::ec(Nid::SECP384R1, 48)),
        ("ES512", Theirs::ec(Nid::SECP521R1, 66)),
        ("RS", Theirs::rsa(2048)),
    ];
    let all = ["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];
    for (of, key) in &keys {
        for alg in all {
            let header = format!(r#"{{"alg":"{alg}","kid":"k"}}"#);
            let outcome = verify_jwt(&key.token(alg, &header, &claims()), "b", &trust_in("k", key), NOW);
            let fits = alg == *of || (*of == "RS" && !alg.starts_with("ES"));
            assert_eq!(
                outcome.map(drop).map_err(|r| r.code),
                if fits { Ok(()) } else { Err(Code::JwtUntrusted) },
                "{alg} by {of}"
            );
        }
    }
    // Algorithms that differ in the hash or the padding only are not taken for each other.
    let rsa = &keys[3].1;
    for (says, is) in [("RS256", "RS512"), ("RS256", "PS256"), ("PS256", "RS256"), ("PS384", "PS512")] {
        let token = rsa.token(is, &format!(r#"{{"alg":"{says}","kid":"k"}}"#), &claims());
        assert_eq!(verify_jwt(&token, "b", &trust_in("k", rsa), NOW).unwrap_err().code, Code::JwtUntrusted, "{says}");
    }
    let weak = Theirs::rsa(1024);
    let token = weak.token("RS256", r#"{"alg":"RS256","kid":"k"}"#, &claims());
    assert_eq!(verify_jwt(&token, "b", &trust_in("k", &weak), NOW).unwrap_err().code, Code::JwtUntrusted);
}

const HEADER: &str = r#"{"alg":"ES256","kid":"k","typ":"JWT"}"#;

#[test]
fn bad_headers_are_refused_whoever_signed_them() {
    let key = Theirs::ec(Nid::X9_62_PRIME256V1, 32);
    let trust = trust_in("k", &key);
    let code = |header: &str| {
        verify_jwt(&key.token("ES256", header, &claims()), "a", &trust, NOW).map(drop).map_err(|r| r.code)
    };
    for (header, want) in [
        (HEADER, Ok(())),
        (r#"{"alg":"ES256","kid":"k"}"#, Ok(())),
        (r#"{"alg":"ES256","kid":"k","typ":"JOSE"}"#, Ok(())),
        (r#"{"alg":"ES256","kid":"k","typ":"jwt"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","typ":"at+jwt"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","typ":1}"#, Err(Code::JwtMalformed)),
        (r#"{"kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"none","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"None","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"es256","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"HS256","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"EdDSA","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256K","kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":["ES256"],"kid":"k"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":""}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"other"}"#, Err(Code::JwtUntrusted)),
        (r#"{"alg":"ES256","kid":"k","alg":"ES256"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","jwk":{}}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","jku":"https://evil"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","x5c":[]}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","x5u":"https://evil"}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","crit":["exp"]}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","b64":false}"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k","cty":"JWT"}"#, Err(Code::JwtMalformed)),
        (r#"["ES256"]"#, Err(Code::JwtMalformed)),
        (r#"{"alg":"ES256","kid":"k"} {}"#, Err(Code::JwtMalformed)),
        ("", Err(Code::JwtMalformed)),
    ] {
        assert_eq!(code(header), want, "{header}");
    }
}

#[test]
fn bad_claims_are_refused_whoever_signed_them() {
    let key = Theirs::ec(Nid::X9_62_PRIME256V1, 32);
    let trust = trust_in("k", &key);
    let code =
        |claims: &str| verify_jwt(&key.token("ES256", HEADER, claims), "a", &trust, NOW).map(drop).map_err(|r| r.code);
    let of = |sub: &str, aud: &str, exp: &str| format!(r#"{{"sub":{sub},"aud":{aud},"exp":{exp}}}"#);
    let web = r#""spiffe://west/web""#;
    let (soon, over) = ((NOW_S + 1).to_string(), NOW_S.to_string());
    let malformed = Err(Code::JwtMalformed);
    for (claims, want) in [
        (of(web, r#"["a"]"#, &soon), Ok(())),
        (of(web, r#""a""#, &soon), Ok(())),
        (of(web, r#"["b","a"]"#, &format!("{NOW_S}.5")), Ok(())),
        (of(web, r#"["b"]"#, &soon), Err(Code::JwtAudience)),
        (of(web, r#"["A"]"#, &soon), Err(Code::JwtAudience)),
        (of(web, r#"["a/"]"#, &soon), Err(Code::JwtAudience)),
        (of(web, "[]", &soon), malformed),
        (of(web, r#""""#, &soon), malformed),
        (of(web, r#"["a",""]"#, &soon), malformed),
        (of(web, r#"["a",1]"#, &soon), malformed),
        (of(web, "null", &soon), malformed),
        (format!(r#"{{"sub":{web},"exp":{soon}}}"#), malformed),
        (of(web, r#"["a"]"#, &over), Err(Code::JwtUntrusted)),
        (of(web, r#"["a"]"#, "0"), Err(Code::JwtUntrusted)),
        (of(web, r#"["a"]"#, "-1"), malformed),
        (of(web, r#"["a"]"#, "1e300"), malformed),
        (of(web, r#"["a"]"#, &format!(r#""{soon}""#)), malformed),
        (of(web, r#"["a"]"#, "null"), malformed),
        (format!(r#"{{"sub":{web},"aud":["a"]}}"#), malformed),
        (format!(r#"{{"sub":{web},"aud":["a"],"exp":{soon},"nbf":{over}}}"#), Ok(())),
        (format!(r#"{{"sub":{web},"aud":["a"],"exp":{soon},"nbf":{soon}}}"#), Err(Code::JwtUntrusted)),
        (format!(r#"{{"sub":{web},"aud":["a"],"exp":{soon},"exp":{over}}}"#), malformed),
        (format!(r#"{{"sub":{web},"aud":["a"],"aud":["b"],"exp":{soon}}}"#), malformed),
        (format!(r#"{{"aud":["a"],"exp":{soon}}}"#), malformed),
        (of(r#""spiffe://east/web""#, r#"["a"]"#, &soon), Err(Code::TrustDomainUnknown)),
        (of(r#""spiffe://west""#, r#"["a"]"#, &soon), malformed),
        (of(r#""spiffe://west/""#, r#"["a"]"#, &soon), malformed),
        (of(r#""spiffe://WEST/web""#, r#"["a"]"#, &soon), malformed),
        (of(r#""spiffe://west/../web""#, r#"["a"]"#, &soon), malformed),
        (of(r#""spiffe://west/w%65b""#, r#"["a"]"#, &soon), malformed),
        (of(r#""spiffe://west/web?x""#, r#"["a"]"#, &soon), malformed),
        (of(r#""https://west/web""#, r#"["a"]"#, &soon), malformed),
        (of(r#""web""#, r#"["a"]"#, &soon), malformed),
        (of(r#"["spiffe://west/web"]"#, r#"["a"]"#, &soon), malformed),
        ("[]".to_owned(), malformed),
        ("{".to_owned(), malformed),
    ] {
        assert_eq!(code(&claims), want, "{claims}");
    }
}

#[test]
fn bad_forms_are_refused() {
    let key = Theirs::ec(Nid::X9_62_PRIME256V1, 32);
    let (trust, token) = (trust_in("k", &key), key.token("ES256", HEADER, &claims()));
    assert!(verify_jwt(&token, "a", &trust, NOW).is_ok());
    let code = |token: &str| verify_jwt(token, "a", &trust, NOW).map(drop).map_err(|r| r.code);
    let parts: Vec<&str> = token.split('.').collect();
    let [header, claims_part, signature] = parts.as_slice() else { panic!("three parts") };
    // The DER form of a signature is OpenSSL's own, not JWS's.
    let raw = B64.decode(signature).unwrap();
    let number = |part: &[u8]| BigNum::from_slice(part).unwrap();
    let der = EcdsaSig::from_private_components(number(&raw[..32]), number(&raw[32..])).unwrap().to_der().unwrap();
    let mut flipped = raw.clone();
    flipped[40] ^= 1;
    let other = key.token("ES256", HEADER, &claims().replace("/web", "/db"));
    let others: Vec<&str> = other.split('.').collect();
    // The last character of 64 bytes carries two bits that count for nothing.
    let last = signature.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let next = alphabet.chars().cycle().skip_while(|c| *c != last).nth(1).unwrap();
    let same_bytes = format!("{}{next}", &signature[..signature.len() - 1]);
    for (what, token, want) in [
        ("nothing", String::new(), Code::JwtMalformed),
        ("one part", "a".to_owned(), Code::JwtMalformed),
        ("two parts", format!("{header}.{claims_part}"), Code::JwtMalformed),
        ("no signature", format!("{header}.{claims_part}."), Code::JwtMalformed),
        ("four parts", format!("{token}.x"), Code::JwtMalformed),
        ("five parts, a JWE", format!("{token}.x.x"), Code::JwtMalformed),
        ("padding", format!("{token}=="), Code::JwtMalformed),
        ("a space", format!(" {token}"), Code::JwtMalformed),
        ("a line end", format!("{token}\n"), Code::JwtMalformed),
        (
            "another alphabet",
            format!("{header}.{claims_part}.{}", signature.replace(['-', '_'], "+") + "+/"),
            Code::JwtMalformed,
        ),
        ("bits that do not count", format!("{header}.{claims_part}.{same_bytes}"), Code::JwtMalformed),
        ("a bearer prefix", format!("Bearer {token}"), Code::JwtMalformed),
        ("too long", format!("{header}.{}.{signature}", "A".repeat(17_000)), Code::JwtMalformed),
        ("DER signature", format!("{header}.{claims_part}.{}", B64.encode(der)), Code::JwtUntrusted),
        ("signature of zeros", format!("{header}.{claims_part}.{}", B64.encode([0; 64])), Code::JwtUntrusted),
        ("signature changed", format!("{header}.{claims_part}.{}", B64.encode(flipped)), Code::JwtUntrusted),
        ("signature cut", format!("{header}.{claims_part}.{}", B64.encode(&raw[..63])), Code::JwtUntrusted),
        ("another's claims", format!("{header}.{}.{signature}", others[1]), Code::JwtUntrusted),
    ] {
        assert_eq!(code(&token), Err(want), "{what}");
    }
    // JSON form of a JWS (RFC 7515 7.2).
    let json = format!(r#"{{"payload":"{claims_part}","protected":"{header}","signature":"{signature}"}}"#);
    assert_eq!(code(&json), Err(Code::JwtMalformed));
}

#[test]
fn keys_vouch_for_their_own_trust_domain_and_until_they_end() {
    let (west, east) = (Theirs::ec(Nid::X9_62_PRIME256V1, 32), Theirs::ec(Nid::X9_62_PRIME256V1, 32));
    let authority =
        |kid: &str, key: &Theirs, not_after| JwtAuthority { kid: kid.into(), spki_der: key.spki(), not_after };
    let mut trust = JwtTrust::default();
    trust.put(&td("west"), &[authority("w", &west, NOW)]).unwrap();
    trust.put(&td("east"), &[authority("e", &east, Stamp(u64::MAX))]).unwrap();
    let token = |key: &Theirs, kid: &str| key.token("ES256", &format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#), &claims());
    let code = |token: &str, at| verify_jwt(token, "a", &trust, at).map(drop).map_err(|r| r.code);
    assert_eq!(code(&token(&west, "w"), NOW), Ok(()));
    assert_eq!(code(&token(&west, "w"), NOW.plus_ms(1)), Err(Code::JwtUntrusted), "the key has ended");
    assert_eq!(code(&token(&east, "e"), NOW), Err(Code::JwtUntrusted), "east's key for an identity of west");
    assert_eq!(code(&token(&east, "w"), NOW), Err(Code::JwtUntrusted), "east's key under west's name");
    let mut empty = trust.clone();
    empty.put(&td("west"), &[]).unwrap();
    assert_eq!(verify_jwt(&token(&west, "w"), "a", &empty, NOW).unwrap_err().code, Code::JwtUntrusted);

    let mut bad = JwtTrust::default();
    let ed25519 = PKey::generate_ed25519().unwrap().public_key_to_der().unwrap();
    let k1 = Theirs::ec(Nid::SECP256K1, 32);
    for keys in [
        vec![authority("", &west, NOW)],
        vec![authority("w", &west, NOW), authority("w", &east, NOW)],
        vec![JwtAuthority { kid: "w".into(), spki_der: ed25519, not_after: NOW }],
        vec![authority("k", &k1, NOW)],
        vec![JwtAuthority { kid: "w".into(), spki_der: [west.spki(), vec![0]].concat(), not_after: NOW }],
        vec![JwtAuthority { kid: "w".into(), spki_der: vec![], not_after: NOW }],
    ] {
        assert_eq!(bad.put(&td("west"), &keys).unwrap_err().code, Code::BundleMalformed, "{keys:?}");
    }
}
