//! `ambit drill watch` and `ambit drill abort`: the drill that runs in a lab, followed and called off from elsewhere.

use crate::drill::lab::Lab;
use crate::drill::live::{Line, abort_file, live_file};
use crate::exit::{Exit, file_refusal};
use crate::output::{Answer, Form};
use ambit_model::{Code, Refusal};
use std::collections::{BTreeMap, VecDeque};
use std::io::{IsTerminal, Write};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Bringing everything back takes a drill this long at most.
const REVERT_MAX: Duration = Duration::from_secs(120);
/// Seconds in a probe's line.
const SECONDS: usize = 60;
/// Events below the lines.
const EVENTS: usize = 12;

/// Follows the drill of a lab until it is over. A terminal is drawn anew each second; anything else gets a line for each event.
pub(super) async fn watch(form: Form, lab: &Lab) -> Result<Answer, Refusal> {
    let file = live_file(lab.folder());
    let drawn = form == Form::Table && std::io::stdout().is_terminal();
    let (mut read, mut view) = (0, View::default());
    loop {
        // Before the file is read: what was told until then is in it.
        let runs = lab.lock().is_err();
        let text = std::fs::read_to_string(&file).map_err(|e| file_refusal(&file, &e))?;
        let complete = text.rfind('\n').map_or(0, |at| at + 1);
        let news = text.get(read..complete).unwrap_or_default();
        read = complete;
        for line in news.lines() {
            let Ok(known) = serde_json::from_str::<Line>(line) else { continue };
            let plain = match form {
                Form::Json => Some(line.to_owned()),
                Form::Table => plain(&known),
            };
            view.take(known);
            if let Some(plain) = plain.filter(|_| !drawn)
                && writeln!(std::io::stdout(), "{plain}").is_err()
            {
                return Ok(Answer::ok(""));
            }
        }
        if drawn && !news.is_empty() {
            let _ = write!(std::io::stdout(), "\x1b[H\x1b[J{}", view.draw());
            let _ = std::io::stdout().flush();
        }
        if !runs {
            return Ok(match view.outcome {
                Some(_) => Answer::ok(""),
                None => Answer::ok("").note("no drill runs, and the last one left no outcome").ending(Exit::Failed),
            });
        }
        sleep(LOOK).await;
    }
}

/// Calls off the drill of a lab, and waits until everything is back.
pub(super) async fn abort(lab: &Lab) -> Result<Answer, Refusal> {
    if lab.lock().is_ok() {
        return Err(Refusal::new(Code::NotFound, format!("a drill that runs in lab {}", lab.name()), "none"));
    }
    let file = abort_file(lab.folder());
    let by = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| "an operator".to_owned());
    let begun = Instant::now();
    std::fs::write(&file, by).map_err(|e| file_refusal(&file, &e))?;
    while lab.lock().is_err() {
        if begun.elapsed() > REVERT_MAX {
            let expected = format!("the drill over within {} s", REVERT_MAX.as_secs());
            return Err(Refusal::new(Code::Unavailable, expected, "it still runs; its faults end with their leases"));
        }
        sleep(LOOK).await;
    }
    Ok(Answer::ok(format!("called off; everything is back after {:.1} s", begun.elapsed().as_secs_f64())))
}

fn plain(line: &Line) -> Option<String> {
    match line {
        Line::Begins { drill, run } => Some(format!("drill {drill}, run {run}")),
        Line::Event(event) => Some(format!("{:>7.1}s  {}", event.t_ms as f64 / 1000.0, event.what)),
        Line::Second { .. } => None,
        Line::Ends { outcome } => Some(format!("ended: {outcome}")),
    }
}

/// What is on the screen.
#[derive(Default)]
struct View {
    drill: String,
    now_ms: u64,
    probes: BTreeMap<String, VecDeque<(u64, u64)>>,
    events: VecDeque<String>,
    outcome: Option<String>,
}

impl View {
    fn take(&mut self, line: Line) {
        match line {
            Line::Begins { drill, run } => *self = View { drill: format!("{drill}, run {run}"), ..View::default() },
            Line::Event(event) => {
                self.now_ms = self.now_ms.max(event.t_ms);
                self.events.extend(plain(&Line::Event(event)));
                while self.events.len() > EVENTS {
                    self.events.pop_front();
                }
            }
            Line::Second { t_ms, probes } => {
                self.now_ms = self.now_ms.max(t_ms);
                for (probe, seen) in probes {
                    let row = self.probes.entry(probe).or_default();
                    row.push_back(seen);
                    if row.len() > SECONDS {
                        row.pop_front();
                    }
                }
            }
            Line::Ends { outcome } => self.outcome = Some(outcome),
        }
    }

    fn draw(&self) -> String {
        let mut out = format!("drill {}  {:.1} s\n\n", self.drill, self.now_ms as f64 / 1000.0);
        for (probe, seen) in &self.probes {
            let bars: String = seen.iter().map(|(good, bad)| bar(*good, *bad)).collect();
            let (good, bad) = seen.back().copied().unwrap_or_default();
            out.push_str(&format!("{probe:>8} {bars:<SECONDS$} {good} good, {bad} failed in the last second\n"));
        }
        out.push('\n');
        self.events.iter().for_each(|event| {
            out.push_str(event);
            out.push('\n');
        });
        if let Some(outcome) = &self.outcome {
            out.push_str(&format!("\nended: {outcome}\n"));
        }
        out
    }
}

/// The share of good ones, as a block that grows with it; a dot where there was none at all.
fn bar(good: u64, bad: u64) -> char {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let Some(eighths) = (good * 8).checked_div(good + bad) else { return '·' };
    match eighths {
        0 => 'x',
        n => BLOCKS.get(n as usize - 1).copied().unwrap_or('█'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drill::report::Event;

    #[test]
    fn a_second_without_success_is_seen_at_a_glance() {
        assert_eq!([bar(0, 0), bar(0, 9), bar(1, 1), bar(7, 0), bar(1, 99)], ['·', 'x', '▄', '█', 'x']);
    }

    #[test]
    fn the_screen_shows_the_last_minute_and_the_last_events() {
        let mut view = View::default();
        view.take(Line::Event(Event { t_ms: 1, what: "of another drill".into() }));
        view.take(Line::Begins { drill: "leader-loss".into(), run: "ab".into() });
        for n in 0..100u64 {
            view.take(Line::Event(Event { t_ms: n * 1000, what: format!("event {n}") }));
            let probes = BTreeMap::from([("writer".to_owned(), (9, u64::from(n == 99)))]);
            view.take(Line::Second { t_ms: n * 1000, probes });
        }
        view.take(Line::Ends { outcome: "passed".into() });
        let drawn = view.draw();
        assert!(!drawn.contains("another") && !drawn.contains("event 87") && drawn.contains("event 88"), "{drawn}");
        assert!(drawn.contains("9 good, 1 failed") && drawn.ends_with("ended: passed\n") && drawn.contains("99.0 s"));
        assert_eq!(drawn.matches('█').count() + drawn.matches('▇').count(), SECONDS, "{drawn}");
    }
}
