//! A report as one page that needs nothing else: no script, no font, no address. Pure. Everything in it is text of the report,
//! escaped; whether that is what a cell sealed, only `ambit drill report verify` tells.

use super::figures::{Marks, ProbeFigures, Sample};
use super::report::{Report, SealedReport};
use super::spec::Drill;
use crate::when::utc;
use ambit_model::{Code, Refusal};
use std::fmt::Write as _;

/// Columns of a chart. More would be narrower than a line.
const BINS: u64 = 300;
/// Units of a chart's picture; the page scales it.
const WIDTH: u64 = 900;
const HEIGHT: u64 = 72;

/// What auditors ask for, and where a report answers. It is evidence to be judged, not a claim of conformity.
const EVIDENCE: [(&str, &str); 6] = [
    (
        "Regulation (EU) 2022/2554 (DORA), art. 24: a risk-based testing programme",
        "hypothesis, scope, owner, and the file that was run",
    ),
    ("DORA, art. 25: scenario-based tests of continuity", "the fault, the timeline and the raw samples"),
    (
        "DORA, art. 11 and 12: recovery times and restoration that were achieved",
        "objectives with target and measured value; ledger of acknowledged writes",
    ),
    (
        "SOC 2 (TSC 2017), CC7.5: recovery from incidents is tested",
        "fault, healing, and the time until everything was steady again",
    ),
    ("SOC 2 (TSC 2017), A1.3: recovery procedures are tested", "outcome, sealed by cells that outlived the fault"),
    (
        "SOC 2 (TSC 2017), CC4.1: evaluations leave evidence",
        "the seal: digest, record key, root; figures that follow from the samples",
    ),
];

