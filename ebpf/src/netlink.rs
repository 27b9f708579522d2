//! Questions to the kernel's routing part, in this thread's network namespace (rtnetlink(7)). In a pod's namespace the pod may
//! listen in, shout in between, and change what is asked for meanwhile: only whole answers of the kernel count.

use crate::error::KernelError;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/net_namespace.h.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
pub(crate) const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
pub(crate) const IFLA_ADDRESS: u16 = 1;
pub(crate) const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
pub(crate) const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
pub(crate) const IFLA_INFO_KIND: u16 = 1;
pub(crate) const IFF_UP: u32 = 1;
pub(crate) const IFF_LOOPBACK: u32 = 8;
/// More devices than a node has pods.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// A list of devices that changes while it is read is read again; whoever keeps changing it is not waited for.
const TRIES_MAX: usize = 8;

/// Datagrams read in one go.
const NEWS_MAX: usize = 256;

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) flags: u32,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) mac: [u8; 6],
    /// The index of a veth's other end, in that one's namespace.
    pub(crate) peer: u32,
    /// What this namespace calls that one, where it is another.
    pub(crate) peer_netns: Option<NetnsId>,
}

/// What one namespace calls another: nothing anywhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NetnsId(pub(crate) i32);

/// Every device of this thread's namespace.
pub(crate) fn devices() -> io::Result<Vec<Device>> {
    for _ in 0..TRIES_MAX {
        let socket = ask(RTM_GETLINK, NLM_F_DUMP, &[0; 16])?;
        if let Some(messages) = answer(socket.as_fd(), NLMSG_DONE)? {
            let links = messages.iter().filter(|message| message.kind == RTM_NEWLINK);
            return Ok(links.filter_map(|message| device(&message.body)).collect());
        }
    }
    Err(io::Error::other(format!("the list of devices changed while it was read, {TRIES_MAX} times over")))
}

/// What this thread's namespace calls `other`. None where it has no name for it: then no device here leads there.
pub(crate) fn netns_id(other: BorrowedFd<'_>) -> io::Result<Option<NetnsId>> {
    let mut body = vec![0, 0, 0, 0, 8, 0];
    body.extend_from_slice(&NETNSA_FD.to_ne_bytes());
    body.extend_from_slice(&other.as_raw_fd().to_ne_bytes());
    let socket = ask(RTM_GETNSID, 0, &body)?;
    let messages = answer(socket.as_fd(), RTM_NEWNSID)?.unwrap_or_default();
    let body = messages.last().and_then(|message| message.body.get(4..)).unwrap_or_default();
    let found = attributes(body).into_iter().find(|(kind, _)| *kind == NETNSA_NSID);
    let id = found.and_then(|(_, value)| Some(i32::from_ne_bytes(*value.first_chunk()?)));
    // Of one that has no id yet the kernel says -1.
    Ok(id.filter(|id| *id >= 0).map(NetnsId))
}

/// Word of the devices of the network namespace in which it was opened.
#[derive(Debug)]
pub struct DeviceNews(OwnedFd);

impl DeviceNews {
    /// Listens from now on.
    pub fn open() -> Result<Self, KernelError> {
        let socket = crate::sys::device_news_socket().map_err(|e| KernelError::io("listen for news of devices", e))?;
        Ok(Self(socket))
    }

    /// Whether a device came, went or changed since the last call. True too where that cannot be told.
    pub fn came(&self) -> bool {
        let mut buffer = [0; 4096];
        let mut read = || crate::sys::receive(&self.0, &mut buffer);
        let is_nothing = |e: &io::Error| e.kind() == io::ErrorKind::WouldBlock;
        // What is more than this is news next time.
        let first = (0..NEWS_MAX).find_map(|n| read().err().map(|e| (n, e)));
        first.is_none_or(|(n, e)| n > 0 || !is_nothing(&e))
    }
}

/// Asks for a change, and waits until the kernel says that it is made.
pub(crate) fn change(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let socket = ask(kind, NLM_F_ACK | flags, body)?;
    let mut buffer = vec![0; 8 << 10];
    let (len, is_of_kernel) = crate::sys::receive(&socket, &mut buffer)?;
    let answer = buffer.get(..len).filter(|_| is_of_kernel).and_then(message).map(|(message, _)| message);
    let code = answer.filter(|message| message.kind == NLMSG_ERROR);
    let code = code.and_then(|message| message.body.first_chunk().copied()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::other("no word of rtnetlink whether it is done")),
    }
}

/// One attribute of a message, padded as the next one needs it.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = u16::try_from(len).unwrap_or(u16::MAX).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

fn ask(kind: u16, flags: u16, body: &[u8]) -> io::Result<File> {
    let socket = File::from(crate::sys::route_socket()?);
    send(&socket, kind, flags, body)?;
    Ok(socket)
}

fn send(mut socket: &File, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut request = Vec::with_capacity(16 + body.len());
    request.extend_from_slice(&u32::try_from(16 + body.len()).unwrap_or(u32::MAX).to_ne_bytes());
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    socket.write_all(&request)
}

struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

