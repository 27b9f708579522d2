//! The wires of a pod: which devices lead out of its network namespace, and where their other ends are (rtnetlink(7)).

use crate::error::KernelError;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

/// linux/rtnetlink.h, linux/netlink.h and linux/if_link.h.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
/// More devices than a node has pods.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    index: u32,
    flags: u32,
    name: String,
    kind: String,
    /// The index of a veth's other end, in that one's namespace.
    peer: u32,
}

/// The indexes, in this thread's namespace, of the other ends of every device that leads out of `netns`. An error where
/// one that is up is no veth to here: what leaves by it could not be stopped.
pub(crate) fn other_ends(netns: BorrowedFd<'_>) -> Result<Vec<u32>, KernelError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |e| KernelError::io(what, e)
    };
    let here = devices().map_err(io("list the node's devices"))?;
    let inside = std::thread::scope(|scope| {
        let listed = scope.spawn(|| crate::sys::enter_netns(netns).and_then(|()| devices()));
        listed.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside ended")))
    });
    matched(&inside.map_err(io("list the pod's devices"))?, &here)
}

fn matched(inside: &[Device], here: &[Device]) -> Result<Vec<u32>, KernelError> {
    let mut found = Vec::new();
    for device in inside.iter().filter(|d| d.flags & IFF_LOOPBACK == 0) {
        // Each names the other: an index alone is somebody else's in another namespace.
        let end = here.iter().find(|d| d.index == device.peer && d.kind == "veth" && d.peer == device.index);
        match end {
            Some(end) if device.kind == "veth" => found.push(end.index),
            // Of itself the kernel puts some into every namespace (tunl0, sit0); down, they carry nothing.
            _ if device.flags & IFF_UP == 0 => {}
            _ => return Err(KernelError::OpenDevice { device: device.name.clone(), kind: device.kind.clone() }),
        }
    }
    Ok(found)
}

/// Every device of this thread's namespace.
fn devices() -> io::Result<Vec<Device>> {
    let mut socket = File::from(crate::sys::route_socket()?);
    let mut request = Vec::with_capacity(32);
    request.extend_from_slice(&32u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.resize(32, 0);
    socket.write_all(&request)?;
    let (mut found, mut buffer, mut taken) = (Vec::new(), vec![0; 64 << 10], 0);
    loop {
        let len = socket.read(&mut buffer)?;
        taken += len;
        if len == 0 || taken > ANSWER_BYTES_MAX {
            return Err(io::Error::other("an answer of rtnetlink that does not end"));
        }
        let mut rest = buffer.get(..len).unwrap_or_default();
        while let Some((kind, body, after)) = message(rest) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return Err(io::Error::other("rtnetlink refused to list devices")),
                RTM_NEWLINK => found.extend(device(body)),
                _ => {}
            }
            rest = after;
        }
    }
}

/// The first netlink message: its kind, its body, and what comes after it.
fn message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(16..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

fn device(body: &[u8]) -> Option<Device> {
    let word = |at: usize| Some(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?));
    let mut device = Device { index: word(4)?, flags: word(8)?, ..Device::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_IFNAME => device.name = text(value),
            IFLA_LINK => device.peer = value.first_chunk().copied().map_or(0, u32::from_ne_bytes),
            IFLA_LINKINFO => {
                let kind = attributes(value).into_iter().find(|(kind, _)| *kind == IFLA_INFO_KIND);
                device.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(device)
}

fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (bytes.first_chunk(), bytes.get(2..).and_then(|b| b.first_chunk())) {
        let (len, kind) = (usize::from(u16::from_ne_bytes(*len)), u16::from_ne_bytes(*kind));
        let Some(value) = bytes.get(4..len) else { break };
        found.push((kind & 0x3fff, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, kind: &str, peer: u32, flags: u32) -> Device {
        Device { index, flags, name: format!("d{index}"), kind: kind.into(), peer }
    }

    #[test]
    fn every_device_that_is_up_must_be_a_veth_whose_other_end_is_here() {
        let lo = device(1, "", 0, IFF_UP | IFF_LOOPBACK);
        let here =
            [lo.clone(), device(7, "veth", 2, IFF_UP), device(8, "veth", 3, IFF_UP), device(9, "bridge", 4, IFF_UP)];
        let open = |devices: &[Device]| matched(devices, &here).unwrap_err().to_string();
        let veth = device(2, "veth", 7, IFF_UP);
        assert_eq!(matched(&[lo.clone(), veth.clone(), device(3, "veth", 8, 0)], &here).unwrap(), [7, 8]);
        assert_eq!(matched(&[lo.clone(), device(4, "sit", 0, 0)], &here).unwrap(), []);
        for other in [
            device(5, "veth", 7, IFF_UP),
            device(2, "veth", 99, IFF_UP),
            device(2, "macvlan", 7, IFF_UP),
            device(4, "veth", 9, IFF_UP),
            device(6, "", 0, IFF_UP),
        ] {
            assert!(open(&[lo.clone(), other.clone()]).contains(&other.name), "{other:?}");
        }
    }

    #[test]
    fn cut_messages_are_no_messages() {
        let mut whole = 20u32.to_ne_bytes().to_vec();
        whole.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
        whole.resize(20, 0);
        assert_eq!(message(&whole), Some((RTM_NEWLINK, &[0; 4][..], &[][..])));
        assert!((0..20).all(|len| message(&whole[..len]).is_none()));
        assert_eq!(super::device(&[0; 15]), None);
        assert_eq!(attributes(&[5, 0, 3, 0, b'x', 0, 0, 0, 9, 0, 3, 0]), [(3, &b"x"[..])]);
        assert_eq!(attributes(&[0, 0, 3, 0]), []);
        assert!(devices().unwrap().iter().any(|d| d.index == 1 && d.flags & IFF_LOOPBACK != 0));
    }
}
