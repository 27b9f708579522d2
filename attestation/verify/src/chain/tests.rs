//! The whole chain, with a software key in the place of a TPM's AK: so that every field a TPM would never put wrong can
//! be put wrong. (The `ambit-tpm` crate runs the same chain against a real TPM.)

use super::*;
use crate::attest::Attest;
use crate::credential;
use crate::ek::{EkDenyRule, EkRoot, Endorsements};
use crate::hash::{HashAlg, sha256};
use crate::public::{AttestationKey, EndorsementKey, Public};
use crate::quote::Quote;
use crate::signature::AkVerifier;
use crate::testdata::{ca, golden, golden_pcrs, mutant};
use crate::transcript::{Binding, Transcript, qualifying_data};
use crate::{KeyHome, TicketBody, csr};
use ambit_model::{Code, Stamp};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SubjectPublicKeyInfo,
};
use zeroize::Zeroizing;

/// 2026-11-25, two days after the golden boot.
const NOW: Stamp = Stamp(1_795_600_000_000);
/// PCRs 0-10 and 14, as the golden quote.
const MASK: u32 = 0x47ff;

fn golden_ek_public() -> Vec<u8> {
    golden("ek.tpm2b_public")[2..].to_vec()
}

fn golden_endorsements() -> Endorsements {
    let root = EkRoot { der: ca("swtpm-localca-rootca-cert.pem"), class: EkClass::Lab };
    Endorsements { roots: vec![root], intermediates: vec![ca("issuercert.pem")], denied: vec![] }
}

fn key(public: Vec<u8>) -> (EndorsementKey, AttestationKey) {
    let ek = EndorsementKey::new(Public::parse(&golden_ek_public()).unwrap()).unwrap();
    (ek, AttestationKey::new(Public::parse(&public).unwrap()).unwrap())
}

/// TPMT_PUBLIC of a P-256 ECDSA-SHA256 key with these attributes.
fn p256_public(attributes: u32, point: &[u8]) -> Vec<u8> {
    let mut out = vec![0x00, 0x23, 0x00, 0x0b];
    out.extend(attributes.to_be_bytes());
    out.extend([0, 0, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0x00, 0x03, 0x00, 0x10]);
    for coordinate in point[1..].chunks(32) {
        out.extend([0, 32]);
        out.extend(coordinate);
    }
    out
}

#[test]
fn the_golden_quote_is_accepted_and_forgeries_are_not() {
    let nonce: Vec<u8> = (0..2).flat_map(|_| (0..16u8).map(|n| n * 0x11)).collect();
    let pcrs: Vec<(u32, Vec<u8>)> =
        golden_pcrs(HashAlg::Sha256).into_iter().filter(|(n, _)| MASK & (1 << n) != 0).collect();
    let (ek, ak) = key(golden("ak.tpmt_public"));
    assert_eq!(ak.public().name(), golden("ak.name"));
    let judge = |attest: &[u8], signature: &[u8], ak: &AttestationKey, extra_data: [u8; 32]| {
        let signer = ek.qualify(ak.public());
        let quote =
            Quote { attest, signature, pcrs: &pcrs, signer: &signer, extra_data, bank: Bank::Sha256, pcr_mask: MASK };
        quote.judge(&AkVerifier::new(ak).unwrap()).map(|_| ()).map_err(|r| r.code)
    };
    let (attest, signature) = (golden("quote.tpms_attest"), golden("quote.tpmt_signature"));
    let nonce: [u8; 32] = nonce.try_into().unwrap();
    assert_eq!(judge(&attest, &signature, &ak, nonce), Ok(()));
    assert_eq!(judge(&attest, &signature, &ak, [0; 32]), Err(Code::QuoteNonce));

    let pem = String::from_utf8(mutant("forged-software-key.pem")).unwrap();
    let spki = {
        use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
        SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
    };
    let (_, forger) = key(p256_public(0x0005_0072, &spki[26..]));
    for (name, by_ak, by_forger) in [
        ("forged-fk_ok", Code::QuoteSignature, Code::QuoteSigner),
        ("forged-fk_magic", Code::QuoteSignature, Code::QuoteMagic),
    ] {
        let (attest, signature) = (mutant(&format!("{name}.tpms_attest")), mutant(&format!("{name}.tpmt_signature")));
        assert_eq!(judge(&attest, &signature, &ak, [0xab; 32]), Err(by_ak), "{name}");
        // Even where the software key itself was presented as an AK: it is under no EK.
        assert_eq!(judge(&attest, &signature, &forger, [0xab; 32]), Err(by_forger), "{name}");
    }
}

