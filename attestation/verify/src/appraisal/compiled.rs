//! A policy made ready to judge: patterns compiled, allow-lists found, digests of exact texts computed.

use super::{AllowList, PolicyRef};
use crate::hash::HashAlg;
use ambit_model::appraisal::AppraisalPolicy;
use ambit_model::{Code, Refusal};
use regex::{Regex, RegexBuilder};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Bytes of one compiled pattern: a pattern is a line a person writes, not a program.
const PATTERN_BYTES_MAX: usize = 256 * 1024;
/// Bytes of a small one: nearly every text that stands for itself, and a few repetitions.
const SMALL_BYTES_MAX: usize = 16 * 1024;
/// Patterns of one policy, and how many of them may be more than small: 32 MiB in all, on every replica. A policy of
/// 1 MiB could else take gigabytes.
const PATTERNS_MAX: usize = 1024;
const LARGE_MAX: usize = 64;

/// A policy that can be asked.
#[derive(Debug)]
pub struct CompiledPolicy {
    pub(super) policy: AppraisalPolicy,
    pub(super) grub_commands: Vec<Regex>,
    pub(super) command_lines: Vec<Regex>,
    /// Digests of the exact command lines as the EFI stub measures them, in both banks.
    pub(super) load_options: BTreeSet<Vec<u8>>,
    pub(super) exceptions: Vec<Regex>,
    pub(super) allow_lists: Vec<Arc<AllowList>>,
    pub(super) own_files: AllowList,
    sha256: [u8; 32],
    version: u64,
}

impl CompiledPolicy {
    /// Compiles `policy`; `allow_list` finds a list by the SHA-256 of its text.
    ///
    /// # Errors
    /// [`Code::AppraisalPolicyMalformed`] for a pattern that does not compile, [`Code::AllowListMissing`].
    pub fn compile(
        policy: &AppraisalPolicy,
        allow_list: &mut dyn FnMut(&[u8; 32]) -> Option<Arc<AllowList>>,
    ) -> Result<CompiledPolicy, Refusal> {
        let grub = policy.grub_commands.iter().flatten();
        let lines = policy.command_line.iter().flat_map(|c| &c.patterns);
        let ima = policy.ima.as_ref();
        let mut allow_lists = Vec::new();
        for wanted in ima.iter().flat_map(|i| &i.allow_lists) {
            let list = allow_list(wanted).filter(|l| l.sha256() == *wanted).ok_or_else(|| {
                let expected = format!("allow-list {}, which policy {} names", hex::encode(wanted), policy.name);
                Refusal::new(Code::AllowListMissing, expected, "none")
            })?;
            allow_lists.push(list);
        }
        let mut compiler = Compiler::default();
        Ok(CompiledPolicy {
            grub_commands: grub.map(|p| compiler.whole(p)).collect::<Result<_, _>>()?,
            command_lines: lines.map(|p| compiler.whole(p)).collect::<Result<_, _>>()?,
            load_options: policy.command_line.iter().flat_map(|c| &c.exact).flat_map(|t| stub_digests(t)).collect(),
            exceptions: ima
                .iter()
                .flat_map(|i| &i.exceptions)
                .map(|g| compiler.whole(&glob(g)))
                .collect::<Result<_, _>>()?,
            allow_lists,
            own_files: AllowList::of_files(ima.iter().flat_map(|i| &i.files)),
            sha256: policy.sha256(),
            version: 0,
            policy: policy.clone(),
        })
    }

    /// The same policy, known to be this version of its name.
    #[must_use]
    pub fn with_version(mut self, version: u64) -> CompiledPolicy {
        self.version = version;
        self
    }

    /// The document.
    pub fn policy(&self) -> &AppraisalPolicy {
        &self.policy
    }

    /// Its name, version and SHA-256.
    pub fn reference(&self) -> PolicyRef {
        PolicyRef { name: self.policy.name.as_str().to_owned(), version: self.version, sha256: self.sha256 }
    }
}

/// What one policy's patterns have taken of what they may.
#[derive(Default)]
struct Compiler {
    patterns: usize,
    large: usize,
}

impl Compiler {
    /// A pattern that matches whole texts only. It must compile by itself first, so that it cannot close the group
    /// around it.
    fn whole(&mut self, pattern: &str) -> Result<Regex, Refusal> {
        let bad = |expected: &str, found: String| Refusal::new(Code::AppraisalPolicyMalformed, expected, found);
        self.patterns = self.patterns.saturating_add(1);
        if self.patterns > PATTERNS_MAX {
            return Err(bad(&format!("at most {PATTERNS_MAX} patterns and exceptions"), "more".into()));
        }
        let build = |bytes: usize| {
            RegexBuilder::new(pattern).size_limit(bytes).build()?;
            RegexBuilder::new(&format!(r"\A(?:{pattern})\z")).size_limit(bytes).build()
        };
        let large = match build(SMALL_BYTES_MAX) {
            Err(regex::Error::CompiledTooBig(_)) => build(PATTERN_BYTES_MAX),
            done => return done.map_err(|e| bad("a regular expression", e.to_string())),
        };
        self.large = self.large.saturating_add(1);
        if self.large > LARGE_MAX {
            return Err(bad(
                &format!("at most {LARGE_MAX} patterns that compile to much"),
                format!("one more: {pattern}"),
            ));
        }
        large.map_err(|e| bad("a regular expression", e.to_string()))
    }
}

