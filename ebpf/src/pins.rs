//! Where maps and links live between two runs of the agent, and the audit of what is found there.
//!
//! ```text
//! <pin_dir>/maps/<name>     the maps of mesh.bpf.o, and `layout`: the layout hash that they were made with
//! <pin_dir>/links/<name>    one cgroup link per program of mesh.bpf.o
//! <pin_dir>/pods/<pod>/     `listener` (the slot of the agent's capture listener), `link` (sk_lookup), and `veth-<n>`,
//!                           `knock-<n>`, the packet programs on the node's side of each of its veths, one each way
//! ```
//! No `.` in a name: bpffs refuses it.

use crate::error::KernelError;
use crate::hook::Hook;
use crate::layout::{self, Field};
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::query::{LinkInfo, LinkTypeInfo};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, ProgramAttachType};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a pinned map must be.
pub(crate) struct MapPin {
    pub(crate) name: &'static str,
    pub(crate) kind: MapType,
    pub(crate) key: usize,
    pub(crate) value: usize,
}

const fn map(name: &'static str, kind: MapType, key: usize, value: usize) -> MapPin {
    MapPin { name, kind, key, value }
}

/// The maps of mesh.bpf.o.
pub(crate) const MAPS: [MapPin; 22] = [
    map("accepted", MapType::SkStorage, 4, layout::RawClient::SIZE),
    map("callers", MapType::ArrayOfMaps, 4, 4),
    map("clients", MapType::Hash, layout::ClientKey::SIZE, layout::RawClient::SIZE),
    map("config", MapType::Array, 4, 8),
    map("counters", MapType::PercpuArray, 4, 8),
    map("endpoints", MapType::ArrayOfMaps, 4, 4),
    map("endpoints6", MapType::ArrayOfMaps, 4, 4),
    map("events", MapType::RingBuf, 0, 0),
    map("flows", MapType::Hash, layout::FlowKey::SIZE, layout::Flow::SIZE),
    map("flows6", MapType::Hash, layout::Flow6Key::SIZE, layout::Flow6::SIZE),
    map("legs", MapType::Hash, layout::LegKey::SIZE, 8),
    map("locals", MapType::Hash, 4, layout::RawLocal::SIZE),
    map("namespaces", MapType::Hash, 8, layout::Namespace::SIZE),
    map("namespaces6", MapType::Hash, 8, layout::Namespace6::SIZE),
    map("ranges", MapType::ArrayOfMaps, 4, 4),
    map("services", MapType::ArrayOfMaps, 4, 4),
    map("services6", MapType::ArrayOfMaps, 4, 4),
    map("sockets", MapType::SkStorage, 4, layout::SocketFlow::SIZE),
    map("sockets6", MapType::SkStorage, 4, layout::SocketFlow6::SIZE),
    map("stamps", MapType::Hash, layout::StampKey::SIZE, layout::RawStamp::SIZE),
    map("verdicts", MapType::ArrayOfMaps, 4, 4),
    map("workloads", MapType::Hash, 8, layout::Workload::SIZE),
];

/// The slot of a pod's capture listener.
pub(crate) const LISTENER: MapPin = map("listener", MapType::Sockmap, 4, 8);

/// A packet program of veth.bpf.o.
pub(crate) struct WireProgram {
    pub(crate) name: &'static str,
    /// What the names of its links' pins begin with.
    pub(crate) prefix: &'static str,
    pub(crate) attach: ProgramAttachType,
}

/// What leaves a pod, and what comes in.
pub(crate) const WIRES: [WireProgram; 2] = [
    WireProgram { name: "ambit_outbound", prefix: "veth-", attach: ProgramAttachType::TcxIngress },
    WireProgram { name: "ambit_knock", prefix: "knock-", attach: ProgramAttachType::TcxEgress },
];

/// A packet program on a device, and its pin.
pub(crate) struct WireLink {
    pub(crate) path: PathBuf,
    pub(crate) hook: Hook,
    /// Of the link, or of the program where there is none.
    pub(crate) id: u32,
    /// The index of its device, in that one's namespace; 0 where it is gone.
    pub(crate) device: u32,
}