/// One enrolment, honest unless a row of a table changes it.
struct Attempt {
    begin: BeginInput,
    expected: Expected,
    endorsements: Endorsements,
    begin_at: Stamp,
    bank: Bank,
    mask: u32,
    magic: u32,
    kind: u16,
    signer: Option<Vec<u8>>,
    extra_data: Option<[u8; 32]>,
    selections: Vec<(u16, Vec<u8>)>,
    digest_by: HashAlg,
    counters: Counters,
    signature: Box<dyn Fn(Vec<u8>) -> Vec<u8>>,
    pcrs: Vec<(u32, Vec<u8>)>,
    boot_log: Vec<u8>,
    ima_log: Vec<u8>,
    edit_header: Box<dyn Fn(&mut EvidenceHeader)>,
    edit_ticket: Box<dyn Fn(&mut TicketBody)>,
    answered_ticket: Vec<u8>,
    csr_swapped: bool,
    hmac_flipped: bool,
    logs_swapped_after: bool,
    answer_at: Stamp,
    stored: Option<Counters>,
    denied: Vec<EkDenyRule>,
}

const TICKET: &[u8] = b"the sealed ticket";

fn software_ak() -> EcdsaKeyPair {
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).unwrap()
}

fn new_csr() -> Vec<u8> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    CertificateParams::new(vec![]).unwrap().serialize_request(&key).unwrap().der().to_vec()
}

impl Attempt {
    fn honest(ak: &EcdsaKeyPair) -> Attempt {
        let pcrs: Vec<(u32, Vec<u8>)> =
            golden_pcrs(HashAlg::Sha256).into_iter().filter(|(n, _)| MASK & (1 << n) != 0).collect();
        Attempt {
            begin: BeginInput {
                cluster: "west".parse().unwrap(),
                ek_certificate: golden("ek-rsa2048.nv.der"),
                ek_intermediates: vec![],
                ek_public: golden_ek_public(),
                ak_public: p256_public(0x0005_0072, ak.public_key().as_ref()),
                agent_nonce: vec![7; 32],
            },
            expected: Expected::AllowListed,
            endorsements: golden_endorsements(),
            begin_at: NOW,
            bank: Bank::Sha256,
            mask: MASK,
            magic: 0xff54_4347,
            kind: 0x8018,
            signer: None,
            extra_data: None,
            selections: vec![(0x000b, vec![0xff, 0x47, 0x00])],
            digest_by: HashAlg::Sha256,
            counters: Counters { reset: 5, restart: 2, clock_ms: 1000, safe: true },
            signature: Box::new(|rs| {
                let mut out = vec![0x00, 0x18, 0x00, 0x0b];
                for part in rs.chunks(32) {
                    out.extend([0, 32]);
                    out.extend(part);
                }
                out
            }),
            pcrs,
            boot_log: golden("binary_bios_measurements"),
            ima_log: golden("ima_binary_runtime_measurements"),
            edit_header: Box::new(|_| {}),
            edit_ticket: Box::new(|_| {}),
            answered_ticket: TICKET.to_vec(),
            csr_swapped: false,
            hmac_flipped: false,
            logs_swapped_after: false,
            answer_at: NOW,
            stored: Some(Counters { reset: 5, restart: 2, clock_ms: 1000, safe: true }),
            denied: vec![],
        }
    }

