//! The handle on a node's kernel side: attach or take over, who the workloads are, the lease, and where a flow wanted to go.

use crate::annex::Annex;
use crate::drift::InForce;
use crate::error::KernelError;
use crate::hook::Hooks;
use crate::layout::{self, CONFIG_LEASE_NS, Field, Flow, FlowKey, Layout, Workload};
use crate::objects::{BuiltObject, MESH};
use crate::pins::{LINKS, MAPS, Pins};
use libbpf_rs::{ErrorKind, Link, MapCore, MapFlags, MapHandle, Object, ObjectBuilder, OpenObject};
use std::collections::HashMap;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most entries of each map: what bounds the memory. Fixed when the maps are first made; a node must be drained and its
/// pins removed before `workloads`, `flows` or `stamps` can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Enrolled cgroups of this node, and attached pods.
    pub workloads: u32,
    /// Verdicts of one generation, about 90 bytes each.
    pub verdicts: u32,
    /// Known addresses of one generation, of each family.
    pub endpoints: u32,
    /// Services of one generation, of each family.
    pub services: u32,
    /// Ranges of addresses of one generation, about 100 bytes each; as many of callers again.
    pub ranges: u32,
    /// Captured flows that the agent did not accept yet, of each family.
    pub flows: u32,
    /// Connections between two pods of this node, and those that ended within the last minute; about 150 bytes each.
    pub stamps: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            workloads: 1024,
            verdicts: 262_144,
            endpoints: 65_536,
            services: 4096,
            ranges: 65_536,
            flows: 16_384,
            stamps: 65_536,
        }
    }
}

/// Where to attach and what to keep.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup2 directory whose subtree is governed: the node's `mesh` cgroup. Agents live outside it.
    pub cgroup_root: PathBuf,
    /// A directory on bpffs, this node's alone.
    pub pin_dir: PathBuf,
    /// Sizes.
    pub capacity: Capacity,
}

/// Where a captured connection wanted to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginalDestination<A = SocketAddrV4> {
    /// What the application asked for: a service's virtual address, or an endpoint's.
    pub asked: A,
    /// The endpoint chosen, which is `asked` unless that was a service.
    pub endpoint: A,
    /// The endpoint's identity, for which the verdict was given.
    pub identity: u32,
}

pub(crate) struct Maps {
    pub(crate) callers: MapHandle,
    pub(crate) clients: MapHandle,
    pub(crate) config: MapHandle,
    pub(crate) counters: MapHandle,
    pub(crate) endpoints: MapHandle,
    pub(crate) endpoints6: MapHandle,
    pub(crate) events: MapHandle,
    pub(crate) flows: MapHandle,
    pub(crate) flows6: MapHandle,
    pub(crate) legs: MapHandle,
    pub(crate) locals: MapHandle,
    pub(crate) namespaces: MapHandle,
    pub(crate) namespaces6: MapHandle,
    pub(crate) ranges: MapHandle,
    pub(crate) services: MapHandle,
    pub(crate) services6: MapHandle,
    pub(crate) stamps: MapHandle,
    pub(crate) verdicts: MapHandle,
    pub(crate) workloads: MapHandle,
}

/// The programs and maps of one node. Dropping it detaches nothing: what is pinned keeps enforcing.
pub struct Kernel {
    pins: Pins,
    maps: Maps,
    capacity: Capacity,
    hooks: Hooks,
    /// What is in the tables in force, once this handle put them there. Held by whoever changes a table, so that
    /// read-modify-write of one is not interleaved with another's.
    change: Mutex<Option<InForce>>,
    /// The index of the agent's annex on the node; 0 as long as there is none.
    annex: AtomicU32,
    strict: AtomicBool,
}

impl Kernel {
    /// Attaches to the cgroup, or takes over what a former agent pinned: its maps are kept, its programs replaced without
    /// a gap. Whatever is wrong with what is found, or with the new programs, leaves the old ones in force. Until `install` and `renew_lease` were called once, every connection beyond loopback is refused.
    pub fn open(options: &Options) -> Result<Self, KernelError> {
        Self::open_with(options, if crate::probe::has_tcx() { Hooks::Tcx } else { Hooks::Clsact })
    }

