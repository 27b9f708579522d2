//! What a running drill shows to others on its machine, and how they call it off: two files beside the lab's lock.

use super::figures::Sample;
use super::report::Event;
use ambit_model::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The length of what one line counts, milliseconds.
pub const SECOND_MS: u64 = 1000;

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A drill begins: its name and who runs it.
    Begins {
        /// Its name.
        drill: String,
        /// The run.
        run: String,
    },
    /// Something happened.
    Event(Event),
    /// How many samples of each probe were good and how many failed in the second that ends here.
    Second {
        /// Its end, milliseconds since the drill began.
        t_ms: u64,
        /// By probe: good, failed.
        probes: BTreeMap<String, (u64, u64)>,
    },
    /// It is over.
    Ends {
        /// How.
        outcome: String,
    },
}

/// The writing end, of the drill that holds the lab's lock.
pub struct Live {
    file: File,
    abort: PathBuf,
    told_ms: u64,
}

impl Live {
    /// Begins the file anew and forgets who called an earlier drill off.
    ///
    /// # Errors
    /// [`Code::DrillGuard`] where the lab's folder cannot be written.
    pub fn begin(folder: &Path, drill: &str, run: &str) -> Result<Live, Refusal> {
        let abort = abort_file(folder);
        let failed = |path: &Path, e: std::io::Error| {
            Refusal::new(Code::DrillGuard, format!("a file {} that can be written", path.display()), e.to_string())
        };
        match std::fs::remove_file(&abort) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(&abort, e)),
            _ => {}
        }
        let path = live_file(folder);
        let file = File::create(&path).map_err(|e| failed(&path, e))?;
        let mut live = Live { file, abort, told_ms: 0 };
        live.tell(&Line::Begins { drill: drill.to_owned(), run: run.to_owned() });
        Ok(live)
    }
    /// Adds a line. Who watches may miss one; the drill goes on.
    pub fn tell(&mut self, line: &Line) {
        let text = serde_json::to_string(line).unwrap_or_default();
        let _ = writeln!(self.file, "{text}");
    }
    /// Tells what was seen in the last second, once it is over.
    pub fn seen(&mut self, now_ms: u64, probes: impl Fn(u64) -> BTreeMap<String, (u64, u64)>) {
        if now_ms >= self.told_ms + SECOND_MS {
            self.tell(&Line::Second { t_ms: now_ms, probes: probes(now_ms - SECOND_MS) });
            self.told_ms = now_ms;
        }
    }
    /// Who called it off, if somebody did.
    pub fn called_off(&self) -> Option<String> {
        let by = std::fs::read_to_string(&self.abort).ok()?;
        Some(by.chars().filter(|c| !c.is_control()).take(64).collect())
    }
}

/// Good and failed samples since `from_ms`.
pub fn since(samples: &[Sample], from_ms: u64) -> (u64, u64) {
    let of = samples.iter().rev().take_while(|s| s.t_ms >= from_ms);
    of.fold((0, 0), |(good, bad), s| if s.ok { (good + 1, bad) } else { (good, bad + 1) })
}

/// Where the drill of a lab tells.
pub fn live_file(folder: &Path) -> PathBuf {
    folder.join("drill.live")
}

/// Where it is called off.
pub fn abort_file(folder: &Path) -> PathBuf {
    folder.join("drill.abort")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_counts_what_is_in_it() {
        let sample = |t_ms, ok| Sample { t_ms, ok, by: String::new() };
        let samples =
            [sample(10, true), sample(999, false), sample(1000, true), sample(1500, false), sample(1700, true)];
        assert_eq!((since(&samples, 1000), since(&samples, 0), since(&samples, 2000)), ((2, 1), (3, 2), (0, 0)));
    }

    #[test]
    fn lines_read_back_and_a_new_drill_begins_anew() {
        let folder = std::env::temp_dir().join(format!("ambit-live-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut first = Live::begin(&folder, "a", "1").unwrap();
        assert_eq!(first.called_off(), None);
        std::fs::write(abort_file(&folder), "ann\n").unwrap();
        assert_eq!(first.called_off().as_deref(), Some("ann"));
        first.seen(400, |_| BTreeMap::new());
        first.seen(1000, |from| BTreeMap::from([("writer".into(), (from, 1))]));
        first.seen(1900, |_| BTreeMap::new());
        first.tell(&Line::Ends { outcome: "passed".into() });
        let text = std::fs::read_to_string(live_file(&folder)).unwrap();
        let lines: Vec<Line> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[1], Line::Second { t_ms: 1000, probes: BTreeMap::from([("writer".into(), (0, 1))]) });
        let second = Live::begin(&folder, "b", "2").unwrap();
        assert_eq!(second.called_off(), None, "who called an earlier drill off did not mean this one");
        assert_eq!(std::fs::read_to_string(live_file(&folder)).unwrap().lines().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
