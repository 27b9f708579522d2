//! How a target's time and heap grow: one shape of input at a quarter of its size and at its size.

use crate::guard::cpu_of;
use crate::{Shape, TARGETS, Target, heap};
use std::time::Duration;

/// Four times the input may take so many times as long. Linear is 4, sorting 4.6, quadratic 16.
const GROWTH_MAX: f64 = 8.0;
/// Measured until so much processor time is spent: 25 ticks of the kernel's clock.
const MEASURED_MIN: Duration = Duration::from_millis(100);
/// Below this, whatever it grows by is no amplifier: a request costs as much.
const CHEAP: Duration = Duration::from_micros(500);
/// Each byte of the input may take so much, whatever it grows by: 1 s for 1 MiB, instrumented.
const BYTE_MAX: Duration = Duration::from_micros(1);
/// A second and third look where the first was bad: a busy machine distorts, a quadratic parser stays quadratic.
const LOOKS: usize = 3;

/// One line of the table.
#[derive(Debug)]
pub struct Growth {
    /// The target.
    pub target: &'static str,
    /// The shape.
    pub shape: &'static str,
    /// Bytes of the larger input.
    pub bytes: usize,
    /// Processor time on the larger input.
    pub took: Duration,
    /// How many times that of the smaller one.
    pub times: f64,
    /// Heap held at once for the larger input.
    pub held: usize,
    /// What it may hold.
    pub held_max: usize,
    /// What it may take, and more for each byte.
    pub request_max: Duration,
}

impl Growth {
    /// Whether time grew with the input's size and no faster, and heap within its bound.
    pub fn is_good(&self) -> bool {
        self.held <= self.held_max && self.time_is_good()
    }

    fn time_is_good(&self) -> bool {
        let bytes = u32::try_from(self.bytes).unwrap_or(u32::MAX);
        self.took <= CHEAP || (self.times <= GROWTH_MAX && self.took <= self.request_max + BYTE_MAX * bytes)
    }
}

/// Measures every shape of every target, or of the one named.
pub fn all(only: Option<&str>) -> impl Iterator<Item = Growth> {
    let targets = TARGETS.iter().filter(move |target| only.is_none_or(|name| name == target.name));
    targets.flat_map(|target| target.shapes.iter().map(move |shape| measure(target, shape)))
}

/// Measures one shape; the best of some looks.
pub fn measure(target: &Target, shape: &Shape) -> Growth {
    let mut best = look(target, shape);
    for _ in 1..LOOKS {
        if best.is_good() {
            break;
        }
        let next = look(target, shape);
        if next.times < best.times {
            best = next;
        }
    }
    best
}

fn look(target: &Target, shape: &Shape) -> Growth {
    let (small, large) = ((shape.make)(shape.bytes / 4), (shape.make)(shape.bytes));
    let (_, held) = heap::peak(|| (target.run)(&large));
    let held_max = (target.heap)(large.len());
    let (before, took) = (one_run(target, &small), one_run(target, &large));
    let size_grew = large.len() as f64 / small.len().max(1) as f64;
    let times = took.as_secs_f64() / before.as_secs_f64().max(1e-9) * 4.0 / size_grew.max(1.0);
    let (target, shape, request_max) = (target.name, shape.name, target.cpu);
    Growth { target, shape, bytes: large.len(), took, times, held, held_max, request_max }
}

/// Processor time of one run, over enough of them to be measured.
fn one_run(target: &Target, input: &[u8]) -> Duration {
    let mut runs = 1u32;
    loop {
        let spent = cpu_of(|| {
            for _ in 0..runs {
                std::hint::black_box((target.run)(input));
            }
        });
        if spent >= MEASURED_MIN || runs >= 1 << 20 {
            return spent / runs;
        }
        runs *= if spent * 8 < MEASURED_MIN { 8 } else { 2 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Verdict;

    const SHAPE: Shape = Shape { name: "zeros", bytes: 8192, make: |n| vec![0; n] };

    fn linear(input: &[u8]) -> Verdict {
        for _ in 0..100 {
            std::hint::black_box(input.iter().fold(0u64, |sum, b| std::hint::black_box(sum ^ u64::from(*b))));
        }
        Verdict::Refused
    }

    fn quadratic(input: &[u8]) -> Verdict {
        for n in 0..input.len() {
            std::hint::black_box(input[n..].iter().fold(0u64, |sum, b| std::hint::black_box(sum ^ u64::from(*b))));
        }
        Verdict::Refused
    }

    #[test]
    fn quadratic_time_is_told_from_linear() {
        let target =
            |run| Target { name: "test", len_max: 64, cpu: Duration::from_secs(9), heap: |_| 0, run, shapes: &[SHAPE] };
        let good = measure(&target(linear), &SHAPE);
        assert!(good.is_good(), "{good:?}");
        let bad = measure(&target(quadratic), &SHAPE);
        assert!(!bad.is_good(), "{bad:?}");
    }
}
