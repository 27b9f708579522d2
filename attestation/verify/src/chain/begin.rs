//! The first round trip: an EK and an AK are presented, endorsed and challenged.

use crate::credential;
use crate::ek::{self, EkClass, EkMake, Endorsements, Quirk, Vouched, deny, roca};
use crate::hash::{Bank, sha256};
use crate::public::{AttestationKey, EndorsementKey, Key, Public};
use crate::signature::AkVerifier;
use crate::ticket::TicketBody;
use crate::{INTERMEDIATES_MAX, OBJECT_BYTES_MAX, PCR_MASK_ALL};
use ambit_model::{ClusterId, Code, NodeId, Refusal, Revision, Stamp};
use zeroize::Zeroizing;

/// What a node sends in `Begin`, as it came off the wire.
#[derive(Clone, Debug)]
pub struct BeginInput {
    /// The cluster to enrol in.
    pub cluster: ClusterId,
    /// EK certificate as read from NV (DER, maybe padded); empty if the TPM has none.
    pub ek_certificate: Vec<u8>,
    /// Certificates between it and a root, in any order.
    pub ek_intermediates: Vec<Vec<u8>>,
    /// TPMT_PUBLIC of the EK.
    pub ek_public: Vec<u8>,
    /// TPMT_PUBLIC of the AK.
    pub ak_public: Vec<u8>,
    /// 32 bytes chosen by the node.
    pub agent_nonce: Vec<u8>,
}

/// Why this cluster would take this EK, as the caller found it for [`PresentedEk::node`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The node id is on the cluster's allow-list.
    AllowListed,
    /// The request carries an unused join token of the cluster, whose SHA-256 this is.
    JoinToken([u8; 32]),
    /// It joined by a token before. What vouched for it then, its maker's certificate, must vouch for it again.
    Joined,
    /// Nothing of these.
    Nobody,
}

/// An EK and an AK that are well formed and of the right kind; nobody vouches for them yet.
#[derive(Debug)]
pub struct PresentedEk {
    input: BeginInput,
    agent_nonce: [u8; 32],
    ek: EndorsementKey,
    ak: AttestationKey,
    node: NodeId,
}

impl PresentedEk {
    /// Parses what a node presented: sizes, both public areas, the EK's kind, the AK's attributes, scheme and strength.
    pub fn parse(input: BeginInput) -> Result<PresentedEk, Refusal> {
        let too_large = |what: &str, n: usize| {
            Refusal::new(Code::EvidenceTooLarge, format!("{what} within its limit"), n.to_string())
        };
        if input.ek_intermediates.len() > INTERMEDIATES_MAX {
            return Err(too_large("EK intermediates", input.ek_intermediates.len()));
        }
        for object in
            [&input.ek_certificate, &input.ek_public, &input.ak_public].into_iter().chain(&input.ek_intermediates)
        {
            if object.len() > OBJECT_BYTES_MAX {
                return Err(too_large("EK or AK", object.len()));
            }
        }
        let agent_nonce = <[u8; 32]>::try_from(input.agent_nonce.as_slice()).map_err(|_| {
            Refusal::new(Code::BadRequest, "an agent nonce of 32 bytes", input.agent_nonce.len().to_string())
        })?;
        let ek = EndorsementKey::new(
            Public::parse(&input.ek_public).map_err(|e| e.refuse(Code::EkMalformed, "EK TPMT_PUBLIC"))?,
        )?;
        let ak = AttestationKey::new(
            Public::parse(&input.ak_public).map_err(|e| e.refuse(Code::EvidenceMalformed, "AK TPMT_PUBLIC"))?,
        )?;
        let node = NodeId(sha256(&ek.public().spki_der()));
        Ok(PresentedEk { input, agent_nonce, ek, ak, node })
    }

    /// The node id: SHA-256 of the EK's SubjectPublicKeyInfo (DER).
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The cluster asked for.
    pub fn cluster(&self) -> &ClusterId {
        &self.input.cluster
    }

    /// The AK's name.
    pub fn ak_name(&self) -> Vec<u8> {
        self.ak.public().name()
    }

