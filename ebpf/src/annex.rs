//! The annex: a network namespace in which the agent alone has sockets, beside those of its pods. There it listens on port
//! 15008 of every pod's address and dials port 15008 of others from a pod's address, as HBONE wants it; the packet programs
//! on the pods' wires turn what comes for these into it (annex.h). One veth leads from it to the node, which routes what
//! comes out of it as it would what comes from the pods.
//!
//! Not in the pods' own namespaces, as Istio's agents do it: who may administer the devices of its pod could then change
//! bytes of the agent's packets on their way out, or take what comes in for them.

use crate::error::KernelError;
use crate::netlink::{self, IFF_UP, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, RTM_NEWLINK, attribute};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/veth.h and linux/fib_rules.h.
const NLM_F_CREATE_NEW: u16 = 0x600;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWRULE: u16 = 32;
const IFF_NOARP: u32 = 0x80;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
/// linux/ip.h: IPV4_DEVCONF_*.
const CONF_FORWARDING: u16 = 1;
const CONF_RP_FILTER: u16 = 8;
const RTA_OIF: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_IIFNAME: u16 = 3;
const AF_INET: u8 = 2;
const TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;
const UNICAST: u8 = 1;
const LOCAL: u8 = 2;
const TO_TABLE: u8 = 1;
const LOOPBACK: u32 = 1;

/// As in annex.h.
const MAC: [u8; 6] = [0x02, b'a', b'm', b'b', b'i', b't'];
/// The end inside; the node's is `ambit` and a number that is free there.
const INSIDE: &str = "wire";
const ON_NODE: &[u8] = b"ambit%d\0";
/// In the annex: where everything is that comes by the wire.
const TABLE_HERE: u8 = 100;

/// The annex. It ends, with its devices, when this and every socket in it is gone: also with an agent that is killed.
#[derive(Debug)]
pub struct Annex {
    netns: OwnedFd,
    index: u32,
    device: String,
}

impl AsFd for Annex {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }
}

impl From<Annex> for OwnedFd {
    fn from(annex: Annex) -> Self {
        annex.netns
    }
}

impl Annex {
    /// Makes one beside this thread's network namespace, the node's.
    pub fn make() -> Result<Self, KernelError> {
        let io = |e| KernelError::io("make the agent's annex, a network namespace on a veth", e);
        let node = File::open("/proc/thread-self/ns/net").map_err(io)?;
        let inside = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                crate::sys::leave_netns()?;
                furnish(node.as_fd())
            });
            made.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside ended")))
        });
        let (netns, index) = inside.map_err(io)?;
        let device = netlink::devices().map_err(io)?.into_iter().find(|device| device.index == index);
        let device = device.ok_or_else(|| io(io::ErrorKind::NotFound.into()))?.name;
        no_ipv6(&device);
        // What comes from the annex is to be routed, and has the address of a pod, to which another way leads.
        let conf: Vec<u8> = [(CONF_FORWARDING, 1u32), (CONF_RP_FILTER, 0)]
            .map(|(kind, on)| attribute(kind, &on.to_ne_bytes()))
            .concat();
        let conf = attribute(IFLA_AF_SPEC, &attribute(u16::from(AF_INET), &attribute(IFLA_INET_CONF, &conf)));
        netlink::change(RTM_NEWLINK, 0, &[link(index, IFF_UP), conf].concat()).map_err(io)?;
        Ok(Self { netns, index, device })
    }

    /// One that another agent made, which goes on with this: nothing that is carried in it ends for that. This thread's
    /// network namespace is the node's.
    pub fn of(netns: OwnedFd) -> Result<Self, KernelError> {
        let io = |e| KernelError::io("take over the agent's annex", e);
        let inside = std::thread::scope(|scope| {
            let looked = scope.spawn(|| {
                crate::sys::enter_netns(netns.as_fd())?;
                let wire = netlink::devices()?.into_iter().find(|device| device.name == INSIDE);
                Ok::<_, io::Error>(wire.ok_or(io::ErrorKind::NotFound)?.peer)
            });
            looked.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside ended")))
        });
        let index = inside.map_err(io)?;
        let device = netlink::devices().map_err(io)?.into_iter().find(|device| device.index == index);
        let device = device.ok_or_else(|| io(io::ErrorKind::NotFound.into()))?.name;
        Ok(Self { netns, index, device })
    }

    /// The index of its device on the node.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether the node drops what comes out of it, as one does whose `net.ipv4.conf.all.rp_filter` is 1 (strict, RFC 3704): the
    /// way to a pod's address is another one. (2, loose, and 0 let it pass.)
    pub fn is_refused_by_the_node(&self) -> bool {
        std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter").is_ok_and(|mode| mode.trim() == "1")
    }

    /// The name of that device.
    pub fn device(&self) -> &str {
        &self.device
    }
}

