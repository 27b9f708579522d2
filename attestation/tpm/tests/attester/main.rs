//! The attester against a real (software) TPM, judged by the verifier and by tools that nobody here wrote.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;
mod failing;
mod svid_key;
mod tabrmd;
mod wrap_key;

use ambit_model::appraisal::{AppraisalPolicy, EndorsementClass};
use ambit_model::{Code, Revision, Stamp};
use ambit_tpm::{AkKind, Attester, Bank, EkChoice, EkKind, Options, TpmError, TpmIdentity};
use ambit_verify::appraisal::CompiledPolicy;
use ambit_verify::hash::sha256;
use ambit_verify::transcript::{Binding, Transcript, qualifying_data};
use ambit_verify::{
    ActivatedAk, BeginInput, Challenge, EkClass, EkRoot, Endorsements, Entropy, EvidenceHeader, Expected, KeyHome,
    LogExtent, PresentedEk, Public, Terms, TicketBody, csr,
};
use common::Swtpm;
use rcgen::{CertificateParams, KeyPair};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

const NOW: Stamp = Stamp(1_900_000_000_000);
/// PCRs that no boot log explains, so that this test needs none: 10 (never extended here), 16 and 23.
const MASK: u32 = 1 << 10 | 1 << 16 | 1 << 23;
const TICKET: &[u8] = b"sealed";

fn begin(identity: &TpmIdentity) -> BeginInput {
    BeginInput {
        cluster: "west".parse().unwrap(),
        ek_certificate: identity.ek_certificate.clone().unwrap_or_default(),
        ek_intermediates: vec![],
        ek_public: identity.ek_public.clone(),
        ak_public: identity.ak_public.clone(),
        agent_nonce: vec![7; 32],
    }
}

/// A policy that asks nothing of PCRs which no boot log explains.
fn policy() -> Arc<CompiledPolicy> {
    let mut policy = AppraisalPolicy::new("any".parse().unwrap(), ["west".parse().unwrap()].into());
    policy.boot_log_optional = true;
    policy.secure_boot_any = true;
    policy.endorsement = EndorsementClass::ALL.into();
    Arc::new(CompiledPolicy::compile(&policy, &mut |_| None).unwrap())
}

fn endorsements((root, issuer): (Vec<u8>, Vec<u8>)) -> Endorsements {
    Endorsements { roots: vec![EkRoot { der: root, class: EkClass::Lab }], intermediates: vec![issuer], denied: vec![] }
}

fn challenge(identity: &TpmIdentity, endorsements: &Endorsements, bank: ambit_verify::Bank) -> (Challenge, TicketBody) {
    let presented = PresentedEk::parse(begin(identity)).unwrap();
    // A TPM without a certificate of this EK is one that the operator listed.
    let expected = if identity.ek_certificate.is_some() { Expected::JoinToken([4; 32]) } else { Expected::AllowListed };
    let endorsed = presented.endorse(expected, endorsements, NOW).unwrap();
    let entropy = Entropy { secret: Zeroizing::new([0x5a; 32]), server_nonce: [2; 32], seed: Zeroizing::new([3; 64]) };
    let terms = Terms {
        bank,
        pcr_mask: MASK,
        ima_offset: 0,
        deadline: NOW.plus_ms(30_000),
        endorsement_revision: Revision(1),
        policy_revision: Revision(1),
    };
    endorsed.challenge(entropy, terms).unwrap()
}

fn attester(tpm: &Swtpm, ek: EkChoice, ak: AkKind) -> Attester {
    Attester::start(Options { ek, ak, ..Options::new(&tpm.tcti(), &tpm.state()) }).unwrap()
}

