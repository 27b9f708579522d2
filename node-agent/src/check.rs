//! What this machine's kernel can do for the mesh, and what is lost where it cannot.

use ambit_ebpf::Feature;
use std::fmt::Write as _;

/// Asks the kernel, by loading and attaching what the agent would (needs root; nothing stays behind).
pub fn features() -> Vec<Feature> {
    ambit_ebpf::probe()
}

/// A line for each feature, what is lost below each that is missing, and a count; and whether the agent can run.
pub fn told(features: &[Feature]) -> (String, bool) {
    let mut text = String::new();
    for feature in features {
        let mark = match (feature.present, feature.required) {
            (true, _) => "found",
            (false, true) => "MISSING",
            (false, false) => "missing",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark:8} {}", feature.name);
        if !feature.present {
            let needed = if feature.required { "the agent does not start; without it " } else { "" };
            let _ = writeln!(text, "         cost: {needed}{}", feature.cost);
        }
    }
    let count = |wanted: fn(&&Feature) -> bool| features.iter().filter(wanted).count();
    let (found, lacking) = (count(|f| f.present), count(|f| f.required && !f.present));
    let _ = writeln!(text, "{found} of {} features found, {lacking} required ones missing", features.len());
    (text, lacking == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_with_its_cost_and_only_what_is_required_fails() {
        let feature = |name, present, required| Feature { name, present, required, cost: "something is lost" };
        let (text, runs) = told(&[feature("a", true, true), feature("b", false, false)]);
        assert!(
            runs && text.contains("found    a\n") && text.contains("missing  b\n         cost: something is lost\n")
        );
        assert!(text.ends_with("1 of 2 features found, 0 required ones missing\n"));
        let (text, runs) = told(&[feature("a", false, true)]);
        assert!(
            !runs
                && text.contains("MISSING  a\n         cost: the agent does not start; without it something is lost\n")
        );
    }
}