/// A program of mesh.bpf.o, the name of its link's pin, and where it attaches.
pub(crate) const LINKS: [(&str, &str, ProgramAttachType); 10] = [
    ("ambit_sock_create", "sock_create", ProgramAttachType::CgroupInetSockCreate),
    ("ambit_connect4", "connect4", ProgramAttachType::CgroupInet4Connect),
    ("ambit_connect6", "connect6", ProgramAttachType::CgroupInet6Connect),
    ("ambit_sendmsg4", "sendmsg4", ProgramAttachType::CgroupUdp4Sendmsg),
    ("ambit_sendmsg6", "sendmsg6", ProgramAttachType::CgroupUdp6Sendmsg),
    ("ambit_getpeername4", "getpeername4", ProgramAttachType::CgroupInet4Getpeername),
    ("ambit_getpeername6", "getpeername6", ProgramAttachType::CgroupInet6Getpeername),
    ("ambit_getsockname4", "getsockname4", ProgramAttachType::CgroupInet4Getsockname),
    ("ambit_getsockname6", "getsockname6", ProgramAttachType::CgroupInet6Getsockname),
    ("ambit_sockops", "sockops", ProgramAttachType::CgroupSockOps),
];

/// A pin directory.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Makes the directory on a BPF file system, which is mounted if its usual place has none.
    pub(crate) fn make(dir: &Path) -> Result<Self, KernelError> {
        crate::sys::mount_bpffs_for(dir).map_err(|e| KernelError::io("mount bpffs on /sys/fs/bpf", e))?;
        let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        Self::require_bpffs(existing)?;
        let pins = Self { dir: dir.to_owned() };
        for folder in ["maps", "links", "pods"] {
            let path = pins.dir.join(folder);
            fs::create_dir_all(&path).map_err(|e| KernelError::io(format!("create {}", path.display()), e))?;
        }
        Ok(pins)
    }

    fn require_bpffs(path: &Path) -> Result<(), KernelError> {
        let on_bpffs =
            crate::sys::is_bpffs(path).map_err(|e| KernelError::io(format!("look at {}", path.display()), e))?;
        if on_bpffs { Ok(()) } else { Err(unexpected(path, "a place on a BPF file system", "another file system")) }
    }

    /// Detaches and removes everything below `dir`. Absent is fine.
    pub(crate) fn remove(dir: &Path) -> Result<(), KernelError> {
        if !dir.exists() {
            return Ok(());
        }
        Self::require_bpffs(dir)?;
        let pods = dir.join("pods");
        let mut pod_links = Vec::new();
        for pod in children(&pods)? {
            let dir = pods.join(pod);
            pod_links.push(dir.join("link"));
            for kind in &WIRES {
                for wire in wires_in(&dir, kind)? {
                    if let Hook::Tcx(link) = &wire.hook {
                        drop(link.detach());
                    }
                    wire.release(kind)?;
                }
            }
        }
        let mesh_links = LINKS.iter().map(|(_, name, _)| dir.join("links").join(name));
        for link in pod_links.into_iter().chain(mesh_links).filter(|path| path.exists()) {
            // Removing the pin detaches too, but only once nobody else holds the link.
            if let Ok(link) = Link::open(&link) {
                drop(link.detach());
            }
        }
        fs::remove_dir_all(dir).map_err(|e| KernelError::io(format!("remove {}", dir.display()), e))
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.dir.join("maps").join(name)
    }

    pub(crate) fn link(&self, name: &str) -> PathBuf {
        self.dir.join("links").join(name)
    }

    pub(crate) fn pod(&self, name: &str) -> PathBuf {
        self.dir.join("pods").join(name)
    }

    /// Names of the pods that have pins.
    pub(crate) fn pods(&self) -> Result<Vec<String>, KernelError> {
        children(&self.dir.join("pods"))
    }

    /// Whether the maps are there already: `false` for a fresh directory, an error for anything in between. A start that
    /// was cut short before any program was attached left nothing that matters, and is cleared.
    pub(crate) fn audit_maps(&self) -> Result<bool, KernelError> {
        let found = children(&self.dir.join("maps"))?;
        let enforcing = !children(&self.dir.join("links"))?.is_empty() || !self.pods()?.is_empty();
        let has = |wanted: &str| found.iter().any(|name| name == wanted);
        let complete = has("layout") && MAPS.iter().all(|pin| has(pin.name));
        if !complete && !enforcing {
            for name in found {
                let path = self.map(&name);
                fs::remove_file(&path).map_err(|e| KernelError::io(format!("remove {}", path.display()), e))?;
            }
            return Ok(false);
        }
        self.check_layout()?;
        for pin in &MAPS {
            self.open_map(&self.map(pin.name), pin)?;
        }
        let stray = found.iter().find(|name| *name != "layout" && MAPS.iter().all(|pin| pin.name != name.as_str()));
        stray.map_or(Ok(true), |name| Err(unexpected(&self.map(name), "nothing", "a pin of that name")))
    }

    /// Opens a pin that must be the map described.
    pub(crate) fn open_map(&self, path: &Path, pin: &MapPin) -> Result<MapHandle, KernelError> {
        let expected = || format!("a {:?} map with {}-byte keys and {}-byte values", pin.kind, pin.key, pin.value);
        if !path.exists() {
            return Err(unexpected(path, expected(), "nothing"));
        }
        let map = MapHandle::from_pinned_path(path).map_err(|e| unexpected(path, expected(), format!("{e:#}")))?;
        let found = (map.map_type(), map.key_size() as usize, map.value_size() as usize);
        if found != (pin.kind, pin.key, pin.value) {
            let found = format!("a {:?} map with {}-byte keys and {}-byte values", found.0, found.1, found.2);
            return Err(unexpected(path, expected(), found));
        }
        Ok(map)
    }

    fn check_layout(&self) -> Result<(), KernelError> {
        let pin = map("layout", MapType::Array, 4, 32);
        let found = self
            .open_map(&self.map("layout"), &pin)?
            .lookup(&0u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| KernelError::bpf("read map layout", e))?
            .unwrap_or_default();
        let expected = map_layout();
        if found == expected {
            return Ok(());
        }
        Err(KernelError::LayoutChanged { dir: self.dir.clone(), expected: hex8(&expected), found: hex8(&found) })
    }

    /// Written last, so that its presence says that all maps are there.
    pub(crate) fn write_layout(&self) -> Result<(), KernelError> {
        let what = "make map layout";
        let mut map = create_map(MapType::Array, "layout", 4, 32, 1).map_err(|e| KernelError::bpf(what, e))?;
        map.update(&0u32.to_ne_bytes(), &map_layout(), MapFlags::ANY).map_err(|e| KernelError::bpf(what, e))?;
        map.pin(self.map("layout")).map_err(|e| KernelError::bpf(what, e))
    }

    /// Inode numbers of the network namespaces that pods' links hang on, `except` this pod's. Gone ones are left out.
    pub(crate) fn attached_namespaces(&self, except: &str) -> Result<Vec<u64>, KernelError> {
        let mut found = Vec::new();
        for pod in self.pods()?.into_iter().filter(|pod| pod != except) {
            if let Some((_, found_there)) = open_link(&self.pod(&pod).join("link"))?
                && let LinkTypeInfo::NetNs(info) = found_there.info
                && info.ino != 0
            {
                found.push(u64::from(info.ino));
            }
        }
        Ok(found)
    }

    /// Where one of a pod's packet programs hangs.
    pub(crate) fn wires(&self, pod: &str, kind: &WireProgram) -> Result<Vec<WireLink>, KernelError> {
        wires_in(&self.pod(pod), kind)
    }

    /// The ids of one packet program's hooks, of every pod but this one.
    pub(crate) fn wires_of_others(&self, pod: &str, kind: &WireProgram) -> Result<Vec<u32>, KernelError> {
        let mut found = Vec::new();
        for other in self.pods()?.into_iter().filter(|other| other != pod) {
            found.extend(self.wires(&other, kind)?.into_iter().map(|wire| wire.id));
        }
        Ok(found)
    }

    /// Whether a pod's link hangs on a network namespace that is still there.
    pub(crate) fn pod_lives(&self, pod: &str) -> Result<bool, KernelError> {
        let path = self.pod(pod).join("link");
        match open_link(&path)?.map(|(_, info)| info.info) {
            None => Ok(false),
            Some(LinkTypeInfo::NetNs(info)) => Ok(info.ino != 0),
            Some(_) => Err(unexpected(&path, "a network namespace link", "another kind of link")),
        }
    }

    /// Opens a pinned link that must hang on `cgroup`. `None`: there is none, or its cgroup is gone (the kernel detached it
    /// then, so the pin enforces nothing and is removed).
    pub(crate) fn open_cgroup_link(
        &self,
        name: &str,
        cgroup: u64,
        attach: ProgramAttachType,
    ) -> Result<Option<Link>, KernelError> {
        let path = self.link(name);
        let Some((link, info)) = open_link(&path)? else { return Ok(None) };
        let LinkTypeInfo::Cgroup(found) = info.info else {
            return Err(unexpected(&path, "a cgroup link", "another kind of link"));
        };
        if found.cgroup_id == 0 {
            unpin(&path)?;
            return Ok(None);
        }
        if found.cgroup_id != cgroup || !same(&found.attach_type, &attach) {
            return Err(unexpected(
                &path,
                format!("a link of {attach:?} on cgroup {cgroup}"),
                format!("a link of {:?} on cgroup {}", found.attach_type, found.cgroup_id),
            ));
        }
        Ok(Some(link))
    }

    /// The same for a pod's link, which must hang on the network namespace with this inode number.
    pub(crate) fn open_pod_link(&self, pod: &str, netns: u64) -> Result<Option<Link>, KernelError> {
        let path = self.pod(pod).join("link");
        let Some((link, info)) = open_link(&path)? else { return Ok(None) };
        let LinkTypeInfo::NetNs(found) = info.info else {
            return Err(unexpected(&path, "a network namespace link", "another kind of link"));
        };
        if found.ino == 0 {
            unpin(&path)?;
            return Ok(None);
        }
        if u64::from(found.ino) != netns || !same(&found.attach_type, &ProgramAttachType::SkLookup) {
            return Err(unexpected(
                &path,
                format!("an sk_lookup link on network namespace {netns}"),
                format!("a link of {:?} on network namespace {}", found.attach_type, found.ino),
            ));
        }
        Ok(Some(link))
    }
}