/// Each kind of EK and of AK at least once, over both banks. swtpm has certificates of RSA-2048 and P-384 only.
#[tokio::test]
async fn a_node_is_verified_from_its_tpm_alone() {
    let tpm = Swtpm::start();
    tpm.tool("tpm2_pcrextend", &[&format!("16:sha256={}", "11".repeat(32)), &format!("23:sha384={}", "22".repeat(48))]);
    for (ek, ak, class) in [
        (EkChoice::Auto, AkKind::EccP256, EkClass::Lab),
        (EkChoice::Fixed(EkKind::Rsa2048), AkKind::Rsa2048Pss, EkClass::Lab),
        (EkChoice::Fixed(EkKind::EccP384), AkKind::EccP256, EkClass::Lab),
        (EkChoice::Fixed(EkKind::EccP384), AkKind::Rsa2048Ssa, EkClass::Lab),
        (EkChoice::Fixed(EkKind::EccP256), AkKind::EccP384, EkClass::Listed),
        (EkChoice::Fixed(EkKind::Rsa3072), AkKind::EccP256, EkClass::Listed),
    ] {
        for (bank, asked) in [(Bank::Sha256, ambit_verify::Bank::Sha256), (Bank::Sha384, ambit_verify::Bank::Sha384)] {
            println!("EK {ek:?}, AK {ak:?}, {bank:?}");
            verified(tpm.ca(), &attester(&tpm, ek, ak), bank, asked, class).await;
        }
    }
    nothing_is_loaded(&tpm);
}

async fn verified(ca: (Vec<u8>, Vec<u8>), attester: &Attester, bank: Bank, asked: ambit_verify::Bank, class: EkClass) {
    let identity = attester.identity().await.unwrap();
    let (challenge, ticket) = challenge(&identity, &endorsements(ca), asked);
    let secret = attester.activate(challenge.credential_blob, challenge.encrypted_secret).await.unwrap();
    assert_eq!(*secret, [0x5a; 32]);

    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let csr = CertificateParams::new(vec![]).unwrap().serialize_request(&key).unwrap().der().to_vec();
    let data = qualifying_data(&Binding {
        agent_nonce: &[7; 32],
        server_nonce: &challenge.server_nonce,
        ticket_sha256: &sha256(TICKET),
        csr_spki: &csr::p256_spki(&csr).unwrap(),
        cluster: ticket.cluster(),
        ak_name: &Public::name_of(&identity.ak_public).unwrap(),
    });
    let quote = attester.quote(bank, MASK, data).await.unwrap();
    let none = LogExtent::of(b"");
    let transcript = Transcript {
        ticket_sha256: sha256(TICKET),
        csr: &csr,
        quote: &quote.attest,
        signature: &quote.signature,
        pcrs: &quote.pcrs,
        boot_log: none,
        ima_log: none,
        svid_key: &KeyHome::InMemory,
    };
    let header = EvidenceHeader {
        hmac: transcript.hmac(&secret).to_vec(),
        csr: csr.clone(),
        quote: quote.attest.clone(),
        signature: quote.signature.clone(),
        pcrs: quote.pcrs.clone(),
        boot_log: none,
        ima_log: none,
        ek_public: identity.ek_public.clone(),
        ak_public: identity.ak_public.clone(),
        svid_key: KeyHome::InMemory,
    };
    let fresh = ActivatedAk::open(ticket, TICKET, header, NOW).unwrap().quote(&[]).unwrap();
    let verified = fresh.appraise(b"", b"", None, &[policy()], Revision(2)).unwrap();
    assert_eq!((verified.ek_class, verified.pcrs.len()), (class, 3));
    assert!(verified.pcrs[&16].iter().any(|b| *b != 0) == (bank == Bank::Sha256));
    assert!(verified.firmware_version != 0);
}