    /// The same with packet programs hung in this way: filters are for kernels that have no links, and for tests.
    pub fn open_with(options: &Options, hooks: Hooks) -> Result<Self, KernelError> {
        if !crate::sys::is_root() {
            return Err(KernelError::NeedsRoot);
        }
        let not_cgroup = |_| KernelError::NotCgroup { path: options.cgroup_root.clone() };
        let cgroup = File::open(&options.cgroup_root).map_err(not_cgroup)?;
        let cgroup_id = crate::sys::cgroup_id(&options.cgroup_root).map_err(not_cgroup)?;
        crate::probe::require(crate::probe::probe())?;
        let pins = Pins::make(&options.pin_dir)?;
        let reuse = pins.audit_maps()?;
        let mut object = load_mesh(&pins, reuse, &options.capacity)?;
        if !reuse {
            pin_maps(&mut object, &pins)?;
        }
        let (maps, capacity) = (open_maps(&pins)?, options.capacity);
        let kernel = Self {
            maps,
            pins,
            capacity,
            hooks,
            change: Mutex::new(None),
            annex: AtomicU32::new(0),
            strict: AtomicBool::new(false),
        };
        kernel.check_capacity()?;
        attach(&object, &kernel.pins, &cgroup, cgroup_id)?;
        Ok(kernel)
    }

    /// Detaches everything pinned below `pin_dir` and removes it. Nothing is enforced afterwards: for clean-up only.
    pub fn remove(pin_dir: &Path) -> Result<(), KernelError> {
        Pins::remove(pin_dir)
    }

    /// Says who the processes of a cgroup are. Call it before the first of them runs.
    pub fn set_workload(&self, cgroup_id: u64, identity: u32) -> Result<(), KernelError> {
        if identity == 0 {
            return Err(KernelError::BadTables(format!("identity 0 for cgroup {cgroup_id}")));
        }
        let value = Workload { identity, flags: 0 };
        self.maps.workloads.update(&cgroup_id.to_ne_bytes(), &value.to_bytes(), MapFlags::ANY).map_err(|e| {
            if e.kind() == ErrorKind::TooBig {
                let capacity = self.maps.workloads.max_entries();
                return KernelError::MapFull { map: "workloads", capacity, needed: capacity as usize + 1 };
            }
            KernelError::bpf(format!("enrol cgroup {cgroup_id}"), e)
        })
    }