/// Every message up to the one of kind `last`; none where the kernel says that what it listed changed meanwhile.
fn answer(socket: BorrowedFd<'_>, last: u16) -> io::Result<Option<Vec<Message>>> {
    let (mut found, mut buffer, mut taken) = (Vec::new(), vec![0; 64 << 10], 0);
    let mut whole = true;
    loop {
        let (len, is_of_kernel) = crate::sys::receive(socket, &mut buffer)?;
        taken += len;
        if len == 0 || taken > ANSWER_BYTES_MAX {
            return Err(io::Error::other("an answer of rtnetlink that does not end"));
        }
        let mut rest = buffer.get(..len).filter(|_| is_of_kernel).unwrap_or_default();
        while let Some((message, after)) = message(rest) {
            whole &= message.flags & NLM_F_DUMP_INTR == 0;
            let kind = message.kind;
            found.push(message);
            match kind {
                NLMSG_ERROR => return Err(io::Error::other("rtnetlink refused to answer")),
                _ if kind == last => return Ok(Some(found).filter(|_| whole)),
                _ => rest = after,
            }
        }
    }
}

/// The first netlink message, and what comes after it.
fn message(bytes: &[u8]) -> Option<(Message, &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let flags = u16::from_ne_bytes(*bytes.get(6..)?.first_chunk()?);
    let body = bytes.get(16..len)?.to_vec();
    Some((Message { kind, flags, body }, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

fn device(body: &[u8]) -> Option<Device> {
    let word = |at: usize| Some(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?));
    let mut device = Device { index: word(4)?, flags: word(8)?, ..Device::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_ADDRESS => device.mac = value.first_chunk().copied().unwrap_or_default(),
            IFLA_IFNAME => device.name = text(value),
            IFLA_LINK => device.peer = value.first_chunk().copied().map_or(0, u32::from_ne_bytes),
            IFLA_LINK_NETNSID => {
                device.peer_netns = value.first_chunk().copied().map(|id| NetnsId(i32::from_ne_bytes(id)));
            }
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
    use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};
    use nix::sys::socket::{bind, getsockname, sendto, socket};

    fn bytes(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut whole = (16 + body.len() as u32).to_ne_bytes().to_vec();
        whole.extend_from_slice(&kind.to_ne_bytes());
        whole.extend_from_slice(&flags.to_ne_bytes());
        whole.extend_from_slice(&[0; 8]);
        whole.extend_from_slice(body);
        whole
    }

    #[test]
    fn cut_messages_are_no_messages() {
        let whole = bytes(RTM_NEWLINK, NLM_F_DUMP_INTR, &[0; 4]);
        let (found, rest) = message(&whole).unwrap();
        assert_eq!((found.kind, found.flags, found.body.as_slice()), (RTM_NEWLINK, NLM_F_DUMP_INTR, &[0; 4][..]));
        assert_eq!(rest, []);
        assert!((0..20).all(|len| message(&whole[..len]).is_none()));
        assert_eq!(device(&[0; 15]), None);
        assert_eq!(attributes(&[5, 0, 3, 0, b'x', 0, 0, 0, 9, 0, 3, 0]), [(3, &b"x"[..])]);
        assert_eq!(attributes(&[0, 0, 3, 0]), []);
        assert!(devices().unwrap().iter().any(|d| d.index == 1 && d.flags & IFF_LOOPBACK != 0));
    }

    /// Two ends that take what the other sends for the kernel's: netlink has none such, so a pair of Unix sockets.
    #[test]
    fn an_answer_is_whole_or_none() {
        let told = |parts: &[Vec<u8>]| {
            let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
            parts.iter().for_each(|part| assert_eq!(theirs.send(part).unwrap(), part.len()));
            answer(ours.as_fd(), NLMSG_DONE).unwrap().map(|messages| messages.len())
        };
        let (link, done) = (bytes(RTM_NEWLINK, 2, &[0; 16]), bytes(NLMSG_DONE, 2, &[0; 4]));
        let interrupted = |kind| bytes(kind, 2 | NLM_F_DUMP_INTR, &[0; 16]);
        assert_eq!(told(&[link.clone(), [link.clone(), done.clone()].concat()]), Some(3));
        assert_eq!(told(&[interrupted(RTM_NEWLINK), link.clone(), done]), None);
        assert_eq!(told(&[link, interrupted(NLMSG_DONE)]), None);
    }

    #[test]
    fn a_device_that_comes_is_told_once() {
        let told = std::thread::spawn(|| {
            crate::sys::leave_netns().unwrap();
            let news = DeviceNews::open().unwrap();
            let ip = |words: &str| {
                assert!(std::process::Command::new("ip").args(words.split(' ')).status().unwrap().success());
                news.came()
            };
            [news.came(), ip("link add x0 type veth peer name x1"), news.came(), ip("link set x0 up"), ip("link show")]
        });
        assert_eq!(told.join().unwrap(), [false, true, false, true, false]);
    }

    /// A pod with `CAP_NET_ADMIN` may send to our socket in its namespace, and would hide a device.
    #[test]
    fn what_others_send_is_no_answer() {
        let asked = File::from(crate::sys::route_socket().unwrap());
        bind(asked.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        let ours: NetlinkAddr = getsockname(asked.as_raw_fd()).unwrap();
        let kind = (AddressFamily::Netlink, SockType::Raw, SockProtocol::NetlinkRoute);
        let other = socket(kind.0, kind.1, SockFlag::empty(), kind.2).unwrap();
        let forged = bytes(NLMSG_DONE, 2, &[0; 4]);
        sendto(other.as_raw_fd(), &forged, &NetlinkAddr::new(ours.pid(), 0), MsgFlags::empty()).unwrap();
        send(&asked, RTM_GETLINK, NLM_F_DUMP, &[0; 16]).unwrap();
        let found = answer(asked.as_fd(), NLMSG_DONE).unwrap().unwrap();
        assert!(found.iter().any(|message| message.kind == RTM_NEWLINK), "the forged end was believed");
    }
}
