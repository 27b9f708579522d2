//! Where a document is wrong, shown in the document.

use ambit_model::Refusal;
use std::path::Path;

/// Characters of a line that are shown; a longer one is cut around the place.
const SHOWN: usize = 100;

/// The refusal with the line that it is about, where its `found` begins with `line L column C:`.
#[must_use]
pub fn pointed(refusal: Refusal, file: &Path, text: &str) -> Refusal {
    let place = |found: &str| {
        let (line, rest) = found.strip_prefix("line ")?.split_once(" column ")?;
        let (column, message) = rest.split_once(": ")?;
        Some((line.parse::<usize>().ok()?, column.parse::<usize>().ok()?, message.to_owned()))
    };
    let Some((line, column, message)) = place(&refusal.found) else { return refusal };
    let Some(content) = line.checked_sub(1).and_then(|at| text.lines().nth(at)) else { return refusal };
    let name = if file.as_os_str() == "-" { "standard input".to_owned() } else { file.display().to_string() };
    let hint = meant(&message).map(|word| format!("; did you mean `{word}`?")).unwrap_or_default();
    let at = column.saturating_sub(1);
    let begin = at.saturating_sub(SHOWN / 2);
    // A tab would move the caret away from its place.
    let shown: String = content.chars().skip(begin).take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let (margin, number) = (" ".repeat(line.to_string().len()), line);
    let caret = " ".repeat(at - begin);
    let found = format!(
        "{message}{hint}\n  --> {name}:{line}:{column}\n {margin} |\n {number} | {}\n {margin} | {caret}^",
        shown.trim_end()
    );
    Refusal { found, ..refusal }
}

/// Of the words that an unknown one could have been, the one that is nearest to it, if any is near.
fn meant(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field `").or_else(|| message.split_once("unknown variant `"))?;
    let mut words = rest.split('`').step_by(2);
    let written = words.next()?;
    words
        .map(|word| (distance(written, word), word))
        .filter(|(far, word)| *far <= 2 && *far < word.chars().count())
        .min()
        .map(|(_, word)| word.to_owned())
}

/// Characters to insert, delete or replace to make one of the other.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.chars().count()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((b, above_left), above) in other.chars().zip(&row).zip(row.iter().skip(1)) {
            let left = next.last().copied().unwrap_or(0);
            next.push((above_left + usize::from(a != b)).min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_points_at_its_place() {
        let text = "kind: Policy\nmetadata: {name: p}\nspec:\n  target: spiffe://w/db\n  action: allow\n  from: [spiffe://w/a]\n  port: [80]\n";
        let refusal = ambit_policy::parse(text).unwrap_err();
        let told = crate::exit::refusal_text(&pointed(refusal, Path::new("p.yaml"), text));
        assert_eq!(
            told,
            "error[policy_malformed]: expected a well-formed Policy, Service, Group or Egress document, found spec: \
             unknown field `port`, expected one of `target`, `action`, `from`, `ports`, `protocols`, `transport`, `expires`; \
             did you mean `ports`?\n  --> p.yaml:7:3\n   |\n 7 |   port: [80]\n   |   ^\n  \
             try: correct the document at the place shown"
        );
    }

    #[test]
    fn a_long_line_is_cut_around_the_place() {
        let text = format!("{}x{}", " ".repeat(300), "y".repeat(300));
        let refusal = Refusal::new(ambit_model::Code::PolicyMalformed, "a", "line 1 column 301: b");
        let told = pointed(refusal, Path::new("-"), &text).found;
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines[1], "  --> standard input:1:301");
        let at = lines[4].find('^').unwrap();
        assert_eq!(lines[3].as_bytes()[at], b'x', "{told}");
        assert!(lines[3].len() < SHOWN + 10);
        // What has no place, or one that is not there, stays as it is.
        for found in ["9 bytes", "line 9 column 1: b", "line x column 1: b"] {
            let refusal = Refusal::new(ambit_model::Code::PolicyMalformed, "a", found);
            assert_eq!(pointed(refusal.clone(), Path::new("p"), &text), refusal);
        }
    }

    #[test]
    fn near_words_are_meant_and_far_ones_are_not() {
        for (written, others, want) in [
            ("port", "`target`, `ports`", Some("ports")),
            ("acton", "`target`, `action`", Some("action")),
            ("paths", "`target`, `action`", None),
            ("x", "`to`, `at`", None),
        ] {
            let message = format!("unknown field `{written}`, expected one of {others}");
            assert_eq!(meant(&message).as_deref(), want, "{written}");
        }
    }
}
