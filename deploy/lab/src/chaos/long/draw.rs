//! What a seed expands to: the steps of a run, drawn one after the other. Pure.

use std::fmt;

/// Every so many kills the majority goes too, for a while.
const NO_QUORUM_EVERY: u32 = 25;
/// How long there is no quorum, milliseconds.
const NO_QUORUM_MS: u64 = 10_000;
/// Numbers of replicas end at 7, and a number is never used twice: a cell that began with three can replace four.
const REPLACED_MAX: u32 = 4;

/// Random numbers that are the same for the same seed on every machine (SplitMix64, Steele et al. 2014).
pub(in crate::chaos) struct Draw(u64);

impl Draw {
    pub(in crate::chaos) fn new(seed: u64) -> Self {
        Self(seed)
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    /// A number below `n`; 0 where there is none. The bias is one in 2^40 at the sizes used here.
    pub(in crate::chaos) fn below(&mut self, n: u64) -> u64 {
        self.next().checked_rem(n).unwrap_or_default()
    }
    /// A number of `from` to `to`.
    pub(super) fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to.saturating_sub(from) + 1)
    }
    /// True in `n` of `of` cases.
    pub(super) fn chance(&mut self, n: u64, of: u64) -> bool {
        self.below(of) < n
    }
}

/// Whom a fault hits; known only when its turn comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// Whoever leads then.
    Leader,
    /// One of the two others: the first or the second of them.
    Follower(u64),
}

/// What a replica is cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// From everything, clients too: its link is down.
    Unplugged,
    /// From the other replicas, both ways; clients still reach it.
    Isolated,
    /// What it sends to the other replicas is lost; what they send arrives.
    Mute,
    /// What the other replicas send to it is lost; what it sends arrives.
    Deaf,
    /// What it sends to one of the others is lost, and nothing else.
    OneWay,
}

/// One step of a run. Each has ended and is reverted before the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// SIGKILL, and a start after so long.
    Kill { who: Who, down_ms: u64 },
    /// SIGTERM, and a start.
    Restart { who: Who },
    /// SIGSTOP, and SIGCONT after so long, which is longer than an election takes.
    Pause { who: Who, ms: u64 },
    /// A partition.
    Part { who: Who, part: Part, ms: u64 },
    /// The disk of one replica is full.
    Fill { ms: u64 },
    /// A follower is removed, killed, and its machine joins as a new replica with an empty disk.
    Replace { follower: u64, alive: bool },
    /// Leadership is handed to a follower.
    Transfer { follower: u64 },
    /// The leader and a follower are killed: a named phase without quorum.
    NoQuorum { ms: u64 },
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Kill { who, down_ms } => write!(f, "kill -9 of {who}, down {down_ms} ms"),
            Act::Restart { who } => write!(f, "restart of {who}"),
            Act::Pause { who, ms } => write!(f, "SIGSTOP of {who} for {ms} ms"),
            Act::Part { who, part, ms } => write!(f, "{who} {part} for {ms} ms"),
            Act::Fill { ms } => write!(f, "disk full for {ms} ms"),
            Act::Replace { alive, .. } => {
                write!(f, "a follower removed {} and replaced", if *alive { "while it runs" } else { "when dead" })
            }
            Act::Transfer { .. } => f.write_str("leadership handed over"),
            Act::NoQuorum { ms } => write!(f, "no quorum for {} s: kill -9 of the leader and a follower", ms / 1000),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Who::Leader => "the leader",
            Who::Follower(_) => "a follower",
        })
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Unplugged => "cut from all",
            Part::Isolated => "cut from its peers, not from clients,",
            Part::Mute => "unheard by its peers",
            Part::Deaf => "deaf to its peers",
            Part::OneWay => "unheard by one peer",
        })
    }
}

/// What follows a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Every replica must have caught up.
    Whole,
    /// The next step comes so soon, while replicas may still catch up: fewer than a majority are down all the same.
    After(u64),
}