/// The pattern of a glob over a path: `*` within one part, `**` over any parts, `?` one character; all else stands for itself.
fn glob(glob: &str) -> String {
    let mut pattern = String::new();
    let mut rest = glob;
    while let Some(c) = rest.chars().next() {
        let (taken, piece) = if rest.starts_with("**") {
            (2, ".*".to_owned())
        } else {
            let piece = match c {
                '*' => "[^/]*".to_owned(),
                '?' => "[^/]".to_owned(),
                other => regex::escape(other.encode_utf8(&mut [0; 4])),
            };
            (c.len_utf8(), piece)
        };
        pattern.push_str(&piece);
        rest = rest.get(taken..).unwrap_or_default();
    }
    pattern
}

/// What Linux's EFI stub extends for a command line: its UTF-16 load options, whose terminating zero some loaders count
/// in and some do not.
pub(super) fn stub_digests(text: &str) -> Vec<Vec<u8>> {
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let hashes = [HashAlg::Sha256, HashAlg::Sha384];
    hashes.iter().flat_map(|h| [h.digest(&[&utf16]), h.digest(&[&utf16, &[0, 0]])]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::appraisal::{CommandLine, ImaRules};

    fn whole(pattern: &str) -> Result<Regex, Refusal> {
        Compiler::default().whole(pattern)
    }

    #[test]
    fn patterns_match_whole_texts_only() {
        for (pattern, text, matches) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("a|b", "ab", false),
            ("a|b", "b", true),
            ("(?m)^a$", "a\nb", false),
            ("root=[a-z]+ quiet", "root=sda quiet", true),
            ("root=[a-z]+ quiet", "root=sda quiet init=/bin/sh", false),
        ] {
            assert_eq!(whole(pattern).unwrap().is_match(text), matches, "{pattern} {text:?}");
        }
        for bad in ["a)|(b", "(", "(?x)a # ", &"a{1000}".repeat(200)] {
            assert_eq!(whole(bad).unwrap_err().code, Code::AppraisalPolicyMalformed, "{bad}");
        }
    }

    #[test]
    fn globs_stay_within_a_part_of_the_path() {
        for (pattern, path, matches) in [
            ("/var/log/*", "/var/log/syslog", true),
            ("/var/log/*", "/var/log/a/b", false),
            ("/var/log/**", "/var/log/a/b", true),
            ("/bin/tpm?", "/bin/tpm2", true),
            ("/bin/tpm?", "/bin/tpm/", false),
            ("/a.b", "/axb", false),
            ("**", "/a\\x0ab", true),
        ] {
            assert_eq!(whole(&glob(pattern)).unwrap().is_match(path), matches, "{pattern} {path}");
        }
    }

    /// What these patterns compile to, and how many compile.
    fn compile(patterns: impl Iterator<Item = String>, exceptions: usize) -> Result<usize, String> {
        let mut policy = AppraisalPolicy::new("p".parse().unwrap(), BTreeSet::from(["west".parse().unwrap()]));
        policy.command_line = Some(CommandLine { patterns: patterns.collect(), exact: BTreeSet::new() });
        let exceptions = (0..exceptions).map(|n| format!("/var/{n}/*")).collect();
        policy.ima = Some(ImaRules { exceptions, ..ImaRules::default() });
        let compiled = CompiledPolicy::compile(&policy, &mut |_| None).map_err(|r| r.expected)?;
        Ok(compiled.command_lines.len() + compiled.exceptions.len())
    }

    #[test]
    fn what_patterns_compile_to_is_bounded() {
        let small = |count: usize| (0..count).map(|n| format!("console=ttyS{n} \\S+"));
        let large = |count: usize| (0..count).map(|n| format!("a{n}{{2000}}"));
        assert_eq!(compile(small(1000), 24), Ok(PATTERNS_MAX));
        assert_eq!(compile(small(1000), 25), Err("at most 1024 patterns and exceptions".into()));
        assert_eq!(compile(large(LARGE_MAX), 100), Ok(LARGE_MAX + 100));
        assert_eq!(compile(large(LARGE_MAX + 1), 0), Err("at most 64 patterns that compile to much".into()));
        assert_eq!(compile(["a{99999}".to_owned()].into_iter(), 0), Err("a regular expression".into()));
        assert_eq!(compile(["a)(b".to_owned()].into_iter(), 0), Err("a regular expression".into()));
    }
}
