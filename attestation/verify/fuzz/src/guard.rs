//! One run of a target within its bounds.

use crate::{Target, Verdict, heap};
use std::time::{Duration, Instant};

/// Processor time that one input of mutation's length may take in any build, optimised or not, unless its target says
/// more. The slowest honest one takes a hundredth.
pub const CPU_MAX: Duration = Duration::from_secs(1);

/// Runs `target` on `input`. Panics where it holds more heap, or takes more time, than it may.
pub fn run(target: &Target, input: &[u8]) -> Verdict {
    let heap_max = (target.heap)(input.len());
    let began = Instant::now();
    let (verdict, held) = heap::peak(|| (target.run)(input));
    let name = target.name;
    assert!(held <= heap_max, "{name}: {held} bytes of heap for {} bytes of input, {heap_max} allowed", input.len());
    if input.len() <= target.len_max && began.elapsed() > CPU_MAX.max(target.cpu) {
        // Others may have had the processor: run it again and count only its own time.
        let took = cpu_of(|| (target.run)(input));
        assert!(took <= CPU_MAX.max(target.cpu), "{name}: {took:?} for {} bytes of input", input.len());
    }
    verdict
}

/// Processor time of this thread in `run`. Good to about 4 ms, a tick of the kernel's clock.
pub(crate) fn cpu_of<T>(run: impl FnOnce() -> T) -> Duration {
    let began = cpu();
    std::hint::black_box(run());
    cpu().saturating_sub(began)
}

/// Nanoseconds on a processor are the first number of schedstat (Linux, Documentation/scheduler/sched-stats).
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstat");
    let nanoseconds = text.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    Duration::from_nanos(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(heap: fn(usize) -> usize, run: fn(&[u8]) -> Verdict) -> Target {
        Target { name: "test", len_max: 64, cpu: Duration::ZERO, heap, run, shapes: &[] }
    }

    fn hoarder(input: &[u8]) -> Verdict {
        std::hint::black_box(vec![0u8; input.len() * 100]);
        Verdict::Accepted
    }

    #[test]
    fn heap_within_the_bound_is_fine() {
        assert_eq!(run(&target(|n| n * 100, hoarder), &[0; 10]), Verdict::Accepted);
    }

    #[test]
    #[should_panic(expected = "1000 bytes of heap for 10 bytes of input, 990 allowed")]
    fn heap_beyond_the_bound_is_a_finding() {
        run(&target(|n| n * 99, hoarder), &[0; 10]);
    }

    fn spinner(_: &[u8]) -> Verdict {
        let began = Instant::now();
        while began.elapsed() < CPU_MAX * 4 {
            std::hint::black_box(0);
        }
        Verdict::Refused
    }

    fn sleeper(_: &[u8]) -> Verdict {
        std::thread::sleep(CPU_MAX + Duration::from_millis(50));
        Verdict::Refused
    }

    #[test]
    #[should_panic(expected = "for 10 bytes of input")]
    fn time_beyond_the_bound_is_a_finding() {
        run(&target(|_| 0, spinner), &[0; 10]);
    }

    #[test]
    fn time_of_others_is_not() {
        assert_eq!(run(&target(|_| 0, sleeper), &[0; 10]), Verdict::Refused);
    }
}