    /// Judges the EK against the cluster's endorsements. A certificate, where one is sent, must be good; none is needed
    /// for an EK that the operator listed by hand. Chain validity alone proves *a* TPM, never one of ours.
    pub fn endorse(self, expected: Expected, endorsements: &Endorsements, now: Stamp) -> Result<EndorsedEk, Refusal> {
        let join_token = match expected {
            Expected::Nobody => {
                return Err(Refusal::new(
                    Code::EkNotExpected,
                    "an EK on the allow-list, or an unused join token",
                    format!("node {}", self.node),
                ));
            }
            Expected::AllowListed | Expected::Joined => None,
            Expected::JoinToken(hash) => Some(hash),
        };
        if let Key::Rsa { modulus, .. } = self.ek.public().key()
            && roca::is_fingerprinted(modulus)
        {
            let expected = "an RSA key of a sound generator";
            return Err(Refusal::new(Code::EkWeak, expected, "one with the fingerprint of CVE-2017-15361"));
        }
        let (backing, quirks) = if self.input.ek_certificate.is_empty() {
            if expected != Expected::AllowListed {
                return Err(Refusal::new(
                    Code::EkChainUntrusted,
                    "an EK certificate, or an EK on the allow-list",
                    "no EK certificate",
                ));
            }
            (Backing { class: EkClass::Listed, root_sha256: None, make: EkMake::Unnamed, join_token }, vec![])
        } else {
            let (certificate, sent) = (&self.input.ek_certificate, &self.input.ek_intermediates);
            let vouched = ek::judge(certificate, sent, self.ek.public(), endorsements, now)?;
            let Vouched { class, root_sha256, make, quirks } = vouched;
            (Backing { class, root_sha256: Some(root_sha256), make, join_token }, quirks)
        };
        deny::before_quote(&endorsements.denied, &backing.make)?;
        // An AK that no TPM can have is not worth a credential.
        AkVerifier::new(&self.ak)?;
        Ok(EndorsedEk { presented: self, backing, quirks })
    }
}

/// The randomness of one challenge, from the caller's generator.
pub struct Entropy {
    /// The activation secret.
    pub secret: Zeroizing<[u8; 32]>,
    /// The server's nonce.
    pub server_nonce: [u8; 32],
    /// Seed of the credential's protection (RSA EKs use as much of it as their name algorithm is long).
    pub seed: Zeroizing<[u8; 64]>,
}

/// What the evidence must show, and under which revisions it is judged.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The bank to quote.
    pub bank: Bank,
    /// Exactly the PCRs to quote; bit n is PCR n.
    pub pcr_mask: u32,
    /// Where the IMA log begins; 0 at enrolment.
    pub ima_offset: u64,
    /// Last instant at which an answer is taken.
    pub deadline: Stamp,
    /// Revision of the cluster's roots, allow-list and deny-list.
    pub endorsement_revision: Revision,
    /// Revision of the cluster's appraisal policies.
    pub policy_revision: Revision,
}

/// What goes to the node beside the sealed ticket.
#[derive(Clone, Debug)]
pub struct Challenge {
    /// TPM2B_ID_OBJECT.
    pub credential_blob: Vec<u8>,
    /// TPM2B_ENCRYPTED_SECRET.
    pub encrypted_secret: Vec<u8>,
    /// The server's nonce.
    pub server_nonce: [u8; 32],
}

/// An EK that a trusted maker or the operator vouches for, that this cluster expects, and the AK said to live beside it.
#[derive(Debug)]
pub struct EndorsedEk {
    presented: PresentedEk,
    backing: Backing,
    quirks: Vec<Quirk>,
}

/// What makes an EK one of this cluster's: kept in the ticket, and in the evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) class: EkClass,
    /// None for an EK without certificate, which the operator listed.
    pub(crate) root_sha256: Option<[u8; 32]>,
    pub(crate) make: EkMake,
    pub(crate) join_token: Option<[u8; 32]>,
}

impl EndorsedEk {
    /// The node id.
    pub fn node(&self) -> NodeId {
        self.presented.node
    }

    /// What vouches for the EK.
    pub fn class(&self) -> EkClass {
        self.backing.class
    }

    /// Who made the TPM.
    pub fn make(&self) -> &EkMake {
        &self.backing.make
    }

    /// How the certificate departs from the standards: for the log.
    pub fn quirks(&self) -> &[Quirk] {
        &self.quirks
    }

    /// Makes the credential that only the TPM with both keys can open, and the ticket body to seal.
    pub fn challenge(self, entropy: Entropy, terms: Terms) -> Result<(Challenge, TicketBody), Refusal> {
        if terms.pcr_mask == 0 || terms.pcr_mask & !PCR_MASK_ALL != 0 {
            return Err(Refusal::new(Code::BadRequest, "a PCR mask over PCRs 0-23", format!("{:#x}", terms.pcr_mask)));
        }
        let PresentedEk { input, agent_nonce, ek, ak, node } = self.presented;
        let credential = credential::make(&ek, &ak.public().name(), &entropy.secret[..], &entropy.seed)?;
        let ticket = TicketBody {
            cluster: input.cluster,
            node,
            backing: self.backing,
            ek_public_sha256: sha256(&input.ek_public),
            ak_public_sha256: sha256(&input.ak_public),
            secret: entropy.secret,
            agent_nonce,
            server_nonce: entropy.server_nonce,
            bank: terms.bank,
            pcr_mask: terms.pcr_mask,
            ima_offset: terms.ima_offset,
            deadline: terms.deadline,
            endorsement_revision: terms.endorsement_revision,
            policy_revision: terms.policy_revision,
        };
        let challenge = Challenge {
            credential_blob: credential.id_object,
            encrypted_secret: credential.encrypted_secret,
            server_nonce: entropy.server_nonce,
        };
        Ok((challenge, ticket))
    }
}
