//! Checkpoints, and what records are made of.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_audit::note::{Kind, Line};
use ambit_audit::record::Outcome;
use ambit_audit::{Checkpoint, Note, Record, Verifier, ocsf};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

fn key(seed: u8, name: &str, kind: Kind) -> (Ed25519KeyPair, Verifier) {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
    let key = pair.public_key().as_ref().try_into().unwrap();
    (pair, Verifier { name: name.into(), kind, key })
}

/// The example key of golang.org/x/mod/sumdb/note.
#[test]
fn key_ids_are_those_of_signed_notes() {
    let vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, &vkey[22..]).unwrap();
    let found = Verifier { name: "PeterNeumann".into(), kind: Kind::Log, key: bytes[1..].try_into().unwrap() };
    assert_eq!(found.vkey(), vkey);
}

#[test]
fn checkpoints_are_signed_and_cosigned() {
    let (log, log_key) = key(1, "west/ambit/audit/1", Kind::Log);
    let (witness, witness_key) = key(2, "east/ambit/witness", Kind::Witness);
    let checkpoint = Checkpoint { origin: "west/ambit/audit/1".into(), size: 7, root: [9; 32] };
    let lines = vec![
        Line::of_log(&log_key, log.sign(checkpoint.text().as_bytes()).as_ref()),
        Line::of_witness(&witness_key, 1_800_000_000, witness.sign(&checkpoint.cosigned(1_800_000_000)).as_ref()),
    ];
    let text = Note { checkpoint, lines }.text();
    let note = Note::parse(&text).unwrap();
    assert_eq!(note.text(), text);
    assert_eq!(note.signed_by(&log_key), Some(0));
    assert_eq!(note.signed_by(&witness_key), Some(1_800_000_000));
    // Neither key counts for the other, nor under another name, nor for another text.
    assert_eq!(note.signed_by(&Verifier { kind: Kind::Witness, ..log_key.clone() }), None);
    assert_eq!(note.signed_by(&Verifier { name: "east".into(), ..log_key.clone() }), None);
    let other = Note::parse(&text.replace("\n7\n", "\n8\n")).unwrap();
    assert_eq!((other.signed_by(&log_key), other.signed_by(&witness_key)), (None, None));
    for bad in [
        text.replace("\n7\n", "\n07\n"),
        text.replace("\n7\n", "\n+7\n"),
        text.replace("\n\n", "\nextension\n\n"),
        text.trim_end().to_owned(),
        text.replace("\n\n", "\n"),
        format!("{text}\n"),
        text.replace('\u{2014}', "-"),
    ] {
        assert!(Note::parse(&bad).is_err(), "{bad}");
    }
}

fn record() -> Record {
    Record {
        v: 1,
        epoch: 1,
        index: 12,
        at: 0,
        stamp_ms: 1_790_000_000_123,
        actor: "spiffe://west/ambit/admin/alice".into(),
        act: "policy.write".into(),
        object: "web".into(),
        outcome: Outcome::Done,
        code: String::new(),
        facts: [("sha256".to_owned(), "00".to_owned())].into(),
    }
}

#[test]
fn records_have_one_form() {
    let bytes = record().encode();
    let expected = r#"{"v":1,"epoch":1,"index":12,"at":0,"stamp_ms":1790000000123,"actor":"spiffe://west/ambit/admin/alice","act":"policy.write","object":"web","outcome":"done","facts":{"sha256":"00"}}"#;
    assert_eq!(String::from_utf8(bytes.clone()).unwrap(), expected);
    assert_eq!(Record::decode(&bytes).unwrap(), record());
    for bad in [
        expected.replace("\"v\":1", "\"v\":2"),
        expected.replace(",\"index\"", ", \"index\""),
        expected.replace("\"outcome\":\"done\"", "\"outcome\":\"done\",\"code\":\"\""),
        expected.replace("\"facts\"", "\"fact\""),
        expected.replace("done", "lost"),
        format!("{expected} "),
    ] {
        assert!(Record::decode(bad.as_bytes()).is_err(), "{bad}");
    }
}

/// However long what is recorded is, an entry fits its bundle.
#[test]
fn records_are_bounded() {
    let long = "\u{1}".repeat(100_000);
    let facts = (0..40).map(|n| (format!("f{n:02}"), long.clone())).collect();
    let bytes = Record { actor: long.clone(), object: long.clone(), facts, ..record() }.encode();
    assert!(bytes.len() <= ambit_audit::tile::ENTRY_BYTES_MAX, "{}", bytes.len());
    Record::decode(&bytes).unwrap();
}

#[test]
fn exports_say_what_the_log_holds() {
    let event = ocsf::event("west/ambit/audit/1", 5, &record(), "aa");
    assert_eq!(event["specversion"], "1.0");
    assert_eq!(event["time"], "2026-09-21T14:13:20.123Z");
    let data = &event["data"];
    assert_eq!((&data["class_uid"], &data["type_uid"]), (&3004.into(), &300403.into()));
    assert_eq!(data["status"], "Success");
    let refused =
        Record { outcome: Outcome::Refused, code: "node_banned".into(), act: "svid.issue".into(), ..record() };
    let data = &ocsf::event("o", 5, &refused, "aa")["data"];
    assert_eq!((&data["class_uid"], &data["status_code"]), (&3002.into(), &"node_banned".into()));
}
