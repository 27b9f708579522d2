//! A pod's network namespace: the capture listener's slot, and the refusal of plain inbound connections.

use crate::error::KernelError;
use crate::kernel::{Kernel, load_object, open_object};
use crate::layout::{self, Layout, Namespace};
use crate::objects::POD;
use crate::pins::{LISTENER, unpin};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle, MapMut, Object};
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

impl Kernel {
    /// Governs a pod's network namespace: captured connections (127.0.0.0/8, [`crate::CAPTURE_PORT`]) go to `listener`;
    /// what comes from beyond loopback is refused, but for the agent's last leg (source 127.x.y.z, destination the
    /// pod's address). `listener` is a listening TCP socket that the agent opened in that namespace, on any address
    /// and port of 127.0.0.0/8. When it closes, captured connections are refused.
    ///
    /// For a pod that is attached already (after a restart) the listener takes the slot and the program is replaced
    /// without a gap. `name` is the pod's, and must stay its own as long as its namespace lives.
    pub fn attach_pod(
        &self,
        name: &str,
        netns: BorrowedFd<'_>,
        address: Ipv4Addr,
        listener: BorrowedFd<'_>,
    ) -> Result<(), KernelError> {
        let name = pod_name(name)?;
        let listens = crate::sys::is_tcp_listener(listener).map_err(|e| KernelError::io("look at the listener", e))?;
        if !listens {
            return Err(KernelError::NotListener(name.to_owned()));
        }
        let netns_inode = inode(netns)?;
        let cookie = crate::sys::netns_cookie(listener).map_err(|e| KernelError::io("read a namespace cookie", e))?;
        let _change = self.lock();
        let dir = self.pins().pod(name);
        fs::create_dir_all(&dir).map_err(|e| KernelError::io(format!("create {}", dir.display()), e))?;
        let link = self.pins().open_pod_link(name, netns_inode)?;
        let slot_pin = dir.join(LISTENER.name);
        if link.is_none() {
            // A slot without a link is left from a start that was cut short, or from a namespace that is gone.
            unpin(&slot_pin)?;
        }
        let object = self.load_pod(address, cookie, &slot_pin, link.is_some())?;
        self.fill_slot(&slot_pin, listener)?;
        let what = || format!("attach ambit_inbound to pod {name}");
        let program = object.progs_mut().find(|p| p.name() == "ambit_inbound");
        let program = program.ok_or_else(|| KernelError::absent(POD.name, "ambit_inbound"))?;
        match link {
            Some(mut link) => link.update_prog(&program).map_err(|e| KernelError::bpf(what(), e))?,
            None => {
                let mut link = program.attach_netns(netns.as_raw_fd()).map_err(|e| KernelError::bpf(what(), e))?;
                link.pin(dir.join("link")).map_err(|e| KernelError::bpf(what(), e))?;
            }
        }
        self.open_namespace(cookie, Namespace { inode: netns_inode, address: layout::address(address), pad: 0 })
    }

    /// From now on the connect programs send connections to the capture address of this namespace. Comes last: before,
    /// someone else could listen there.
    fn open_namespace(&self, cookie: u64, namespace: Namespace) -> Result<(), KernelError> {
        self.close_namespaces("")?;
        let namespaces = &self.maps().namespaces;
        namespaces.update(&cookie.to_ne_bytes(), &namespace.to_bytes(), MapFlags::ANY).map_err(|e| {
            if e.kind() == ErrorKind::TooBig {
                let capacity = namespaces.max_entries();
                return KernelError::MapFull { map: "namespaces", capacity, needed: capacity as usize + 1 };
            }
            KernelError::bpf("write map namespaces", e)
        })
    }

    /// Takes namespaces off the list that no pod's link hangs on any more, and that of pod `leaving`.
    fn close_namespaces(&self, leaving: &str) -> Result<(), KernelError> {
        let attached = self.pins().attached_namespaces(leaving)?;
        // Of both the value begins with the inode.
        for namespaces in [&self.maps().namespaces6, &self.maps().namespaces] {
            let cookies: Vec<Vec<u8>> = namespaces.keys().take(namespaces.max_entries() as usize).collect();
            for cookie in cookies {
                let found = namespaces.lookup(&cookie, MapFlags::ANY);
                let found = found.map_err(|e| KernelError::bpf("read map namespaces", e))?.unwrap_or_default();
                let inode = found.first_chunk().map_or(0, |inode| u64::from_ne_bytes(*inode));
                if !attached.contains(&inode) {
                    namespaces.delete(&cookie).map_err(|e| KernelError::bpf("write map namespaces", e))?;
                }
            }
        }
        Ok(())
    }

