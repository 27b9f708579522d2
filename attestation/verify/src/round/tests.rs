//! Rounds, with a software key in the place of a TPM's AK.

use super::*;
use crate::Step;
use crate::hash::HashAlg;
use crate::testdata::{AkKind, AttestSpec, SoftwareAk, golden, quoted_pcrs};
use crate::transcript::round_data;

const MASK: u32 = 0x47ff;
const NONCE: [u8; 32] = [2; 32];
const QN: [u8; 34] = [7; 34];

fn known(ak_public: &[u8]) -> KnownNode {
    KnownNode::parse(NodeId([3; 32]), "west".parse().unwrap(), Generation(7), ak_public, QN.to_vec()).unwrap()
}

/// One answer, honest unless a row changes it.
struct Answer {
    node: NodeId,
    generation: Generation,
    cluster: &'static str,
    nonce: [u8; 32],
    spec: AttestSpec,
    pcrs: Vec<(u32, Vec<u8>)>,
    edit: fn(&mut RoundQuote),
}

impl Answer {
    fn honest() -> Answer {
        let pcrs = quoted_pcrs();
        let spec = AttestSpec { signer: QN.to_vec(), ..AttestSpec::quote(&[], &pcrs) };
        let (node, generation) = (NodeId([3; 32]), Generation(7));
        Answer { node, generation, cluster: "west", nonce: NONCE, spec, pcrs, edit: |_| {} }
    }

    fn judge(mut self, ak: &SoftwareAk) -> Result<FreshRound, Refusal> {
        let name_alg = ak.hash();
        let name = [name_alg.id().to_be_bytes().to_vec(), name_alg.digest(&[&ak.public])].concat();
        let cluster = self.cluster.parse().unwrap();
        if self.spec.extra_data.is_empty() {
            self.spec.extra_data = round_data(&self.nonce, &self.node, self.generation, &cluster, &name).to_vec();
        }
        let quote = self.spec.bytes();
        let signature = ak.sign(&quote);
        let mut answer = RoundQuote { quote, signature, pcrs: self.pcrs };
        (self.edit)(&mut answer);
        Round::new(NONCE, Bank::Sha256, MASK).unwrap().quote(&known(&ak.public), answer)
    }
}

#[test]
fn an_honest_answer_is_fresh() {
    let fresh = Answer::honest().judge(&SoftwareAk::p256()).unwrap();
    assert_eq!((fresh.node(), fresh.generation(), fresh.bank()), (NodeId([3; 32]), Generation(7), Bank::Sha256));
    assert_eq!(fresh.pcrs().len(), 12);
    assert_eq!(fresh.counters(), Counters { reset: 5, restart: 2, clock_ms: 1000, safe: true });
    assert_eq!(fresh.firmware_version(), 0x2019_0802_0016_3636);
}

