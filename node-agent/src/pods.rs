//! Which pods run on this node: what a CNI plugin would tell, read from one small file per pod.
//!
//! A file is the claim "this cgroup and this network namespace are one pod"; who it *is* comes from the slice alone.

use ambit_model::{Address, Selector};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A pod file is one line of JSON.
const FILE_BYTES_MAX: u64 = 4096;
/// More pods than any node runs; beyond it the rest stay unenrolled, hence denied.
pub const PODS_MAX: usize = 1024;

/// One pod as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The file's name without `.json`.
    pub name: String,
    /// Its cgroup's name below the node's `mesh` cgroup.
    pub cgroup: String,
    /// The kernel's id of that cgroup: the inode of its directory. A recreated cgroup is another pod.
    pub cgroup_id: u64,
    /// Its network namespace's file.
    pub netns: PathBuf,
    /// (device, inode) of that file: a recreated namespace of the same name is another pod.
    pub netns_id: (u64, u64),
    /// Its address.
    pub address: Ipv4Addr,
    /// Its other address, if it has one.
    pub address6: Option<Ipv6Addr>,
    /// The uid that its processes run as.
    pub uid: u32,
}

impl Pod {
    /// What the pod can be recognised by.
    pub fn selectors(&self) -> BTreeSet<Selector> {
        BTreeSet::from([Selector::Cgroup(self.cgroup.clone()), Selector::UnixUid(self.uid)])
    }

    /// Where it can be called.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        // What was read is one.
        let other = self.address6.and_then(|address| Address::try_from(address).ok());
        std::iter::once(Address::from(self.address)).chain(other)
    }

    /// Whether `other` is the same pod but for what it is recognised by: same cgroup, namespace and addresses.
    pub fn stands_where(&self, other: &Pod) -> bool {
        *self == Pod { uid: self.uid, ..other.clone() }
    }
}

/// A file that is not a pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pod file {name}: {why}")]
pub struct Unusable {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub why: String,
}

/// All pods, by name.
pub type Pods = BTreeMap<String, Pod>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PodFile {
    cgroup: String,
    netns: PathBuf,
    address: Ipv4Addr,
    #[serde(default)]
    address6: Option<String>,
    uid: u32,
}

/// Reads every pod file in `dir`. Errors are per file: one bad file hides no other pod.
pub fn scan(dir: &Path, cgroup_root: &Path) -> std::io::Result<(Pods, Vec<Unusable>)> {
    let (mut pods, mut unusable) = (Pods::new(), Vec::new());
    let mut names: Vec<String> = std::fs::read_dir(dir)?
        .filter_map(|f| f.ok()?.file_name().into_string().ok())
        .filter_map(|f| f.strip_suffix(".json").map(str::to_owned))
        .collect();
    names.sort();
    for name in names.into_iter().take(PODS_MAX) {
        match read(dir, cgroup_root, &name) {
            Ok(pod) => {
                pods.insert(name, pod);
            }
            Err(why) => unusable.push(Unusable { name, why }),
        }
    }
    drop_duplicates(&mut pods, &mut unusable);
    Ok((pods, unusable))
}

