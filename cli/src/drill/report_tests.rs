use super::*;
use crate::drill::figures::figures;
use ambit_identity::{RecordKey, Root};
use ambit_model::{RaftIndex, Stamp};
use ambit_state::State;
use ambit_state::command::{Command, LogEntry};

const SPEC: &str = include_str!("../../../deploy/drills/leader-loss.yaml");

fn report() -> Report {
    let marks = Marks { injected_ms: 3000, healed_ms: 8000, steady_ms: Some(11_000), ended_ms: 12_000 };
    let good = |t_ms: u64| Sample { t_ms, ok: !(3000..3700).contains(&t_ms), by: String::new() };
    let writer: Vec<Sample> = (0..1200).map(|n| good(n * 10)).collect();
    let ledger: Vec<Write> = (0..1200u64)
        .map(|n| Write {
            number: n,
            sent_ms: n * 10,
            acked_ms: Some(n * 10 + 4),
            attempts: 1,
            ran_again: false,
            listed: 1,
        })
        .collect();
    let drill: Drill = SPEC.parse().unwrap();
    let figures = figures(&Seen { writer: &writer, caller: &[], outside: &[], writes: &ledger }, Some(marks));
    Report {
        format: Report::format(),
        drill: "leader-loss".into(),
        run: "00aabbcc".into(),
        outcome: "passed".into(),
        spec: SPEC.into(),
        spec_sha256: hex::encode(Sha256::digest(SPEC)),
        versions: vec!["ambit 0.1.0".into()],
        started_ms: 1_700_000_000_000,
        load_average: "0.10 0.20 0.30 1/200 4711".into(),
        marks: Some(marks),
        timeline: vec![Event { t_ms: 0, what: "phase baseline".into() }],
        objectives: judge(&drill, Some(marks), &figures),
        figures,
        caller: vec![],
        outside: vec![],
        writer,
        ledger,
    }
}

/// A cell's root and one of its record keys.
struct Signer {
    root: Root,
    record: RecordKey,
}

impl Signer {
    fn new() -> Signer {
        let td = "west".parse().unwrap();
        Signer {
            root: Root::create(&td, Stamp(1_700_000_000_000), [7; 16]).unwrap(),
            record: RecordKey::generate().unwrap(),
        }
    }
    fn fingerprint(&self) -> [u8; 32] {
        ambit_identity::fingerprint(self.root.der())
    }
    /// As the server does: the digest is committed, then signed.
    fn seal(&self, report: Report) -> SealedReport {
        let seal = self.sealed(&report);
        SealedReport::new(report, vec![seal])
    }
    fn sealed(&self, report: &Report) -> Seal {
        let td: TrustDomain = "west".parse().unwrap();
        let command = Command::SealReport(report.drill.clone(), report.sha256().unwrap());
        let entry = LogEntry { stamp: Stamp(1_700_000_020_000), client: [1; 32], request: [2; 16], command };
        let committed = State::new().apply(RaftIndex(9), &entry).into_report().unwrap();
        let (statement, signature) = self.record.sign_report(&td, &committed).unwrap();
        let (keys, keys_signature) = KeySet::certify(&self.root, &td, 1, vec![self.record.public()]).unwrap();
        Seal {
            statement: hex::encode(statement),
            signature: hex::encode(signature),
            key_set_statement: hex::encode(keys),
            key_set_signature: hex::encode(keys_signature),
            root: hex::encode(self.root.der()),
            trust_domain: td,
        }
    }
}

fn refused(text: &str, fingerprint: &[u8; 32]) -> Refusal {
    let refusal = verify(text, &[*fingerprint]).unwrap_err();
    assert_eq!(refusal.code, Code::DrillReportInvalid, "{refusal}");
    refusal
}

#[test]
fn a_sealed_report_verifies_offline() {
    let signer = Signer::new();
    let report = report();
    assert!(report.objectives.iter().all(|o| o.met), "{:?}", report.objectives);
    let text = signer.seal(report).text().unwrap();
    let verified = verify(&text, &[signer.fingerprint()]).unwrap();
    let [sealer] = &verified.sealers[..] else { panic!("{:?}", verified.sealers) };
    assert_eq!((sealer.trust_domain.as_str(), sealer.index, sealer.sealed_ms), ("west", 9, 1_700_000_020_000));
    assert!(verified.unknown.is_empty());
    assert_eq!(verified.report.figures.writer.unwrap().rto_ms, Some(710));
}