    /// Forgets a cgroup: its processes may do nothing from now on. Absent is fine.
    pub fn remove_workload(&self, cgroup_id: u64) -> Result<(), KernelError> {
        match self.maps.workloads.delete(&cgroup_id.to_ne_bytes()) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(KernelError::bpf(format!("remove cgroup {cgroup_id}"), e)),
            _ => Ok(()),
        }
    }

    /// The enrolled cgroups and their identities, to reconcile after a restart.
    pub fn workloads(&self) -> Result<HashMap<u64, u32>, KernelError> {
        let mut found = HashMap::new();
        for key in self.maps.workloads.keys() {
            let value =
                self.maps.workloads.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read workloads", e))?;
            if let (Some(id), Some(workload)) = (key.first_chunk(), value.as_deref().and_then(Workload::from_bytes)) {
                found.insert(u64::from_ne_bytes(*id), workload.identity);
            }
        }
        Ok(found)
    }

    /// Lets new connections be judged for `length` from now. Past that, all are refused until the next renewal.
    pub fn renew_lease(&self, length: Duration) -> Result<(), KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let until = now.saturating_add(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
        self.set_config(CONFIG_LEASE_NS, until)
    }

    /// Has the lease in force end by `length` from now, if it would last longer.
    pub fn shorten_lease(&self, length: Duration) -> Result<(), KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let until = now.saturating_add(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX));
        if self.config(CONFIG_LEASE_NS)? > until { self.set_config(CONFIG_LEASE_NS, until) } else { Ok(()) }
    }

    /// Where the captured connection wanted to go whose accepted socket has `client` as peer, `capture` as local address
    /// and lives in the namespace with this cookie. Takes the record: ask once, at accept. `None`, also when the
    /// kernel could not be asked, means that the connection must be reset.
    ///
    /// Both addresses are needed: the kernel gives one source port to two connections at once if their capture
    /// addresses differ.
    pub fn original_destination(
        &self,
        netns_cookie: u64,
        client: SocketAddrV4,
        capture: SocketAddrV4,
    ) -> Option<OriginalDestination> {
        let key = FlowKey {
            netns_cookie,
            client_address: layout::address(*client.ip()),
            capture_address: layout::address(*capture.ip()),
            client_port: client.port(),
            pad: [0; 3],
        };
        let mut value = [0; Flow::SIZE];
        if !self.maps.flows.lookup_into_and_delete(&key.to_bytes(), &mut value).unwrap_or(false) {
            return None;
        }
        let flow = Flow::from_bytes(&value)?;
        Some(OriginalDestination {
            asked: SocketAddrV4::new(Ipv4Addr::from(flow.asked_address), flow.asked_port),
            endpoint: SocketAddrV4::new(Ipv4Addr::from(flow.endpoint_address), flow.endpoint_port),
            identity: flow.identity,
        })
    }

    /// Removes the records of flows that closed longer than `older_than` ago and that no agent took, and says how many.
    /// They only come from agents that died between SYN and accept; once a minute is enough.
    pub fn sweep_closed_flows(&self, older_than: Duration) -> Result<usize, KernelError> {
        let now = crate::sys::boot_time_ns().map_err(|e| KernelError::io("read the boot clock", e))?;
        let age = u64::try_from(older_than.as_nanos()).unwrap_or(u64::MAX);
        let keys: Vec<Vec<u8>> = self.maps.flows.keys().take(self.maps.flows.max_entries() as usize).collect();
        let mut removed = 0;
        for key in keys {
            let value = self.maps.flows.lookup(&key, MapFlags::ANY).map_err(|e| KernelError::bpf("read flows", e))?;
            let Some(flow) = value.as_deref().and_then(Flow::from_bytes) else { continue };
            if flow.closed_ns != 0 && now.saturating_sub(flow.closed_ns) >= age && self.maps.flows.delete(&key).is_ok()
            {
                removed += 1;
            }
        }
        Ok(removed + self.sweep_ipv6(now, age)?)
    }

    /// Pods that are guarded from now on turn HBONE off into this annex; before, they drop it.
    pub fn use_annex(&self, annex: &Annex) {
        self.annex.store(annex.index(), Ordering::Relaxed);
    }

    /// Of pods that are guarded from now on, also what goes directly and is open stops where the lease is over, until it is
    /// renewed; before, it goes on.
    pub fn set_strict(&self, strict: bool) {
        self.strict.store(strict, Ordering::Relaxed);
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.strict.load(Ordering::Relaxed)
    }

    pub(crate) fn annex(&self) -> u32 {
        self.annex.load(Ordering::Relaxed)
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    pub(crate) fn maps(&self) -> &Maps {
        &self.maps
    }

    pub(crate) fn hooks(&self) -> Hooks {
        self.hooks
    }

    pub(crate) fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<InForce>> {
        // A panic could leave it behind what is in the kernel, which is drift then, and healed.
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_config(&self, index: u32, value: u64) -> Result<(), KernelError> {
        self.maps
            .config
            .update(&index.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| KernelError::bpf("write map config", e))
    }

    pub(crate) fn config(&self, index: u32) -> Result<u64, KernelError> {
        let value = self.maps.config.lookup(&index.to_ne_bytes(), MapFlags::ANY);
        let value = value.map_err(|e| KernelError::bpf("read map config", e))?.unwrap_or_default();
        Ok(value.first_chunk().copied().map_or(0, u64::from_ne_bytes))
    }

    fn check_capacity(&self) -> Result<(), KernelError> {
        let fixed = [
            (&self.maps.workloads, "workloads", self.capacity.workloads),
            (&self.maps.flows, "flows", self.capacity.flows),
            (&self.maps.flows6, "flows6", self.capacity.flows),
            (&self.maps.stamps, "stamps", self.capacity.stamps),
        ];
        for (map, name, wanted) in fixed {
            if map.max_entries() != wanted {
                return Err(KernelError::PinUnexpected {
                    path: self.pins.map(name),
                    expected: format!("a capacity of {wanted} entries"),
                    found: format!("{}: drain the node and remove the pins to change it", map.max_entries()),
                });
            }
        }
        Ok(())
    }
}

pub(crate) fn open_object(built: &BuiltObject) -> Result<OpenObject, KernelError> {
    ObjectBuilder::default()
        .open_memory(built.bytes)
        .map_err(|e| KernelError::bpf(format!("open object {}", built.name), e))
}

pub(crate) fn load_object(object: OpenObject, built: &BuiltObject) -> Result<Object, KernelError> {
    object.load().map_err(|e| KernelError::bpf(format!("load object {}", built.name), e))
}

fn load_mesh(pins: &Pins, reuse: bool, capacity: &Capacity) -> Result<Object, KernelError> {
    let mut object = open_object(&MESH)?;
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let entries = match name.as_str() {
            "workloads" | "namespaces" | "namespaces6" | "locals" => Some(capacity.workloads),
            "flows" | "flows6" | "legs" => Some(capacity.flows),
            "stamps" => Some(capacity.stamps),
            _ => None,
        };
        if reuse {
            map.reuse_pinned_map(pins.map(&name)).map_err(|e| KernelError::bpf(format!("reuse map {name}"), e))?;
        } else if let Some(entries) = entries {
            map.set_max_entries(entries).map_err(|e| KernelError::bpf(format!("size map {name}"), e))?;
        }
    }
    load_object(object, &MESH)
}