fn read(dir: &Path, cgroup_root: &Path, name: &str) -> Result<Pod, String> {
    let path = dir.join(format!("{name}.json"));
    let len = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
    if len > FILE_BYTES_MAX {
        return Err(format!("{len} bytes, at most {FILE_BYTES_MAX}"));
    }
    let file: PodFile =
        serde_json::from_slice(&std::fs::read(&path).map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    // The selector's grammar is the cgroup name's grammar: no separators, so the name cannot leave `cgroup_root`.
    format!("cgroup:{}", file.cgroup).parse::<Selector>().map_err(|r| r.to_string())?;
    let address6 = file.address6.as_deref().map(ipv6).transpose()?;
    let cgroup = cgroup_root.join(&file.cgroup);
    let meta = std::fs::metadata(&cgroup).map_err(|e| format!("cgroup {}: {e}", cgroup.display()))?;
    let netns = std::fs::metadata(&file.netns).map_err(|e| format!("netns {}: {e}", file.netns.display()))?;
    Ok(Pod {
        name: name.to_owned(),
        cgroup: file.cgroup,
        cgroup_id: meta.ino(),
        netns: file.netns,
        netns_id: (netns.dev(), netns.ino()),
        address: file.address,
        address6,
        uid: file.uid,
    })
}

/// Global or unique local, in the one form of it.
fn ipv6(text: &str) -> Result<Ipv6Addr, String> {
    let address: Address = text.parse().map_err(|r: ambit_model::Refusal| r.to_string())?;
    address.v6().ok_or_else(|| format!("address6 {text} is no IPv6 address"))
}

/// Two files that claim one cgroup or one address contradict each other: neither is believed.
fn drop_duplicates(pods: &mut Pods, unusable: &mut Vec<Unusable>) {
    let mut cgroups: BTreeMap<u64, usize> = BTreeMap::new();
    let mut addresses: BTreeMap<Address, usize> = BTreeMap::new();
    for pod in pods.values() {
        *cgroups.entry(pod.cgroup_id).or_default() += 1;
        pod.addresses().for_each(|address| *addresses.entry(address).or_default() += 1);
    }
    pods.retain(|name, pod| {
        let alone = cgroups.get(&pod.cgroup_id) == Some(&1) && pod.addresses().all(|at| addresses.get(&at) == Some(&1));
        if !alone {
            unusable.push(Unusable { name: name.clone(), why: "its cgroup or address is claimed twice".to_owned() });
        }
        alone
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_files_are_read_strictly_and_one_by_one() {
        let root = std::env::temp_dir().join(format!("ambit-pods-{}", std::process::id()));
        let (dir, cgroups) = (root.join("pods"), root.join("mesh"));
        for d in [&dir, &cgroups.join("web"), &cgroups.join("db")] {
            std::fs::create_dir_all(d).unwrap();
        }
        let put = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        let line = |cgroup: &str, address: &str| {
            format!(r#"{{"cgroup":"{cgroup}","netns":"/proc/self/ns/net","address":"{address}","uid":1000}}"#)
        };
        put("web.json", &line("web", "10.71.101.11"));
        put("db.json", &line("db", "10.71.101.12"));
        put("notes.txt", "not a pod");
        put("half.json", r#"{"cgroup":"we"#);
        let dual = |address6: &str| {
            line("db", "10.71.101.12").replace(",\"uid\"", &format!(",\"address6\":\"{address6}\",\"uid\""))
        };
        for bad in ["fe80::1", "::1", "::ffff:10.0.0.1", "10.0.0.1", "FD00::1", "fd61:6d62:6974::7"] {
            put("db.json", &dual(bad));
            assert!(scan(&dir, &cgroups).unwrap().1.iter().any(|u| u.name == "db"), "{bad}");
        }
        put("db.json", &dual("fd00::12"));
        assert_eq!(scan(&dir, &cgroups).unwrap().0["db"].addresses().count(), 2);
        put("up.json", &line("../agent", "10.71.101.13"));
        put("gone.json", &line("gone", "10.71.101.14"));
        put("extra.json", r#"{"cgroup":"web","netns":"/x","address":"10.0.0.1","uid":1,"identity":"spiffe://a/b"}"#);
        let (pods, unusable) = scan(&dir, &cgroups).unwrap();
        assert_eq!(pods.keys().map(String::as_str).collect::<Vec<_>>(), ["db", "web"]);
        assert_eq!(unusable.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(), ["extra", "gone", "half", "up"]);
        assert_eq!(pods["web"].cgroup_id, std::fs::metadata(cgroups.join("web")).unwrap().ino());

        put("twin.json", &line("web", "10.71.101.15"));
        let (pods, unusable) = scan(&dir, &cgroups).unwrap();
        assert_eq!(pods.keys().map(String::as_str).collect::<Vec<_>>(), ["db"]);
        assert!(unusable.iter().any(|u| u.name == "twin"));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
