//! Breaks the checks of attestation one by one, in a copy, and sees that exactly the rows fail which say that they test it.
//!
//! Each crate that checks has its list, `tests/checks.txt`. The copy and what is built from it have a folder of their own.

use crate::{Stop, cargo};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where checks are, in the order of design.md section 3: folder, package, and which of its tests know them.
const CRATES: [(&str, &str, &[&str]); 3] = [
    ("federation/identity", "ambit-identity", &["--lib"]),
    ("attestation/verify", "ambit-verify", &["--lib"]),
    ("federation/state", "ambit-state", &["--test", "admission", "--test", "attest"]),
];
const LIST: &str = "tests/checks.txt";

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
    let tree = copy(&root)?;
    let (mut all, mut proven) = (0, 0);
    for (folder, package, tests) in CRATES {
        let list = root.join(folder).join(LIST);
        let checks = parse(&list.display().to_string(), &read(&list)?)?;
        let checks: Vec<Check> = checks.into_iter().filter(|check| check.name.contains(only)).collect();
        if checks.is_empty() {
            continue;
        }
        let bench = Bench { folder: tree.join(folder), package, tests, build: root.join("target/mutants/build") };
        all += checks.len();
        proven += bench.prove(&checks)?;
    }
    println!("{all} checks, {proven} proven");
    if proven == all && proven > 0 { Ok(()) } else { Err(Stop::Failed(String::new())) }
}

fn read(path: &Path) -> Result<String, Stop> {
    std::fs::read_to_string(path).map_err(|e| Stop::Failed(format!("{}: {e}", path.display())))
}

fn write(path: &Path, text: &str) -> Result<(), Stop> {
    std::fs::write(path, text).map_err(|e| Stop::Failed(format!("{}: {e}", path.display())))
}

fn parse(list: &str, text: &str) -> Result<Vec<Check>, Stop> {
    let mut checks: Vec<Check> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "check" {
            checks.push(Check { name: rest.into(), ..Check::default() });
            continue;
        }
        let Some(check) = checks.last_mut() else {
            return Err(Stop::Failed(format!("{list}: '{line}' before a check")));
        };
        match word {
            "in" => check.file = rest.into(),
            "-" => check.from = rest.into(),
            "+" => check.to.push(rest.into()),
            "row" => drop(check.rows.insert(rest.into())),
            "test" => drop(check.tests.insert(rest.into())),
            _ => return Err(Stop::Failed(format!("{list}: '{line}' is none of its words"))),
        }
    }
    Ok(checks)
}

/// The files that git tracks or would track, and no others. Those that are the same already keep their time, so that cargo
/// builds only what changed.
fn copy(root: &Path) -> Result<PathBuf, Stop> {
    let tree = root.join("target/mutants/tree");
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root);
    let listed = git.output().map_err(|e| Stop::Failed(format!("git ls-files: {e}")))?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut kept = BTreeSet::new();
    for file in listed.split('\0').filter(|file| !file.is_empty()) {
        // A file deleted but not yet committed is listed too.
        let Ok(now) = std::fs::read(root.join(file)) else { continue };
        let to = tree.join(file);
        kept.insert(to.clone());
        if std::fs::read(&to).is_ok_and(|then| then == now) {
            continue;
        }
        let folder = to.parent().unwrap_or(&tree);
        let copied = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&to, now));
        copied.map_err(|e| Stop::Failed(format!("{}: {e}", to.display())))?;
    }
    sweep(&tree, &kept).map_err(|e| Stop::Failed(format!("{}: {e}", tree.display())))?;
    Ok(tree)
}

/// What was copied before and is gone or elsewhere now.
fn sweep(folder: &Path, kept: &BTreeSet<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sweep(&entry.path(), kept)?;
        } else if !kept.contains(&entry.path()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// One crate's copy, and how it is tested.
struct Bench<'a> {
    folder: PathBuf,
    package: &'a str,
    tests: &'a [&'a str],
    build: PathBuf,
}

impl Bench<'_> {
    /// How many of the checks are proven.
    fn prove(&self, checks: &[Check]) -> Result<usize, Stop> {
        let whole = self.test()?;
        if !whole.rows.is_empty() || !whole.tests.is_empty() {
            let (rows, tests) = (whole.rows, whole.tests);
            return Err(Stop::Failed(format!(
                "{}: with every check in place these fail: {rows:?} {tests:?}",
                self.package
            )));
        }
        let mut proven = 0;
        for check in checks {
            match self.broken(check) {
                Ok(()) => {
                    proven += 1;
                    let noticed: Vec<&str> = check.rows.iter().chain(&check.tests).map(String::as_str).collect();
                    println!("check {}: without it fail: {}", check.name, noticed.join("; "));
                }
                Err(Stop::Failed(why) | Stop::Usage(why)) => println!("check {}: NOT PROVEN: {why}", check.name),
            }
        }
        Ok(proven)
    }

    fn broken(&self, check: &Check) -> Result<(), Stop> {
        let path = self.folder.join(&check.file);
        let sound = read(&path)?;
        let places = sound.matches(&check.from).count();
        if places != 1 || check.from.is_empty() {
            return Err(Stop::Failed(format!("'{}' is {places} times in {}", check.from, check.file)));
        }
        write(&path, &sound.replace(&check.from, &check.to.join("\n")))?;
        let found = self.test();
        write(&path, &sound)?;
        let found = found?;
        let only =
            |left: &BTreeSet<String>, right: &BTreeSet<String>| left.difference(right).cloned().collect::<Vec<_>>();
        let (missing, more) = (only(&check.rows, &found.rows), only(&found.rows, &check.rows));
        let asleep = only(&check.tests, &found.tests);
        let noticed = !found.rows.is_empty() || !found.tests.is_empty();
        if missing.is_empty() && more.is_empty() && asleep.is_empty() && noticed {
            return Ok(());
        }
        Err(Stop::Failed(format!(
            "rows that still pass {missing:?}, rows besides {more:?}, tests that still pass {asleep:?}"
        )))
    }

    /// Runs the crate's own tests in the copy. Rows say `wrong: WHAT: ...`, tests `---- PATH stdout ----`.
    fn test(&self) -> Result<Found, Stop> {
        let mut cargo = Command::new("cargo");
        cargo.args(["test", "--quiet", "--no-fail-fast", "--package", self.package]).args(self.tests);
        cargo.current_dir(&self.folder).env("CARGO_TARGET_DIR", &self.build).env("RUST_BACKTRACE", "0");
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
}