/// The steps of a run with `kills` single kills, and what comes after each.
pub(super) fn steps(seed: u64, kills: u32) -> Vec<(Act, Then)> {
    let mut draw = Draw::new(seed);
    let mut steps = Vec::new();
    let (mut others, mut replaced) = (Vec::new(), 0);
    for n in 1..=kills {
        let who = who(&mut draw);
        steps.push((Act::Kill { who, down_ms: draw.between(100, 2_000) }, then(&mut draw)));
        // Each kind in turn, in an order of its own each time: a run of a few kills sees most of them too.
        if others.is_empty() {
            others = shuffled(&mut draw);
        }
        let wanted = if kills < 10 { others.len().div_ceil(kills as usize) } else { draw.below(2) as usize };
        for kind in others.drain(..wanted.min(others.len())).collect::<Vec<_>>() {
            if kind == Kind::Replace {
                if replaced == REPLACED_MAX {
                    continue;
                }
                replaced += 1;
            }
            let act = act(&mut draw, kind);
            // A replica that joins needs all the others.
            let then = if kind == Kind::Replace { Then::Whole } else { then(&mut draw) };
            if kind == Kind::Replace
                && let Some((_, before)) = steps.last_mut()
            {
                *before = Then::Whole;
            }
            steps.push((act, then));
        }
        if n % NO_QUORUM_EVERY == 0 || n == kills {
            steps.push((Act::NoQuorum { ms: NO_QUORUM_MS }, Then::Whole));
        }
    }
    steps
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Restart,
    Pause,
    PauseLeader,
    Part(Part),
    Fill,
    Replace,
    Transfer,
}

fn shuffled(draw: &mut Draw) -> Vec<Kind> {
    let mut kinds = vec![
        Kind::Restart,
        Kind::Pause,
        Kind::PauseLeader,
        Kind::Part(Part::Unplugged),
        Kind::Part(Part::Isolated),
        Kind::Part(Part::Mute),
        Kind::Part(Part::Deaf),
        Kind::Part(Part::OneWay),
        Kind::Fill,
        Kind::Replace,
        Kind::Transfer,
    ];
    for n in (1..kinds.len()).rev() {
        kinds.swap(n, draw.below(n as u64 + 1) as usize);
    }
    kinds
}

fn act(draw: &mut Draw, kind: Kind) -> Act {
    match kind {
        Kind::Restart => Act::Restart { who: who(draw) },
        Kind::Pause => Act::Pause { who: Who::Follower(draw.below(2)), ms: draw.between(700, 2_500) },
        Kind::PauseLeader => Act::Pause { who: Who::Leader, ms: draw.between(700, 2_500) },
        Kind::Part(part) => Act::Part { who: who(draw), part, ms: draw.between(700, 3_000) },
        Kind::Fill => Act::Fill { ms: draw.between(1_000, 3_000) },
        Kind::Replace => Act::Replace { follower: draw.below(2), alive: draw.chance(1, 2) },
        Kind::Transfer => Act::Transfer { follower: draw.below(2) },
    }
}

/// The leader half of the time.
fn who(draw: &mut Draw) -> Who {
    if draw.chance(1, 2) { Who::Leader } else { Who::Follower(draw.below(2)) }
}

fn then(draw: &mut Draw) -> Then {
    if draw.chance(2, 3) { Then::Whole } else { Then::After(draw.below(700)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_steps_each_time_and_another_gives_others() {
        assert_eq!(steps(1, 100), steps(1, 100));
        assert_ne!(steps(1, 100), steps(2, 100));
    }

    #[test]
    fn runs_have_their_kills_and_every_kind_of_fault() {
        for (seed, kills) in [(1, 3), (2, 10), (3, 100), (4, 1)] {
            let steps = steps(seed, kills);
            let count = |f: fn(&Act) -> bool| steps.iter().filter(|(act, _)| f(act)).count();
            assert_eq!(count(|a| matches!(a, Act::Kill { .. })), kills as usize);
            assert!(count(|a| matches!(a, Act::Replace { .. })) <= REPLACED_MAX as usize);
            assert!(count(|a| matches!(a, Act::NoQuorum { .. })) >= 1);
            if kills != 10 {
                assert!(count(|a| matches!(a, Act::Fill { .. })) >= 1, "{steps:?}");
                assert!(count(|a| matches!(a, Act::Replace { .. })) >= 1, "{steps:?}");
                assert!(count(|a| matches!(a, Act::Pause { who: Who::Leader, .. })) >= 1, "{steps:?}");
                assert!(count(|a| matches!(a, Act::Part { part: Part::Isolated, .. })) >= 1, "{steps:?}");
            }
        }
        let leaders =
            steps(3, 400).into_iter().filter(|(a, _)| matches!(a, Act::Kill { who: Who::Leader, .. })).count();
        assert!((150..250).contains(&leaders), "{leaders} of 400");
    }
}