#[test]
fn each_lie_has_its_code() {
    type Row = (&'static str, Code, fn(&mut Answer));
    let rows: &[Row] = &[
        ("for another node", Code::QuoteNonce, |a| a.node.0[0] ^= 1),
        ("of the generation before", Code::QuoteNonce, |a| a.generation = Generation(6)),
        ("for another cluster", Code::QuoteNonce, |a| a.cluster = "east"),
        ("of another round", Code::QuoteNonce, |a| a.nonce = [9; 32]),
        ("of an enrolment", Code::QuoteNonce, |a| a.spec.extra_data = vec![1; 32]),
        ("AK under another parent", Code::QuoteSigner, |a| a.spec.signer[9] ^= 1),
        ("magic 0", Code::QuoteMagic, |a| a.spec.magic = 0),
        ("type CERTIFY", Code::QuoteType, |a| a.spec.kind = 0x8017),
        ("empty selection", Code::QuoteSelection, |a| a.spec.selections[0].1 = vec![0; 3]),
        ("one PCR fewer", Code::QuoteSelection, |a| a.spec.selections[0].1[0] = 0xfe),
        ("other values", Code::QuotePcrDigest, |a| a.pcrs[3].1[0] ^= 1),
        ("signature of another quote", Code::QuoteSignature, |a| a.edit = |q| q.quote[80] ^= 1),
        ("no signature", Code::EvidenceMalformed, |a| a.edit = |q| q.signature.clear()),
        ("signature of 1 MiB", Code::EvidenceTooLarge, |a| a.edit = |q| q.signature = vec![0; 1 << 20]),
        ("25 PCRs", Code::EvidenceTooLarge, |a| a.edit = |q| q.pcrs = vec![(0, vec![]); 25]),
    ];
    let ak = SoftwareAk::p256();
    for (what, code, change) in rows {
        let mut answer = Answer::honest();
        change(&mut answer);
        assert_eq!(answer.judge(&ak).map(|_| ()).unwrap_err().code, *code, "{what}");
    }
    assert_eq!(Round::new(NONCE, Bank::Sha256, 0).unwrap_err().code, Code::BadRequest);
    assert_eq!(Round::new(NONCE, Bank::Sha256, 1 << 24).unwrap_err().code, Code::BadRequest);
}

#[test]
fn a_stored_ak_is_judged_again() {
    let (ak, cluster) = (SoftwareAk::p256(), "west".parse::<ClusterId>().unwrap());
    let parse = |public: &[u8]| {
        KnownNode::parse(NodeId([3; 32]), cluster.clone(), Generation(7), public, QN.to_vec()).map_err(|r| r.code)
    };
    assert_eq!(parse(&golden("ak.tpmt_public")).unwrap().ak_name(), golden("ak.name"));
    let changed = |at: usize, bit: u8| {
        let mut public = ak.public.clone();
        public[at] ^= bit;
        parse(&public).map(|_| ()).unwrap_err()
    };
    assert_eq!(changed(5, 0x01), Code::AkAttributes);
    assert_eq!(changed(60, 0x01), Code::EvidenceMalformed, "a point that is not on the curve");
}

/// Vectors by another implementation (Python's hashlib) of the words in the documentation.
#[test]
fn the_digests_are_as_documented() {
    let name = [&[0, 0x0b][..], &[5; 32]].concat();
    let data = round_data(&[2; 32], &NodeId([3; 32]), Generation(7), &"west".parse().unwrap(), &name);
    assert_eq!(hex::encode(data), "eb11bb64bb0ea59938824ed22e1b7107216fd8eb485157371f6b2b88b17d25f2");
    let pcrs = |change: fn(&mut Vec<(u32, Vec<u8>)>)| {
        let mut answer = Answer::honest();
        answer.pcrs = (0..11).chain([14]).map(|n| (n, vec![n as u8; 32])).collect();
        change(&mut answer.pcrs);
        answer.spec.digest = HashAlg::Sha256.digest(&answer.pcrs.iter().map(|(_, v)| v.as_slice()).collect::<Vec<_>>());
        hex::encode(answer.judge(&SoftwareAk::p256()).unwrap().boot_pcrs_sha256())
    };
    let boot = "1ed6a8ee06ccf285883876a827718f2a28952e65f5ae6604850964b2aeff00fd";
    assert_eq!(pcrs(|_| {}), boot);
    assert_eq!(pcrs(|p| p[10].1[0] ^= 1), boot, "PCR 10 grows while a machine runs");
    assert_ne!(pcrs(|p| p[9].1[0] ^= 1), boot);
    assert_ne!(pcrs(|p| p[11].1[0] ^= 1), boot, "PCR 14");
}

#[test]
fn counters_tell_a_step_from_a_fork() {
    let at = |reset, restart, clock_ms| Counters { reset, restart, clock_ms, safe: true };
    let last = at(5, 2, 1000);
    for (now, step) in [
        (at(5, 2, 1001), Some(Step::Ran)),
        (at(5, 3, 10), Some(Step::Resumed)),
        (at(6, 0, 0), Some(Step::Rebooted)),
        (at(5, 2, 1000), None),
        (at(5, 2, 999), None),
        (at(5, 1, 2000), None),
        (at(4, 9, 2000), None),
    ] {
        let found = now.step_from(&last);
        assert_eq!(found.as_ref().ok(), step.as_ref(), "{now}");
        assert!(found.is_ok() || found.unwrap_err().code == Code::TpmStateForked);
    }
}

#[test]
fn every_kind_of_ak_answers_rounds() {
    use aws_lc_rs::rsa::KeySize::{Rsa2048, Rsa3072};
    for kind in [AkKind::P384, AkKind::RsaSsa(Rsa2048), AkKind::RsaPss(Rsa2048), AkKind::RsaSsa(Rsa3072)] {
        let ak = SoftwareAk::new(kind);
        let mut answer = Answer::honest();
        // A TPM digests the PCR values with the hash of the AK's scheme, whatever the bank.
        let values: Vec<&[u8]> = answer.pcrs.iter().map(|(_, v)| v.as_slice()).collect();
        answer.spec.digest = ak.hash().digest(&values);
        assert!(answer.judge(&ak).is_ok(), "{kind:?}");
    }
}

/// After a resume PCRs may have begun anew (TPM Restart): a checkpoint of before says nothing, the whole logs do.
#[test]
fn only_a_tpm_that_ran_on_goes_on_from_its_checkpoint() {
    use crate::appraisal::CompiledPolicy;
    use crate::chain::{Before, RoundLogs};
    use crate::ima::{Checkpoint, ImaForm};
    let mut policy = ambit_model::AppraisalPolicy::new("any".parse().unwrap(), ["west".parse().unwrap()].into());
    policy.unpoliced = ambit_model::appraisal::POLICED_PCRS.into_iter().collect();
    policy.secure_boot_any = true;
    policy.endorsement = ambit_model::appraisal::EndorsementClass::ALL.into();
    let policy = std::sync::Arc::new(CompiledPolicy::compile(&policy, &mut |_| None).unwrap());
    let log = golden("ima_binary_runtime_measurements");
    for (reset, restart, whole) in [(5, 2, false), (5, 1, true), (4, 9, true)] {
        let fresh = Answer::honest().judge(&SoftwareAk::p256()).unwrap();
        let pcr = fresh.pcrs()[&10].clone();
        let ima = Checkpoint { offset: log.len() as u64, entries: 41, pcr, form: ImaForm::Native };
        let before = Before {
            counters: Counters { reset, restart, clock_ms: 999, safe: true },
            boot_pcrs_sha256: fresh.boot_pcrs_sha256(),
            ima,
            policy: policy.clone(),
        };
        let grown = RoundLogs::Grown { ima_log: b"" };
        let judged = fresh.appraise(&before, crate::EkClass::Lab, grown, std::slice::from_ref(&policy));
        let code = judged.map(|_| ()).map_err(|denial| denial.refusal.code);
        assert_eq!(code, if whole { Err(Code::BootLogMissing) } else { Ok(()) }, "from {reset}, {restart}");
    }
}
