//! Verbs whose place is fixed and whose work is not built. Each says so, ends in its count line, and fails: nothing
//! was proven.

use crate::Stop;

fn unbuilt(what: &str, last_line: &str) -> Result<(), Stop> {
    println!("not built yet: {what}");
    println!("{last_line}");
    Err(Stop::Failed(String::new()))
}

/// Comparative benchmarks.
pub(crate) fn bench(name: &str) -> Result<(), Stop> {
    let what = format!(
        "no benchmark '{name}': only `memory`, `policy`, `streams`, `revoke`, `deny`, `dataplane`, `attest`, `raft`, `issuance` and `kernel` are built; the demo's table holds the other figures measured so far"
    );
    unbuilt(&what, "0 figures, 0 met")
}
