//! What a benchmark prints: one line a figure, with its target, met or missed. A missed target fails nothing.

use super::cpu;
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Which side of the target is good.
#[derive(Clone, Copy)]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Beside the others, for comparison.
    None,
}

struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    target: Target,
    /// The same figure of others, the first of which the target compares with; none where the target is of the figure.
    others: Vec<(&'static str, f64)>,
}

impl Row {
    /// Ours as a multiple of the first other.
    fn ratio(&self) -> Option<f64> {
        self.others.first().map(|(_, other)| self.value / other)
    }
    fn met(&self) -> Option<bool> {
        let judged = self.ratio().unwrap_or(self.value);
        match self.target {
            Target::AtLeast(t) => Some(judged >= t),
            Target::AtMost(t) => Some(judged <= t),
            Target::None => None,
        }
    }
}

/// The figures of one run. Each is printed as it comes, so that a run that fails has told what it knew.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Row>,
}

impl Table {
    pub(super) fn head(&self, text: &str) {
        println!("\n{text} (load average {})", cpu::load().unwrap_or_default());
    }
    pub(super) fn figure(&mut self, name: &str, value: f64, unit: &'static str, target: Target) {
        let row = Row { name: name.to_owned(), value, unit, target, others: Vec::new() };
        let digits = digits(value);
        let told = match (row.target, row.met()) {
            (Target::AtLeast(t), Some(met)) => format!("target >= {t} {unit}  {}", word(met)),
            (Target::AtMost(t), Some(met)) => format!("target <= {t} {unit}  {}", word(met)),
            (_, _) => String::new(),
        };
        println!("  {name:58} {value:9.digits$} {unit:12} {told}");
        self.rows.push(row);
    }
    /// The same figure of ours and of others; the target is of the ratio of ours to the first of them.
    pub(super) fn ratio(
        &mut self,
        name: &str,
        unit: &'static str,
        ours: f64,
        others: &[(&'static str, f64)],
        target: Target,
    ) {
        let row = Row { name: name.to_owned(), value: ours, unit, target, others: others.to_vec() };
        let told = match (row.target, row.met()) {
            (Target::AtLeast(t), Some(met)) => format!("target >= {t}x  {}", word(met)),
            (Target::AtMost(t), Some(met)) => format!("target <= {t}x  {}", word(met)),
            (_, _) => String::new(),
        };
        let others: String =
            others.iter().map(|(who, value)| format!("  {who} {value:9.digits$}", digits = digits(*value))).collect();
        let (digits, ratio) = (digits(ours), row.ratio().unwrap_or(f64::NAN));
        println!("  {name:62} {unit:5}  ours {ours:9.digits$}{others}  {ratio:.2}x  {told}");
        self.rows.push(row);
    }
    pub(super) fn floor(&mut self, name: &str, value: f64, unit: &'static str) {
        self.figure(name, value, unit, Target::None);
    }

    /// Writes `target/bench/NAME.json`, and the last line: only figures with a target count.
    pub(super) fn end(self, name: &str) -> Result<()> {
        let load = cpu::load()?;
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|r| {
                let target = match r.target {
                    Target::AtLeast(t) | Target::AtMost(t) => Some(t),
                    Target::None => None,
                };
                let mut json = serde_json::json!({
                    "name": r.name, "unit": r.unit, "ours": r.value, "target": target, "met": r.met(),
                    "load_average": load,
                });
                if let (Some(ratio), Some(json)) = (r.ratio(), json.as_object_mut()) {
                    json.extend(r.others.iter().map(|(who, value)| ((*who).to_owned(), (*value).into())));
                    json.insert("ratio".to_owned(), ratio.into());
                }
                json
            })
            .collect();
        let folder = folder()?;
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(format!("{name}.json")), format!("{:#}\n", serde_json::json!(rows)))?;
        let judged: Vec<bool> = self.rows.iter().filter_map(Row::met).collect();
        println!("load average {load}");
        println!("{} figures, {} met", judged.len(), judged.iter().filter(|met| **met).count());
        Ok(())
    }
}

/// Three of them that mean something.
fn digits(value: f64) -> usize {
    if value < 10.0 { 2 } else { usize::from(value < 1000.0) }
}

fn word(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// `target/bench`, beside the folder of the profile that this binary was built in.
fn folder() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.parent().and_then(|p| p.parent()).map(|t| t.join("bench")).context("a target folder")
}
