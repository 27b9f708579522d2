//! The deny-list: models and firmware that are not accepted, whatever vouches for them.

use super::make::EkMake;
use ambit_model::{Code, Refusal};

/// What one field of a rule demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Every TPM, also one whose certificate does not say.
    Any,
    /// TPMs whose certificate says exactly this.
    Is(String),
}

/// Which firmware a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareMatch {
    /// Every version: such a rule is judged before any credential is made.
    Any,
    /// Versions below this one, as the quote reports them: judged after it.
    Below(u64),
}

/// One rule: a TPM that matches all of it is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EkDenyRule {
    /// What operators call it.
    pub name: String,
    /// TCG vendor id.
    pub manufacturer: Match,
    /// Model.
    pub model: Match,
    /// Firmware.
    pub firmware: FirmwareMatch,
}

impl EkDenyRule {
    /// A rule from its stored form: an empty manufacturer or model stands for any, `u64::MAX` for every firmware.
    /// A rule that would refuse every TPM is refused itself.
    pub fn new(name: &str, manufacturer: &str, model: &str, firmware_below: u64) -> Result<EkDenyRule, Refusal> {
        let manufacturer =
            if manufacturer.is_empty() { Match::Any } else { Match::Is(EkMake::vendor_id(manufacturer)?) };
        let model = if model.is_empty() { Match::Any } else { Match::Is(model.to_owned()) };
        let firmware =
            if firmware_below == u64::MAX { FirmwareMatch::Any } else { FirmwareMatch::Below(firmware_below) };
        if (&manufacturer, &model, firmware) == (&Match::Any, &Match::Any, FirmwareMatch::Any) {
            let expected = "a rule with a manufacturer, a model or a firmware version";
            return Err(Refusal::new(Code::BadRequest, expected, format!("rule {name}, which denies every TPM")));
        }
        Ok(EkDenyRule { name: name.to_owned(), manufacturer, model, firmware })
    }

    /// Whether the makers' part of it matches. Names that could not be read match every rule that asks for one: a
    /// certificate must not slip through by being odd.
    fn names(&self, make: &EkMake) -> bool {
        match make {
            EkMake::Named { manufacturer, model } => {
                let matches =
                    |rule: &Match, fact: &str| matches!(rule, Match::Any) || *rule == Match::Is(fact.to_owned());
                matches(&self.manufacturer, manufacturer) && matches(&self.model, model)
            }
            EkMake::Unnamed => self.manufacturer == Match::Any && self.model == Match::Any,
            EkMake::Unreadable => true,
        }
    }

    fn refuse(&self, make: &EkMake, firmware: &str) -> Refusal {
        Refusal::new(Code::EkDenied, format!("no TPM of deny rule {}", self.name), format!("{make}, {firmware}"))
    }
}

/// Reads a firmware version: `0x` and hexadecimal digits as a quote reports it (64 bits), or `major.minor` as makers
/// print it, which are the upper two 16-bit words (TPM_PT_FIRMWARE_VERSION_1).
pub fn firmware_version(text: &str) -> Result<u64, Refusal> {
    let parsed = match (text.strip_prefix("0x"), text.split_once('.')) {
        (Some(digits), _) => u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+')),
        (None, Some((major, minor))) => match (major.parse::<u16>(), minor.parse::<u16>()) {
            (Ok(major), Ok(minor)) => Some(u64::from(major) << 48 | u64::from(minor) << 32),
            _ => None,
        },
        (None, None) => None,
    };
    parsed.ok_or_else(|| Refusal::new(Code::BadRequest, "a firmware version as 0x... or major.minor", text))
}

/// Refuses what a rule without firmware denies: known before any credential is made.
pub(crate) fn before_quote(rules: &[EkDenyRule], make: &EkMake) -> Result<(), Refusal> {
    match rules.iter().find(|rule| rule.firmware == FirmwareMatch::Any && rule.names(make)) {
        Some(rule) => Err(rule.refuse(make, "any firmware")),
        None => Ok(()),
    }
}

/// Refuses a TPM that any rule denies, with its firmware as a quote reports it.
pub fn after_quote(rules: &[EkDenyRule], make: &EkMake, firmware: u64) -> Result<(), Refusal> {
    let denies = |rule: &&EkDenyRule| {
        let covers = match rule.firmware {
            FirmwareMatch::Any => true,
            FirmwareMatch::Below(limit) => firmware < limit,
        };
        covers && rule.names(make)
    };
    match rules.iter().find(denies) {
        Some(rule) => Err(rule.refuse(make, &format!("firmware {firmware:#018x}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_deny_what_they_name() {
        let tpm = |manufacturer: &str, model: &str| EkMake::Named {
            manufacturer: EkMake::vendor_id(manufacturer).unwrap(),
            model: model.to_owned(),
        };
        let ifx = tpm("IFX", "SLB9665");
        // Manufacturer, model, firmware below | make | firmware | denied before the quote, and after it.
        for (rule, make, firmware, before, after) in [
            (("IFX", "", u64::MAX), &ifx, 9, true, true),
            (("id:49465800", "", u64::MAX), &ifx, 9, true, true),
            (("STM", "", u64::MAX), &ifx, 9, false, false),
            (("", "SLB9665", u64::MAX), &ifx, 9, true, true),
            (("", "SLB9670", u64::MAX), &ifx, 9, false, false),
            (("IFX", "SLB9665", 10), &ifx, 9, false, true),
            (("IFX", "SLB9665", 10), &ifx, 10, false, false),
            (("IFX", "SLB9670", 10), &ifx, 9, false, false),
            (("", "", 10), &EkMake::Unnamed, 9, false, true),
            (("", "", 10), &EkMake::Unnamed, 10, false, false),
            (("IFX", "", u64::MAX), &EkMake::Unnamed, 9, false, false),
            (("IFX", "", u64::MAX), &EkMake::Unreadable, 9, true, true),
        ] {
            let rules = [EkDenyRule::new("r", rule.0, rule.1, rule.2).unwrap()];
            let code = |r: Result<(), Refusal>| r.map_err(|r| r.code).err();
            assert_eq!(code(before_quote(&rules, make)), before.then_some(Code::EkDenied), "{rule:?} {make}");
            assert_eq!(code(after_quote(&rules, make, firmware)), after.then_some(Code::EkDenied), "{rule:?} {make}");
        }
        assert!(before_quote(&[], &ifx).is_ok() && after_quote(&[], &ifx, 0).is_ok());
        assert_eq!(EkDenyRule::new("all", "", "", u64::MAX).unwrap_err().code, Code::BadRequest);
        assert_eq!(EkDenyRule::new("odd", "INFINEON", "", 1).unwrap_err().code, Code::BadRequest);
    }

    #[test]
    fn firmware_versions_are_read() {
        assert_eq!(firmware_version("0x0007003f0011cb00").unwrap(), 0x0007_003f_0011_cb00);
        assert_eq!(firmware_version("7.63").unwrap(), 0x0007_003f_0000_0000);
        for bad in ["", "7", "7.", "7.63.1", "0x", "0x+1", "7.99999", "-7.1", "0x10000000000000000"] {
            assert_eq!(firmware_version(bad).unwrap_err().code, Code::BadRequest, "{bad}");
        }
    }
}
