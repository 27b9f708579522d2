//! Callers outside of the mesh, on their way in: what the packet programs on the pods' wires turn off into the annex for them
//! (`bpf/callers.h`) is the agent's one listener's, whatever port of whichever pod it is to.

use crate::annex::Annex;
use crate::error::KernelError;
use crate::kernel::Kernel;
use crate::objects::ANNEX;
use libbpf_rs::{Link, MapCore, MapFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// A listener that gets them for as long as this lives. It goes with its process: it is pinned nowhere.
#[derive(Debug)]
pub struct LetIn {
    _link: Link,
}

impl Kernel {
    /// Gives `listener`, a TCP socket that listens in the annex on any address, every connection of a caller that the tables let in
    /// by its address. Of listeners that share an address (`SO_REUSEPORT`) each gets its part. The accepted socket's local address
    /// is the pod's, and its peer's the caller's.
    pub fn let_in(&self, annex: &Annex, listener: BorrowedFd<'_>) -> Result<LetIn, KernelError> {
        let listens = crate::sys::is_tcp_listener(listener).map_err(|e| KernelError::io("look at the listener", e))?;
        if !listens {
            return Err(KernelError::NotListener("the annex".to_owned()));
        }
        let object = self.load_beside(&ANNEX, None)?;
        let missing = |name: &str| KernelError::absent(ANNEX.name, name);
        let slot = object.maps().find(|map| map.name() == "strangers").ok_or_else(|| missing("strangers"))?;
        let fd = (listener.as_raw_fd() as u64).to_ne_bytes();
        slot.update(&0u32.to_ne_bytes(), &fd, MapFlags::ANY)
            .map_err(|e| KernelError::bpf("put the listener of the annex into its slot", e))?;
        let program = object.progs_mut().find(|p| p.name() == "ambit_annex").ok_or_else(|| missing("ambit_annex"))?;
        let link = program.attach_netns(annex.as_fd().as_raw_fd());
        let link = link.map_err(|e| KernelError::bpf("attach ambit_annex to the annex", e))?;
        Ok(LetIn { _link: link })
    }
}