    fn begin(&self) -> Result<TicketBody, Denial> {
        let presented = PresentedEk::parse(self.begin.clone())?;
        let endorsed = presented.endorse(self.expected, &self.endorsements, self.begin_at)?;
        let entropy = Entropy { secret: Zeroizing::new([1; 32]), server_nonce: [2; 32], seed: Zeroizing::new([3; 64]) };
        let terms = Terms {
            bank: self.bank,
            pcr_mask: self.mask,
            ima_offset: 0,
            deadline: NOW.plus_ms(30_000),
            endorsement_revision: Revision(4),
            policy_revision: Revision(5),
        };
        let (challenge, ticket) = endorsed.challenge(entropy, terms)?;
        assert_eq!(challenge.server_nonce, ticket.nonce());
        let mut ticket = TicketBody::decode(&ticket.encode()).unwrap();
        (self.edit_ticket)(&mut ticket);
        Ok(ticket)
    }

    /// TPMS_ATTEST as asked for.
    fn attest(&self, csr: &[u8]) -> Vec<u8> {
        let name = |alg: HashAlg, parts: &[&[u8]]| [alg.id().to_be_bytes().to_vec(), alg.digest(parts)].concat();
        let ak_name = name(HashAlg::Sha256, &[&self.begin.ak_public]);
        let ek_name = name(HashAlg::Sha256, &[&self.begin.ek_public]);
        let ek_qualified = name(HashAlg::Sha256, &[&[0x40, 0, 0, 0x0b], &ek_name]);
        let signer = self.signer.clone().unwrap_or_else(|| name(HashAlg::Sha256, &[&ek_qualified, &ak_name]));
        let extra_data = self.extra_data.unwrap_or_else(|| {
            qualifying_data(&Binding {
                agent_nonce: &[7; 32],
                server_nonce: &[2; 32],
                ticket_sha256: &sha256(TICKET),
                csr_spki: &csr::p256_spki(csr).unwrap(),
                cluster: &self.begin.cluster,
                ak_name: &ak_name,
            })
        });
        let mut out = self.magic.to_be_bytes().to_vec();
        out.extend(self.kind.to_be_bytes());
        for part in [signer.as_slice(), &extra_data] {
            out.extend((part.len() as u16).to_be_bytes());
            out.extend(part);
        }
        out.extend(self.counters.clock_ms.to_be_bytes());
        out.extend(self.counters.reset.to_be_bytes());
        out.extend(self.counters.restart.to_be_bytes());
        out.push(u8::from(self.counters.safe));
        out.extend([0; 8]);
        out.extend((self.selections.len() as u32).to_be_bytes());
        for (alg, select) in &self.selections {
            out.extend(alg.to_be_bytes());
            out.push(select.len() as u8);
            out.extend(select);
        }
        let values: Vec<&[u8]> = self.pcrs.iter().map(|(_, v)| v.as_slice()).collect();
        let digest = self.digest_by.digest(&values);
        out.extend((digest.len() as u16).to_be_bytes());
        out.extend(digest);
        out
    }

    fn run(&self, ak: &EcdsaKeyPair) -> Result<Verified<NodeEvidence>, Denial> {
        let body = self.begin()?;
        let csr = new_csr();
        let quote = self.attest(&csr);
        let signature = (self.signature)(ak.sign(&SystemRandom::new(), &quote).unwrap().as_ref().to_vec());
        let csr = if self.csr_swapped { new_csr() } else { csr };
        let mut header = EvidenceHeader {
            hmac: vec![],
            csr,
            quote,
            signature,
            pcrs: self.pcrs.clone(),
            boot_log: LogExtent::of(&self.boot_log),
            ima_log: LogExtent::of(&self.ima_log),
            ek_public: self.begin.ek_public.clone(),
            ak_public: self.begin.ak_public.clone(),
            svid_key: KeyHome::InMemory,
        };
        (self.edit_header)(&mut header);
        let transcript = Transcript {
            ticket_sha256: sha256(&self.answered_ticket),
            csr: &header.csr,
            quote: &header.quote,
            signature: &header.signature,
            pcrs: &header.pcrs,
            boot_log: header.boot_log,
            ima_log: header.ima_log,
            svid_key: &header.svid_key,
        };
        header.hmac = transcript.hmac(&[1; 32]).to_vec();
        if self.hmac_flipped {
            header.hmac[31] ^= 1;
        }
        let activated = ActivatedAk::open(body, &self.answered_ticket, header, self.answer_at)?;
        assert_eq!(activated.session().nonce, [2; 32]);
        let (boot, ima) = (self.boot_log.as_slice(), self.ima_log.as_slice());
        let (boot, ima) = if self.logs_swapped_after { (ima, boot) } else { (boot, ima) };
        activated.quote(&self.denied)?.appraise(boot, ima, self.stored)
    }
}

