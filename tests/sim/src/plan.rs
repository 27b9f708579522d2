//! What a seed means: the options of a run, printed where it fails.

use crate::dice::Dice;
use ambitd::replica::pull;
use std::fmt;

/// Virtual microseconds.
pub(crate) type Micros = u64;
pub(crate) const MS: Micros = 1_000;
pub(crate) const SECOND: Micros = 1_000_000;
pub(crate) const YEAR_MS: i64 = 31_536_000_000;

/// Every so many seeds the run is of several cells.
const SEVERAL_EVERY: u64 = 8;

/// What happens between the cells of a run.
#[derive(Clone, Debug)]
pub(crate) struct Between {
    /// Of a letter, at most.
    pub(crate) delay_max: Micros,
    /// Of letters that are this much late, or lost.
    pub(crate) loss_per_mille: u64,
    /// Mean time between two cuts of a link; none where 0. The same for all below.
    pub(crate) cut_every: Micros,
    /// All replicas of a cell stop, and start again.
    pub(crate) restart_every: Micros,
    /// When one of the cells begins anew, of the whole run; never where 0.
    pub(crate) anew_at: Micros,
    /// Answers to pulls that are not what the origin said.
    pub(crate) lies_per_mille: u64,
    /// Records asked for at once.
    pub(crate) pull_limit: u32,
}

/// The options of one run, or of one cell of it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// How long faults last; then a quorum is healed and must make progress.
    pub(crate) length: Micros,
    pub(crate) clients: usize,
    pub(crate) loss_per_mille: u64,
    pub(crate) duplicate_per_mille: u64,
    /// Of a message, at most; the least is 100 us. Differences reorder.
    pub(crate) delay_max: Micros,
    /// Mean time between two faults of each kind; none where 0.
    pub(crate) partition_every: Micros,
    pub(crate) crash_every: Micros,
    pub(crate) pause_every: Micros,
    pub(crate) disk_every: Micros,
    pub(crate) transfer_every: Micros,
    pub(crate) member_every: Micros,
    pub(crate) rivals_every: Micros,
    pub(crate) jump_every: Micros,
    /// What passes from one replica to one other takes this much longer.
    pub(crate) slow_link: Micros,
    /// Of one sync, at most.
    pub(crate) sync_max: Micros,
    /// One replica's wall clock is off by this, milliseconds.
    pub(crate) clock_off_ms: i64,
    /// One replica's clocks run fast or slow by so many millionths.
    pub(crate) drift_ppm: i64,
    /// One replica's disk may lose everything, or have bit flips in its log or its snapshot.
    pub(crate) ruin: bool,
    /// Ten minutes without a quorum in the middle.
    pub(crate) outage: bool,
    /// Entries between snapshots, and kept behind them.
    pub(crate) snapshot_after: u64,
    pub(crate) keep_entries: u64,
    /// None where the cell is alone.
    pub(crate) between: Option<Between>,
}

impl Between {
    fn of(seed: u64) -> Between {
        let mut dice = Dice::new(seed ^ 0x6265_7477);
        let d = &mut dice;
        let sometimes = |d: &mut Dice, per_mille, low, high| {
            let every = d.between(low, high);
            if d.per_mille(per_mille) { every * MS } else { 0 }
        };
        let (far, narrow) = (d.per_mille(300), d.per_mille(300));
        Between {
            delay_max: d.between(1, if far { 1_500 } else { 60 }) * MS,
            loss_per_mille: if d.per_mille(400) { d.below(100) } else { 0 },
            cut_every: sometimes(d, 700, 200, 2_000),
            restart_every: sometimes(d, 400, 1_000, 4_000),
            anew_at: sometimes(d, 350, 800, 4_000),
            lies_per_mille: if d.per_mille(600) { d.between(20, 500) } else { 0 },
            pull_limit: if narrow { d.between(1, 8) as u32 } else { pull::LIMIT },
        }
    }
}

impl Plan {
    /// Whether this seed's run is of several cells.
    pub(crate) fn is_of_several(seed: u64) -> bool {
        seed.is_multiple_of(SEVERAL_EVERY)
    }

