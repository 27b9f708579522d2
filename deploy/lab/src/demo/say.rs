//! What the user sees: chapters, steps, a closing table. Colour only on a terminal.

use super::figures::Figures;
use crate::lab::Lab;
use std::io::{IsTerminal, Write};
use std::time::Instant;

pub(crate) struct Say {
    colour: bool,
    begun: Instant,
}

impl Say {
    pub(crate) fn new() -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some();
        Self { colour: std::io::stdout().is_terminal() && !plain, begun: Instant::now() }
    }

    /// A broken pipe ends the telling, not the lab.
    fn line(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
    pub(crate) fn title(&self, text: &str) {
        self.line(&self.paint("1", text));
    }
    pub(crate) fn chapter(&self, text: &str) {
        let at = self.begun.elapsed().as_secs_f32();
        self.line(&format!("\n{} {}", self.paint("2", &format!("[{at:6.1} s]")), self.paint("1;36", text)));
    }
    pub(crate) fn step(&self, text: &str) {
        self.line(&format!("  {text}"));
    }
    /// Something that was to happen and did.
    pub(crate) fn good(&self, text: &str) {
        self.line(&format!("  {} {text}", self.paint("32", "ok")));
    }
    /// Output of a program, as it came.
    pub(crate) fn quote(&self, text: &str) {
        for row in text.trim_end().lines() {
            self.line(&format!("    {row}"));
        }
    }

    pub(crate) fn table(&self, figures: &Figures) {
        self.line(&format!("\n{}", self.paint("1", "Figures of this run")));
        let width = figures.rows.iter().map(|f| f.name.len()).max().unwrap_or_default();
        for f in &figures.rows {
            let target = f.target.map(|t| format!("target {} {}", number(t), f.unit)).unwrap_or_default();
            let met = match f.met() {
                None => String::new(),
                Some(true) => self.paint("32", "met"),
                Some(false) => self.paint("31", "missed"),
            };
            let line = format!("  {:width$}  {:>10} {:<6} {target:<18} {met}", f.name, number(f.value), f.unit);
            self.line(line.trim_end());
        }
        self.line(&format!("  load average {}", figures.load));
    }

    pub(crate) fn explore(&self, lab: &Lab) {
        self.chapter("The lab stays up");
        let (name, folder) = (lab.name(), lab.folder("operator"));
        for line in [
            "target/debug/ambit-lab status".to_owned(),
            format!(
                "target/debug/ambit-lab exec operator -- target/debug/ambit --context {}/west/context.json status",
                folder.display()
            ),
            "target/debug/ambit-lab exec east-n1-web -- curl -s http://10.96.0.10:8080/".to_owned(),
            format!("target/debug/ambit-lab down --name {name}"),
        ] {
            self.step(&line);
        }
    }

    pub(crate) fn next(&self, kept: bool) {
        let next = if kept { "explore the lab with the commands above" } else { "cargo xtask demo --keep" };
        self.line(&format!("\nNext: {next}; README.md says what Ambit does not do yet."));
    }
}

fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}
