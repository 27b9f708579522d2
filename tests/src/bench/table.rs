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
}

impl Row {
    fn met(&self) -> Option<bool> {
        match self.target {
            Target::AtLeast(t) => Some(self.value >= t),
            Target::AtMost(t) => Some(self.value <= t),
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
        let row = Row { name: name.to_owned(), value, unit, target };
        let digits = if value < 10.0 { 2 } else { usize::from(value < 1000.0) };
        let told = match (row.target, row.met()) {
            (Target::AtLeast(t), Some(met)) => format!("target >= {t} {unit}  {}", word(met)),
            (Target::AtMost(t), Some(met)) => format!("target <= {t} {unit}  {}", word(met)),
            (_, _) => String::new(),
        };
        println!("  {name:58} {value:9.digits$} {unit:12} {told}");
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
                serde_json::json!({
                    "name": r.name, "unit": r.unit, "ours": r.value, "target": target, "met": r.met(),
                    "load_average": load,
                })
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

fn word(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// `target/bench`, beside the folder of the profile that this binary was built in.
fn folder() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.parent().and_then(|p| p.parent()).map(|t| t.join("bench")).context("a target folder")
}
