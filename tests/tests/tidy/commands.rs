//! Every command in README.md and CONTRIBUTING.md exists, with the options that it is shown with.

use ambit_tests::{root, text};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

const DOCUMENTS: &[&str] = &["README.md", "CONTRIBUTING.md"];

/// Commands in a document: lines of `sh` blocks, lines that start with `$ ` in others, and inline code.
fn commands(markdown: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut block: Option<&str> = None;
    for line in markdown.lines() {
        let line = line.trim();
        if let Some(language) = line.strip_prefix("```") {
            block = if block.is_some() { None } else { Some(language) };
            continue;
        }
        match block {
            Some("sh") => found.extend([line.strip_prefix("$ ").unwrap_or(line)].map(str::to_owned)),
            Some(_) => found.extend(line.strip_prefix("$ ").map(str::to_owned)),
            None => found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned)),
        }
    }
    // What follows a comment or a pipe is not this command's.
    let first =
        |c: String| c.split(" #").next().and_then(|c| c.split(" | ").next()).unwrap_or_default().trim().to_owned();
    found.into_iter().map(first).collect()
}

fn shown(prefix: &str) -> BTreeSet<String> {
    let all = DOCUMENTS.iter().flat_map(|document| commands(&text(document).unwrap()));
    all.filter_map(|command| command.strip_prefix(prefix).map(str::to_owned)).collect()
}

/// The binary as the sources now give it: the documents are not to agree with yesterday's.
fn built(package: &str, binary: &str) -> PathBuf {
    let cargo = || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root().unwrap());
        cargo
    };
    // The whole workspace, as `cargo xtask test` builds it: one package alone has other features, and with them other
    // builds of half the dependencies.
    let status = cargo().args(["build", "--quiet", "--workspace", "--bins"]).status().unwrap();
    assert!(status.success(), "cargo build --workspace --bins, for {package}");
    // This program lies in target/debug/deps.
    let me = std::env::current_exe().unwrap();
    me.parent().unwrap().with_file_name(binary)
}

fn help(binary: &PathBuf, args: &[&str]) -> Result<String, String> {
    let out = Command::new(binary).args(args).arg("--help").current_dir(root().unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() { Ok(said) } else { Err(said) }
}

/// The words before the first option or argument: verbs are written in lower case, arguments are not.
fn verbs(command: &str) -> Vec<&str> {
    let is_verb = |word: &&str| word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') && !word.starts_with('-');
    command.split_whitespace().take_while(is_verb).collect()
}

fn options(command: &str) -> Vec<&str> {
    let words = command.split_whitespace().map(|word| word.trim_matches(['[', ']']));
    words.filter(|word| word.starts_with('-') && word.len() > 1).map(|word| word.split('=').next().unwrap()).collect()
}

#[test]
fn xtask_verbs_exist() {
    let binary = built("xtask", "xtask");
    let usage = help(&binary, &[]).unwrap();
    let lines: Vec<_> = usage.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    let commands = shown("cargo xtask ");
    assert!(commands.len() >= 2, "the documents show no xtask command: is the reader of documents broken?");
    for command in commands {
        let words = verbs(&command);
        let verb = words.first().unwrap_or_else(|| panic!("cargo xtask {command}: no verb"));
        let is_of = |line: &&&str| line.split_whitespace().next() == Some(verb);
        let line = lines.iter().find(is_of).unwrap_or_else(|| panic!("cargo xtask {command}: no such verb"));
        for word in words.iter().skip(1).copied().chain(options(&command)) {
            assert!(*verb == "bench" || line.contains(word), "cargo xtask {command}: {word} is not in: {line}");
        }
    }
}

#[test]
fn ambit_verbs_exist() {
    let binary = built("ambit", "ambit");
    for command in shown("ambit ") {
        let words = verbs(&command);
        // It hands everything to ambit-lab, `--help` too.
        if words.first() == Some(&"lab") {
            continue;
        }
        let (found, help) = leaf(&binary, &words);
        assert!(!found.is_empty(), "ambit {command}: no such verb");
        for option in options(&command) {
            assert!(help.contains(option), "ambit {command}: {option} is not in the help of {found:?}");
        }
    }
}

/// The help of the deepest verb that `words` lead to; what is left over must be arguments of it.
fn leaf<'a>(binary: &PathBuf, words: &'a [&'a str]) -> (&'a [&'a str], String) {
    let mut deepest = ([].as_slice(), help(binary, &[]).unwrap());
    for depth in 1..=words.len() {
        let takes_verbs = deepest.1.contains("Commands:");
        if !takes_verbs {
            assert!(deepest.1.contains("Arguments:"), "ambit {words:?}: {:?} takes no arguments", deepest.0);
            return deepest;
        }
        let verbs = &words[..depth];
        deepest = (verbs, help(binary, verbs).unwrap_or_else(|said| panic!("ambit {}: {said}", words.join(" "))));
    }
    deepest
}

#[test]
fn the_reader_of_documents_reads() {
    let text = "Run `cargo xtask demo` or\n```sh\ncargo xtask test  # all\n$ ambit status | cat\n```\n```text\n$ ambit check\nambit says no\n```\n";
    let found: Vec<_> = commands(text).into_iter().collect();
    assert_eq!(found, ["ambit check", "ambit status", "cargo xtask demo", "cargo xtask test"]);
    assert_eq!(verbs("policy apply -f x.yaml"), ["policy", "apply"]);
    assert_eq!(verbs("explain SRC DST"), ["explain"]);
    assert_eq!(options("demo [--json FILE] --keep"), ["--json", "--keep"]);
}
