//! The adversarial list (reference/tpm.md, section 10) where it arrives at the RPCs: real replicas, real TPMs. Rows that
//! need a TPM which lies are the verifier's own (`attestation/verify/src/chain/tests/lies.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_proto::v1;
use ambit_proto::v1::evidence_request::Part;
use ambit_tests::cell::Cell;
use ambit_tests::machine::{Answer, Lies, Machine, evidence, join_token, node_identity, register_cluster};
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use ambit_tpm::Bank;
use std::time::Duration;

type Outcome<T> = Result<T, v1::Denied>;

/// Writes the row if the outcome is what it says.
#[track_caller]
fn told<T>(case: u8, what: &str, outcome: Outcome<T>, code: &str) {
    let found = outcome.map_or_else(|denied| denied.code, |_| "accepted".into());
    assert_eq!(found, code, "case {case}: {what}");
    row(case, what, code).unwrap();
}

fn header(answer: &mut Answer) -> &mut v1::EvidenceHeader {
    match answer.frames[0].part.as_mut() {
        Some(Part::Header(header)) => header,
        _ => panic!("the first frame is the header"),
    }
}

/// A file of the verifier's mutants of the golden boot log.
fn mutant(name: &str) -> Vec<u8> {
    std::fs::read(ambit_tests::root().unwrap().join("attestation/verify/tests/golden/mutants").join(name)).unwrap()
}

/// The log of a real boot of another kind; each of its events is what it says.
fn other_boot(name: &str) -> Vec<u8> {
    let boots = ambit_tests::root().unwrap().join("attestation/verify/tests/boots");
    std::fs::read(boots.join(name).join("binary_bios_measurements")).unwrap()
}

