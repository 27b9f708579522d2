//! What a run did, for its summary and its digest.

/// What a run did, for its summary and its digest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) acknowledged: u64,
    pub(crate) reads: u64,
    /// Runs in which two of three voters had to go on by themselves.
    pub(crate) quorums: u64,
    pub(crate) entries: u64,
    pub(crate) crashes: u64,
    pub(crate) partitions: u64,
    pub(crate) pauses: u64,
    pub(crate) disk_faults: u64,
    pub(crate) ruined: u64,
    pub(crate) replaced: u64,
    pub(crate) elections: u64,
    pub(crate) pulls: u64,
    pub(crate) imports: u64,
    pub(crate) lies: u64,
    /// Over every entry of every cell.
    pub(crate) trail: [u8; 32],
}

impl Tally {
    /// Of several cells.
    pub(crate) fn add(&mut self, other: &Tally) {
        for (sum, more) in self.counts().into_iter().zip(other.clone().counts()) {
            *sum += *more;
        }
        for (sum, more) in self.trail.iter_mut().zip(other.trail) {
            *sum = sum.rotate_left(1) ^ more;
        }
    }

    fn counts(&mut self) -> [&mut u64; 14] {
        [
            &mut self.acknowledged,
            &mut self.reads,
            &mut self.quorums,
            &mut self.entries,
            &mut self.crashes,
            &mut self.partitions,
            &mut self.pauses,
            &mut self.disk_faults,
            &mut self.ruined,
            &mut self.replaced,
            &mut self.elections,
            &mut self.pulls,
            &mut self.imports,
            &mut self.lies,
        ]
    }
}
