//! The lease under which a home with a witness signs, and the wait of who takes its authority over.
//!
//! Pure: the clock is an argument, and is one that counts from boot also while the machine sleeps and that nobody sets
//! (CLOCK_BOOTTIME). A lease is counted from *sending* the question: the granter, who answers later, waits longer than
//! the home signs, by [`margin_ms`] for clocks that drift.
//!
//! Never: a signature outside of it because it was in time a moment ago. Whoever signs asks [`Lease::may_sign`] as the last
//! step before each signature, and again before the signature leaves.

use ambit_model::grant::{Naming, Vouch};
use ambit_model::{Code, Refusal, TrustDomain};
use std::collections::BTreeMap;

/// Milliseconds since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Boot(pub u64);

impl Boot {
    fn plus_ms(self, ms: u64) -> Boot {
        Boot(self.0.saturating_add(ms))
    }
}

/// Clocks that each drift by up to a twentieth differ by a tenth; and a second for what is rounded.
pub fn margin_ms(lease_ms: u64) -> u64 {
    lease_ms / 8 + 1_000
}

/// How long the granters are silent before a grant takes effect.
pub fn wait_ms(vouch: &Vouch) -> u64 {
    match vouch {
        Vouch::Approvers => 0,
        Vouch::Witness { lease_ms, .. } => lease_ms + margin_ms(*lease_ms),
    }
}

/// How long after it proposed an entry a holder's replica signs it: less than any wait, and than cells are apart.
const SIGN_WITHIN_MS: u64 = 30_000;

fn sign_within_ms(vouch: &Vouch) -> u64 {
    match vouch {
        Vouch::Approvers => SIGN_WITHIN_MS,
        Vouch::Witness { lease_ms, .. } => SIGN_WITHIN_MS.min(*lease_ms),
    }
}

/// What a granter answers when it was asked to renew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Who says so.
    pub granter: TrustDomain,
    /// Of the question.
    pub nonce: [u8; 16],
    /// The home's, as it asked.
    pub epoch: u64,
    /// The lease's term, as the granter knows it.
    pub lease_ms: u64,
}

/// Questions without an answer, of one granter.
const ASKED_MAX: usize = 8;

/// One replica's lease. Each has its own: what another asked at, this one's clock cannot tell.
#[derive(Debug, Default)]
pub struct Lease {
    asked: Vec<(TrustDomain, [u8; 16], u64, Boot)>,
    /// By granter: the epoch, when it was asked, and the term that it answered, ms.
    held: BTreeMap<TrustDomain, (u64, Boot, u64)>,
}

impl Lease {
    /// A question leaves now.
    pub fn ask(&mut self, granter: &TrustDomain, nonce: [u8; 16], epoch: u64, now: Boot) {
        while self.asked.iter().filter(|(of, ..)| of == granter).count() >= ASKED_MAX {
            let oldest = self.asked.iter().position(|(of, ..)| of == granter);
            oldest.map(|at| self.asked.remove(at));
        }
        self.asked.push((granter.clone(), nonce, epoch, now));
    }

    /// It was renewed, counted from the question that this answers. An answer to no question of ours says nothing.
    pub fn renewed(&mut self, renewal: &Renewal) -> bool {
        let Renewal { granter, nonce, epoch, lease_ms } = renewal;
        let fits = |(of, n, e, _): &(TrustDomain, [u8; 16], u64, Boot)| (of, n, e) == (granter, nonce, epoch);
        let Some(at) = self.asked.iter().position(fits) else { return false };
        let (.., sent) = self.asked.remove(at);
        let now = (*epoch, sent, *lease_ms);
        let held = self.held.entry(granter.clone()).or_insert(now);
        // Of two answers the later question's counts, whatever came first.
        if (held.0, held.1) <= (now.0, now.1) {
            *held = now;
        }
        true
    }

    /// Until when this replica may sign in this epoch under such a naming; none where it may not at all.
    pub fn until(&self, naming: &Naming, epoch: u64) -> Option<Boot> {
        // Who waits for this naming's term waits no longer, whatever another naming's was when the granter answered.
        let Vouch::Witness { lease_ms, .. } = &naming.vouch else { return None };
        let of = |granter: &TrustDomain| {
            let held = self.held.get(granter).filter(|(e, ..)| *e == epoch);
            held.map(|(_, sent, answered)| sent.plus_ms((*answered).min(*lease_ms)))
        };
        // A majority of three: the home, and one of the two.
        naming.witness().and_then(of).max(of(&naming.standby))
    }

