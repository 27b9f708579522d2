//! What leaves a pod by its wire: the packet program on the node's side of each of its veths, and the connections that were
//! there before.

use crate::error::KernelError;
use crate::inbound::{inode, pod_name};
use crate::kernel::{Kernel, load_object, open_object};
use crate::objects::{BuiltObject, SOCKETS, VETH};
use crate::pins::{OUTBOUND_PREFIX, WIRES, unpin};
use libbpf_rs::{Iter, Object, ProgramMut};
use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

impl Kernel {
    /// Puts the packet programs on the node's side of every veth of the pod: nothing leaves by them but ARP and
    /// the resets with which the pod's kernel refuses what comes in clear. Call it in the namespace where those ends are.
    /// Returns how many veths there are; an error where a device leads elsewhere, since nothing could be stopped there.
    ///
    /// A program that is there already is replaced without a gap; a veth that was made anew has none until this is
    /// called again, which [`Kernel::wires_are_guarded`] tells.
    pub fn guard_wires(&self, name: &str, netns: BorrowedFd<'_>, address: Ipv4Addr) -> Result<usize, KernelError> {
        let name = pod_name(name)?;
        let ends = crate::wire::other_ends(netns)?;
        let _change = self.lock();
        let dir = self.pins().pod(name);
        fs::create_dir_all(&dir).map_err(|e| KernelError::io(format!("create {}", dir.display()), e))?;
        let object = self.load_beside(&VETH, Some(address))?;
        for (name_in_object, prefix) in WIRES {
            let program = program(&object, &VETH, name_in_object)?;
            self.hang(name, prefix, &program, &ends)?;
        }
        Ok(ends.len())
    }

    /// Brings the links of one packet program to exactly these devices.
    fn hang(&self, pod: &str, prefix: &str, program: &ProgramMut<'_>, ends: &[u32]) -> Result<(), KernelError> {
        let what = || format!("guard a veth of pod {pod}");
        let mut guarded = Vec::new();
        for (path, mut link, index) in self.pins().wires(pod, prefix)? {
            if ends.contains(&index) && !guarded.contains(&index) {
                link.update_prog(program).map_err(|e| KernelError::bpf(what(), e))?;
                guarded.push(index);
            } else {
                unpin(&path)?;
            }
        }
        for index in ends.iter().filter(|index| !guarded.contains(index)) {
            let mut link = crate::sys::attach_tcx(program, *index).map_err(|e| KernelError::io(what(), e))?;
            link.pin(free_pin(&self.pins().pod(pod), prefix)).map_err(|e| KernelError::bpf(what(), e))?;
        }
        Ok(())
    }

    /// Whether every way out of the pod has its packet program. False also where a device leads elsewhere.
    pub fn wires_are_guarded(&self, name: &str, netns: BorrowedFd<'_>) -> Result<bool, KernelError> {
        let name = pod_name(name)?;
        let Ok(mut ends) = crate::wire::other_ends(netns) else { return Ok(false) };
        let mut guarded: Vec<u32> =
            self.pins().wires(name, OUTBOUND_PREFIX)?.into_iter().map(|(_, _, index)| index).collect();
        ends.sort_unstable();
        guarded.sort_unstable();
        Ok(ends == guarded)
    }

    /// Ends the TCP connections of a namespace whose ends are both beyond loopback: made before it was governed, or by sockets
    /// from outside the mesh cgroup, their packets would be dropped without a word. False where this kernel cannot (before
    /// 6.5), which leaves them to that.
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

    /// Loads an object that tells through the maps of mesh.bpf.o.
    pub(crate) fn load_beside(&self, built: &BuiltObject, pod: Option<Ipv4Addr>) -> Result<Object, KernelError> {
        let mut object = open_object(built)?;
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            let result = match (name.as_str(), pod) {
                ("counters" | "events", _) => map.reuse_pinned_map(self.pins().map(&name)),
                (_, Some(address)) if name.ends_with("rodata") => map.set_initial_value(&address.octets()),
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

/// The first name that no pin has.
fn free_pin(dir: &Path, prefix: &str) -> PathBuf {
    let mut names = (0u32..).map(|n| dir.join(format!("{prefix}{n}")));
    names.find(|path| !path.exists()).unwrap_or_else(|| dir.join(prefix))
}