const STYLE: &str = "
:root{--ink:#1c2430;--dim:#5f6b7a;--line:#d7dde4;--paper:#fff;--good:#2a9d8f;--bad:#d1495b;--mark:#8d6a9f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#9aa6b4;--line:#343d49;--paper:#14181d;--good:#4bc0ae;--bad:#ef6f7f;--mark:#b79ac6}}
*{box-sizing:border-box}body{margin:2rem auto;max-width:62rem;padding:0 1.2rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}p{margin:.3rem 0}.dim{color:var(--dim)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
.ok{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}svg{display:block;width:100%;height:auto;margin:.3rem 0}
pre{overflow:auto;border:1px solid var(--line);padding:.8rem;font-size:13px}code{overflow-wrap:anywhere}
.g{fill:var(--good)}.b{fill:var(--bad)}.m{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:4 3}.t{fill:var(--dim);font-size:11px}
";

/// The page for a report's text.
///
/// # Errors
/// [`Code::DrillReportInvalid`] where the text is no report.
pub fn page(text: &str) -> Result<String, Refusal> {
    let sealed: SealedReport = serde_json::from_str(text)
        .map_err(|e| Refusal::new(Code::DrillReportInvalid, "a report of this program", e.to_string()))?;
    let report = &sealed.report;
    let drill: Option<Drill> = report.spec.parse().ok();
    let mut out = String::with_capacity(64 * 1024);
    let title = escaped(&format!("Drill {}: {}", report.drill, report.outcome));
    out.push_str("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">");
    put(&mut out, format_args!("<title>{title}</title><style>{STYLE}</style></head><body>\n"));
    head(&mut out, report, drill.as_ref());
    objectives(&mut out, report);
    charts(&mut out, report);
    figures(&mut out, report);
    timeline(&mut out, report);
    seals(&mut out, &sealed);
    evidence(&mut out);
    put(
        &mut out,
        format_args!(
            "<h2>The file that was run</h2><p class=\"dim\">SHA-256 <code>{}</code></p>",
            escaped(&report.spec_sha256)
        ),
    );
    put(&mut out, format_args!("<pre>{}</pre></body></html>\n", escaped(&report.spec)));
    Ok(out)
}

/// Writing to a text cannot fail.
fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(what);
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn head(out: &mut String, report: &Report, drill: Option<&Drill>) {
    let class = if report.outcome == "passed" { "ok" } else { "no" };
    let (name, outcome) = (escaped(&report.drill), escaped(&report.outcome));
    put(out, format_args!("<h1>Drill {name}: <span class=\"{class}\">{outcome}</span></h1>\n"));
    if let Some(drill) = drill {
        put(out, format_args!("<p>{}</p>", escaped(&drill.hypothesis)));
        let fault = drill.fault().map(|(fault, lease, _)| format!("{fault}, lease {lease}")).unwrap_or_default();
        let names = |clusters: &[ambit_model::ClusterId]| {
            clusters.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        put(
            out,
            format_args!(
                "<p class=\"dim\">owner {}; fault: {}; may be harmed: {}; protected: {}</p>",
                escaped(&drill.owner),
                escaped(&fault),
                escaped(&names(&drill.clusters)),
                escaped(&names(&drill.protected)),
            ),
        );
    }
    let (run, versions, load) =
        (escaped(&report.run), escaped(&report.versions.join(", ")), escaped(&report.load_average));
    put(
        out,
        format_args!(
            "<p class=\"dim\">run {run}, begun {}; {versions}; load average {load}</p>\n",
            utc(report.started_ms)
        ),
    );
}

fn objectives(out: &mut String, report: &Report) {
    out.push_str("<h2>Objectives</h2><table><tr><th>objective</th><th>target</th><th>measured</th><th></th></tr>\n");
    for o in &report.objectives {
        let (class, word) = if o.met { ("ok", "met") } else { ("no", "missed") };
        let (name, target, measured) = (escaped(&o.name), escaped(&o.target), escaped(&o.measured));
        put(
            out,
            format_args!(
                "<tr><td>{name}</td><td>{target}</td><td>{measured}</td><td class=\"{class}\">{word}</td></tr>\n"
            ),
        );
    }
    out.push_str("</table>\n");
}

fn charts(out: &mut String, report: &Report) {
    let ended = report.marks.map(|m| m.ended_ms);
    for (name, samples) in [
        ("of the writer", &report.writer),
        ("of the caller", &report.caller),
        ("outside of the scope", &report.outside),
    ] {
        let last = samples.iter().map(|s| s.t_ms).max();
        if let Some(last) = last {
            put(out, format_args!("<h2>Samples {name}</h2>\n"));
            chart(out, samples, last.max(ended.unwrap_or_default()).max(1), report.marks);
        }
    }
}

/// A column for each piece of time: its samples by shares, those that failed above those that were good. Without a sample, nothing.
fn chart(out: &mut String, samples: &[Sample], end_ms: u64, marks: Option<Marks>) {
    let mut bins = vec![(0u64, 0u64); BINS as usize];
    for s in samples {
        let at = (s.t_ms.saturating_mul(BINS) / (end_ms + 1)).min(BINS - 1) as usize;
        if let Some((good, bad)) = bins.get_mut(at) {
            *(if s.ok { good } else { bad }) += 1;
        }
    }
    put(out, format_args!("<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">", HEIGHT + 28));
    for (at, (good, bad)) in bins.iter().enumerate().filter(|(_, (good, bad))| good + bad > 0) {
        let (x, width) = (at as u64 * WIDTH / BINS, WIDTH / BINS);
        // One failure among many is seen all the same.
        let failed = (bad * HEIGHT).div_ceil(good + bad);
        for (class, y, height) in [("b", 0, failed), ("g", failed, HEIGHT - failed)] {
            if height > 0 {
                put(
                    out,
                    format_args!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"/>"),
                );
            }
        }
    }
    let marks = marks
        .iter()
        .flat_map(|m| [("fault", Some(m.injected_ms)), ("healing", Some(m.healed_ms)), ("steady", m.steady_ms)]);
    for (name, at) in marks.filter_map(|(name, at)| Some((name, at?))) {
        let x = at.min(end_ms) * WIDTH / end_ms;
        // The last words end where others begin.
        let anchor = if name == "steady" { "end" } else { "start" };
        let y = if name == "steady" { HEIGHT + 24 } else { HEIGHT + 11 };
        put(out, format_args!("<line class=\"m\" x1=\"{x}\" y1=\"0\" x2=\"{x}\" y2=\"{HEIGHT}\"/>"));
        put(
            out,
            format_args!(
                "<text class=\"t\" text-anchor=\"{anchor}\" x=\"{x}\" y=\"{y}\">{name} {}</text>",
                seconds(at)
            ),
        );
    }
    out.push_str("</svg>\n");
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

fn figures(out: &mut String, report: &Report) {
    let f = &report.figures;
    out.push_str("<h2>Figures</h2><table><tr><th></th><th>recovery time</th><th>failed before / from the fault on</th><th>answered before, during, after</th></tr>\n");
    for (name, probe) in [("writer", &f.writer), ("caller", &f.caller), ("outside", &f.outside)] {
        if let Some(probe) = probe {
            figure(out, name, probe);
        }
    }
    out.push_str("</table>\n");
    if let Some(l) = &f.ledger {
        put(
            out,
            format_args!(
                "<p>Ledger: {} writes sent, {} acknowledged, <b>{} lost, {} doubled</b>; {} were there though never acknowledged; {} were sent more than once.</p>\n",
                l.sent, l.acked, l.lost, l.duplicated, l.unacked_present, l.repeated
            ),
        );
    }
}

fn figure(out: &mut String, name: &str, probe: &ProbeFigures) {
    let rto = probe.rto_ms.map_or_else(|| "not measured".to_owned(), seconds);
    let answered = probe.answered.iter().map(|by| {
        let words: Vec<String> = by.iter().map(|(who, n)| format!("{} {n}", escaped(who))).collect();
        if words.is_empty() { "-".to_owned() } else { words.join(", ") }
    });
    let answered = answered.collect::<Vec<_>>().join(" | ");
    put(
        out,
        format_args!(
            "<tr><td>{name}</td><td>{rto}</td><td>{} / {} of {}</td><td>{answered}</td></tr>\n",
            probe.failed_before, probe.failed, probe.samples
        ),
    );
}

fn timeline(out: &mut String, report: &Report) {
    out.push_str("<h2>Timeline</h2><table>\n");
    for e in &report.timeline {
        put(out, format_args!("<tr><td>{}</td><td>{}</td></tr>\n", seconds(e.t_ms), escaped(&e.what)));
    }
    out.push_str("</table>\n");
}

fn seals(out: &mut String, sealed: &SealedReport) {
    out.push_str("<h2>Seals</h2>\n");
    for seal in sealed.seal.iter().chain(&sealed.further) {
        let root = hex::decode(&seal.root).unwrap_or_default();
        let (td, root) = (escaped(seal.trust_domain.as_str()), hex::encode(ambit_identity::fingerprint(&root)));
        put(out, format_args!("<p>{td}, by its own words under root <code>{root}</code></p>\n"));
    }
    if sealed.seal.is_none() {
        out.push_str("<p class=\"no\">None: nobody vouches for this report.</p>\n");
    }
    out.push_str("<p class=\"dim\">This page proves nothing by itself. Check the report it was made from: <code>ambit drill report verify REPORT.json --fingerprint HEX</code></p>\n");
}

fn evidence(out: &mut String) {
    out.push_str("<h2>Appendix: what auditors ask for</h2><p class=\"dim\">Evidence to be judged, not a claim of conformity.</p><table>\n");
    for (asked, answer) in EVIDENCE {
        put(out, format_args!("<tr><td>{asked}</td><td>{answer}</td></tr>\n"));
    }
    out.push_str("</table>\n");
}
