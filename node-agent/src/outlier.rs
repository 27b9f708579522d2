//! Which endpoints are avoided, decided by what connections and probes found out. Pure: time is an argument.
//!
//! An endpoint is put out where its tunnel failed, or where it was silent or turned connections away several times in a row.
//! It comes back after good probes, or good connections where it was used all the same; the more often it was put out lately, the
//! longer it must have been good. An endpoint alone is judged, never its node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// Turned away by the workload so often in a row: it does not answer at its port.
const TURNED_AWAY_MAX: u32 = 3;
/// Silent so often in a row while another endpoint answered.
const SILENT_MAX: u32 = 2;
/// What is longer ago says nothing of now: an endpoint that was good for so long has no past.
pub const FORGET_AFTER: Duration = Duration::from_secs(60);
/// After the second time it must be good for so long, after each further one for twice as long.
const GOOD_FOR_FIRST: Duration = Duration::from_millis(500);
/// But for no longer than this.
const GOOD_FOR_MAX: Duration = Duration::from_secs(30);
/// Endpoints that anything is remembered of; beyond it the one that was in trouble longest ago is forgotten.
const KNOWN_MAX: usize = 10_000;

/// An endpoint, or one port of it; 0: all of them, as its tunnel is for all.
pub type Key = (IpAddr, u16);

/// Endpoints that are avoided now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unhealthy(BTreeSet<Key>);

impl Unhealthy {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }
    /// Whether connections to this port avoid the endpoint.
    pub fn avoids(&self, address: IpAddr, port: u16) -> bool {
        self.0.contains(&(address, 0)) || self.0.contains(&(address, port))
    }
}

impl FromIterator<IpAddr> for Unhealthy {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        Self(addresses.into_iter().map(|address| (address, 0)).collect())
    }
}

/// What a connection or a probe found out about an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A connection was opened, or a probe went through.
    Good,
    /// No tunnel, or it broke: at once enough.
    NoTunnel,
    /// Nothing came while another endpoint answered that was asked later.
    Silent,
    /// The tunnel is there, and the workload does not answer.
    TurnedAway,
}

impl Evidence {
    /// As operators read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::NoTunnel => "no_tunnel",
            Self::Silent => "silent",
            Self::TurnedAway => "turned_away",
        }
    }
}

/// What became of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing new.
    None,
    /// It is avoided from now on.
    Out,
    /// It is used again.
    Back,
}

/// What is remembered of one. Times are since some moment that is the same for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Put out, and since when; else in use.
    pub out: Option<(Evidence, Duration)>,
    /// How often it was put out without having been good for long between.
    pub times: u32,
    silent: u32,
    turned_away: u32,
    /// Good without a break since then.
    good_since: Option<Duration>,
    last_bad: Duration,
}

impl Known {
    fn new(now: Duration) -> Self {
        Self { out: None, times: 0, silent: 0, turned_away: 0, good_since: None, last_bad: now }
    }

    /// How long it must be good before it is used again.
    pub fn good_for(&self) -> Duration {
        match self.times {
            0 | 1 => Duration::ZERO,
            n => GOOD_FOR_FIRST.saturating_mul(1 << (n - 2).min(16)).min(GOOD_FOR_MAX),
        }
    }

    fn good(&mut self, now: Duration) -> Change {
        (self.silent, self.turned_away) = (0, 0);
        let since = *self.good_since.get_or_insert(now);
        if self.out.is_none() || now.saturating_sub(since) < self.good_for() {
            return Change::None;
        }
        self.out = None;
        Change::Back
    }

    fn bad(&mut self, evidence: Evidence, now: Duration) -> Change {
        let was_long_good = self.out.is_none() && now.saturating_sub(self.last_bad) > FORGET_AFTER;
        if was_long_good {
            *self = Self::new(now);
        }
        (self.good_since, self.last_bad) = (None, now);
        match evidence {
            Evidence::Silent => self.silent += 1,
            Evidence::TurnedAway => self.turned_away += 1,
            Evidence::Good | Evidence::NoTunnel => {}
        }
        let enough = evidence == Evidence::NoTunnel || self.silent >= SILENT_MAX || self.turned_away >= TURNED_AWAY_MAX;
        if self.out.is_some() || !enough {
            return Change::None;
        }
        self.out = Some((evidence, now));
        self.times = self.times.saturating_add(1);
        Change::Out
    }
}

/// All that are, or lately were, in trouble.
#[derive(Clone, Debug, Default)]
pub struct Outliers(BTreeMap<Key, Known>);

impl Outliers {
    /// Takes in what was found out.
    pub fn heard(&mut self, address: Key, evidence: Evidence, now: Duration) -> Change {
        if evidence == Evidence::Good {
            // Of most nothing is remembered, and nothing needs to be.
            let Some(known) = self.0.get_mut(&address) else { return Change::None };
            let change = known.good(now);
            if known.out.is_none() && (known.times == 0 || now.saturating_sub(known.last_bad) > FORGET_AFTER) {
                self.0.remove(&address);
            }
            return change;
        }
        if self.0.len() >= KNOWN_MAX && !self.0.contains_key(&address) {
            let oldest = self.0.iter().min_by_key(|(_, known)| known.last_bad).map(|(address, _)| *address);
            oldest.map(|address| self.0.remove(&address));
        }
        self.0.entry(address).or_insert_with(|| Known::new(now)).bad(evidence, now)
    }

    /// It is none any more: nothing is remembered. Whether it was avoided.
    pub fn forget(&mut self, address: Key) -> bool {
        self.0.remove(&address).is_some_and(|known| known.out.is_some())
    }