    /// Lets a pod's namespace go: for a pod that ended. False while a wire of its is still there, which stays guarded: ask
    /// again. Absent is fine.
    pub fn detach_pod(&self, name: &str) -> Result<bool, KernelError> {
        let dir = self.pins().pod(pod_name(name)?);
        let _change = self.lock();
        self.close_namespaces(name)?;
        unpin(&dir.join("link"))?;
        unpin(&dir.join(LISTENER.name))?;
        if self.keep_wires(name, &[])? > 0 {
            return Ok(false);
        }
        match fs::remove_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(KernelError::io(format!("remove {}", dir.display()), e))
            }
            _ => Ok(true),
        }
    }

    /// Whether the network namespace still lives that was attached under this name.
    pub fn pod_lives(&self, name: &str) -> Result<bool, KernelError> {
        self.pins().pod_lives(pod_name(name)?)
    }

    /// Pods that are attached, to reconcile after a restart.
    pub fn pods(&self) -> Result<Vec<String>, KernelError> {
        self.pins().pods()
    }

    fn load_pod(
        &self,
        address: Ipv4Addr,
        cookie: u64,
        slot_pin: &Path,
        reuse_slot: bool,
    ) -> Result<Object, KernelError> {
        let mut object = open_object(&POD)?;
        // `pod` of pod.bpf.c.
        let constants = [&address.octets()[..], &[0; 4], &cookie.to_ne_bytes()].concat();
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            let what = format!("prepare map {name} of {}", POD.name);
            let result = match name.as_str() {
                "counters" | "events" | "legs" | "locals" | "stamps" => map.reuse_pinned_map(self.pins().map(&name)),
                "listener" if reuse_slot => {
                    self.pins().open_map(slot_pin, &LISTENER)?;
                    map.reuse_pinned_map(slot_pin)
                }
                _ if name.ends_with("rodata") => map.set_initial_value(&constants),
                _ => Ok(()),
            };
            result.map_err(|e| KernelError::bpf(what, e))?;
        }
        let mut object = load_object(object, &POD)?;
        if !reuse_slot {
            let mut slot = listener_map(&mut object)?;
            slot.pin(slot_pin).map_err(|e| KernelError::bpf(format!("pin {}", slot_pin.display()), e))?;
        }
        Ok(object)
    }

    fn fill_slot(&self, slot_pin: &Path, listener: BorrowedFd<'_>) -> Result<(), KernelError> {
        let slot: MapHandle = self.pins().open_map(slot_pin, &LISTENER)?;
        let fd = (listener.as_raw_fd() as u64).to_ne_bytes();
        slot.update(&0u32.to_ne_bytes(), &fd, MapFlags::ANY)
            .map_err(|e| KernelError::bpf(format!("put the listener into {}", slot_pin.display()), e))
    }
}

fn listener_map(object: &mut Object) -> Result<MapMut<'_>, KernelError> {
    let missing = || KernelError::absent(POD.name, LISTENER.name);
    object.maps_mut().find(|map| map.name() == LISTENER.name).ok_or_else(missing)
}

/// The namespace's inode number, by which the kernel names it in a link.
pub(crate) fn inode(netns: BorrowedFd<'_>) -> Result<u64, KernelError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", netns.as_raw_fd()));
    Ok(fs::metadata(path).map_err(|e| KernelError::io("look at the pod's network namespace", e))?.ino())
}

/// A name becomes a directory: nothing in it may lead elsewhere.
pub(crate) fn pod_name(name: &str) -> Result<&str, KernelError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(plain) {
        Ok(name)
    } else {
        Err(KernelError::BadPodName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_name_is_one_plain_folder() {
        for good in ["a", "web-0", "x1"] {
            assert!(pod_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a.b", "A", &"x".repeat(64)] {
            assert!(pod_name(bad).is_err(), "{bad}");
        }
    }
}
