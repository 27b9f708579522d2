//! Whether tasks of this node wait for CPU, memory or disks, by the kernel's account of pressure
//! (Documentation/accounting/psi.rst).
//!
//! Counted are events: intervals of about ten seconds in which some task stalled for more than a tenth of the time. It is the
//! node's account, not that of the agent's own cgroup. What the kernel keeps no account of has no series: 0 would say that
//! nobody waits.

use crate::metrics::METRICS;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Where the kernel tells it, since 4.20; not where it was built without PSI or started with `psi=0`.
pub const PRESSURE: &str = "/proc/pressure";
/// The kernel's own shortest window.
const EVERY: Duration = Duration::from_secs(10);
/// The part of an interval that is more than chance.
const STALLED_MAX: f64 = 0.1;
const RESOURCES: [&str; 3] = ["cpu", "memory", "io"];

/// What a file of pressure says that it should not.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("not a file of pressure: {0:?}")]
pub struct Malformed(String);

/// How long some task stalled since the machine started: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, microseconds.
///
/// # Errors
/// [`Malformed`] where not exactly one line is of that form. Lines of other kinds are left alone.
pub fn some_total(text: &str) -> Result<Duration, Malformed> {
    let malformed = || Malformed(text.chars().take(200).collect());
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("some "));
    let (Some(line), None) = (lines.next(), lines.next()) else { return Err(malformed()) };
    let mut fields = line.split(' ');
    for name in ["avg10=", "avg60=", "avg300="] {
        let field = fields.next().and_then(|field| field.strip_prefix(name)?.split_once('.'));
        field.filter(|(whole, part)| is_number(whole) && is_number(part)).ok_or_else(malformed)?;
    }
    let total = fields.next().and_then(|field| field.strip_prefix("total=")).filter(|total| is_number(total));
    let total = total.and_then(|total| total.parse().ok()).filter(|_| fields.next().is_none());
    total.map(Duration::from_micros).ok_or_else(malformed)
}

/// Digits only: numbers also parse with a sign.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Two looks at one resource.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    /// The stalls' total at the first.
    pub before: Duration,
    /// At the second.
    pub now: Duration,
    /// Between them.
    pub elapsed: Duration,
}

impl Interval {
    /// Whether tasks stalled for more than a tenth of it. A total that fell is of no interval.
    pub fn is_contended(&self) -> bool {
        self.now.saturating_sub(self.before) > self.elapsed.mul_f64(STALLED_MAX)
    }
}

/// What one look at a resource found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Contended since the look before, or not; not at the first one.
    Read(bool),
    /// The kernel keeps no such account.
    Lacking,
    /// It cannot be read, or not be understood.
    Failed,
}

/// One resource of the node.
#[derive(Debug)]
struct Watched {
    resource: &'static str,
    file: PathBuf,
    last: Option<(Duration, Instant)>,
    /// That it fails was told.
    told: bool,
}

impl Watched {
    fn look(&mut self, now: Instant) -> Look {
        let text = match std::fs::read_to_string(&self.file) {
            Ok(text) => text,
            Err(error) if is_lacking(&error) => return Look::Lacking,
            Err(error) => return self.failed(&error),
        };
        match some_total(&text) {
            Ok(total) => {
                let last = self.last.replace((total, now));
                let interval = last.map(|(before, at)| Interval {
                    before,
                    now: total,
                    elapsed: now.saturating_duration_since(at),
                });
                Look::Read(interval.is_some_and(|interval| interval.is_contended()))
            }
            Err(error) => self.failed(&error),
        }
    }

    fn failed(&mut self, error: &dyn std::fmt::Display) -> Look {
        if !std::mem::replace(&mut self.told, true) {
            tracing::error!(resource = self.resource, %error, "the node's pressure is not known");
        }
        // What comes after is not counted as one interval with what was before.
        self.last = None;
        Look::Failed
    }
}

