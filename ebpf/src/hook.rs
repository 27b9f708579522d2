//! Where a packet program hangs on a device: by a tcx link, or, before Linux 6.6, as a filter of a clsact queueing discipline.
//!
//! A filter has no link, so that nothing holds it but its device. Its program is pinned in the link's place, under a name that
//! says the device; it is in force where the filter of that device is this very program.

use crate::error::KernelError;
use crate::pins::{WireLink, WireProgram, unpin};
use libbpf_rs::{Link, ProgramAttachType, ProgramMut, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook, TcHookBuilder};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// The first filter of all (tc(8)): what is of a later priority is asked after it.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 1;
/// What the name of a filter's pin has after its prefix.
const FILTER: char = 'f';

/// How this kernel hangs packet programs on devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooks {
    /// By links, before all others of a device (tcx, Linux 6.6).
    Tcx,
    /// As filters, of the first priority.
    Clsact,
}

/// What a pin holds.
pub(crate) enum Hook {
    Tcx(Link),
    Clsact,
}

impl Hooks {
    /// The ids of what hangs on a device, of links or of programs, in the order in which it is asked.
    pub(crate) fn on_device(self, device: u32, kind: &WireProgram) -> Result<Vec<u32>, KernelError> {
        match self {
            Self::Tcx => crate::sys::tcx_links(device, kind.attach.clone())
                .map_err(|e| KernelError::io(format!("ask for the packet programs of device {device}"), e)),
            Self::Clsact => Ok(filter_on(device, kind).into_iter().collect()),
        }
    }

    /// Hangs a program before all others of a device, and pins it below `dir`.
    pub(crate) fn hang(
        self,
        new: &mut ProgramMut<'_>,
        device: u32,
        kind: &WireProgram,
        dir: &Path,
    ) -> Result<(), KernelError> {
        let what = || format!("guard device {device}");
        match self {
            Self::Tcx => {
                let mut link = crate::sys::attach_tcx(new, device).map_err(|e| KernelError::io(what(), e))?;
                link.pin(free_pin(dir, kind.prefix)).map_err(|e| KernelError::bpf(what(), e))
            }
            Self::Clsact => {
                attach(new, device, kind).map_err(|e| KernelError::bpf(what(), e))?;
                let prefix = format!("{}{FILTER}{device}-", kind.prefix);
                new.pin(free_pin(dir, &prefix)).map_err(|e| KernelError::bpf(what(), e))
            }
        }
    }
}

impl Hook {
    /// What a pin of this name and kind says: its hook, its id, and the device on which it is in force, 0 where it is gone.
    pub(crate) fn open(path: &Path, name: &str, kind: &WireProgram) -> Result<Option<(Self, u32, u32)>, KernelError> {
        let Some(device) = filter_device(name, kind) else { return crate::pins::open_tcx(path) };
        let id = crate::sys::pinned_program_id(path)
            .map_err(|e| KernelError::io(format!("open the packet program {}", path.display()), e))?;
        let device = if filter_on(device, kind) == Some(id) { device } else { 0 };
        Ok(Some((Self::Clsact, id, device)))
    }
}

impl WireLink {
    /// Takes the program off its device, and the pin away.
    pub(crate) fn release(&self, kind: &WireProgram) -> Result<(), KernelError> {
        if matches!(self.hook, Hook::Clsact) && self.device != 0 {
            detach(self.device, kind).map_err(|e| KernelError::bpf(format!("free device {}", self.device), e))?;
        }
        unpin(&self.path)
    }
}

/// The device in the name of a filter's pin.
fn filter_device(name: &str, kind: &WireProgram) -> Option<u32> {
    name.strip_prefix(kind.prefix)?.strip_prefix(FILTER)?.split_once('-')?.0.parse().ok()
}

fn point(kind: &WireProgram) -> TcAttachPoint {
    if matches!(kind.attach, ProgramAttachType::TcxIngress) { TC_INGRESS } else { TC_EGRESS }
}

fn hook(program: BorrowedFd<'_>, device: u32, kind: &WireProgram) -> TcHook {
    // Of a device that cannot be the kernel knows nothing.
    let index = i32::try_from(device).unwrap_or(i32::MAX);
    let mut builder = TcHookBuilder::new(program);
    builder.ifindex(index).replace(true).handle(HANDLE).priority(PRIORITY);
    builder.hook(point(kind))
}

/// Puts a filter in its place, in one step where there is one.
pub(crate) fn attach(program: &ProgramMut<'_>, device: u32, kind: &WireProgram) -> libbpf_rs::Result<()> {
    let mut hook = hook(program.as_fd(), device, kind);
    if filter_on(device, kind).is_none() {
        // Fine where the queueing discipline is there already.
        hook.create()?;
    }
    hook.attach().map(drop)
}

/// The program of the filter in our place; none where there is no filter, and no device.
fn filter_on(device: u32, kind: &WireProgram) -> Option<u32> {
    // Only a place is asked for, and no program: standard input stands for one.
    hook(std::io::stdin().as_fd(), device, kind).query().ok()
}

fn detach(device: u32, kind: &WireProgram) -> libbpf_rs::Result<()> {
    hook(std::io::stdin().as_fd(), device, kind).detach()
}

/// The first name that no pin has.
fn free_pin(dir: &Path, prefix: &str) -> std::path::PathBuf {
    let mut names = (0u32..).map(|n| dir.join(format!("{prefix}{n}")));
    names.find(|path| !path.exists()).unwrap_or_else(|| dir.join(prefix))
}