/// What was given up finishes late, and flushes then: a leak is what stays.
fn nothing_is_loaded(tpm: &Swtpm) {
    let end = Instant::now() + Duration::from_secs(10);
    for handles in ["handles-transient", "handles-loaded-session", "handles-saved-session"] {
        loop {
            let listed = tpm.try_tool("tpm2_getcap", &[handles]);
            if listed.status.success() && listed.stdout.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "{handles}: {listed:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The EK decides the node's id: it is chosen by what NV holds, and then stays.
#[tokio::test]
async fn the_ek_is_the_one_with_a_certificate_and_then_stays() {
    let tpm = Swtpm::start();
    let other_state = tpm.file("other");
    std::fs::create_dir(&other_state).unwrap();
    let auto = |state: &std::path::Path| Attester::open(&tpm.tcti(), state).unwrap();
    let rsa = auto(&tpm.state()).identity().await.unwrap();
    assert_eq!(rsa.ek_public[..4], [0, 1, 0, 0x0b], "RSA with SHA-256");
    assert!(rsa.ek_certificate.is_some());
    tpm.tool("tpm2_nvundefine", &["-C", "p", "0x1c00002"]);
    let p384 = auto(&other_state).identity().await.unwrap();
    assert_eq!(p384.ek_public[..4], [0, 0x23, 0, 0x0c], "ECC with SHA-384");
    assert!(p384.ek_certificate.is_some());
    // Who enrolled with the RSA EK goes on with it, certificate or not.
    let again = auto(&tpm.state()).identity().await.unwrap();
    assert_eq!(again, TpmIdentity { ek_certificate: None, ..rsa });
    // Neither certificate left: the EK that every TPM can derive.
    tpm.tool("tpm2_nvundefine", &["-C", "p", "0x1c00016"]);
    let bare = tpm.file("bare");
    std::fs::create_dir(&bare).unwrap();
    let listed = auto(&bare).identity().await.unwrap();
    assert_eq!((listed.ek_public, listed.ek_certificate), (again.ek_public, None));
}

/// Provisioned machines keep the EK at a persistent handle; others derive it. Both are the same key, and what stands at
/// that handle is used only if it is an EK.
#[tokio::test]
async fn a_persistent_ek_is_used_and_a_strange_key_in_its_place_is_not() {
    let tpm = Swtpm::start();
    let identity = async || Attester::open(&tpm.tcti(), &tpm.state()).unwrap().identity().await.unwrap();
    let persistent = identity().await;
    tpm.tool("tpm2_evictcontrol", &["-Q", "-C", "p", "-c", "0x81010001"]);
    assert_eq!(identity().await, persistent, "derived");
    tpm.tool("tpm2_createprimary", &["-Q", "-C", "o", "-G", "rsa", "-c", "strange.ctx"]);
    tpm.tool("tpm2_evictcontrol", &["-Q", "-C", "o", "-c", "strange.ctx", "0x81010001"]);
    tpm.tool("tpm2_flushcontext", &["-t"]);
    assert_eq!(identity().await, persistent, "derived beside a strange key");
}

/// Keys are kept as saved contexts between operations, which a reset of the TPM makes worthless.
#[tokio::test]
async fn a_reset_of_the_tpm_between_operations_is_survived() {
    let mut tpm = Swtpm::start();
    tpm.tool("tpm2_evictcontrol", &["-Q", "-C", "p", "-c", "0x81010001"]);
    let attester = Attester::open(&tpm.tcti(), &tpm.state()).unwrap();
    let before = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap();
    tpm.reset();
    let after = attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap();
    assert_ne!(before.attest, after.attest);
    let identity = attester.identity().await.unwrap();
    let (challenge, _) = challenge(&identity, &endorsements(tpm.ca()), ambit_verify::Bank::Sha256);
    let secret = attester.activate(challenge.credential_blob, challenge.encrypted_secret).await.unwrap();
    assert_eq!(*secret, [0x5a; 32]);
    nothing_is_loaded(&tpm);
}

#[tokio::test]
async fn the_ak_is_made_once_and_stays_with_its_tpm() {
    let (tpm, other) = (Swtpm::start(), Swtpm::start());
    let first = Attester::open(&tpm.tcti(), &tpm.state()).unwrap().identity().await.unwrap();
    let again = Attester::open(&tpm.tcti(), &tpm.state()).unwrap().identity().await.unwrap();
    assert_eq!(first, again);
    // Another TPM does not load the AK's wrapped half.
    let stolen = Attester::open(&other.tcti(), &tpm.state()).unwrap();
    let refused = stolen.quote(Bank::Sha256, 1, [0; 32]).await.unwrap_err();
    assert!(matches!(refused, TpmError::OtherTpm { .. }), "{refused:?}");
    // Nor does it open a credential made for the first, or the first one made for the other.
    let (theirs, _) = challenge(&first, &endorsements(tpm.ca()), ambit_verify::Bank::Sha256);
    let elsewhere = Attester::open(&other.tcti(), &other.state()).unwrap();
    elsewhere.activate(theirs.credential_blob, theirs.encrypted_secret).await.unwrap_err();
    // And its manufacturer vouches for none of this TPM's keys.
    let refusal = PresentedEk::parse(begin(&first))
        .unwrap()
        .endorse(Expected::AllowListed, &endorsements(other.ca()), NOW)
        .unwrap_err();
    assert_eq!(refusal.code, Code::EkChainUntrusted);
}

#[tokio::test]
async fn requests_in_parallel_take_turns_and_leave_nothing_loaded() {
    let tpm = Swtpm::start();
    let attester = Attester::open(&tpm.tcti(), &tpm.state()).unwrap();
    let quotes = (0..20u8).map(|n| {
        let attester = attester.clone();
        tokio::spawn(async move { attester.quote(Bank::Sha256, 1, [n; 32]).await })
    });
    let began = std::time::Instant::now();
    for quote in quotes {
        quote.await.unwrap().unwrap();
    }
    println!("20 quotes, the first of which makes the AK: {:?}", began.elapsed());
    nothing_is_loaded(&tpm);
}

#[tokio::test]
async fn slots_filled_by_dead_processes_are_emptied() {
    let tpm = Swtpm::start();
    for n in 0..3 {
        tpm.tool("tpm2_createprimary", &["-Q", "-C", "o", "-G", "ecc", "-c", &format!("left{n}")]);
    }
    let left = tpm.try_tool("tpm2_getcap", &["handles-transient"]).stdout;
    assert_eq!(String::from_utf8(left).unwrap().lines().count(), 3, "the TPM's slots are full");
    let attester = Attester::open(&tpm.tcti(), &tpm.state()).unwrap();
    attester.identity().await.unwrap();
    attester.quote(Bank::Sha256, 1, [0; 32]).await.unwrap();
}

#[tokio::test]
async fn wrong_requests_are_named() {
    let tpm = Swtpm::start();
    let attester = Attester::open(&tpm.tcti(), &tpm.state()).unwrap();
    for mask in [0, 1 << 24, u32::MAX] {
        let refused = attester.quote(Bank::Sha256, mask, [0; 32]).await.unwrap_err();
        assert!(matches!(refused, TpmError::Selection { .. }), "{mask:#x}: {refused:?}");
    }
    for blob in [vec![], vec![0], vec![0, 5, 1], vec![0xff; 70_000]] {
        let refused = attester.activate(blob, vec![0, 0]).await.unwrap_err();
        assert!(matches!(refused, TpmError::Malformed { .. }), "{refused:?}");
    }
    assert!(matches!(Attester::open("no such thing", &tpm.state()), Err(TpmError::Tcti { .. })));
    let nowhere = Attester::open("swtpm:host=127.0.0.1,port=1", &tpm.state()).unwrap();
    assert!(matches!(nowhere.identity().await.unwrap_err(), TpmError::Unreachable { .. }));
}

/// Proof 3 of issue 2: tpm2-tools verify our quote, and only with our nonce. With each kind of AK, over both banks; but
/// not with PSS, which tpm2_checkquote 5.4 takes for PKCS #1 v1.5.
#[tokio::test]
async fn tpm2_checkquote_accepts_our_quote() {
    let tpm = Swtpm::start();
    for ak in [AkKind::EccP256, AkKind::EccP384, AkKind::Rsa2048Ssa] {
        let attester = attester(&tpm, EkChoice::Auto, ak);
        let identity = attester.identity().await.unwrap();
        let public = [(identity.ak_public.len() as u16).to_be_bytes().to_vec(), identity.ak_public].concat();
        tpm.write("ak.pub", &public);
        for (bank, alg) in [(Bank::Sha256, 0x000b), (Bank::Sha384, 0x000c)] {
            let quote = attester.quote(bank, 0x47ff, [0xc4; 32]).await.unwrap();
            tpm.write("quote.msg", &quote.attest);
            tpm.write("quote.sig", &quote.signature);
            tpm.write("quote.pcrs", &tools_pcrs(alg, 0x47ff, &quote.pcrs));
            // The hash of the AK's scheme, whatever the bank.
            let hash = if ak == AkKind::EccP384 { "sha384" } else { "sha256" };
            let check = |nonce: &str| {
                let files = ["-u", "ak.pub", "-m", "quote.msg", "-s", "quote.sig", "-f", "quote.pcrs", "-g", hash];
                tpm.try_tool("tpm2_checkquote", &[files.as_slice(), &["-q", nonce]].concat())
            };
            let good = check(&"c4".repeat(32));
            assert!(good.status.success(), "{ak:?} {bank:?}: {}", String::from_utf8_lossy(&good.stderr));
            assert!(!check(&"c5".repeat(32)).status.success(), "another nonce must not pass");
        }
    }
}

/// PolicyOR branches of high-range EKs (TCG EK Credential Profile 2.5, B.6).
const POLICY_A_SHA384: &str =
    "8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53";
const POLICY_C_SHA384: &str =
    "d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165";

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 16).unwrap()).collect()
}

