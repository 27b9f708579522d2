//! One enrolment by a software TPM, honest unless a row of a table changes it.

use super::{MASK, NOW, golden_ek_public, golden_endorsements};
use crate::appraisal::CompiledPolicy;
use crate::chain::*;
use crate::ek::{EkDenyRule, Endorsements};
use crate::hash::{Bank, HashAlg, sha256};
use crate::testdata::{AkKind, AttestSpec, SoftwareAk, golden, p256_public, quoted_pcrs, tpm2b};
use crate::transcript::{Binding, Transcript, qualifying_data};
use crate::{KeyHome, TicketBody, csr};
use ambit_model::{Revision, Stamp};
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use std::sync::{Arc, LazyLock};
use zeroize::Zeroizing;

pub(super) const TICKET: &[u8] = b"the sealed ticket";
/// The policies' revision when the ticket was sealed, and when the logs were judged.
const BEGUN_UNDER: Revision = Revision(5);
pub(super) const JUDGED_UNDER: Revision = Revision(6);
pub(super) const STORED: Counters = Counters { reset: 5, restart: 2, clock_ms: 1000, safe: true };

/// The one policy of cluster west: the golden boot, by any class of EK.
static GOLDEN: LazyLock<Arc<CompiledPolicy>> = LazyLock::new(|| {
    let pcrs = quoted_pcrs().into_iter().collect();
    let (boot, ima) = (golden("binary_bios_measurements"), golden("ima_binary_runtime_measurements"));
    let evidence = KeptEvidence::new("lab", "sha256", pcrs, boot, ima).unwrap();
    let mut learnt = evidence.learn(&"golden".parse().unwrap(), &"west".parse().unwrap()).unwrap();
    for class in [EkClass::Hardware, EkClass::Virtual, EkClass::Lab, EkClass::Listed] {
        learnt.policy.endorsement.insert(class.into());
    }
    let list = learnt.allow_list.map(|text| Arc::new(crate::appraisal::AllowList::parse(text.as_bytes()).unwrap()));
    Arc::new(CompiledPolicy::compile(&learnt.policy, &mut |_| list.clone()).unwrap())
});

/// A change to what would be right.
type Edit<T> = Box<dyn Fn(&mut T)>;

pub(super) struct Attempt {
    pub(super) ak: SoftwareAk,
    // Begin.
    pub(super) begin: BeginInput,
    pub(super) expected: Expected,
    pub(super) endorsements: Endorsements,
    pub(super) begin_at: Stamp,
    pub(super) bank: Bank,
    pub(super) mask: u32,
    pub(super) edit_ticket: Edit<TicketBody>,
    // What the TPM signs. An empty signer or extraData stands for the right one.
    pub(super) spec: AttestSpec,
    pub(super) digest_by: Option<HashAlg>,
    pub(super) edit_signature: Edit<Vec<u8>>,
    pub(super) by_another_key: bool,
    pub(super) in_tpm: Option<InTpm>,
    // What the node sends, with an HMAC over it.
    pub(super) pcrs: Vec<(u32, Vec<u8>)>,
    pub(super) boot_log: Vec<u8>,
    pub(super) ima_log: Vec<u8>,
    pub(super) csr_swapped: bool,
    pub(super) edit_header: Edit<EvidenceHeader>,
    pub(super) answered_ticket: Vec<u8>,
    pub(super) hmac_flipped: bool,
    pub(super) logs_swapped_after: bool,
    pub(super) answer_at: Stamp,
    // What the cell knows.
    pub(super) stored: Option<Counters>,
    pub(super) denied: Vec<EkDenyRule>,
    pub(super) policies: Vec<Arc<CompiledPolicy>>,
}

/// A certification of the CSR's key.
#[derive(Clone)]
pub(super) struct InTpm {
    pub(super) attributes: u32,
    pub(super) kind: u16,
    pub(super) other_session: bool,
}

/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign.
pub(super) const IN_TPM: InTpm = InTpm { attributes: 0x0004_0072, kind: 0x8017, other_session: false };

impl Attempt {
    pub(super) fn honest() -> Attempt {
        Attempt::with(SoftwareAk::p256())
    }

    pub(super) fn of(kind: AkKind) -> Attempt {
        Attempt::with(SoftwareAk::new(kind))
    }

    fn with(ak: SoftwareAk) -> Attempt {
        let pcrs = quoted_pcrs();
        Attempt {
            begin: BeginInput {
                cluster: "west".parse().unwrap(),
                ek_certificate: golden("ek-rsa2048.nv.der"),
                ek_intermediates: vec![],
                ek_public: golden_ek_public(),
                ak_public: ak.public.clone(),
                agent_nonce: vec![7; 32],
            },
            expected: Expected::AllowListed,
            endorsements: golden_endorsements(),
            begin_at: NOW,
            bank: Bank::Sha256,
            mask: MASK,
            edit_ticket: Box::new(|_| {}),
            spec: AttestSpec::quote(&[], &pcrs),
            digest_by: None,
            edit_signature: Box::new(|_| {}),
            by_another_key: false,
            in_tpm: None,
            pcrs,
            boot_log: golden("binary_bios_measurements"),
            ima_log: golden("ima_binary_runtime_measurements"),
            csr_swapped: false,
            edit_header: Box::new(|_| {}),
            answered_ticket: TICKET.to_vec(),
            hmac_flipped: false,
            logs_swapped_after: false,
            answer_at: NOW,
            stored: Some(Counters { clock_ms: 999, ..STORED }),
            denied: vec![],
            policies: vec![GOLDEN.clone()],
            ak,
        }
    }

