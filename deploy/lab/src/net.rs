//! The lab's network: named namespaces, a bridge per site, a router between them, links that can be cut.
//!
//! ```text
//!  operator -- router == west (bridge br0: uplink, r1, r2, r3, n1, n2) -- west-n1 -- west-n1-<pod>
//!                     == east (bridge br0: …)
//! ```
//! A link is cut at the bridge's side, by taking the port down: the routes of the machine behind it stay.

use crate::tool::{self, ToolError};
use crate::topology::{self, Kind, Member, Site, Spec};
use nix::sched::CloneFlags;
use std::fmt::Write as _;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where iproute2 keeps named namespaces.
const NETNS_DIR: &str = "/run/netns";
/// The router's port on a site's bridge.
const UPLINK: &str = "uplink";
/// Priority of the rules that part two sites; any below the kernel's own 32766.
const PART_PRIORITY: u32 = 100;

/// What can go wrong with the network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The ip tool.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A namespace could not be opened or entered.
    #[error("namespace {name}")]
    Enter {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// A setting could not be written.
    #[error("sysctl {name} in namespace {namespace}")]
    Sysctl {
        /// The namespace.
        namespace: String,
        /// The setting's path below /proc/sys.
        name: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A namespace could not be removed.
    #[error("namespace {name} could not be removed")]
    Remove {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
}

/// The file that stands for a namespace.
pub fn path(namespace: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(namespace)
}

/// A namespace, open for setns.
pub fn open(namespace: &str) -> Result<File, NetError> {
    File::open(path(namespace)).map_err(|source| NetError::Enter { name: namespace.into(), source })
}

/// Runs `work` on a thread of its own inside a namespace; sockets made there stay there.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    let file = open(namespace)?;
    let fail = |source| NetError::Enter { name: namespace.into(), source };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            nix::sched::setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread inside panicked"))).map_err(fail)
    })
}

/// Whether something accepts TCP connections there.
pub fn reachable(namespace: &str, address: SocketAddr, limit: Duration) -> bool {
    inside(namespace, || TcpStream::connect_timeout(&address, limit).is_ok()).unwrap_or(false)
}

/// Whether something listens on this address in the namespace of a process (proc(5), /proc/PID/net/tcp).
pub fn listening(pid: i32, address: SocketAddr) -> bool {
    const LISTEN: &str = "0A";
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    // The kernel prints each 32-bit word of the address as a number of this machine's byte order.
    let word = |w: &[u8]| w.try_into().map(|w| format!("{:08X}", u32::from_ne_bytes(w))).unwrap_or_default();
    let exact: String = octets.chunks(4).map(word).collect();
    let port = format!("{:04X}", address.port());
    let ends = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next()?.to_owned(), fields.nth(1)?.to_owned());
        let (ip, at) = local.split_once(':')?;
        Some(state == LISTEN && at == port && (ip == exact || ip.bytes().all(|b| b == b'0')))
    };
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().skip(1).any(|line| ends(line) == Some(true))
    })
}

/// The namespaces of a lab, whether or not it has a state file.
pub fn list(lab: &str) -> Vec<String> {
    let prefix = topology::namespace_prefix(lab);
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else { return Vec::new() };
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut ours: Vec<String> = names.filter(|name| name.starts_with(&prefix)).collect();
    ours.sort();
    ours
}

/// Removes a namespace; its links go with it.
pub fn remove(namespace: &str) -> Result<(), NetError> {
    let path = path(namespace);
    // Not mounted if the lab was killed between making the file and mounting on it.
    let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(NetError::Remove { name: namespace.into(), source })
        }
        _ => Ok(()),
    }
}