/// PCR values as `tpm2_quote -o` writes them: the C structures TPML_PCR_SELECTION, a count, and TPML_DIGESTs, as they lie
/// in the memory of this (little-endian) machine.
fn tools_pcrs(alg: u16, mask: u32, pcrs: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut out = 1u32.to_le_bytes().to_vec();
    out.extend(alg.to_le_bytes());
    out.push(3);
    out.extend(mask.to_le_bytes());
    out.resize(4 + 16 * 8, 0);
    out.extend((pcrs.chunks(8).count() as u32).to_le_bytes());
    for eight in pcrs.chunks(8) {
        let end = out.len() + 4 + 8 * 66;
        out.extend((eight.len() as u32).to_le_bytes());
        for (_, value) in eight {
            out.extend((value.len() as u16).to_le_bytes());
            out.extend(value);
            out.resize(out.len() + 64 - value.len(), 0);
        }
        out.resize(end, 0);
    }
    out
}

/// Our credentials open in a TPM driven by tpm2-tools, for each kind of EK; and nodes made of those tools alone enrol.
#[test]
fn tpm2_activatecredential_opens_our_credentials() {
    let tpm = Swtpm::start();
    for kind in ["rsa", "ecc", "ecc384", "rsa3072"] {
        tpm.tool("tpm2_createek", &["-Q", "-G", kind, "-c", "ek.ctx", "-u", "ek.pub"]);
        tpm.tool("tpm2_flushcontext", &["-t"]);
        let ak = ["-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-c", "ak.ctx", "-u", "ak.pub", "-n", "ak.name"];
        tpm.tool("tpm2_createak", &[["-Q", "-C", "ek.ctx"].as_slice(), &ak].concat());
        tpm.tool("tpm2_flushcontext", &["-t"]);
        let identity = TpmIdentity {
            ek_certificate: None,
            ek_public: tpm.read("ek.pub")[2..].to_vec(),
            ak_public: tpm.read("ak.pub")[2..].to_vec(),
        };
        assert_eq!(Public::name_of(&identity.ak_public).unwrap(), tpm.read("ak.name"), "{kind}");
        let presented = PresentedEk::parse(begin(&identity)).unwrap();
        let endorsed = presented.endorse(Expected::AllowListed, &Endorsements::default(), NOW).unwrap();
        let entropy =
            Entropy { secret: Zeroizing::new([0x5a; 32]), server_nonce: [2; 32], seed: Zeroizing::new([3; 64]) };
        let terms = Terms {
            bank: ambit_verify::Bank::Sha256,
            pcr_mask: 1,
            ima_offset: 0,
            deadline: NOW,
            endorsement_revision: Revision(1),
            policy_revision: Revision(1),
        };
        let (challenge, _) = endorsed.challenge(entropy, terms).unwrap();
        let name_hash_is_sha384 = identity.ek_public[3] == 0x0c;
        // tpm2-tools' credential file: magic, version, then both structures.
        let head = [0xbadc_c0deu32.to_be_bytes(), 1u32.to_be_bytes()].concat();
        tpm.write("cred", &[head, challenge.credential_blob, challenge.encrypted_secret].concat());
        let hash = if name_hash_is_sha384 { "sha384" } else { "sha256" };
        tpm.tool("tpm2_startauthsession", &["--policy-session", "-g", hash, "-S", "session.ctx"]);
        tpm.tool("tpm2_policysecret", &["-Q", "-S", "session.ctx", "-c", "e"]);
        if name_hash_is_sha384 {
            tpm.write("policy-a", &hex(POLICY_A_SHA384));
            tpm.write("policy-c", &hex(POLICY_C_SHA384));
            tpm.tool("tpm2_policyor", &["-Q", "-S", "session.ctx", "-l", "sha384:policy-a,policy-c"]);
        }
        let opened = ["-i", "cred", "-o", "opened", "-P", "session:session.ctx"];
        tpm.tool("tpm2_activatecredential", &[["-Q", "-c", "ak.ctx", "-C", "ek.ctx"].as_slice(), &opened].concat());
        tpm.tool("tpm2_flushcontext", &["session.ctx"]);
        tpm.tool("tpm2_flushcontext", &["-t"]);
        assert_eq!(tpm.read("opened"), [0x5a; 32], "{kind}");
    }
}
