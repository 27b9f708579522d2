//! What an attacker puts wrong, one thing at a time: everything else of the attempt holds, so that only the check which
//! the row names can refuse it. `checks.txt` beside the crate's tests breaks each check and names the rows that must
//! then fail (design.md section 3; reference/tpm.md section 10 numbers the cases).

use super::attempt::{Attempt, IN_TPM, InTpm, STORED};
use super::{NOW, golden};
use crate::bootlog::BootLog;
use crate::chain::{Counters, Expected};
use crate::ek::EkDenyRule;
use crate::hash::HashAlg;
use crate::testdata::number::flawed_modulus;
use crate::testdata::{AK_ATTRIBUTES, AkKind, mutant, rsa_public, table_row};
use ambit_model::{Code, Stamp};
use aws_lc_rs::rsa::KeySize;

/// Number of the case (0: none of the list), what is wrong, the code, the change.
type Row = (u8, &'static str, Code, fn(&mut Attempt));

const BEGIN: &[Row] = &[
    (0, "nobody expects the EK", Code::EkNotExpected, |a| a.expected = Expected::Nobody),
    (0, "no EK certificate, join token", Code::EkChainUntrusted, |a| {
        a.begin.ek_certificate.clear();
        a.expected = Expected::JoinToken([9; 32]);
    }),
    (0, "no EK certificate, joined before", Code::EkChainUntrusted, |a| {
        a.begin.ek_certificate.clear();
        a.expected = Expected::Joined;
    }),
    (24, "EK certificate of an unknown CA", Code::EkChainUntrusted, |a| a.endorsements.roots.clear()),
    (24, "EK certificate without its issuer", Code::EkChainUntrusted, |a| a.endorsements.intermediates.clear()),
    (24, "EK certificate out of its time", Code::EkChainUntrusted, |a| a.begin_at = Stamp(1_500_000_000_000)),
    (22, "EK certificate of another key of the TPM", Code::EkMismatch, |a| {
        a.begin.ek_certificate = golden("ek-p384.nv.der");
    }),
    (23, "EK certificate padded with other bytes", Code::EkMalformed, |a| a.begin.ek_certificate.push(1)),
    (0, "EK certificate cut", Code::EkMalformed, |a| a.begin.ek_certificate.truncate(900)),
    (0, "a maker that is denied", Code::EkDenied, |a| {
        a.endorsements.denied = vec![EkDenyRule::new("lab", "id:00001014", "swtpm", u64::MAX).unwrap()];
    }),
    (0, "EK of the flawed generator", Code::EkWeak, |a| {
        a.begin.ek_certificate.clear();
        let modulus = a.begin.ek_public.len() - 256;
        a.begin.ek_public.splice(modulus.., flawed_modulus());
    }),
    (0, "AK of the flawed generator", Code::AkWeak, |a| {
        a.begin.ak_public = rsa_public(AK_ATTRIBUTES, 0x14, &flawed_modulus());
    }),
    (0, "EK as TPM2B", Code::EkMalformed, |a| a.begin.ek_public = golden("ek.tpm2b_public")),
    (0, "an AK as EK", Code::EkMalformed, |a| a.begin.ek_public = a.begin.ak_public.clone()),
    (10, "an EK as AK", Code::AkAttributes, |a| a.begin.ak_public = a.begin.ek_public.clone()),
    (8, "AK unrestricted", Code::AkAttributes, |a| a.begin.ak_public[5] ^= 0x01),
    (10, "AK decrypts too", Code::AkAttributes, |a| a.begin.ak_public[5] ^= 0x02),
    (10, "AK not fixedTPM", Code::AkAttributes, |a| a.begin.ak_public[7] ^= 0x02),
    (10, "AK not fixedParent", Code::AkAttributes, |a| a.begin.ak_public[7] ^= 0x10),
    (10, "AK imported", Code::AkAttributes, |a| a.begin.ak_public[7] ^= 0x20),
    (10, "AK without userWithAuth", Code::AkAttributes, |a| a.begin.ak_public[7] ^= 0x40),
    (10, "AK without scheme", Code::AkAttributes, |a| {
        a.begin.ak_public[12..14].copy_from_slice(&[0x00, 0x10]);
        a.begin.ak_public.drain(14..16);
    }),
    (18, "AK scheme with SHA-1", Code::AkWeak, |a| a.begin.ak_public[15] = 0x04),
    (10, "AK name by SHA-1", Code::AkWeak, |a| a.begin.ak_public[3] = 0x04),
    (10, "AK on another curve", Code::AkWeak, |a| a.begin.ak_public[17] = 0x05),
    (10, "AK no point of its curve", Code::EvidenceMalformed, |a| *a.begin.ak_public.last_mut().unwrap() ^= 1),
    (0, "AK cut", Code::EvidenceMalformed, |a| a.begin.ak_public.truncate(60)),
    (0, "agent nonce of 31 bytes", Code::BadRequest, |a| a.begin.agent_nonce.truncate(31)),
    (0, "empty mask", Code::BadRequest, |a| a.mask = 0),
    (0, "mask beyond PCR 23", Code::BadRequest, |a| a.mask = 1 << 24),
    (46, "ten intermediates", Code::EvidenceTooLarge, |a| a.begin.ek_intermediates = vec![vec![]; 10]),
    (46, "an EK certificate of 1 MiB", Code::EvidenceTooLarge, |a| a.begin.ek_certificate = vec![0x30; 1 << 20]),
];

const TICKET: &[Row] = &[
    (46, "boot log of 3 MiB announced", Code::EvidenceTooLarge, |a| {
        a.edit_header = Box::new(|h| h.boot_log.len = 3 << 20)
    }),
    (40, "IMA log of 1 GiB announced", Code::EvidenceTooLarge, |a| {
        a.edit_header = Box::new(|h| h.ima_log.len = 1 << 30)
    }),
    (46, "quote of 1 MiB", Code::EvidenceTooLarge, |a| a.edit_header = Box::new(|h| h.quote = vec![0; 1 << 20])),
    (46, "25 PCR values", Code::EvidenceTooLarge, |a| a.edit_header = Box::new(|h| h.pcrs = vec![(0, vec![]); 25])),
    (4, "an answer after the deadline", Code::TicketExpired, |a| a.answer_at = NOW.plus_ms(30_001)),
    (5, "ticket of another AK", Code::TicketInvalid, |a| a.edit_ticket = Box::new(|t| t.ak_public_sha256[0] ^= 1)),
    (5, "ticket of another EK", Code::TicketInvalid, |a| a.edit_ticket = Box::new(|t| t.ek_public_sha256[0] ^= 1)),
    (28, "HMAC one bit off", Code::ActivationFailed, |a| a.hmac_flipped = true),
    (28, "HMAC under a guessed secret", Code::ActivationFailed, |a| a.edit_ticket = Box::new(|t| t.secret[0] ^= 1)),
    (0, "no CSR", Code::CsrMalformed, |a| a.edit_header = Box::new(|h| h.csr.clear())),
    (0, "CSR with a wrong signature", Code::CsrMalformed, |a| {
        a.edit_header = Box::new(|h| *h.csr.last_mut().unwrap() ^= 1);
    }),
];

const QUOTE: &[Row] = &[
    (18, "signature that says SHA-1", Code::QuoteSignature, |a| a.edit_signature = Box::new(|s| s[3] = 0x04)),
    (20, "signature of zeros", Code::QuoteSignature, |a| {
        a.edit_signature = Box::new(|s| *s = [&[0, 0x18, 0, 0x0b, 0, 32][..], &[0; 32], &[0, 32], &[0; 32]].concat());
    }),
    (0, "firmware version changed after signing", Code::QuoteSignature, |a| {
        a.edit_header = Box::new(|h| h.quote[95] ^= 1);
    }),
    (9, "quote by a key that is not the AK", Code::QuoteSignature, |a| a.by_another_key = true),
    (19, "RSASSA-PSS signature by an RSASSA AK", Code::QuoteSignature, |a| {
        *a = Attempt::of(AkKind::RsaSsa(KeySize::Rsa2048));
        a.edit_signature = Box::new(|s| s[1] = 0x16);
    }),
    (19, "RSASSA signature by an RSASSA-PSS AK", Code::QuoteSignature, |a| {
        *a = Attempt::of(AkKind::RsaPss(KeySize::Rsa2048));
        a.edit_signature = Box::new(|s| s[1] = 0x14);
    }),
    (0, "signature cut", Code::EvidenceMalformed, |a| a.edit_signature = Box::new(|s| s.truncate(50))),
    (6, "magic 0", Code::QuoteMagic, |a| a.spec.magic = 0),
    (7, "type CERTIFY", Code::QuoteType, |a| a.spec.kind = 0x8017),
    (7, "type TIME", Code::QuoteType, |a| a.spec.kind = 0x8019),
    (9, "AK under no EK", Code::QuoteSigner, |a| a.spec.signer = [&[0, 0x0b][..], &[1; 32]].concat()),
    (1, "another nonce", Code::QuoteNonce, |a| a.spec.extra_data = vec![0; 32]),
    (43, "CSR of another key", Code::QuoteNonce, |a| a.csr_swapped = true),
    (5, "ticket of another session", Code::QuoteNonce, |a| a.answered_ticket = b"another".to_vec()),
    (5, "ticket of another cluster", Code::QuoteNonce, |a| {
        a.edit_ticket = Box::new(|t| t.cluster = "east".parse().unwrap());
    }),
    (11, "empty selection", Code::QuoteSelection, |a| a.spec.selections = vec![(0x000b, vec![0, 0, 0])]),
    (11, "no selection", Code::QuoteSelection, |a| a.spec.selections.clear()),
    (12, "PCR 23 only", Code::QuoteSelection, |a| a.spec.selections = vec![(0x000b, vec![0, 0, 0x80])]),
    (13, "SHA-1 bank", Code::QuoteSelection, |a| a.spec.selections[0].0 = 0x0004),
    (13, "SHA-384 bank, not asked for", Code::QuoteSelection, |a| a.spec.selections[0].0 = 0x000c),
    (14, "two banks", Code::QuoteSelection, |a| a.spec.selections.push((0x0004, vec![1, 0, 0]))),
    (16, "one PCR more selected", Code::QuoteSelection, |a| a.spec.selections[0].1[2] = 0x80),
    (0, "one PCR fewer selected", Code::QuoteSelection, |a| a.spec.selections[0].1[0] = 0xfe),
    (0, "selection of four octets", Code::QuoteSelection, |a| a.spec.selections[0].1.push(0)),
    (15, "PCR 14 relabelled 15", Code::QuotePcrDigest, |a| {
        a.edit_header = Box::new(|h| h.pcrs.last_mut().unwrap().0 = 15);
    }),
    (16, "a PCR value more", Code::QuotePcrDigest, |a| a.edit_header = Box::new(|h| h.pcrs.push((15, vec![0; 32])))),
    (0, "PCR values split elsewhere", Code::QuotePcrDigest, |a| {
        a.edit_header = Box::new(|h| {
            let moved = h.pcrs[1].1.remove(0);
            h.pcrs[0].1.push(moved);
        });
    }),
    (17, "digest by another hash", Code::QuotePcrDigest, |a| a.digest_by = Some(HashAlg::Sha384)),
    (0, "firmware that is denied", Code::EkDenied, |a| {
        a.denied = vec![EkDenyRule::new("old", "", "", a.spec.firmware_version + 1).unwrap()];
    }),
    (0, "SVID key not fixed to its TPM", Code::KeyNotCertified, |a| {
        a.in_tpm = Some(InTpm { attributes: IN_TPM.attributes ^ 2, ..IN_TPM });
    }),
    (0, "SVID key certified for another session", Code::KeyNotCertified, |a| {
        a.in_tpm = Some(InTpm { other_session: true, ..IN_TPM });
    }),
];

const LOGS: &[Row] = &[
    (45, "reset count back", Code::ClockStepBack, |a| a.spec.counters.reset = 4),
    (45, "restart count back", Code::ClockStepBack, |a| a.spec.counters.restart = 1),
    (45, "clock back", Code::ClockStepBack, |a| a.spec.counters.clock_ms = 998),
    (0, "logs other than stated", Code::EvidenceMalformed, |a| a.logs_swapped_after = true),
    (29, "no boot log", Code::BootLogMissing, |a| a.boot_log.clear()),
    (30, "boot log cut", Code::BootLogMalformed, |a| a.boot_log = mutant("truncated.bin")),
    (31, "digest count 2^32-1", Code::BootLogMalformed, |a| a.boot_log = mutant("digest-count-2e32-1.bin")),
    (32, "event longer than the log", Code::BootLogMalformed, |a| {
        // The size of the header event's data: after PCR, type and SHA-1 digest.
        a.boot_log[28..32].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    }),
    (33, "events of PCR 7 retyped", Code::BootLogEventAltered, |a| a.boot_log = mutant("retyped-pcr7.bin")),
    (35, "kernel command line edited", Code::BootLogEventAltered, |a| {
        let at = a.boot_log.windows(16).position(|w| w == b"kernel_cmdline: ").unwrap();
        a.boot_log[at + 17] ^= 1;
    }),
    (0, "a version edited", Code::BootLogEventAltered, |a| edit_event(a, 0, 0x0000_0008)),
    (0, "an action edited", Code::BootLogEventAltered, |a| edit_event(a, 5, 0x8000_0007)),
    (0, "a boot variable edited", Code::BootLogEventAltered, |a| edit_event(a, 1, 0x8000_0002)),
    (0, "a Secure Boot variable edited", Code::BootLogEventAltered, |a| edit_event(a, 7, 0x8000_0001)),
    (0, "a GRUB command edited", Code::BootLogEventAltered, |a| edit_event(a, 8, 0x0000_000d)),
    (0, "a separator edited", Code::BootLogEventAltered, |a| edit_event(a, 3, 0x0000_0004)),
    (36, "a PCR that the boot log does not lead to", Code::BootLogPcrMismatch, |a| a.pcrs[2].1[0] ^= 1),
    (39, "no IMA log", Code::ImaLogMismatch, |a| a.ima_log.clear()),
    (39, "IMA log cut", Code::ImaLogMalformed, |a| a.ima_log.truncate(5000)),
    (39, "IMA log without its last entry", Code::ImaLogMismatch, |a| {
        let last = ima_entries(&a.ima_log).pop().unwrap();
        a.ima_log.truncate(last);
    }),
    (39, "an IMA entry's own hash changed", Code::ImaLogMismatch, |a| {
        // The SHA-256 bank is extended with the data's digest: without this check, nothing reads this hash.
        let sixth = ima_entries(&a.ima_log)[5];
        a.ima_log[sixth + 4] ^= 1;
    }),
    (0, "no policy for the cluster", Code::AppraisalPolicyMissing, |a| a.policies.clear()),
];

/// Changes the last byte but one of the first such event's data. (Of a text, the last may be its terminating zero.)
fn edit_event(a: &mut Attempt, pcr: u32, kind: u32) {
    let start = a.boot_log.as_ptr().addr();
    let log = BootLog::parse(&a.boot_log).unwrap();
    let data = log.events().iter().find(|e| (e.pcr, e.kind) == (pcr, kind)).unwrap().data;
    let at = data.as_ptr().addr() - start + data.len() - 2;
    a.boot_log[at] ^= 1;
}

/// Where each entry begins.
fn ima_entries(log: &[u8]) -> Vec<usize> {
    let mut begins = vec![0];
    let u32_at = |at: usize| u32::from_le_bytes(log[at..at + 4].try_into().unwrap()) as usize;
    loop {
        let name = begins.last().unwrap() + 24;
        let data = name + 4 + u32_at(name);
        let end = data + 4 + u32_at(data);
        if end == log.len() {
            return begins;
        }
        begins.push(end);
    }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    [BEGIN, TICKET, QUOTE, LOGS].into_iter().flatten()
}

/// Prints each row that is not refused by its code as `wrong: WHAT`: `cargo xtask mutants` reads that.
#[test]
fn each_lie_has_its_code() {
    let mut wrong = Vec::new();
    for (case, what, code, change) in rows() {
        let mut attempt = Attempt::honest();
        change(&mut attempt);
        match attempt.run() {
            Ok(_) => wrong.push(format!("wrong: {what}: accepted")),
            Err(denial) if denial.refusal.code != *code => wrong.push(format!("wrong: {what}: {denial:?}")),
            Err(denial) => {
                let told = denial.refusal.for_node();
                assert!(told.expected.is_empty() && told.found.is_empty());
                if *case != 0 {
                    table_row(*case, what, code.as_str());
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn no_two_rows_have_one_name() {
    let names: std::collections::BTreeSet<_> = rows().map(|row| row.1).collect();
    assert_eq!(names.len(), rows().count());
}

#[test]
fn honest_variations_are_accepted() {
    type Row = (u8, &'static str, fn(&mut Attempt));
    let rows: &[Row] = &[
        (23, "EK certificate padded with FF", |a| a.begin.ek_certificate.extend([0xff; 100])),
        (23, "EK certificate padded with 00", |a| a.begin.ek_certificate.extend([0; 100])),
        (0, "intermediate sent by the node", |a| {
            a.begin.ek_intermediates = std::mem::take(&mut a.endorsements.intermediates);
        }),
        (0, "a strange root beside", |a| {
            let odd = crate::ek::EkRoot { der: vec![0x30, 0], class: crate::EkClass::Hardware };
            a.endorsements.roots.insert(0, odd);
        }),
        (0, "no certificate, but listed", |a| {
            a.begin.ek_certificate.clear();
            a.endorsements.roots.clear();
        }),
        (0, "joined before, with its certificate", |a| a.expected = Expected::Joined),
        (0, "first quote of this EK", |a| a.stored = None),
        (45, "after a crash: clock and restarts back, resets up", |a| {
            a.spec.counters = Counters { reset: 6, restart: 0, clock_ms: 3, safe: false };
        }),
        (0, "the very counters stored", |a| a.stored = Some(STORED)),
        (0, "P-384 AK", |a| *a = Attempt::of(AkKind::P384)),
        (0, "RSASSA AK", |a| *a = Attempt::of(AkKind::RsaSsa(KeySize::Rsa2048))),
        (0, "RSASSA-PSS AK of 3072 bits", |a| *a = Attempt::of(AkKind::RsaPss(KeySize::Rsa3072))),
        (0, "a rule for older firmware", |a| {
            a.denied = vec![EkDenyRule::new("old", "", "", a.spec.firmware_version).unwrap()];
        }),
    ];
    for (case, what, change) in rows {
        let mut attempt = Attempt::honest();
        change(&mut attempt);
        match attempt.run() {
            Err(denial) => panic!("{what}: {denial:?}"),
            Ok(verified) => assert!(!verified.svid_key_in_tpm),
        }
        if *case != 0 {
            table_row(*case, what, "accepted");
        }
    }
    let certified = Attempt { in_tpm: Some(IN_TPM), ..Attempt::honest() }.run().unwrap();
    assert!(certified.svid_key_in_tpm);
}
