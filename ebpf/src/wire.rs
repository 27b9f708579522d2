//! The wires of a pod: which devices lead out of its network namespace, and where their other ends are.

use crate::error::KernelError;
use crate::netlink::{self, Device, IFF_LOOPBACK, IFF_UP, NetnsId};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// A veth of a pod whose other end is on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    /// The index of that other end, in the node's namespace.
    pub(crate) index: u32,
    /// The address of the pod's end.
    pub(crate) mac: [u8; 6],
}

/// How a pod's packets may leave it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WaysOut {
    /// What can be guarded.
    pub(crate) wires: Vec<Wire>,
    /// The cookie of the pod's namespace.
    pub(crate) netns: u64,
    /// A device that is up and no veth to here, if there is one: what leaves by it cannot be stopped.
    pub(crate) open: Option<Device>,
}

/// The devices that lead out of `netns`, seen from this thread's namespace, the node's.
pub(crate) fn ways_out(netns: BorrowedFd<'_>) -> Result<WaysOut, KernelError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |e| KernelError::io(what, e)
    };
    let node = File::open("/proc/thread-self/ns/net").map_err(io("open the node's network namespace"))?;
    let here = netlink::devices().map_err(io("list the node's devices"))?;
    let pod = netlink::netns_id(netns).map_err(io("ask for the id of the pod's network namespace"))?;
    let inside = std::thread::scope(|scope| {
        let listed = scope.spawn(|| {
            crate::sys::enter_netns(netns)?;
            let cookie = crate::sys::netns_cookie(crate::sys::route_socket()?)?;
            Ok((netlink::devices()?, netlink::netns_id(node.as_fd())?, cookie))
        });
        listed.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside ended")))
    });
    let (inside, node, netns) = inside.map_err(io("list the pod's devices"))?;
    let ways = matched(&Side { devices: &inside, other: node }, &Side { devices: &here, other: pod });
    Ok(WaysOut { netns, ..ways })
}

/// The devices of a namespace, and what it calls the other one.
struct Side<'a> {
    devices: &'a [Device],
    other: Option<NetnsId>,
}

impl Side<'_> {
    /// Whether a device of this side is a veth with its other end on the other side.
    fn leads_across(&self, device: &Device) -> bool {
        device.kind == "veth" && device.peer_netns.is_some() && device.peer_netns == self.other
    }
}

fn matched(inside: &Side<'_>, here: &Side<'_>) -> WaysOut {
    let mut ways = WaysOut { wires: Vec::new(), netns: 0, open: None };
    for device in inside.devices.iter().filter(|d| d.flags & IFF_LOOPBACK == 0) {
        // Each names the other, and its namespace: an index alone is somebody else's there.
        let end = here.devices.iter().find(|d| {
            d.index == device.peer && d.peer == device.index && here.leads_across(d) && inside.leads_across(device)
        });
        match end {
            Some(end) => ways.wires.push(Wire { index: end.index, mac: device.mac }),
            // Of itself the kernel puts some into every namespace (tunl0, sit0); down, they carry nothing.
            None if device.flags & IFF_UP == 0 => {}
            None => ways.open = ways.open.or_else(|| Some(device.clone())),
        }
    }
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NetnsId = NetnsId(0);
    const POD: NetnsId = NetnsId(5);

    fn device(index: u32, kind: &str, peer: u32, peer_netns: Option<NetnsId>, flags: u32) -> Device {
        Device { index, flags, name: format!("d{index}"), kind: kind.into(), mac: [index as u8; 6], peer, peer_netns }
    }

    #[test]
    fn a_device_that_is_up_and_no_veth_to_here_is_told_and_hides_no_other() {
        let lo = device(1, "", 0, None, IFF_UP | IFF_LOOPBACK);
        let here = [
            lo.clone(),
            device(7, "veth", 2, Some(POD), IFF_UP),
            device(8, "veth", 3, Some(POD), IFF_UP),
            device(9, "bridge", 4, Some(POD), IFF_UP),
            device(10, "veth", 5, Some(NetnsId(6)), IFF_UP),
        ];
        let node_side = Side { devices: &here, other: Some(POD) };
        let ways = |devices: &[Device], node| matched(&Side { devices, other: node }, &node_side);
        let indexes = |ways: &WaysOut| ways.wires.iter().map(|w| (w.index, w.mac[0])).collect::<Vec<_>>();
        let veth = device(2, "veth", 7, Some(NODE), IFF_UP);
        let two = ways(&[lo.clone(), veth.clone(), device(3, "veth", 8, Some(NODE), 0)], Some(NODE));
        assert_eq!((indexes(&two), two.open), (vec![(7, 2), (8, 3)], None));
        let none = ways(&[lo.clone(), device(4, "sit", 0, None, 0)], Some(NODE));
        assert_eq!((none.wires, none.open), (vec![], None));
        for other in [
            device(6, "veth", 7, Some(NODE), IFF_UP),
            device(3, "veth", 99, Some(NODE), IFF_UP),
            device(3, "macvlan", 8, Some(NODE), IFF_UP),
            device(4, "veth", 9, Some(NODE), IFF_UP),
            device(6, "", 0, None, IFF_UP),
            // Another namespace of the pod's may have the very index of somebody else's veth.
            device(3, "veth", 8, Some(NetnsId(1)), IFF_UP),
            device(3, "veth", 8, None, IFF_UP),
            device(5, "veth", 10, Some(NODE), IFF_UP),
        ] {
            for devices in [[lo.clone(), other.clone(), veth.clone()], [lo.clone(), veth.clone(), other.clone()]] {
                let found = ways(&devices, Some(NODE));
                assert_eq!((indexes(&found), found.open.as_ref()), (vec![(7, 2)], Some(&other)));
            }
        }
        // Where neither has a name for the other nothing leads across.
        let nameless = matched(
            &Side { devices: &[device(2, "veth", 7, None, IFF_UP)], other: None },
            &Side { devices: &[device(7, "veth", 2, None, IFF_UP)], other: None },
        );
        assert!(nameless.wires.is_empty() && nameless.open.is_some());
    }
}
