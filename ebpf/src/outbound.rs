//! What leaves a pod by its wire: the packet program on the node's side of each of its veths, and the connections that were
//! there before.

use crate::error::KernelError;
use crate::hook::{Hook, Hooks};
use crate::inbound::{inode, pod_name};
use crate::kernel::{Kernel, load_object, open_object};
use crate::netlink::Device;
use crate::objects::{BuiltObject, SOCKETS, VETH};
use crate::pins::{WIRES, WireLink, WireProgram, unpin};
use crate::wire::Wire;
use libbpf_rs::{Iter, Object, ProgramMut};
use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;

impl Kernel {
    /// Puts the packet programs on the node's side of every veth of the pod, before any other program there: nothing leaves
    /// by them but ARP, the resets with which the pod's kernel refuses what comes in clear, and what goes directly to another
    /// pod of this node. Call it in the namespace where those ends are. Returns how many veths there are.
    ///
    /// Whatever can be guarded is, also where this ends in an error: there is another device that is up, by which packets
    /// could leave unseen, or no wire at all, as where the pod took it elsewhere before it was seen. Such a pod must be nobody.
    /// A program that is there already is replaced without a gap, and goes with its device only; a veth that was made
    /// anew has none until this is called again, which [`Kernel::wires_are_guarded`] tells.
    pub fn guard_wires(&self, name: &str, netns: BorrowedFd<'_>, address: Ipv4Addr) -> Result<usize, KernelError> {
        let name = pod_name(name)?;
        let ways = crate::wire::ways_out(netns)?;
        let _change = self.lock();
        let dir = self.pins().pod(name);
        fs::create_dir_all(&dir).map_err(|e| KernelError::io(format!("create {}", dir.display()), e))?;
        // One that cannot be guarded must not keep the others from being so.
        let guard = |wire| self.guard_wire(name, wire, address, ways.netns);
        let hung: Vec<Result<(), KernelError>> = ways.wires.iter().map(guard).collect();
        let kept = self.keep_wires(name, &ways.wires)?;
        hung.into_iter().collect::<Result<(), KernelError>>()?;
        match ways.open {
            Some(Device { name, kind, .. }) => Err(KernelError::OpenDevice { device: name, kind }),
            None if kept == 0 => Err(KernelError::NoWire(name.to_owned())),
            None => Ok(ways.wires.len()),
        }
    }

    fn guard_wire(&self, pod: &str, wire: &Wire, address: Ipv4Addr, netns: u64) -> Result<(), KernelError> {
        // `pod` of veth.bpf.c.
        let (annex, strict) = (self.annex().to_ne_bytes(), u8::from(self.is_strict()));
        let constants = [&address.octets()[..], &wire.mac, &[strict, 0], &annex, &netns.to_ne_bytes()].concat();
        let object = self.load_beside(&VETH, Some(&constants))?;
        WIRES.iter().try_for_each(|kind| self.hang(pod, kind, &mut program(&object, &VETH, kind.name)?, wire.index))
    }

    /// Puts a packet program before all others of a device.
    fn hang(&self, pod: &str, kind: &WireProgram, new: &mut ProgramMut<'_>, device: u32) -> Result<(), KernelError> {
        let on_device = self.hooks().on_device(device, kind)?;
        let mut ours = self.pins().wires(pod, kind)?;
        ours.retain(|link| on_device.contains(&link.id));
        let first = self.first_of_ours(pod, kind, &on_device, &ours)?;
        if let Some(Hook::Tcx(link)) = ours.iter_mut().find(|link| Some(link.id) == first).map(|link| &mut link.hook) {
            return link.update_prog(new).map_err(|e| KernelError::bpf(format!("guard a veth of pod {pod}"), e));
        }
        self.hooks().hang(new, device, kind, &self.pins().pod(pod))?;
        // Of ours behind somebody else's there is no need any more, nor of what a filter was before.
        ours.iter().try_for_each(|behind| unpin(&behind.path))
    }

    /// The pod's link on a device, if nobody else's program comes before it. (Those of another pod's guard, where two files
    /// claim one namespace, let nothing past.)
    fn first_of_ours(
        &self,
        pod: &str,
        kind: &WireProgram,
        on_device: &[u32],
        ours: &[WireLink],
    ) -> Result<Option<u32>, KernelError> {
        let is_ours = |id: &u32| ours.iter().any(|link| link.id == *id);
        let Some(at) = on_device.iter().position(is_ours) else { return Ok(None) };
        let (ahead, rest) = on_device.split_at(at);
        if !ahead.is_empty() {
            let others = self.pins().wires_of_others(pod, kind)?;
            if ahead.iter().any(|id| !others.contains(id)) {
                return Ok(None);
            }
        }
        Ok(rest.first().copied())
    }