fn pin_maps(object: &mut Object, pins: &Pins) -> Result<(), KernelError> {
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        map.pin(pins.map(&name)).map_err(|e| KernelError::bpf(format!("pin map {name}"), e))?;
    }
    pins.write_layout()
}

/// A link that is there gets the new program in one step; one that is not is made. All of them are looked at before the
/// first is touched: a pin that is not what it should be leaves every program in force that was.
fn attach(object: &Object, pins: &Pins, cgroup: &File, cgroup_id: u64) -> Result<(), KernelError> {
    let found: Vec<Option<Link>> = LINKS
        .iter()
        .map(|(_, name, kind)| pins.open_cgroup_link(name, cgroup_id, kind.clone()))
        .collect::<Result<_, _>>()?;
    for ((program, name, _), link) in LINKS.into_iter().zip(found) {
        let what = || format!("attach {program}");
        let Some(loaded) = object.progs_mut().find(|p| p.name() == program) else {
            return Err(KernelError::absent(MESH.name, program));
        };
        if let Some(mut link) = link {
            link.update_prog(&loaded).map_err(|e| KernelError::bpf(format!("replace {program}"), e))?;
        } else {
            let mut link = loaded.attach_cgroup(cgroup.as_raw_fd()).map_err(|e| KernelError::bpf(what(), e))?;
            link.pin(pins.link(name)).map_err(|e| KernelError::bpf(what(), e))?;
        }
    }
    Ok(())
}

fn open_maps(pins: &Pins) -> Result<Maps, KernelError> {
    let open = |name: &str| {
        let pin = MAPS.iter().find(|pin| pin.name == name);
        let pin = pin.ok_or_else(|| KernelError::absent(MESH.name, name))?;
        pins.open_map(&pins.map(name), pin)
    };
    Ok(Maps {
        callers: open("callers")?,
        clients: open("clients")?,
        config: open("config")?,
        counters: open("counters")?,
        endpoints: open("endpoints")?,
        endpoints6: open("endpoints6")?,
        events: open("events")?,
        flows: open("flows")?,
        flows6: open("flows6")?,
        legs: open("legs")?,
        locals: open("locals")?,
        namespaces: open("namespaces")?,
        namespaces6: open("namespaces6")?,
        ranges: open("ranges")?,
        services: open("services")?,
        services6: open("services6")?,
        stamps: open("stamps")?,
        verdicts: open("verdicts")?,
        workloads: open("workloads")?,
    })
}