    /// Whether this seed's run is of cells and a grant.
    pub(crate) fn is_of_a_grant(seed: u64) -> bool {
        seed % SEVERAL_EVERY == SEVERAL_EVERY / 2
    }

    /// Of one cell of several: each has faults of its own.
    pub(crate) fn of_cell(seed: u64, number: u64, length: Micros) -> Plan {
        let plan = Plan::of(Dice::new(seed ^ (number << 56)).next(), length);
        Plan { outage: false, between: Some(Between::of(seed)), ..plan }
    }

    pub(crate) fn of(seed: u64, length: Micros) -> Plan {
        let mut dice = Dice::new(seed ^ 0x706c_616e);
        let d = &mut dice;
        let sometimes = |d: &mut Dice, per_mille, low, high| {
            let every = d.between(low, high);
            if d.per_mille(per_mille) { every * MS } else { 0 }
        };
        let (far, slow) = (d.per_mille(200), d.per_mille(150));
        let plan = Plan {
            seed,
            length,
            clients: d.between(2, 6) as usize,
            loss_per_mille: if d.per_mille(600) { d.below(60) } else { 0 },
            duplicate_per_mille: if d.per_mille(500) { d.below(60) } else { 0 },
            delay_max: d.between(1, if far { 120 } else { 12 }) * MS,
            partition_every: sometimes(d, 600, 400, 3_000),
            crash_every: sometimes(d, 700, 300, 3_000),
            pause_every: sometimes(d, 300, 500, 4_000),
            disk_every: sometimes(d, 500, 300, 3_000),
            transfer_every: sometimes(d, 300, 500, 3_000),
            member_every: sometimes(d, 300, 700, 3_000),
            rivals_every: sometimes(d, 400, 200, 1_500),
            jump_every: sometimes(d, 200, 300, 2_000),
            slow_link: sometimes(d, 250, 20, 500),
            sync_max: d.between(1, if slow { 100 } else { 8 }) * MS,
            clock_off_ms: match d.below(8) {
                0 => YEAR_MS,
                1 => -YEAR_MS,
                2 => d.between(0, 4_000) as i64 - 2_000,
                _ => 0,
            },
            drift_ppm: if d.per_mille(300) { d.between(0, 100_000) as i64 - 50_000 } else { 0 },
            ruin: d.per_mille(200),
            outage: d.per_mille(15),
            snapshot_after: d.between(10, 300),
            keep_entries: d.between(2, 60),
            between: None,
        };
        // The long outage is a fault of its own: its ten minutes are for what time does.
        let calm = Plan {
            partition_every: 0,
            crash_every: 0,
            pause_every: 0,
            disk_every: 0,
            transfer_every: 0,
            member_every: 0,
            rivals_every: 0,
            jump_every: 0,
            ruin: false,
            ..plan.clone()
        };
        if plan.outage { calm } else { plan }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} s, {} clients, loss {}/1000, duplicates {}/1000, delay to {} ms, sync to {} ms; every (ms): partition {}, \
             crash {}, pause {}, disk fault {}, transfer {}, member {}, rivals {}, \
             clock set {}; a link slower by {} ms; clock {:+} ms, drift {:+} ppm, ruin {}, outage {}, \
             snapshot after {}, keeping {}",
            self.length / SECOND,
            self.clients,
            self.loss_per_mille,
            self.duplicate_per_mille,
            self.delay_max / MS,
            self.sync_max / MS,
            self.partition_every / MS,
            self.crash_every / MS,
            self.pause_every / MS,
            self.disk_every / MS,
            self.transfer_every / MS,
            self.member_every / MS,
            self.rivals_every / MS,
            self.jump_every / MS,
            self.slow_link / MS,
            self.clock_off_ms,
            self.drift_ppm,
            self.ruin,
            self.outage,
            self.snapshot_after,
            self.keep_entries,
        )
    }
}

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "between cells: delay to {} ms, loss {}/1000; every (ms): cut {}, restart of a cell {}; one begins anew at {} ms; lies {}/1000, {} records a \
             pull",
            self.delay_max / MS,
            self.loss_per_mille,
            self.cut_every / MS,
            self.restart_every / MS,
            self.anew_at / MS,
            self.lies_per_mille,
            self.pull_limit
        )
    }
}
