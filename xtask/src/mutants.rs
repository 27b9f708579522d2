//! Breaks the verifier's checks one by one, in a copy, and sees that exactly the rows fail which say that they test it.
//!
//! `attestation/verify/tests/checks.txt` is the list. The copy and what is built from it have a folder of their own.

use crate::{Stop, cargo};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const CRATE: &str = "attestation/verify";
const LIST: &str = "attestation/verify/tests/checks.txt";

/// One check, how it is broken, and what must notice.
#[derive(Default)]
struct Check {
    name: String,
    file: String,
    from: String,
    to: Vec<String>,
    rows: BTreeSet<String>,
    tests: BTreeSet<String>,
}

/// What a run of the tests found wrong.
#[derive(Default)]
struct Found {
    rows: BTreeSet<String>,
    tests: BTreeSet<String>,
}

/// The last line counts the checks; it fails unless each was proven.
pub(crate) fn run(only: &str) -> Result<(), Stop> {
    let root = cargo::root()?;
    let text = read(&root.join(LIST))?;
    let checks: Vec<Check> = parse(&text)?.into_iter().filter(|check| check.name.contains(only)).collect();
    let tree = copy(&root)?;
    let whole = test(&tree, &root)?;
    if !whole.rows.is_empty() || !whole.tests.is_empty() {
        return Err(Stop::Failed(format!("with every check in place these fail: {:?} {:?}", whole.rows, whole.tests)));
    }
    let mut proven = 0;
    for check in &checks {
        match broken(check, &tree, &root) {
            Ok(()) => {
                proven += 1;
                let noticed: Vec<&str> = check.rows.iter().chain(&check.tests).map(String::as_str).collect();
                println!("check {}: without it fail: {}", check.name, noticed.join("; "));
            }
            Err(Stop::Failed(why) | Stop::Usage(why)) => println!("check {}: NOT PROVEN: {why}", check.name),
        }
    }
    println!("{} checks, {proven} proven", checks.len());
    if proven == checks.len() && proven > 0 { Ok(()) } else { Err(Stop::Failed(String::new())) }
}

fn read(path: &Path) -> Result<String, Stop> {
    std::fs::read_to_string(path).map_err(|e| Stop::Failed(format!("{}: {e}", path.display())))
}

fn write(path: &Path, text: &str) -> Result<(), Stop> {
    std::fs::write(path, text).map_err(|e| Stop::Failed(format!("{}: {e}", path.display())))
}

fn parse(text: &str) -> Result<Vec<Check>, Stop> {
    let mut checks: Vec<Check> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "check" {
            checks.push(Check { name: rest.into(), ..Check::default() });
            continue;
        }
        let Some(check) = checks.last_mut() else {
            return Err(Stop::Failed(format!("{LIST}: '{line}' before a check")));
        };
        match word {
            "in" => check.file = rest.into(),
            "-" => check.from = rest.into(),
            "+" => check.to.push(rest.into()),
            "row" => drop(check.rows.insert(rest.into())),
            "test" => drop(check.tests.insert(rest.into())),
            _ => return Err(Stop::Failed(format!("{LIST}: '{line}' is none of its words"))),
        }
    }
    Ok(checks)
}

/// The files that git tracks or would track. Those that are the same already keep their time, so that cargo builds only
/// what changed.
fn copy(root: &Path) -> Result<PathBuf, Stop> {
    let tree = root.join("target/mutants/tree");
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root);
    let listed = git.output().map_err(|e| Stop::Failed(format!("git ls-files: {e}")))?;
    for file in String::from_utf8_lossy(&listed.stdout).split('\0').filter(|file| !file.is_empty()) {
        // A file deleted but not yet committed is listed too.
        let Ok(now) = std::fs::read(root.join(file)) else { continue };
        let to = tree.join(file);
        if std::fs::read(&to).is_ok_and(|then| then == now) {
            continue;
        }
        let folder = to.parent().unwrap_or(&tree);
        let copied = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&to, now));
        copied.map_err(|e| Stop::Failed(format!("{}: {e}", to.display())))?;
    }
    Ok(tree)
}

fn broken(check: &Check, tree: &Path, root: &Path) -> Result<(), Stop> {
    let path = tree.join(CRATE).join(&check.file);
    let sound = read(&path)?;
    let places = sound.matches(&check.from).count();
    if places != 1 || check.from.is_empty() {
        return Err(Stop::Failed(format!("'{}' is {places} times in {}", check.from, check.file)));
    }
    write(&path, &sound.replace(&check.from, &check.to.join("\n")))?;
    let found = test(tree, root);
    write(&path, &sound)?;
    let found = found?;
    let only = |left: &BTreeSet<String>, right: &BTreeSet<String>| left.difference(right).cloned().collect::<Vec<_>>();
    let (missing, more) = (only(&check.rows, &found.rows), only(&found.rows, &check.rows));
    let asleep = only(&check.tests, &found.tests);
    if !missing.is_empty()
        || !more.is_empty()
        || !asleep.is_empty()
        || (found.rows.is_empty() && found.tests.is_empty())
    {
        return Err(Stop::Failed(format!(
            "rows that still pass {missing:?}, rows besides {more:?}, tests that still pass {asleep:?}"
        )));
    }
    Ok(())
}

/// Runs the verifier's own tests in the copy. Rows say `wrong: WHAT: ...`, tests `test PATH ... FAILED`.
fn test(tree: &Path, root: &Path) -> Result<Found, Stop> {
    let build = root.join("target/mutants/build");
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--quiet", "--package", "ambit-verify", "--lib"]).current_dir(tree);
    cargo.env("CARGO_TARGET_DIR", build).env("RUST_BACKTRACE", "0");
    let out = cargo.output().map_err(|e| Stop::Failed(format!("cargo test: {e}")))?;
    let (said, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if !said.contains("test result:") {
        let tail: Vec<&str> = errors.lines().filter(|line| line.starts_with("error")).take(3).collect();
        return Err(Stop::Failed(format!("the copy does not build: {}", tail.join("; "))));
    }
    let mut found = Found::default();
    for line in said.lines().chain(errors.lines()) {
        let row = line.strip_prefix("wrong: ").and_then(|line| line.split_once(": "));
        let test = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----"));
        found.rows.extend(row.map(|(what, _)| what.to_owned()));
        found.tests.extend(test.map(str::to_owned));
    }
    Ok(found)
}
