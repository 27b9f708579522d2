//! The table of the adversarial list: case, what was tried, what it was answered. Tests write its rows as they pass.

use crate::{Stop, cargo};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Cases of the list.
const CASES: u8 = 48;

/// Rows of an earlier run say nothing about this one.
pub(crate) fn clear() -> Result<(), Stop> {
    match std::fs::remove_dir_all(folder()?) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Stop::Failed(format!("the old table: {e}"))),
        _ => Ok(()),
    }
}

/// Prints the rows, and which cases have none; how many those are.
pub(crate) fn print() -> Result<u64, Stop> {
    let mut rows = BTreeSet::new();
    if let Ok(files) = std::fs::read_dir(folder()?) {
        for file in files.flatten() {
            rows.extend(std::fs::read_to_string(file.path()).unwrap_or_default().lines().map(str::to_owned));
        }
    }
    println!("\nadversarial list ({} rows):", rows.len());
    rows.iter().for_each(|row| println!("{row}"));
    let shown = |case: &u8| rows.iter().any(|row| row.starts_with(&format!("case {case:02} ")));
    let missing: Vec<String> = (1..=CASES).filter(|case| !shown(case)).map(|case| case.to_string()).collect();
    println!("{} of {CASES} cases shown; without a row: {}\n", usize::from(CASES) - missing.len(), missing.join(" "));
    Ok(missing.len() as u64)
}

fn folder() -> Result<PathBuf, Stop> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(target.map_or_else(|| cargo::root().map(|root| root.join("target")), Ok)?.join("adversarial"))
}
