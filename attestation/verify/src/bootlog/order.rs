//! Rules over the order of events, which a replay alone cannot see broken in a firmware that was never honest.

use super::facts::Fact;
use super::rules::{EV_EFI_VARIABLE_DRIVER_CONFIG, Variable, altered};
use super::{EV_SEPARATOR, Event};
use crate::chain::Denial;
use crate::hash::HashAlg;
use ambit_model::{Code, Refusal};
use std::collections::{BTreeMap, BTreeSet};

/// PCRs that belong to the firmware until it separates them (PFP 3.3.3 and 10.4.1, EV_SEPARATOR).
const FIRMWARE_PCRS: std::ops::RangeInclusive<u32> = 0..=7;
/// The Secure Boot policy (PFP 3.3.4.8).
const SECURE_BOOT_PCR: u32 = 7;

/// What was seen so far.
#[derive(Default)]
pub(super) struct Order {
    /// By PCR, the event that separated it.
    separated: BTreeMap<u32, usize>,
    variables: BTreeSet<(Vec<u8>, Vec<u8>)>,
}

impl Order {
    /// Judges the place of one event among those before it.
    pub(super) fn judge(&mut self, event: &Event<'_>, digest: &[u8], hash: HashAlg, fact: &Fact) -> Result<(), Denial> {
        if event.kind == EV_SEPARATOR {
            // Either may be the one that does not belong here: both are named.
            if let Some(first) = self.separated.insert(event.pcr, event.number) {
                return Err(out_of_order(
                    event,
                    "one separator in this PCR",
                    &format!("a second one, after event {first}"),
                ));
            }
            return Ok(());
        }
        // A separator under another type would hide from the rule above.
        let separators = [[0u8; 4], [0xff; 4]];
        if FIRMWARE_PCRS.contains(&event.pcr) && separators.iter().any(|s| hash.digest(&[s]) == digest) {
            return Err(altered(
                event,
                "another type than a separator's".to_owned(),
                "a separator's digest".to_owned(),
            ));
        }
        if event.pcr == SECURE_BOOT_PCR {
            self.secure_boot_policy(event, fact)?;
        }
        Ok(())
    }

    fn secure_boot_policy(&mut self, event: &Event<'_>, fact: &Fact) -> Result<(), Denial> {
        let separated = self.separated.contains_key(&SECURE_BOOT_PCR);
        if event.kind == EV_EFI_VARIABLE_DRIVER_CONFIG {
            if let Some(v) = Variable::parse(event.data)
                && !self.variables.insert((v.guid.to_vec(), v.name.to_vec()))
            {
                let expected = format!("{}: each Secure Boot variable once", event.place());
                let found = format!("{} again", v.name_text());
                return Err(Denial::at(Refusal::new(Code::BootVariableRepeated, expected, found), event.place()));
            }
            // The separator parts configuration from authorities: what follows it did not govern this boot.
            if separated {
                return Err(out_of_order(event, "configuration before the separator", "a variable after it"));
            }
        }
        // shim runs after the firmware has handed over. The firmware's own authorities may come on either side: older
        // firmware verified drivers before its separator.
        let by_shim = matches!(fact, Fact::SbatLevel(_))
            || matches!(fact, Fact::Authority { variable, .. } if variable.starts_with("Mok"));
        if by_shim && !separated {
            return Err(out_of_order(event, "what shim measures after the separator", "it before the separator"));
        }
        Ok(())
    }

    /// After the last event: the firmware ended its part of each PCR that it owns and that is judged.
    pub(super) fn end(&self, policed: &[u32]) -> Result<(), Denial> {
        let missing = policed.iter().find(|pcr| FIRMWARE_PCRS.contains(pcr) && !self.separated.contains_key(pcr));
        match missing {
            None => Ok(()),
            Some(pcr) => {
                let expected = format!("a separator in PCR {pcr}");
                Err(Denial::at(Refusal::new(Code::BootEventOutOfOrder, expected, "none"), format!("PCR {pcr}")))
            }
        }
    }
}

fn out_of_order(event: &Event<'_>, expected: &str, found: &str) -> Denial {
    let expected = format!("{}: {expected}", event.place());
    Denial::at(Refusal::new(Code::BootEventOutOfOrder, expected, found), event.place())
}