    /// Whether it is avoided.
    pub fn is_out(&self, address: &Key) -> bool {
        self.0.get(address).is_some_and(|known| known.out.is_some())
    }

    /// Those that are avoided, and why.
    pub fn out(&self) -> impl Iterator<Item = (&Key, &Known)> {
        self.0.iter().filter(|(_, known)| known.out.is_some())
    }

    /// The same, to be asked.
    pub fn unhealthy(&self) -> Unhealthy {
        Unhealthy(self.out().map(|(key, _)| *key).collect())
    }

    /// Whether anything is remembered of anybody.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Key = (IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 0);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn what_puts_an_endpoint_out_and_what_does_not() {
        use Evidence::{Good, NoTunnel, Silent, TurnedAway};
        for (heard, out) in [
            (&[Good][..], false),
            (&[NoTunnel], true),
            (&[Silent], false),
            (&[Silent, Silent], true),
            (&[Silent, Good, Silent], false),
            (&[TurnedAway, TurnedAway], false),
            (&[TurnedAway, TurnedAway, TurnedAway], true),
            (&[TurnedAway, TurnedAway, Good, TurnedAway, TurnedAway], false),
            (&[Silent, TurnedAway, TurnedAway], false),
        ] {
            let mut all = Outliers::default();
            for (evidence, n) in heard.iter().zip(0..) {
                all.heard(A, *evidence, ms(n));
            }
            assert_eq!(all.is_out(&A), out, "{heard:?}");
        }
    }

    #[test]
    fn who_comes_and_goes_stays_out_longer_each_time_and_who_was_good_for_long_has_no_past() {
        let (mut all, mut now, mut waits) = (Outliers::default(), ms(0), Vec::new());
        for _ in 0..9 {
            assert_eq!(all.heard(A, Evidence::NoTunnel, now), Change::Out);
            let begun = now;
            while all.heard(A, Evidence::Good, now) != Change::Back {
                now += ms(250);
            }
            waits.push((now - begun).as_millis());
        }
        assert_eq!(waits, [0, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        now += FORGET_AFTER + ms(1);
        assert_eq!(all.heard(A, Evidence::NoTunnel, now), Change::Out);
        assert_eq!(all.heard(A, Evidence::Good, now), Change::Back, "as the first time");
    }

    #[test]
    fn one_bad_probe_among_good_ones_begins_the_wait_anew() {
        let mut all = Outliers::default();
        for _ in 0..3 {
            all.heard(A, Evidence::NoTunnel, ms(0));
            all.heard(A, Evidence::Good, ms(0));
            all.heard(A, Evidence::Good, ms(2_000));
        }
        all.heard(A, Evidence::NoTunnel, ms(10_000));
        assert_eq!(all.heard(A, Evidence::Good, ms(10_100)), Change::None);
        assert_eq!(all.heard(A, Evidence::NoTunnel, ms(11_900)), Change::None, "it is out already");
        assert_eq!(all.heard(A, Evidence::Good, ms(12_200)), Change::None);
        assert_eq!(all.heard(A, Evidence::Good, ms(14_199)), Change::None);
        assert_eq!(all.heard(A, Evidence::Good, ms(14_200)), Change::Back);
    }

    #[test]
    fn nothing_is_kept_of_who_is_good_and_little_of_the_others() {
        let mut all = Outliers::default();
        all.heard(A, Evidence::Good, ms(0));
        all.heard(A, Evidence::Silent, ms(1));
        all.heard(A, Evidence::Good, ms(2));
        assert!(all.0.is_empty());
        for n in 0..20_000_u32 {
            all.heard((std::net::Ipv4Addr::from(n).into(), 80), Evidence::NoTunnel, ms(n.into()));
        }
        assert_eq!(all.0.len(), KNOWN_MAX);
        let is_out = |n: u32| all.is_out(&(std::net::Ipv4Addr::from(n).into(), 80));
        assert!(is_out(19_999) && !is_out(0));
        let unhealthy = all.unhealthy();
        let avoids = |port| unhealthy.avoids(std::net::Ipv4Addr::from(19_999).into(), port);
        assert!(avoids(80) && !avoids(81), "another port is another matter");
        assert!([A.0].into_iter().collect::<Unhealthy>().avoids(A.0, 81), "a tunnel is for all ports");
    }

    /// Whatever is heard when: it is said to go out and to come back in turn, it never comes back on bad news or before its
    /// time, and goes out on good news never.
    #[test]
    fn whatever_is_heard_the_promises_hold() {
        for seed in 1..2_000_u64 {
            let (mut all, mut now, mut state) = (Outliers::default(), ms(0), seed);
            let (mut out, mut good_since) = (false, None);
            for _ in 0..60 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                now += ms((state >> 40) % 3_000);
                let evidence =
                    [Evidence::Good, Evidence::Good, Evidence::NoTunnel, Evidence::Silent, Evidence::TurnedAway]
                        [(state >> 33) as usize % 5];
                let is_good = evidence == Evidence::Good;
                good_since = if is_good { good_since.or(Some(now)) } else { None };
                let before = all.0.get(&A).copied();
                let change = all.heard(A, evidence, now);
                match change {
                    Change::Out => assert!(!out && !is_good, "{seed}"),
                    Change::Back => {
                        let waited = now - good_since.unwrap();
                        assert!(out && is_good && waited >= before.unwrap().good_for(), "{seed}");
                    }
                    Change::None => {}
                }
                out = match change {
                    Change::Out => true,
                    Change::Back => false,
                    Change::None => out,
                };
                assert_eq!(all.is_out(&A), out, "{seed}");
            }
        }
    }
}