    pub(super) fn begin(&self) -> Result<TicketBody, Denial> {
        let presented = PresentedEk::parse(self.begin.clone())?;
        let endorsed = presented.endorse(self.expected, &self.endorsements, self.begin_at)?;
        let entropy = Entropy { secret: Zeroizing::new([1; 32]), server_nonce: [2; 32], seed: Zeroizing::new([3; 64]) };
        let terms = Terms {
            bank: self.bank,
            pcr_mask: self.mask,
            ima_offset: 0,
            deadline: NOW.plus_ms(30_000),
            endorsement_revision: Revision(4),
            policy_revision: BEGUN_UNDER,
        };
        let (challenge, ticket) = endorsed.challenge(entropy, terms)?;
        assert_eq!(challenge.server_nonce, ticket.nonce());
        let mut ticket = TicketBody::decode(&ticket.encode()).unwrap();
        (self.edit_ticket)(&mut ticket);
        Ok(ticket)
    }

    /// The qualified name of the AK under the golden EK, spelled out.
    fn signer(&self) -> Vec<u8> {
        let name = |alg: HashAlg, parts: &[&[u8]]| [alg.id().to_be_bytes().to_vec(), alg.digest(parts)].concat();
        let ek_name = name(HashAlg::Sha256, &[&self.begin.ek_public]);
        let ek_qualified = name(HashAlg::Sha256, &[&[0x40, 0, 0, 0x0b], &ek_name]);
        name(self.ak.hash(), &[&ek_qualified, &self.ak_name()])
    }

    fn ak_name(&self) -> Vec<u8> {
        let alg = self.ak.hash();
        [alg.id().to_be_bytes().to_vec(), alg.digest(&[&self.begin.ak_public])].concat()
    }

    fn qualifying_data(&self, csr: &[u8]) -> Vec<u8> {
        let binding = Binding {
            agent_nonce: &[7; 32],
            server_nonce: &[2; 32],
            ticket_sha256: &sha256(TICKET),
            csr_spki: &csr::p256_spki(csr).unwrap(),
            cluster: &self.begin.cluster,
            ak_name: &self.ak_name(),
        };
        qualifying_data(&binding).to_vec()
    }

    /// TPMS_ATTEST as asked for.
    fn quote(&self, csr: &[u8]) -> Vec<u8> {
        let mut spec = self.spec.clone();
        if spec.signer.is_empty() {
            spec.signer = self.signer();
        }
        if spec.extra_data.is_empty() {
            spec.extra_data = self.qualifying_data(csr);
        }
        let values: Vec<&[u8]> = self.pcrs.iter().map(|(_, v)| v.as_slice()).collect();
        spec.digest = self.digest_by.unwrap_or(self.ak.hash()).digest(&values);
        spec.bytes()
    }

    fn svid_key(&self, csr: &[u8], key: &KeyPair) -> KeyHome {
        let Some(in_tpm) = &self.in_tpm else { return KeyHome::InMemory };
        let public = p256_public(in_tpm.attributes, key.der_bytes());
        let mut spec = AttestSpec::quote(&self.signer(), &[]);
        spec.kind = in_tpm.kind;
        spec.extra_data = self.qualifying_data(csr);
        if in_tpm.other_session {
            spec.extra_data[0] ^= 1;
        }
        let name = [&[0, 0x0b][..], &sha256(&public)].concat();
        let attest = [spec.head(), tpm2b(&name), tpm2b(&[1; 34])].concat();
        let signature = self.ak.sign(&attest);
        KeyHome::from_wire((public, attest, signature), Default::default()).unwrap()
    }

    pub(super) fn run(&self) -> Result<Verified<NodeEvidence>, Denial> {
        let body = self.begin()?;
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let request =
            |key: &KeyPair| CertificateParams::new(vec![]).unwrap().serialize_request(key).unwrap().der().to_vec();
        let csr = request(&key);
        let quote = self.quote(&csr);
        let mut signature = if self.by_another_key { SoftwareAk::p256().sign(&quote) } else { self.ak.sign(&quote) };
        (self.edit_signature)(&mut signature);
        let svid_key = self.svid_key(&csr, &key);
        let csr = if self.csr_swapped {
            request(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap())
        } else {
            csr
        };
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
            svid_key,
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
        activated.quote(&self.denied)?.appraise(boot, ima, self.stored, &self.policies, JUDGED_UNDER)
    }
}