    /// The last step before a signature, and again before it leaves: [`Lease::check`] at that very moment.
    ///
    /// # Errors
    /// [`Code::LeaseEnded`].
    pub fn may_sign(&self, namings: &[Naming], epoch: u64, now: Boot) -> Result<(), Refusal> {
        #[cfg(ambit_mutant)]
        if crate::mutant::is("lease-at-apply-only") {
            return Ok(());
        }
        self.check(namings, epoch, now)
    }

    /// Whether it may sign now, under every naming that somebody may act on: who asks for what would not be signed is told
    /// before anything is committed.
    ///
    /// # Errors
    /// [`Code::LeaseEnded`].
    pub fn check(&self, namings: &[Naming], epoch: u64, now: Boot) -> Result<(), Refusal> {
        for naming in namings.iter().filter(|naming| naming.witness().is_some()) {
            if self.until(naming, epoch).is_none_or(|until| until <= now) {
                let expected = format!("a lease renewed by {naming}");
                let found = self.until(naming, epoch).map_or("none".to_owned(), |until| {
                    format!("one that ended {} ms ago", now.0.saturating_sub(until.0))
                });
                return Err(Refusal::new(Code::LeaseEnded, expected, found));
            }
        }
        Ok(())
    }
}

/// One replica of a holder: since when it has seen that nobody renews the home's lease any more, by its own clock. The
/// state's stamps may jump where a leader's clocks were set; this does not.
#[derive(Debug, Default)]
pub struct Wait {
    since: BTreeMap<(TrustDomain, u64), Boot>,
}

impl Wait {
    /// It is seen now, of this home and epoch.
    pub fn see(&mut self, home: &TrustDomain, epoch: u64, now: Boot) {
        self.since.entry((home.clone(), epoch)).or_insert(now);
    }

    /// Whether it may sign for the home, at this very moment, what it proposed then. A replica that lags knows nothing of
    /// what came after its entry: a later epoch, or that the authority was given back. Neither takes effect as soon as what
    /// it may still sign is signed.
    ///
    /// # Errors
    /// [`Code::StandbyUngranted`] before the wait is over, and for what was proposed too long ago.
    pub fn may_sign(
        &self,
        (home, epoch): (&TrustDomain, u64),
        vouch: &Vouch,
        proposed: Boot,
        now: Boot,
    ) -> Result<(), Refusal> {
        let within = sign_within_ms(vouch);
        if proposed.plus_ms(within) <= now {
            let found = format!("{} ms ago", now.0.saturating_sub(proposed.0));
            return Err(Refusal::new(Code::StandbyUngranted, format!("an entry proposed within {within} ms"), found));
        }
        self.check(home, epoch, vouch, now)
    }

