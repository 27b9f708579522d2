//! The network: delay, loss, duplication, reordering by unequal delays, and cuts, one way or both.

use crate::dice::Dice;
use crate::plan::{Micros, Plan};
use std::collections::BTreeSet;

/// The least delay of a message.
const DELAY_MIN: Micros = 100;

pub(crate) struct Network {
    dice: Dice,
    loss_per_mille: u64,
    duplicate_per_mille: u64,
    delay_max: Micros,
    /// From, to: nothing passes.
    cut: BTreeSet<(u64, u64)>,
    /// From, to, and how much longer it takes.
    slow: Option<((u64, u64), Micros)>,
    quiet: bool,
}

impl Network {
    pub(crate) fn new(plan: &Plan, dice: Dice) -> Network {
        Network {
            dice,
            loss_per_mille: plan.loss_per_mille,
            duplicate_per_mille: plan.duplicate_per_mille,
            delay_max: plan.delay_max,
            cut: BTreeSet::new(),
            slow: None,
            quiet: false,
        }
    }

    /// When a message that leaves at `at` arrives: not at all, once or twice.
    pub(crate) fn arrivals(&mut self, from: u64, to: u64, at: Micros) -> Vec<Micros> {
        if self.cut.contains(&(from, to)) || (!self.quiet && self.dice.per_mille(self.loss_per_mille)) {
            return Vec::new();
        }
        let copies = if !self.quiet && self.dice.per_mille(self.duplicate_per_mille) { 2 } else { 1 };
        let longest = if self.quiet { DELAY_MIN * 4 } else { self.delay_max };
        let slow = self.slow.filter(|(link, _)| *link == (from, to)).map_or(0, |(_, longer)| longer);
        (0..copies).map(|_| at + slow + self.dice.between(DELAY_MIN, longest.max(DELAY_MIN + 1))).collect()
    }

    /// Cuts the members apart in one of the ways that networks fail.
    pub(crate) fn cut(&mut self, members: &[u64]) -> &'static str {
        self.cut.clear();
        let alone = self.dice.pick(members).copied().unwrap_or_default();
        let others = members.iter().copied().filter(|m| *m != alone);
        match self.dice.below(4) {
            0 => {
                self.cut.extend(others.flat_map(|other| [(alone, other), (other, alone)]));
                "one alone"
            }
            1 => {
                self.cut.extend(others.map(|other| (alone, other)));
                "one not heard"
            }
            2 => {
                self.cut.extend(others.map(|other| (other, alone)));
                "one deaf"
            }
            _ => {
                // Each hears some: no two see the same majority (etcd's ring).
                let ring = members.iter().zip(members.iter().cycle().skip(1));
                self.cut.extend(ring.map(|(a, b)| (*a, *b)));
                "a ring"
            }
        }
    }

    /// One link is slow, one way.
    pub(crate) fn slow_down(&mut self, members: &[u64], longer: Micros) {
        let from = self.dice.pick(members).copied();
        let others: Vec<u64> = members.iter().copied().filter(|m| Some(*m) != from).collect();
        let link = from.zip(self.dice.pick(&others).copied());
        self.slow = link.filter(|_| longer > 0).map(|link| (link, longer));
    }

    pub(crate) fn mend(&mut self) {
        self.cut.clear();
    }

    /// From here on nothing is lost, doubled or late.
    pub(crate) fn calm(&mut self) {
        self.mend();
        self.slow = None;
        self.quiet = true;
    }
}
