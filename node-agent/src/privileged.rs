//! Processes of the mesh that hold capabilities by which they could look at, or meddle with, their pod's network: plain processes
//! are given none of these. As `/proc` tells at one moment: who starts meanwhile is not seen.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Bits in `/proc/<pid>/status` (capabilities(7), include/uapi/linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;

/// Cgroups that are looked into.
const CGROUPS_MAX: usize = 4_096;
/// Processes, and threads of each, that are looked at.
const PROCESSES_MAX: usize = 65_536;
const THREADS_MAX: usize = 1_024;
/// Of how many it is told which.
const NAMED_MAX: usize = 256;

/// One that holds some.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// The name of its program, as the kernel has it.
    pub name: String,
    /// Its cgroup below the mesh's.
    pub cgroup: String,
    /// Sees and makes packets of any kind.
    pub net_raw: bool,
    /// Changes devices, routes and filters.
    pub net_admin: bool,
    /// In a user namespace of its own, which may own no network namespace that matters.
    pub own_users: bool,
}

/// All that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// By process id, the first ones.
    pub named: Vec<Holder>,
    /// How many there are.
    pub all: usize,
    /// Processes that were looked at.
    pub looked_at: usize,
    /// There is more in the mesh than is looked at.
    pub cut_short: bool,
}

/// Looks at every process below the mesh cgroup.
///
/// # Errors
/// The cgroup cannot be read.
pub fn holders(mesh: &Path) -> io::Result<Holders> {
    let (pids, mut found) = processes(mesh)?;
    let ours = fs::read_link("/proc/self/ns/user").ok();
    let mut all = Vec::new();
    for (pid, cgroup) in pids {
        // It may have ended since.
        let Some((name, held)) = held(pid) else { continue };
        found.looked_at += 1;
        if held & (NET_ADMIN | NET_RAW) != 0 {
            let (net_raw, net_admin) = (held & NET_RAW != 0, held & NET_ADMIN != 0);
            let own_users = fs::read_link(format!("/proc/{pid}/ns/user")).ok() != ours;
            all.push(Holder { pid, name, cgroup, net_raw, net_admin, own_users });
        }
    }
    all.sort();
    found.all = all.len();
    all.truncate(NAMED_MAX);
    found.named = all;
    Ok(found)
}

/// All processes with the cgroup that they are in, each once.
fn processes(mesh: &Path) -> io::Result<(Vec<(u32, String)>, Holders)> {
    let (mut found, mut seen, mut pids) = (Holders::default(), BTreeSet::new(), Vec::new());
    // The mesh cgroup itself must be there; what is below it comes and goes.
    fs::read_dir(mesh)?;
    let (mut waiting, mut cgroups): (Vec<PathBuf>, usize) = (vec![mesh.to_owned()], 0);
    while let Some(dir) = waiting.pop() {
        cgroups += 1;
        if cgroups > CGROUPS_MAX {
            found.cut_short = true;
            break;
        }
        let below = dir.strip_prefix(mesh).unwrap_or(&dir).display().to_string();
        // In a threaded cgroup it is its threads that are listed.
        let listed = fs::read_to_string(dir.join("cgroup.procs"));
        let listed = listed.or_else(|_| fs::read_to_string(dir.join("cgroup.threads"))).unwrap_or_default();
        // 0 is who is in a process namespace that is none of ours.
        for pid in listed.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0u32) {
            if pids.len() >= PROCESSES_MAX {
                found.cut_short = true;
            } else if seen.insert(pid) {
                pids.push((pid, below.clone()));
            }
        }
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        waiting.extend(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    Ok((pids, found))
}

/// Its name, and what any of its threads may use: what is permitted can be made effective by the process itself.
fn held(pid: u32) -> Option<(String, u64)> {
    let (mut name, mut held) = (None, 0);
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    for thread in threads.flatten().take(THREADS_MAX) {
        let Ok(status) = fs::read_to_string(thread.path().join("status")) else { continue };
        let (of, bits) = parse(&status)?;
        name.get_or_insert(of);
        held |= bits;
    }
    Some((name?, held))
}

fn parse(status: &str) -> Option<(String, u64)> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let bits = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    // The kernel escapes line ends only; a name goes to a terminal.
    let name = field("Name")?.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    Some((name, bits("CapPrm")? | bits("CapEff")?))
}

/// A line for each, what it costs, and a count.
pub fn told(holders: &Holders) -> String {
    let mut text = String::new();
    for Holder { pid, name, cgroup, net_raw, net_admin, own_users } in &holders.named {
        let held = match (net_raw, net_admin) {
            (true, true) => "CAP_NET_RAW and CAP_NET_ADMIN",
            (true, false) => "CAP_NET_RAW",
            _ => "CAP_NET_ADMIN",
        };
        let whose = if *own_users { ", in a user namespace of its own" } else { "" };
        text.push_str(&format!("HOLDS    process {pid} ({name}) of cgroup '{cgroup}': {held}{whose}\n"));
    }
    if holders.all > 0 {
        text.push_str(
            "         cost: packets of its pod can be read and made; what leaves by the pod's wire is still judged there\n",
        );
    }
    let more = if holders.cut_short { "; there are more, which were not looked at" } else { "" };
    text.push_str(&format!(
        "{} of {} processes of the mesh hold CAP_NET_RAW or CAP_NET_ADMIN{more}\n",
        holders.all, holders.looked_at
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_may_use_is_read_to_the_letter() {
        let status = |prm: &str, eff: &str| {
            format!("Name:\tx\u{7}y\nUid:\t0\t0\nCapInh:\tffff\nCapPrm:\t{prm}\nCapEff:\t{eff}\n")
        };
        for (prm, eff, bits) in [
            ("0000000000000000", "0000000000000000", Some(0)),
            ("0000000000002000", "0000000000000000", Some(NET_RAW)),
            ("0000000000001000", "0000000000001000", Some(NET_ADMIN)),
            ("000001ffffffffff", "0000000000000000", Some(0x1ff_ffff_ffff)),
            ("", "0", None),
            ("x", "0", None),
        ] {
            let expected = bits.map(|bits| ("x?y".to_owned(), bits));
            assert_eq!(parse(&status(prm, eff)), expected, "{prm} {eff}");
        }
        assert_eq!(parse("Name:\tx\n"), None);
    }

    #[test]
    fn each_is_told_with_what_it_holds() {
        let holder = |pid, net_raw, net_admin, own_users| Holder {
            pid,
            name: "tcpdump".into(),
            cgroup: "web".into(),
            net_raw,
            net_admin,
            own_users,
        };
        let named = vec![holder(7, true, false, false), holder(8, true, true, true)];
        let text = told(&Holders { named, all: 300, looked_at: 400, cut_short: true });
        assert!(text.starts_with("HOLDS    process 7 (tcpdump) of cgroup 'web': CAP_NET_RAW\n"), "{text}");
        assert!(
            text.contains("process 8 (tcpdump) of cgroup 'web': CAP_NET_RAW and CAP_NET_ADMIN, in a user namespace")
        );
        let end = "300 of 400 processes of the mesh hold CAP_NET_RAW or CAP_NET_ADMIN; there are more, which were not looked at\n";
        assert!(text.ends_with(end) && text.contains("cost: "));
        assert_eq!(told(&Holders::default()), "0 of 0 processes of the mesh hold CAP_NET_RAW or CAP_NET_ADMIN\n");
    }
}