/// Inside: loopback and wire, everything that comes by the wire is here, everything else is beyond it. The index of the
/// wire's other end.
fn furnish(node: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    set_up(LOOPBACK, 0)?;
    make_wire(node)?;
    let wire = netlink::devices()?.into_iter().find(|device| device.name == INSIDE);
    let wire = wire.ok_or(io::ErrorKind::NotFound)?;
    no_ipv6(INSIDE);
    // With addresses that nobody asks for, a frame goes to the sender's own, which is the other end's too.
    set_up(wire.index, IFF_NOARP)?;
    // ICMP reaches no pod, hence not the annex: a path that carries less is found out by what gets lost (RFC 4821). Where it
    // cannot be set, such a path is slow to be found.
    let _ = std::fs::write("/proc/sys/net/ipv4/tcp_mtu_probing", "1");
    route(TABLE_MAIN, SCOPE_LINK, UNICAST, wire.index)?;
    route(TABLE_HERE, SCOPE_HOST, LOCAL, LOOPBACK)?;
    let mut rule = vec![AF_INET, 0, 0, 0, TABLE_HERE, 0, 0, TO_TABLE, 0, 0, 0, 0];
    rule.extend(attribute(FRA_IIFNAME, format!("{INSIDE}\0").as_bytes()));
    rule.extend(attribute(FRA_PRIORITY, &100u32.to_ne_bytes()));
    netlink::change(RTM_NEWRULE, NLM_F_CREATE_NEW, &rule)?;
    Ok((File::open("/proc/thread-self/ns/net")?.into(), wire.peer))
}

/// `ifinfomsg`.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&index.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes
}

fn set_up(index: u32, flags: u32) -> io::Result<()> {
    netlink::change(RTM_NEWLINK, 0, &link(index, IFF_UP | flags))
}

fn make_wire(node: BorrowedFd<'_>) -> io::Result<()> {
    let peer = [
        link(0, 0),
        attribute(IFLA_IFNAME, ON_NODE),
        attribute(IFLA_ADDRESS, &MAC),
        attribute(IFLA_NET_NS_FD, &node.as_raw_fd().to_ne_bytes()),
    ];
    let kind = attribute(IFLA_INFO_KIND, b"veth\0");
    let peer = attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer.concat()));
    let wire = [
        link(0, 0),
        attribute(IFLA_IFNAME, format!("{INSIDE}\0").as_bytes()),
        attribute(IFLA_ADDRESS, &MAC),
        attribute(IFLA_LINKINFO, &[kind, peer].concat()),
    ];
    netlink::change(RTM_NEWLINK, NLM_F_CREATE_NEW, &wire.concat())
}

/// To everywhere.
fn route(table: u8, scope: u8, kind: u8, device: u32) -> io::Result<()> {
    let mut body = vec![AF_INET, 0, 0, 0, table, RTPROT_STATIC, scope, kind, 0, 0, 0, 0];
    body.extend(attribute(RTA_OIF, &device.to_ne_bytes()));
    netlink::change(RTM_NEWROUTE, NLM_F_CREATE_NEW, &body)
}

/// Both ends have one address, which IPv6 would take for a conflict. Where it cannot be turned off, that is all it does.
fn no_ipv6(device: &str) {
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "1");
}
