//! A quote alone names a PCR, never an event: a boot that was good names it.

use super::Folder;
use crate::bootlog::{BootLog, Event};
use crate::chain::Denial;
use crate::hash::Bank;

impl Folder {
    /// `denial`, with the first event that differs from `reference` if it only names a PCR of the boot.
    pub(super) fn named_by(&self, reference: Option<&Folder>, bank: Bank, denial: Denial) -> Denial {
        let pcr = denial.diverged.as_deref().and_then(|d| d.strip_prefix("PCR ")).and_then(|n| n.parse().ok());
        let (Some(reference), Some(pcr)) = (reference, pcr) else { return denial };
        match first_difference(reference.boot_log(), self.boot_log(), pcr, bank) {
            None => denial,
            Some((place, expected, found)) => {
                let mut denial = denial;
                denial.diverged = Some(place);
                denial.refusal.expected = format!("{}; as in the reference: {expected}", denial.refusal.expected);
                denial.refusal.found = format!("{}; {found}", denial.refusal.found);
                denial
            }
        }
    }
}

/// Place, expected and found of the first event of `pcr` that is not the reference's.
fn first_difference(reference: &[u8], log: &[u8], pcr: u32, bank: Bank) -> Option<(String, String, String)> {
    let (reference, log) = (BootLog::parse(reference).ok()?, BootLog::parse(log).ok()?);
    let extending = |log: &BootLog<'_>| -> Vec<(String, String)> {
        let of_pcr = log.events().iter().filter(|e| e.pcr == pcr && e.extends());
        of_pcr.map(|e: &Event<'_>| (e.place(), e.digest(bank.hash()).map(hex::encode).unwrap_or_default())).collect()
    };
    let (wanted, found) = (extending(&reference), extending(&log));
    let differs = (0..wanted.len().max(found.len()))
        .find(|n| wanted.get(*n).map(|(_, digest)| digest) != found.get(*n).map(|(_, digest)| digest))?;
    Some(match (wanted.get(differs), found.get(differs)) {
        (Some((_, w)), Some((place, f))) => (place.clone(), w.clone(), f.clone()),
        (Some((place, w)), None) => (format!("{place}, which is missing"), w.clone(), "no such event".to_owned()),
        (None, Some((place, f))) => (place.clone(), "no such event".to_owned(), f.clone()),
        (None, None) => return None,
    })
}