#[test]
fn two_cells_seal_one_report_and_each_is_asked_for_by_its_fingerprint() {
    let (one, other, stranger) = (Signer::new(), Signer::new(), Signer::new());
    let report = report();
    let seals = vec![one.sealed(&report), other.sealed(&report)];
    let text = SealedReport::new(report.clone(), seals.clone()).text().unwrap();
    let both = verify(&text, &[one.fingerprint(), other.fingerprint()]).unwrap();
    assert_eq!((both.sealers.len(), both.unknown.len()), (2, 0));
    let first = verify(&text, &[other.fingerprint()]).unwrap();
    assert_eq!((first.sealers[0].fingerprint, first.unknown[0].fingerprint), (other.fingerprint(), one.fingerprint()));
    // One that was asked for and did not seal it, whoever else did.
    let missing = verify(&text, &[one.fingerprint(), stranger.fingerprint()]).unwrap_err();
    assert!(missing.expected.ends_with(&hex::encode(stranger.fingerprint())), "{missing}");
    // A bad second seal spoils the report, though nobody asked for it.
    let mut spoilt = seals;
    spoilt[1].signature = "00".repeat(64);
    let text = SealedReport::new(report, spoilt).text().unwrap();
    assert!(refused(&text, &one.fingerprint()).expected.starts_with("a statement signed by a record key"));
    assert!(verify(&text, &[]).is_err());
}

#[test]
fn any_altered_byte_is_found() {
    let signer = Signer::new();
    let text = signer.seal(report()).text().unwrap();
    let fingerprint = signer.fingerprint();
    // Every byte would take minutes; a prime step visits each kind of line.
    let mut altered = 0;
    for at in (0..text.len()).step_by(997).chain(0..200) {
        let mut bytes = text.clone().into_bytes();
        if !bytes[at].is_ascii() {
            continue;
        }
        bytes[at] = if bytes[at] == b'7' { b'8' } else { b'7' };
        refused(&String::from_utf8(bytes).unwrap(), &fingerprint);
        altered += 1;
    }
    assert!(altered > 200, "{altered}");
}

#[test]
fn each_way_to_cheat_has_its_refusal() {
    let signer = Signer::new();
    let fingerprint = signer.fingerprint();
    let text = |change: fn(&mut SealedReport)| {
        let mut sealed = signer.seal(report());
        change(&mut sealed);
        sealed.text().unwrap()
    };
    let resealed = |change: fn(&mut Report)| {
        let mut altered = report();
        change(&mut altered);
        signer.seal(altered).text().unwrap()
    };
    for (text, expected) in [
        (text(|s| s.seal = None), "a sealed report"),
        (text(|s| s.report.outcome = "missed".into()), "the report "),
        (text(|s| s.report.writer.truncate(100)), "the report "),
        (
            text(|s| s.seal.as_mut().unwrap().trust_domain = "east".parse().unwrap()),
            "a key set certified by the root of east",
        ),
        (text(|s| s.seal.as_mut().unwrap().signature = "00".repeat(64)), "a statement signed by a record key"),
        (text(|s| s.seal.as_mut().unwrap().key_set_signature = "30".into()), "a key set certified"),
        (text(|s| s.seal.as_mut().unwrap().statement = "zz".into()), "hexadecimal digits"),
        (text(|_| ()) + " ", "the file exactly as it was written"),
        (text(|_| ()).replacen("\"drill\":", "\"drill\": \"x\",\"drill\":", 1), "a report of this program"),
        // A cell seals any digest; what is sealed must still agree with itself.
        (resealed(|r| r.figures.writer.as_mut().unwrap().rto_ms = Some(1)), "figures that follow"),
        (resealed(|r| r.objectives.clear()), "objectives that follow"),
        (resealed(|r| r.spec.push(' ')), "the digest of the drill's file"),
        (resealed(|r| r.format = "other".into()), "ambit-drill-report/1"),
    ] {
        let refusal = refused(&text, &fingerprint);
        assert!(refusal.expected.starts_with(expected), "{expected}: {refusal}");
    }
    let other = Signer::new();
    assert!(refused(&other.seal(report()).text().unwrap(), &fingerprint).expected.starts_with("a seal under root"));
    refused("", &fingerprint);
    refused("{}", &fingerprint);
}

#[test]
fn the_page_needs_nothing_else_and_runs_nothing_of_the_report() {
    let signer = Signer::new();
    let mut report = report();
    report.timeline.push(Event { t_ms: 5, what: "<script>alert('x')</script>&\u{1b}".into() });
    report.caller = (0..1200).map(|n| Sample { t_ms: n * 10, ok: n % 7 > 0, by: "<b>".into() }).collect();
    report.figures = report.recomputed();
    let page = crate::drill::html::page(&signer.seal(report).text().unwrap()).unwrap();
    for absent in ["<script", "<b>\"", "http", "url(", "@import", "src=", "\u{1b}"] {
        assert!(!page.contains(absent), "{absent}");
    }
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;"));
    assert!(page.contains("rto.writer") && page.matches("<svg").count() == 2 && page.contains("class=\"b\""));
    assert_eq!(page.matches("<table>").count(), page.matches("</table>").count());
    assert!(crate::drill::html::page("{}").is_err());
}