/// The ids of the programs that are in force on the cgroup, by the pins below `pin_dir`: one that was replaced has another.
pub fn programs(pin_dir: &Path) -> Result<Vec<u32>, KernelError> {
    let pins = Pins { dir: pin_dir.to_owned() };
    let mut found = Vec::with_capacity(LINKS.len());
    for (_, name, _) in LINKS {
        found.extend(open_link(&pins.link(name))?.map(|(_, info)| info.prog_id));
    }
    Ok(found)
}

/// The hash of the layout of all maps: two programs whose hashes differ never write the same pinned maps.
pub fn map_layout() -> [u8; 32] {
    let maps: Vec<_> = MAPS.iter().map(|pin| (pin.name, pin.kind as u32, pin.key, pin.value)).collect();
    layout::layout_hash(&maps)
}

/// libbpf-rs gives attach types no equality; their numbers are the kernel's.
fn same(a: &ProgramAttachType, b: &ProgramAttachType) -> bool {
    a.clone() as u32 == b.clone() as u32
}

/// An anonymous map.
/// `BPF_F_NO_PREALLOC` (include/uapi/linux/bpf.h).
const NO_PREALLOC: u32 = 1;

pub(crate) fn create_map(
    kind: MapType,
    name: &str,
    key: u32,
    value: u32,
    entries: u32,
) -> libbpf_rs::Result<MapHandle> {
    // The kernel takes no other of this kind, which it makes entry by entry.
    let map_flags = if kind == MapType::LpmTrie { NO_PREALLOC } else { 0 };
    let opts = bpf_map_create_opts { sz: size_of::<bpf_map_create_opts>() as _, map_flags, ..Default::default() };
    MapHandle::create(kind, Some(name), key, value, entries, &opts)
}