    /// Whether the wait is over.
    ///
    /// # Errors
    /// [`Code::StandbyUngranted`].
    pub fn check(&self, home: &TrustDomain, epoch: u64, vouch: &Vouch, now: Boot) -> Result<(), Refusal> {
        let wait = wait_ms(vouch);
        #[cfg(ambit_mutant)]
        let wait = if crate::mutant::is("grant-before-lease-ends") { 0 } else { wait };
        let since = self.since.get(&(home.clone(), epoch));
        if since.is_some_and(|since| since.plus_ms(wait) <= now) {
            return Ok(());
        }
        let found = since
            .map_or("no end of them seen".to_owned(), |since| format!("{} ms of them", now.0.saturating_sub(since.0)));
        Err(Refusal::new(
            Code::StandbyUngranted,
            format!("{wait} ms after renewals of the lease of {home} ended"),
            found,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naming() -> Naming {
        "east with witness core and lease 8 s".parse().unwrap()
    }
    fn td(name: &str) -> TrustDomain {
        name.parse().unwrap()
    }
    fn answer(granter: &str, nonce: u8, epoch: u64) -> Renewal {
        Renewal { granter: td(granter), nonce: [nonce; 16], epoch, lease_ms: 8_000 }
    }

    #[test]
    fn a_lease_counts_from_the_question_of_either_granter_and_of_this_epoch() {
        let mut lease = Lease::default();
        let may = |lease: &Lease, epoch, at| lease.check(&[naming()], epoch, Boot(at)).is_ok();
        assert!(!may(&lease, 1, 0));
        lease.ask(&td("east"), [1; 16], 1, Boot(1_000));
        // Answered late: it ends eight seconds after the question all the same.
        assert!(lease.renewed(&answer("east", 1, 1)));
        assert!(may(&lease, 1, 8_999) && !may(&lease, 1, 9_000) && !may(&lease, 2, 2_000));
        // No question, a question to another, a question of another epoch, and one answered before.
        lease.ask(&td("core"), [2; 16], 1, Boot(5_000));
        for wrong in [answer("core", 9, 1), answer("east", 2, 1), answer("core", 2, 2), answer("east", 1, 1)] {
            assert!(!lease.renewed(&wrong), "{wrong:?}");
        }
        assert!(!may(&lease, 1, 9_000));
        assert!(lease.renewed(&answer("core", 2, 1)));
        assert!(may(&lease, 1, 12_999) && !may(&lease, 1, 13_000));
        // An older answer shortens nothing.
        lease.ask(&td("core"), [3; 16], 1, Boot(2_000));
        assert!(lease.renewed(&answer("core", 3, 1)));
        assert!(may(&lease, 1, 12_999));
    }

    #[test]
    fn every_naming_that_may_be_acted_on_wants_its_own_and_none_without_a_witness() {
        let mut lease = Lease::default();
        lease.ask(&td("east"), [1; 16], 1, Boot(0));
        assert!(lease.renewed(&answer("east", 1, 1)));
        let (other, vouched) = ("north with witness south and lease 8 s".parse().unwrap(), "north".parse().unwrap());
        assert!(lease.check(&[naming(), vouched], 1, Boot(1)).is_ok());
        assert!(lease.check(&[naming(), other], 1, Boot(1)).is_err());
        assert!(lease.check(&[], 1, Boot(u64::MAX)).is_ok());
    }

    /// Who waits, waits for the term of the naming that it knows: what was answered under another does not outlast it.
    #[test]
    fn a_naming_of_another_term_is_held_to_its_own() {
        let of = |lease: &str| format!("east with witness core and lease {lease}").parse::<Naming>().unwrap();
        let (long, short) = (of("900 s"), of("4 s"));
        for (answered, asked_of, until) in [(900_000, &short, 4_000), (900_000, &long, 900_000), (4_000, &long, 4_000)]
        {
            let mut lease = Lease::default();
            lease.ask(&td("east"), [1; 16], 1, Boot(0));
            assert!(lease.renewed(&Renewal { lease_ms: answered, ..answer("east", 1, 1) }));
            let may = |at| lease.check(std::slice::from_ref(asked_of), 1, Boot(at)).is_ok();
            assert!(may(until - 1) && !may(until), "{answered} under {asked_of}");
        }
    }

    /// I20 in numbers: whatever both clocks drift by, the home has stopped when the holder begins.
    #[test]
    fn who_waits_waits_longer_than_the_home_signs_whatever_the_clocks_drift_by() {
        for lease_ms in [4_000u64, 5_000, 60_000, 900_000] {
            let vouch = Vouch::Witness { cell: td("core"), lease_ms };
            for (slow, fast) in [(950u64, 1_050u64), (1_000, 1_000), (1_050, 950)] {
                // The home's clock counts `slow` thousandths, the holder's `fast`.
                let signs = lease_ms * 1_000 / slow;
                let waits = wait_ms(&vouch) * 1_000 / fast;
                assert!(waits > signs, "{lease_ms}: {waits} {signs}");
            }
        }
    }

    #[test]
    fn a_wait_begins_when_it_is_seen_first_and_never_before() {
        let (mut wait, vouch) = (Wait::default(), Vouch::Witness { cell: td("core"), lease_ms: 8_000 });
        let may = |wait: &Wait, at| wait.check(&td("west"), 2, &vouch, Boot(at)).is_ok();
        assert!(!may(&wait, u64::MAX));
        wait.see(&td("west"), 2, Boot(100));
        wait.see(&td("west"), 2, Boot(5_000));
        assert!(!may(&wait, 10_099) && may(&wait, 10_100));
        assert!(wait.check(&td("west"), 3, &vouch, Boot(u64::MAX)).is_err());
        // What it proposed is signed within the lease, or by nobody.
        for (proposed, at, signs) in [(20_000, 27_999, true), (20_000, 28_000, false), (10_000, 10_099, false)] {
            let signed = wait.may_sign((&td("west"), 2), &vouch, Boot(proposed), Boot(at));
            assert_eq!(signed.is_ok(), signs, "{proposed} {at}");
        }
    }
}