fn with(header: fn(&mut v1::EvidenceHeader)) -> Lies {
    Lies { header: Some(header), ..Lies::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn begin_is_refused() {
    let cell = Cell::start("west", 1).await.unwrap();
    let (maker, stranger) = (Maker::new().unwrap(), Maker::new().unwrap());
    let machine = Machine::new(&maker, "a").await.unwrap();
    let other = Machine::new(&maker, "b").await.unwrap();
    let foreign = Machine::new(&stranger, "c").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    type Row = (u8, &'static str, &'static str, Box<dyn Fn(&mut v1::BeginRequest)>);
    let theirs = other.begin_request("west", &token);
    let their_certificate = theirs.ek_certificate.clone();
    let rows: Vec<Row> = vec![
        (8, "AK that is not restricted", "ak_attributes", Box::new(|b| b.ak_public[5] ^= 1)),
        (10, "AK that is not fixedTPM", "ak_attributes", Box::new(|b| b.ak_public[7] ^= 2)),
        (10, "AK that decrypts", "ak_attributes", Box::new(|b| b.ak_public[5] ^= 2)),
        (10, "AK without userWithAuth", "ak_attributes", Box::new(|b| b.ak_public[7] ^= 0x40)),
        (
            10,
            "AK with scheme null",
            "ak_attributes",
            Box::new(|b| {
                b.ak_public.splice(12..16, [0x00, 0x10]);
            }),
        ),
        (
            22,
            "EK certificate of TPM A, EK public of TPM B",
            "ek_mismatch",
            Box::new(move |b| {
                b.ek_certificate = their_certificate.clone();
            }),
        ),
        (23, "EK certificate padded with 00", "accepted", Box::new(|b| b.ek_certificate.extend([0; 500]))),
        (23, "EK certificate padded with FF", "accepted", Box::new(|b| b.ek_certificate.extend([0xff; 500]))),
        (23, "EK certificate padded with 00 and FF", "ek_malformed", Box::new(|b| b.ek_certificate.extend([0, 0xff]))),
        (24, "self-signed EK certificate", "ek_chain_untrusted", Box::new(|b| b.ek_certificate = self_signed())),
        (46, "EK certificate of 1 MiB", "evidence_too_large", Box::new(|b| b.ek_certificate = vec![0x30; 1 << 20])),
        (46, "a hundred intermediates", "evidence_too_large", Box::new(|b| b.ek_intermediates = vec![vec![0x30]; 100])),
    ];
    for (case, what, code, change) in rows {
        let mut request = machine.begin_request("west", &token);
        change(&mut request);
        let begun = machine.begin_with(cell.anonymous(1).await.unwrap(), request).await.unwrap();
        told(case, what, begun, code);
    }
    let begun = foreign.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap();
    told(24, "EK certificate of an unknown CA", begun, "ek_chain_untrusted");

    // A key in memory that says it is an AK gets a challenge, which no TPM opens for it: what is left is to guess.
    let mut request = machine.begin_request("west", &token);
    request.ak_public = theirs.ak_public.clone();
    let begun = machine.begin_with(cell.anonymous(1).await.unwrap(), request).await.unwrap().unwrap();
    machine.answer(&begun, &Lies::default()).await.map(|_| ()).unwrap_err();
    let honest = machine.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let mut guess = machine.answer(&honest, &Lies::default()).await.unwrap();
    header(&mut guess).ticket = begun.ticket();
    header(&mut guess).ak_public = theirs.ak_public;
    let guessed = evidence(cell.anonymous(1).await.unwrap(), &guess.frames).await.unwrap();
    told(9, "AK that is not in the TPM of the EK", guessed, "activation_failed");
}

/// An EK certificate that vouches for itself.
fn self_signed() -> Vec<u8> {
    let folder = ambit_tests::process::Folder::new().unwrap();
    let (key, der) = (folder.path("key").display().to_string(), folder.path("der").display().to_string());
    let subject = ["-subj", "/CN=ek", "-addext", "extendedKeyUsage=2.23.133.8.1", "-days", "30"];
    let request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", &key];
    ambit_tests::process::must_run(&[&request[..], &subject, &["-outform", "der", "-out", &der]].concat()).unwrap();
    std::fs::read(der).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evidence_is_refused() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "a").await.unwrap();
    let other = Machine::new(&maker, "b").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    register_cluster(&cell, "east", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    let lie = Lies::default;
    let cmdline = {
        let at = BOOT_LOG.windows(16).position(|w| w == b"kernel_cmdline: ").unwrap();
        let mut log = BOOT_LOG.to_vec();
        log[at + 17] ^= 1;
        log
    };
    let mut long_event = BOOT_LOG.to_vec();
    long_event[28..32].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    let boot = |log: Vec<u8>| Lies { boot_log: Some(log), ..Lies::default() };
    let ima = |log: Vec<u8>| Lies { ima_log: Some(log), ..Lies::default() };
    let mut ima_changed = IMA_LOG.to_vec();
    let at = IMA_LOG.windows(8).position(|w| w == b"sha256:\0").unwrap();
    ima_changed[at + 8] ^= 1;
    let rows: Vec<(u8, &str, &str, Lies)> = vec![
        (1, "quote over another nonce", "quote_nonce", Lies { other_nonce: true, ..lie() }),
        (12, "quote of PCR 23 only", "quote_selection", Lies { quote_over: Some((Bank::Sha256, 1 << 23)), ..lie() }),
        (13, "quote of another bank", "quote_selection", Lies { quote_over: Some((Bank::Sha384, 0x47ff)), ..lie() }),
        (16, "quote of one PCR more", "quote_selection", Lies { quote_over: Some((Bank::Sha256, 0xc7ff)), ..lie() }),
        (15, "PCR 14 relabelled 15", "quote_pcr_digest", with(|h| h.pcrs.last_mut().unwrap().index = 15)),
        (
            16,
            "a PCR value more",
            "quote_pcr_digest",
            with(|h| h.pcrs.push(v1::PcrValue { index: 15, value: vec![0; 32] })),
        ),
        (18, "signature that says SHA-1", "quote_signature", with(|h| h.signature[3] = 4)),
        (
            20,
            "signature of zeros",
            "quote_signature",
            with(|h| h.signature.iter_mut().skip(6).filter(|b| **b != 32).for_each(|b| *b = 0)),
        ),
        (6, "quote whose magic was changed", "quote_signature", with(|h| h.quote[0] = 0)),
        (7, "quote whose type was changed", "quote_signature", with(|h| h.quote[5] = 0x17)),
        (29, "no boot log", "boot_log_missing", boot(vec![])),
        (30, "boot log cut", "boot_log_malformed", boot(mutant("truncated.bin"))),
        (31, "digest count 2^32-1", "boot_log_malformed", boot(mutant("digest-count-2e32-1.bin"))),
        (32, "event longer than the log", "boot_log_malformed", boot(long_event)),
        (33, "events of PCR 7 retyped", "boot_log_event_altered", boot(mutant("retyped-pcr7.bin"))),
        (35, "kernel command line edited", "boot_log_event_altered", boot(cmdline)),
        (36, "boot log without its last event", "boot_log_pcr_mismatch", boot(without_last_event())),
        (36, "boot log of another machine's boot", "boot_log_pcr_mismatch", boot(other_boot("secureboot-grub"))),
        (36, "boot log of a boot by the EFI stub", "boot_log_pcr_mismatch", boot(other_boot("efistub-sb"))),
        (39, "IMA entry changed", "ima_log_mismatch", ima(ima_changed)),
        (39, "IMA log cut", "ima_log_malformed", ima(IMA_LOG[..5000].to_vec())),
        (40, "IMA log of 1 GiB announced", "evidence_too_large", with(|h| h.ima_log_len = 1 << 30)),
    ];
    for (case, what, code, lies) in rows {
        told(case, what, machine.enrol(&cell, 1, "west", &token, &lies).await.unwrap(), code);
    }

    let answer = async |cluster: &str, token: &str| {
        let begun = machine.begin(cell.anonymous(1).await.unwrap(), cluster, token).await.unwrap().unwrap();
        machine.answer(&begun, &lie()).await.unwrap()
    };
    let send = async |answer: &Answer| evidence(cell.anonymous(1).await.unwrap(), &answer.frames).await.unwrap();

    // More bytes than the header states: read up to the stated length and no further.
    let mut flood = answer("west", &token).await;
    flood.frames.last_mut().unwrap().part = Some(Part::Chunk(vec![0; 1 << 20]));
    told(40, "more log bytes than announced", send(&flood).await, "evidence_malformed");
    let mut more = answer("west", &token).await;
    more.frames.push(v1::EvidenceRequest { part: Some(Part::Chunk(vec![0])) });
    told(40, "a message after the logs", send(&more).await, "evidence_malformed");

    let theirs = {
        let begun = other.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
        other.answer(&begun, &lie()).await.unwrap()
    };
    let mut theirs = theirs;
    let mut swapped = answer("west", &token).await;
    header(&mut swapped).ticket = header(&mut theirs).ticket.clone();
    told(5, "ticket of another node", send(&swapped).await, "ticket_invalid");
    let mut swapped = answer("west", &token).await;
    header(&mut swapped).ak_public = header(&mut theirs).ak_public.clone();
    told(21, "AK public other than the ticket's", send(&swapped).await, "ticket_invalid");
    let mut garbage = answer("west", &token).await;
    header(&mut garbage).ticket[20] ^= 1;
    told(5, "ticket changed", send(&garbage).await, "ticket_invalid");
    let mut east = answer("east", &join_token(&cell, "east").await.unwrap()).await;
    let mut west = answer("west", &token).await;
    header(&mut west).ticket = header(&mut east).ticket.clone();
    told(5, "ticket of another cluster", send(&west).await, "activation_failed");

    // Guessing burns nothing of the honest node's: its own answer still counts. But it is no way in either.
    let mut guess = answer("west", &token).await;
    let honest = header(&mut guess).hmac.clone();
    for n in 1..=2u8 {
        header(&mut guess).hmac = vec![n; 32];
        told(28, &format!("HMAC guessed, try {n}"), send(&guess).await, "activation_failed");
    }
    header(&mut guess).hmac = honest;

    // A relay puts its own CSR in: the HMAC no longer holds; nor would the quote.
    let mut relayed = answer("west", &token).await;
    header(&mut relayed).csr = header(&mut theirs).csr.clone();
    told(43, "CSR swapped by a relay", send(&relayed).await, "activation_failed");
    let own = Lies { header: Some(|h| h.csr = ambit_identity::SvidKey::generate().unwrap().csr().unwrap()), ..lie() };
    told(
        43,
        "CSR swapped by the node after its quote",
        machine.enrol(&cell, 1, "west", &token, &own).await.unwrap(),
        "quote_nonce",
    );

    // Honest at last, and then again.
    let verdict = send(&guess).await.unwrap();
    assert_eq!(verdict.generation, 1);
    told(2, "the same evidence again", send(&guess).await, "nonce_consumed");

    // Evidence over the TLS session of somebody else certifies the key it was quoted over, which that one does not have.
    let token = join_token(&cell, "west").await.unwrap();
    let begun = other.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let theirs = other.answer(&begun, &lie()).await.unwrap();
    let as_machine = cell.channel_as(node_identity(&verdict, &guess.key).unwrap(), 1).await.unwrap();
    let carried = evidence(as_machine, &theirs.frames).await.unwrap().unwrap();
    assert_eq!(carried.node_id, other.node());
    let spki = ambit_verify::csr::p256_spki(&theirs.key.csr().unwrap()).unwrap();
    assert!(carried.svid_chain_der[0].windows(spki.len()).any(|window| window == spki));
    row(44, "evidence over another node's TLS identity", "accepted, for the quoted key only").unwrap();
}

/// The golden log without its last extending event.
fn without_last_event() -> Vec<u8> {
    let full = ambit_lab::boot_log::parse(BOOT_LOG).unwrap().len();
    let shorter = (1..2_000).map(|n| &BOOT_LOG[..BOOT_LOG.len() - n]).find(|log| {
        ambit_lab::boot_log::parse(log).is_ok_and(|events| events.len() < full && events.last().unwrap().pcr < 10)
    });
    shorter.unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nonce_serves_once_whoever_leads_and_an_ek_has_one_ak() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "a").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    // One EK, two AKs, at once: one wins.
    let prepare = async |machine: &Machine, cell: &Cell| {
        let begun = machine.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
        machine.answer(&begun, &Lies::default()).await.unwrap()
    };
    let first = prepare(&machine, &cell).await;
    let machine = machine.rekeyed().await.unwrap();
    let second = prepare(&machine, &cell).await;
    let (a, b) = (cell.anonymous(2).await.unwrap(), cell.anonymous(3).await.unwrap());
    let (a, b) = tokio::join!(evidence(a, &first.frames), evidence(b, &second.frames));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    let (won, lost) = if a.is_ok() { (&first, b) } else { (&second, a) };
    told(26, "one EK with two AKs at once: the one that lost", lost, "ak_changed");

    // Whoever drives the TPM later makes another AK: the node stays who it is.
    let hijack = machine.rekeyed().await;
    let hijack = match hijack {
        Ok(machine) => machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap(),
        Err(e) => panic!("{e}"),
    };
    told(27, "enrolled EK with another AK", hijack, "ak_changed");

    let leader = cell.leader().await.unwrap();
    cell.kill(leader).unwrap();
    for replica in cell.running() {
        let again = loop {
            match evidence(cell.anonymous(replica).await.unwrap(), &won.frames).await {
                Ok(outcome) => break outcome,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        told(3, "the same evidence after the leader's death", again, "nonce_consumed");
    }
}