    /// Whether a wire's one place for a filter was taken for another pod, which lets nothing past either.
    fn is_filtered_for_another(&self, pod: &str, kind: &WireProgram, wire: &Wire) -> Result<bool, KernelError> {
        if self.hooks() == Hooks::Tcx {
            return Ok(false);
        }
        let others = self.pins().wires_of_others(pod, kind)?;
        Ok(self.hooks().on_device(wire.index, kind)?.iter().any(|id| others.contains(id)))
    }

    /// Removes links that guard nothing and says how many stay. One whose device is still there stays, wherever the pod took
    /// its own end of it; unless another pod's link guards that device too: then a file had claimed its namespace.
    pub(crate) fn keep_wires(&self, pod: &str, wires: &[Wire]) -> Result<usize, KernelError> {
        let mut kept = 0;
        for kind in &WIRES {
            for link in self.pins().wires(pod, kind)? {
                let is_wire = wires.iter().any(|wire| wire.index == link.device);
                if link.device == 0 || (!is_wire && self.is_guarded_for_another(pod, kind, &link)?) {
                    link.release(kind)?;
                } else {
                    kept += 1;
                }
            }
            for wire in wires {
                kept += usize::from(self.is_filtered_for_another(pod, kind, wire)?);
            }
        }
        Ok(kept)
    }

    fn is_guarded_for_another(&self, pod: &str, kind: &WireProgram, link: &WireLink) -> Result<bool, KernelError> {
        let others = self.pins().wires_of_others(pod, kind)?;
        // Where the device is in another namespace than ours, its number means nothing here.
        let on_device = self.hooks().on_device(link.device, kind).unwrap_or_default();
        Ok(on_device.contains(&link.id) && on_device.iter().any(|id| others.contains(id)))
    }

    /// Whether every way out of the pod has its packet programs, and these come before anybody else's.
    pub fn wires_are_guarded(&self, name: &str, netns: BorrowedFd<'_>) -> Result<bool, KernelError> {
        let name = pod_name(name)?;
        let Ok(ways) = crate::wire::ways_out(netns) else { return Ok(false) };
        let mut kept = 0;
        for kind in &WIRES {
            let ours = self.pins().wires(name, kind)?;
            kept += ours.iter().filter(|link| link.device != 0).count();
            for wire in &ways.wires {
                let is_filtered = self.is_filtered_for_another(name, kind, wire)?;
                kept += usize::from(is_filtered);
                let on_device = self.hooks().on_device(wire.index, kind)?;
                if !is_filtered && self.first_of_ours(name, kind, &on_device, &ours)?.is_none() {
                    return Ok(false);
                }
            }
        }
        Ok(ways.open.is_none() && kept > 0)
    }

    /// Ends the TCP connections of a namespace whose ends are both beyond loopback, and that have no stamp: made before it was governed, or by sockets
    /// from outside the mesh cgroup, their packets would be dropped without a word. False where this kernel cannot (before
    /// 6.5), which leaves them to that. So do those whose stamp was taken away.
    pub fn end_bypassing(&self, netns: BorrowedFd<'_>) -> Result<bool, KernelError> {
        let Ok(object) = self.load_beside(&SOCKETS, None) else { return Ok(false) };
        let what = || format!("look at the sockets of network namespace {}", inode(netns).unwrap_or_default());
        let link =
            program(&object, &SOCKETS, "ambit_end_bypassing")?.attach().map_err(|e| KernelError::bpf(what(), e))?;
        // An iterator sees the namespace of the thread that opens it.
        let read = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                crate::sys::enter_netns(netns).map_err(|e| KernelError::io(what(), e))?;
                let mut iter = Iter::new(&link).map_err(|e| KernelError::bpf(what(), e))?;
                iter.read_to_end(&mut Vec::new()).map_err(|e| KernelError::io(what(), e))
            });
            reader.join().unwrap_or_else(|_| Err(KernelError::io(what(), std::io::Error::other("the thread ended"))))
        });
        read.map(|_| true)
    }

    /// Loads an object that tells through the maps of mesh.bpf.o, with these constants.
    pub(crate) fn load_beside(&self, built: &BuiltObject, constants: Option<&[u8]>) -> Result<Object, KernelError> {
        let mut object = open_object(built)?;
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            let result = match (name.as_str(), constants) {
                ("callers" | "config" | "counters" | "events" | "locals" | "ranges" | "stamps" | "verdicts", _) => {
                    map.reuse_pinned_map(self.pins().map(&name))
                }
                (_, Some(bytes)) if name.ends_with("rodata") => map.set_initial_value(bytes),
                _ => Ok(()),
            };
            result.map_err(|e| KernelError::bpf(format!("prepare map {name} of {}", built.name), e))?;
        }
        load_object(object, built)
    }
}

fn program<'o>(object: &'o Object, built: &BuiltObject, name: &str) -> Result<ProgramMut<'o>, KernelError> {
    object.progs_mut().find(|p| p.name() == name).ok_or_else(|| KernelError::absent(built.name, name))
}