/// Makes all namespaces and links of a lab.
pub fn build(spec: &Spec) -> Result<(), NetError> {
    let members = spec.members();
    let roles = ["router".to_owned(), "operator".to_owned()].into_iter();
    let roles = roles.chain(spec.sites.iter().map(|s| s.name.clone())).chain(members.iter().map(Member::role));
    let namespaces: Vec<String> = roles.map(|role| spec.namespace(&role)).collect();
    add(spec, &namespaces)?;
    build_router(spec)?;
    for site in &spec.sites {
        build_site(spec, site)?;
    }
    for member in spec.members() {
        let others = spec.members().into_iter().filter(|m| m.site == member.site && *m != member);
        build_member(spec, &member, &others.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Makes a pod's namespace behind its node and returns its name. The node routes to it; it reaches all by the node.
pub fn add_pod(spec: &Spec, node: &Member, pod: &str, address: Ipv4Addr) -> Result<String, NetError> {
    let inside = spec.namespace(&format!("{}-{pod}", node.role()));
    let outside = spec.namespace(&node.role());
    let link = pod_link(pod);
    let gateway = node.pod_address(1).unwrap_or(Ipv4Addr::UNSPECIFIED);
    add(spec, std::slice::from_ref(&inside))?;
    batch(
        spec,
        &outside,
        &format!(
            "link add {link} type veth peer name eth0 netns {inside}\naddr add {gateway}/32 dev {link}\n\
             link set {link} up\nroute add {address}/32 dev {link}\n"
        ),
    )?;
    // As the CNI plugin ptp does: the pod sees only its node, so that every packet passes the node's side of the veth.
    batch(
        spec,
        &inside,
        &format!(
            "link set lo up\naddr add {address}/32 dev eth0\nlink set eth0 up\n\
             route add {gateway}/32 dev eth0 scope link\nroute add default via {gateway} src {address}\n"
        ),
    )?;
    Ok(inside)
}

/// The node's side of a pod's veth. A pod name has at most 12 characters, an interface name 15.
pub fn pod_link(pod: &str) -> String {
    format!("p-{pod}")
}

/// Takes the link of a member (`west-n1`) or of a whole site (`west`) down or up.
pub fn set_link(spec: &Spec, site: &str, member: Option<&Member>, up: bool) -> Result<(), NetError> {
    let port = member.map_or(UPLINK.to_owned(), Member::port);
    batch(spec, &spec.namespace(site), &format!("link set {port} {}\n", if up { "up" } else { "down" }))
}

/// Whether the link is up.
pub fn link_up(spec: &Spec, site: &str, member: Option<&Member>) -> Result<bool, NetError> {
    let port = member.map_or(UPLINK.to_owned(), Member::port);
    let text = tool::run(&spec.name, "ip", &["-n", &spec.namespace(site), "-o", "link", "show", &port], "")?;
    Ok(text.contains(",UP") || text.contains("<UP"))
}

/// Parts two sites in the router, both ways, or joins them again. The operator still reaches both.
pub fn set_parted(spec: &Spec, a: &Site, b: &Site, parted: bool) -> Result<(), NetError> {
    let router = spec.namespace("router");
    for (from, to) in [(a, b), (b, a)] {
        let rule = format!("iif {} to 10.{}.0.0/16 priority {PART_PRIORITY} blackhole", from.name, to.octet);
        // Deleting first makes parting twice the same as once; it fails when there is none.
        let gone = batch(spec, &router, &format!("rule del {rule}\n"));
        if parted {
            batch(spec, &router, &format!("rule add {rule}\n"))?;
        } else if let Err(NetError::Tool(ToolError::Start { .. })) = &gone {
            gone?;
        }
    }
    Ok(())
}

/// Loses all that one member of a site sends to another, or lets it through again. What comes back is not touched.
pub fn set_unheard(spec: &Spec, from: &Member, to: &Member, unheard: bool) -> Result<(), NetError> {
    let namespace = spec.namespace(&from.role());
    let rule = format!("to {} priority {PART_PRIORITY} blackhole", to.address());
    // As for two sites: twice is the same as once.
    let gone = batch(spec, &namespace, &format!("rule del {rule}\n"));
    if unheard {
        batch(spec, &namespace, &format!("rule add {rule}\n"))?;
    } else if let Err(NetError::Tool(ToolError::Start { .. })) = &gone {
        gone?;
    }
    Ok(())
}

fn add(spec: &Spec, namespaces: &[String]) -> Result<(), NetError> {
    let lines: String = namespaces.iter().map(|n| format!("netns add {n}\n")).collect();
    Ok(tool::run(&spec.name, "ip", &["-batch", "-"], &lines).map(drop)?)
}

fn batch(spec: &Spec, namespace: &str, lines: &str) -> Result<(), NetError> {
    Ok(tool::run(&spec.name, "ip", &["-n", namespace, "-batch", "-"], lines).map(drop)?)
}

fn build_router(spec: &Spec) -> Result<(), NetError> {
    let router = spec.namespace("router");
    let operator = spec.namespace("operator");
    let (near, far) = (topology::OPERATOR_ROUTER, topology::OPERATOR);
    let mut lines = format!(
        "link set lo up\nlink add oper type veth peer name eth0 netns {operator}\naddr add {near}/24 dev oper\n\
         link set oper up\n"
    );
    for site in &spec.sites {
        let (name, octet, switch) = (&site.name, site.octet, spec.namespace(&site.name));
        let _ = write!(
            lines,
            "link add {name} type veth peer name {UPLINK} netns {switch}\naddr add 10.{octet}.0.1/24 dev {name}\n\
             link set {name} up\n"
        );
        for node in site.members() {
            lines.push_str(&pod_route(&node));
        }
    }
    batch(spec, &router, &lines)?;
    batch(
        spec,
        &operator,
        &format!("link set lo up\naddr add {far}/24 dev eth0\nlink set eth0 up\nroute add default via {near}\n"),
    )?;
    set_sysctl(&router, "net/ipv4/ip_forward", "1")
}

fn build_site(spec: &Spec, site: &Site) -> Result<(), NetError> {
    let mut lines = format!(
        "link set lo up\nlink add br0 type bridge\nlink set br0 up\nlink set {UPLINK} master br0\nlink set {UPLINK} up\n"
    );
    for member in site.members() {
        let (port, namespace) = (member.port(), spec.namespace(&member.role()));
        let _ = write!(
            lines,
            "link add {port} type veth peer name eth0 netns {namespace}\nlink set {port} master br0\n\
             link set {port} up\n"
        );
    }
    batch(spec, &spec.namespace(&site.name), &lines)
}

fn build_member(spec: &Spec, member: &Member, others: &[Member]) -> Result<(), NetError> {
    let namespace = spec.namespace(&member.role());
    let (address, gateway) = (member.address(), member.gateway());
    let mut lines =
        format!("link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n");
    others.iter().for_each(|other| lines.push_str(&pod_route(other)));
    batch(spec, &namespace, &lines)?;
    if matches!(member.kind, Kind::Node(_)) {
        set_sysctl(&namespace, "net/ipv4/ip_forward", "1")?;
    }
    Ok(())
}

fn pod_route(node: &Member) -> String {
    let network = node.pod_address(0);
    network.map(|network| format!("route add {network}/24 via {}\n", node.address())).unwrap_or_default()
}

fn set_sysctl(namespace: &str, name: &'static str, value: &str) -> Result<(), NetError> {
    let written = inside(namespace, || std::fs::write(Path::new("/proc/sys").join(name), value))?;
    written.map_err(|source| NetError::Sysctl { namespace: namespace.into(), name, source })
}