/// No file, or one that the kernel made and keeps nothing in (`psi_show` of kernel/sched/psi.c).
fn is_lacking(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// The three.
#[derive(Debug)]
pub struct Contention([Watched; 3]);

impl Contention {
    /// By the files of this folder.
    pub fn of(pressure: &Path) -> Contention {
        let watched = |resource| Watched { resource, file: pressure.join(resource), last: None, told: false };
        Contention(RESOURCES.map(watched))
    }

    /// Looks at each resource.
    pub fn look(&mut self, now: Instant) -> [(&'static str, Look); 3] {
        self.0.each_mut().map(|watched| (watched.resource, watched.look(now)))
    }
}

/// Counts until the process ends, or for ever nothing where the kernel keeps no account.
pub async fn watch(mut contention: Contention) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    let first = contention.look(Instant::now());
    let lacking: Vec<_> =
        first.iter().filter(|(_, look)| *look == Look::Lacking).map(|(resource, _)| *resource).collect();
    if !lacking.is_empty() {
        let setting = "CONFIG_PSI=y, and psi=1 where it is off by default";
        tracing::warn!(
            ?lacking,
            setting,
            "this kernel keeps no account of pressure: the node's contention is not counted"
        );
    }
    count(first);
    loop {
        tick.tick().await;
        count(contention.look(Instant::now()));
    }
}

fn count(looks: [(&'static str, Look); 3]) {
    for (resource, look) in looks {
        if let Look::Read(contended) = look {
            METRICS.contention.add([resource], f64::from(u8::from(contended)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IO: &str =
        "some avg10=0.24 avg60=0.48 avg300=3.52 total=340960165\nfull avg10=0.24 avg60=0.48 avg300=3.50 total=7\n";

    #[test]
    fn the_total_is_read_from_exactly_one_line_of_the_kernels_form() {
        assert_eq!(some_total(IO), Ok(Duration::from_micros(340_960_165)));
        let line = "some avg10=0.00 avg60=0.00 avg300=100.00 total=0";
        assert_eq!(some_total(line), Ok(Duration::ZERO));
        assert_eq!(some_total(&format!("{line}\nmore of=another kind\n")), Ok(Duration::ZERO));
        for text in [
            "",
            "some",
            "some \n",
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
            "some avg10=0.00 avg60=0.00 total=0\n",
            "some avg60=0.00 avg10=0.00 avg300=0.00 total=0\n",
            "some avg10=0 avg60=0.00 avg300=0.00 total=0\n",
            "some avg10=0.00 avg60=-1.00 avg300=0.00 total=0\n",
            "some avg10=nan avg60=0.00 avg300=0.00 total=0\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=+5\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=-5\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=5us\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=5 more=1\n",
            "some  avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=18446744073709551616\n",
            &format!("{line}\n{line}\n"),
            "\u{0}\u{fffd}some",
        ] {
            assert_eq!(some_total(text), Err(Malformed(text.to_owned())), "{text:?}");
        }
        let long = "x".repeat(5_000);
        assert_eq!(some_total(&long), Err(Malformed("x".repeat(200))));
    }

    #[test]
    fn more_than_a_tenth_of_the_time_is_contention() {
        let ms = Duration::from_millis;
        for (before, now, elapsed, want) in [
            (0, 0, 10_000, false),
            (5_000, 6_000, 10_000, false),
            (5_000, 6_001, 10_000, true),
            (5_000, 6_001, 20_000, false),
            (5_000, 25_000, 10_000, true),
            (5_000, 4_000, 10_000, false),
            (0, 0, 0, false),
        ] {
            let interval = Interval { before: ms(before), now: ms(now), elapsed: ms(elapsed) };
            assert_eq!(interval.is_contended(), want, "{interval:?}");
        }
    }

    #[test]
    fn each_look_is_of_the_time_since_the_last_good_one_and_what_is_not_there_is_lacking() {
        let folder = std::env::temp_dir().join(format!("ambit-pressure-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |resource: &str, total_ms: u64| {
            let text = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={}\n", total_ms * 1000);
            std::fs::write(folder.join(resource), text).unwrap();
        };
        let (mut contention, start) = (Contention::of(&folder), Instant::now());
        let mut look = |s| contention.look(start + Duration::from_secs(s)).map(|(_, look)| look);
        assert_eq!(look(0), [Look::Lacking; 3]);
        write("cpu", 90_000);
        std::fs::write(folder.join("memory"), "some of it").unwrap();
        assert_eq!(look(10), [Look::Read(false), Look::Failed, Look::Lacking], "a first look is of no interval");
        write("cpu", 91_500);
        write("memory", 0);
        assert_eq!(look(20), [Look::Read(true), Look::Read(false), Look::Lacking]);
        write("cpu", 92_500);
        write("memory", 5_000);
        assert_eq!(look(30), [Look::Read(false), Look::Read(true), Look::Lacking], "a tenth is not more");
        std::fs::write(folder.join("cpu"), [0xff, 0xfe]).unwrap();
        assert_eq!(look(40)[0], Look::Failed);
        write("cpu", 99_000);
        assert_eq!(look(50)[0], Look::Read(false), "of no interval again");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn only_what_was_read_has_a_series() {
        let told =
            |resource| METRICS.page().contains(&format!("ambit_node_contention_total{{resource=\"{resource}\"}}"));
        count([("cpu", Look::Read(false)), ("memory", Look::Lacking), ("io", Look::Failed)]);
        assert!(told("cpu") && !told("memory") && !told("io"));
        assert_eq!(METRICS.contention.value(["cpu"]), 0.0);
        count([("cpu", Look::Read(true)), ("memory", Look::Lacking), ("io", Look::Failed)]);
        assert_eq!(METRICS.contention.value(["cpu"]), 1.0);
    }
}