#[test]
fn an_honest_node_is_verified() {
    let ak = software_ak();
    let mut attempt = Attempt::honest(&ak);
    attempt.expected = Expected::JoinToken([9; 32]);
    let verified = attempt.run(&ak).unwrap();
    assert_eq!(verified.ek_class, EkClass::Lab);
    assert_eq!(verified.cluster.as_str(), "west");
    assert_eq!(verified.join_token, Some([9; 32]));
    assert_eq!(verified.pcrs.len(), 12);
    assert_eq!((verified.boot.events, verified.ima.entries), (48, 41));
    assert_eq!((verified.endorsement_revision, verified.policy_revision), (Revision(4), Revision(5)));
    let spki = Public::parse(&golden_ek_public()).unwrap().spki_der();
    assert_eq!(verified.node.0, sha256(&spki));
    let claims: serde_json::Value = serde_json::from_str(&verified.claims_json(NOW)).unwrap();
    let node = &claims["submods"]["node"];
    assert_eq!(node["ear.status"], "warning", "a lab TPM is never affirming");
    assert_eq!(node["ambit.boot"]["secure_boot"], true);
    assert_eq!(node["ambit.ima"]["extended_as"], "native");
    assert_eq!(claims["iat"], 1_795_600_000);
}

#[test]
fn each_lie_has_its_code() {
    type Row = (&'static str, Code, fn(&mut Attempt));
    let rows: Vec<Row> = vec![
        // Begin.
        ("nobody expects the EK", Code::EkNotExpected, |a| a.expected = Expected::Nobody),
        ("no certificate, join token", Code::EkChainUntrusted, |a| {
            a.begin.ek_certificate.clear();
            a.expected = Expected::JoinToken([9; 32]);
        }),
        ("no root", Code::EkChainUntrusted, |a| a.endorsements.roots.clear()),
        ("no intermediate", Code::EkChainUntrusted, |a| a.endorsements.intermediates.clear()),
        ("before the certificate is valid", Code::EkChainUntrusted, |a| a.begin_at = Stamp(1_500_000_000_000)),
        ("certificate of another key of the TPM", Code::EkMismatch, |a| {
            a.begin.ek_certificate = golden("ek-p384.nv.der");
        }),
        ("certificate padded with other bytes", Code::EkMalformed, |a| a.begin.ek_certificate.push(1)),
        ("certificate cut", Code::EkMalformed, |a| a.begin.ek_certificate.truncate(900)),
        ("EK as TPM2B", Code::EkMalformed, |a| a.begin.ek_public = golden("ek.tpm2b_public")),
        ("an AK as EK", Code::EkMalformed, |a| a.begin.ek_public = a.begin.ak_public.clone()),
        ("an EK as AK", Code::AkAttributes, |a| a.begin.ak_public = a.begin.ek_public.clone()),
        ("AK unrestricted", Code::AkAttributes, |a| a.begin.ak_public[5] ^= 0x01),
        ("AK decrypts too", Code::AkAttributes, |a| a.begin.ak_public[5] ^= 0x02),
        ("AK not fixedTPM", Code::AkAttributes, |a| a.begin.ak_public[7] ^= 0x02),
        ("AK without scheme", Code::AkAttributes, |a| {
            a.begin.ak_public[12..14].copy_from_slice(&[0x00, 0x10]);
            a.begin.ak_public.drain(14..16);
        }),
        ("AK scheme SHA-1", Code::AkWeak, |a| a.begin.ak_public[15] = 0x04),
        ("AK name SHA-1", Code::AkWeak, |a| a.begin.ak_public[3] = 0x04),
        ("AK on another curve", Code::AkWeak, |a| a.begin.ak_public[17] = 0x05),
        ("AK cut", Code::EvidenceMalformed, |a| a.begin.ak_public.truncate(60)),
        ("agent nonce of 31 bytes", Code::BadRequest, |a| a.begin.agent_nonce.truncate(31)),
        ("empty mask", Code::BadRequest, |a| a.mask = 0),
        ("mask beyond PCR 23", Code::BadRequest, |a| a.mask = 1 << 24),
        ("ten intermediates", Code::EvidenceTooLarge, |a| a.begin.ek_intermediates = vec![vec![]; 10]),
        // Ticket and activation.
        ("late", Code::TicketExpired, |a| a.answer_at = NOW.plus_ms(30_001)),
        ("ticket of another AK", Code::TicketInvalid, |a| a.edit_ticket = Box::new(|t| t.ak_public_sha256[0] ^= 1)),
        ("ticket of another EK", Code::TicketInvalid, |a| a.edit_ticket = Box::new(|t| t.ek_public_sha256[0] ^= 1)),
        ("wrong HMAC", Code::ActivationFailed, |a| a.hmac_flipped = true),
        ("secret not opened", Code::ActivationFailed, |a| a.edit_ticket = Box::new(|t| t.secret[0] ^= 1)),
        ("no CSR", Code::CsrMalformed, |a| a.edit_header = Box::new(|h| h.csr.clear())),
        ("CSR with a wrong signature", Code::CsrMalformed, |a| {
            a.edit_header = Box::new(|h| *h.csr.last_mut().unwrap() ^= 1);
        }),
        ("boot log of 3 MiB", Code::EvidenceTooLarge, |a| a.edit_header = Box::new(|h| h.boot_log.len = 3 << 20)),
        ("IMA log of 1 GiB", Code::EvidenceTooLarge, |a| a.edit_header = Box::new(|h| h.ima_log.len = 1 << 30)),
        ("quote of 1 MiB", Code::EvidenceTooLarge, |a| a.edit_header = Box::new(|h| h.quote = vec![0; 1 << 20])),
        // Quote.
        ("signature of nothing", Code::QuoteSignature, |a| {
            a.signature =
                Box::new(|_| [&[0x00, 0x18, 0x00, 0x0b, 0x00, 0x20][..], &[0; 32], &[0x00, 0x20], &[0; 32]].concat())
        }),
        ("signature says SHA-1", Code::QuoteSignature, |a| {
            let honest = std::mem::replace(&mut a.signature, Box::new(|v| v));
            a.signature = Box::new(move |rs| {
                let mut s = honest(rs);
                s[3] = 0x04;
                s
            });
        }),
        ("RSA signature by an ECDSA AK", Code::QuoteSignature, |a| {
            a.signature = Box::new(|_| [&[0x00, 0x14, 0x00, 0x0b, 0x01, 0x00][..], &[1; 256]].concat());
        }),
        ("quote changed after signing", Code::QuoteSignature, |a| a.edit_header = Box::new(|h| h.quote[60] ^= 1)),
        ("signature cut", Code::EvidenceMalformed, |a| a.edit_header = Box::new(|h| h.signature.truncate(50))),
        ("magic 0", Code::QuoteMagic, |a| a.magic = 0),
        ("type CERTIFY", Code::QuoteType, |a| a.kind = 0x8017),
        ("type TIME", Code::QuoteType, |a| a.kind = 0x8019),
        ("AK under another parent", Code::QuoteSigner, |a| a.signer = Some([&[0, 0x0b][..], &[1; 32]].concat())),
        ("other nonce", Code::QuoteNonce, |a| a.extra_data = Some([0; 32])),
        ("other CSR key", Code::QuoteNonce, |a| a.csr_swapped = true),
        ("other ticket", Code::QuoteNonce, |a| a.answered_ticket = b"another".to_vec()),
        ("other cluster", Code::QuoteNonce, |a| {
            a.edit_ticket = Box::new(|t| t.cluster = "east".parse().unwrap());
        }),
        ("empty selection", Code::QuoteSelection, |a| a.selections = vec![(0x000b, vec![0, 0, 0])]),
        ("no selection", Code::QuoteSelection, |a| a.selections.clear()),
        ("SHA-1 bank", Code::QuoteSelection, |a| a.selections[0].0 = 0x0004),
        ("SHA-384 bank", Code::QuoteSelection, |a| a.selections[0].0 = 0x000c),
        ("two banks", Code::QuoteSelection, |a| a.selections.push((0x0004, vec![1, 0, 0]))),
        ("one PCR more", Code::QuoteSelection, |a| a.selections[0].1[2] = 0x80),
        ("one PCR fewer", Code::QuoteSelection, |a| a.selections[0].1[0] = 0xfe),
        ("four octets", Code::QuoteSelection, |a| a.selections[0].1.push(0)),
        ("PCR 14 relabelled 15", Code::QuotePcrDigest, |a| {
            a.edit_header = Box::new(|h| h.pcrs.last_mut().unwrap().0 = 15);
        }),
        ("a PCR value changed", Code::QuotePcrDigest, |a| a.edit_header = Box::new(|h| h.pcrs[0].1[0] ^= 1)),
        ("a PCR value more", Code::QuotePcrDigest, |a| {
            a.edit_header = Box::new(|h| h.pcrs.push((15, vec![0; 32])));
        }),
        ("PCR values split elsewhere", Code::QuotePcrDigest, |a| {
            a.edit_header = Box::new(|h| {
                let moved = h.pcrs[1].1.remove(0);
                h.pcrs[0].1.push(moved);
            });
        }),
        ("digest by another hash", Code::QuotePcrDigest, |a| a.digest_by = HashAlg::Sha384),
        // Counters and logs.
        ("reset count back", Code::ClockStepBack, |a| a.counters.reset = 4),
        ("restart count back", Code::ClockStepBack, |a| a.counters.restart = 1),
        ("clock back", Code::ClockStepBack, |a| a.counters.clock_ms = 999),
        ("logs other than stated", Code::EvidenceMalformed, |a| a.logs_swapped_after = true),
        ("no boot log", Code::BootLogMissing, |a| a.boot_log.clear()),
        ("boot log cut", Code::BootLogMalformed, |a| a.boot_log = mutant("truncated.bin")),
        ("PCR 7 retyped", Code::BootLogEventAltered, |a| a.boot_log = mutant("retyped-pcr7.bin")),
        ("boot log of another boot", Code::BootLogPcrMismatch, |a| {
            a.pcrs[2].1[0] ^= 1;
        }),
        ("no IMA log", Code::ImaLogMismatch, |a| a.ima_log.clear()),
        ("IMA log cut", Code::ImaLogMalformed, |a| a.ima_log.truncate(5000)),
    ];
    let ak = software_ak();
    let mut wrong = Vec::new();
    for (what, code, change) in rows {
        let mut attempt = Attempt::honest(&ak);
        change(&mut attempt);
        match attempt.run(&ak) {
            Ok(_) => wrong.push(format!("{what}: accepted")),
            Err(denial) if denial.refusal.code != code => wrong.push(format!("{what}: {denial:?}")),
            Err(denial) => {
                let told = denial.refusal.for_node();
                assert!(told.expected.is_empty() && told.found.is_empty());
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn honest_variations_are_accepted() {
    type Row = (&'static str, fn(&mut Attempt));
    let rows: Vec<Row> = vec![
        ("certificate padded with FF", |a| a.begin.ek_certificate.extend([0xff; 100])),
        ("certificate padded with 00", |a| a.begin.ek_certificate.extend([0; 100])),
        ("intermediate sent by the node", |a| {
            a.begin.ek_intermediates = std::mem::take(&mut a.endorsements.intermediates);
        }),
        ("a strange root beside", |a| {
            a.endorsements.roots.insert(0, EkRoot { der: vec![0x30, 0], class: EkClass::Hardware });
        }),
        ("no certificate, but listed", |a| {
            a.begin.ek_certificate.clear();
            a.endorsements.roots.clear();
        }),
        ("first quote of this EK", |a| a.stored = None),
        ("after a crash: clock and restarts back, resets up", |a| {
            a.counters = Counters { reset: 6, restart: 0, clock_ms: 3, safe: false };
        }),
        ("fewer PCRs, none of the boot log", |a| {
            a.mask = 1 << 10;
            a.selections[0].1 = vec![0, 4, 0];
            a.pcrs.retain(|(n, _)| *n == 10);
            a.boot_log.clear();
        }),
    ];
    let ak = software_ak();
    for (what, change) in rows {
        let mut attempt = Attempt::honest(&ak);
        change(&mut attempt);
        if let Err(denial) = attempt.run(&ak) {
            panic!("{what}: {denial:?}");
        }
    }
}

/// Certificates of the golden EK's key by a CA of our own: what webpki lets through and we must not, and the reverse.
#[test]
fn an_ek_certificate_must_be_one() {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca_params = CertificateParams::new(vec![]).unwrap();
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_cert = ca_params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(ca_params, &ca_key);
    let key = SubjectPublicKeyInfo::from_der(&Public::parse(&golden_ek_public()).unwrap().spki_der()).unwrap();
    let ek_use = ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1]);
    for (what, is_ca, uses, code) in [
        ("good", false, vec![ek_use.clone()], None),
        ("no use named", false, vec![], Some(Code::EkChainUntrusted)),
        ("for TLS servers", false, vec![ExtendedKeyUsagePurpose::ServerAuth], Some(Code::EkChainUntrusted)),
        ("a CA", true, vec![ek_use], Some(Code::EkChainUntrusted)),
    ] {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.extended_key_usages = uses;
        if is_ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let ak = software_ak();
        let mut attempt = Attempt::honest(&ak);
        attempt.begin.ek_certificate = params.signed_by(&key, &issuer).unwrap().der().to_vec();
        attempt.endorsements = Endorsements {
            roots: vec![EkRoot { der: ca_cert.der().to_vec(), class: EkClass::Hardware }],
            ..Default::default()
        };
        let outcome = attempt.run(&ak);
        assert_eq!(outcome.as_ref().err().map(|d| d.refusal.code), code, "{what}: {outcome:?}");
        if let Ok(verified) = outcome {
            let claims: serde_json::Value = serde_json::from_str(&verified.claims_json(NOW)).unwrap();
            assert_eq!(claims["submods"]["node"]["ear.status"], "affirming");
        }
        // The same certificate under the golden CA's root only.
        attempt.endorsements = golden_endorsements();
        assert_eq!(attempt.run(&ak).unwrap_err().refusal.code, Code::EkChainUntrusted, "{what}");
    }
}

#[test]
fn tickets_have_one_encoding() {
    let ak = software_ak();
    let bytes = Attempt::honest(&ak).begin().unwrap().encode();
    assert_eq!(TicketBody::decode(&bytes).unwrap().encode(), bytes);
    for n in 0..bytes.len() {
        assert_eq!(TicketBody::decode(&bytes[..n]).unwrap_err().code, Code::TicketInvalid, "{n} bytes");
    }
    assert!(TicketBody::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    assert!(!format!("{:?}", TicketBody::decode(&bytes).unwrap()).contains("secret"));
}

/// Cut or corrupt every structure at every byte: an answer, never a panic.
#[test]
fn no_corruption_panics() {
    let (ek, _) = key(golden("ak.tpmt_public"));
    for bytes in
        [golden("quote.tpms_attest"), golden("quote.tpmt_signature"), golden("ak.tpmt_public"), golden_ek_public()]
    {
        for n in 0..bytes.len() {
            for changed in [bytes[..n].to_vec(), {
                let mut b = bytes.clone();
                b[n] ^= 0xff;
                b
            }] {
                let _ = Attest::parse(&changed);
                let _ = crate::signature::Signature::parse(&changed);
                if let Ok(public) = Public::parse(&changed) {
                    let _ = (public.spki_der(), public.name());
                    if let Ok(broken) = EndorsementKey::new(public) {
                        let _ = credential::make(&broken, &ek.public().name(), &[0; 32], &[0; 64]);
                    }
                }
                let _ = csr::p256_spki(&changed);
            }
        }
    }
}