fn wires_in(dir: &Path, kind: &WireProgram) -> Result<Vec<WireLink>, KernelError> {
    let mut found = Vec::new();
    for name in children(dir)?.into_iter().filter(|name| name.starts_with(kind.prefix)) {
        let path = dir.join(&name);
        if let Some((hook, id, device)) = Hook::open(&path, &name, kind)? {
            found.push(WireLink { path, hook, id, device });
        }
    }
    Ok(found)
}

/// A tcx link, its id, and its device.
pub(crate) fn open_tcx(path: &Path) -> Result<Option<(Hook, u32, u32)>, KernelError> {
    let Some((link, info)) = open_link(path)? else { return Ok(None) };
    match info.info {
        LinkTypeInfo::Tcx(tcx) => Ok(Some((Hook::Tcx(link), info.id, tcx.ifindex))),
        _ => Err(unexpected(path, "a tcx link", "another kind of link")),
    }
}

fn open_link(path: &Path) -> Result<Option<(Link, LinkInfo)>, KernelError> {
    if !path.exists() {
        return Ok(None);
    }
    let link = Link::open(path).map_err(|e| unexpected(path, "a link", format!("{e:#}")))?;
    let info = link.info().map_err(|e| unexpected(path, "a link", format!("{e:#}")))?;
    Ok(Some((link, info)))
}

pub(crate) fn unpin(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(KernelError::io(format!("remove {}", path.display()), e)),
        _ => Ok(()),
    }
}

fn children(dir: &Path) -> Result<Vec<String>, KernelError> {
    let what = || format!("list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| KernelError::io(what(), e))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(|e| KernelError::io(what(), e))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn unexpected(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> KernelError {
    KernelError::PinUnexpected { path: path.to_owned(), expected: expected.into(), found: found.into() }
}

fn hex8(bytes: &[u8]) -> String {
    bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
