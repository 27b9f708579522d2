//! The few system calls that neither std nor libbpf-rs has.
#![allow(
    unsafe_code,
    reason = "getsockopt, statfs, mount, clock_gettime, geteuid, setns, unshare, socket, bind and recvfrom by libc, and two calls that libbpf-rs lacks; no pointer outlives its call"
)]

use libbpf_rs::{AsRawLibbpf, Link, ProgramAttachType, ProgramMut, libbpf_sys};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr::NonNull;

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
/// asm-generic/socket.h; libc does not name it for every target.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// Where bpffs belongs when a node has none yet.
const BPFFS: &str = "/sys/fs/bpf";

pub(crate) fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn get_option<T: Copy + Default>(fd: impl AsFd, option: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` and `len` live through the call and `len` is the size of `value`, an integer.
    let result = unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the network namespace that a socket belongs to: part of the key of a captured flow.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    get_option(socket, SO_NETNS_COOKIE)
}

/// Whether a socket is a listening TCP socket.
pub(crate) fn is_tcp_listener(socket: impl AsFd) -> io::Result<bool> {
    let listening: libc::c_int = get_option(&socket, libc::SO_ACCEPTCONN)?;
    let protocol: libc::c_int = get_option(&socket, libc::SO_PROTOCOL)?;
    Ok(listening == 1 && protocol == libc::IPPROTO_TCP)
}

fn filesystem(path: &Path) -> io::Result<i64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path ends in NUL; an all-zero statfs is a valid one, and the kernel overwrites it.
    let (result, stat) = unsafe { (libc::statfs(path.as_ptr(), stat.as_mut_ptr()), stat.assume_init()) };
    if result == 0 { Ok(stat.f_type) } else { Err(io::Error::last_os_error()) }
}

/// Whether `path` lies on a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(filesystem(path)? == BPF_FS_MAGIC)
}

/// Mounts bpffs on its usual place if `below` lies there and nothing is mounted yet.
pub(crate) fn mount_bpffs_for(below: &Path) -> io::Result<()> {
    let place = Path::new(BPFFS);
    if !below.starts_with(place) {
        return Ok(());
    }
    // Two agents that start at once must not mount twice: the second mount would hide the first one's pins.
    let guard = std::fs::File::open(place)?;
    guard.lock()?;
    if is_bpffs(place)? {
        return Ok(());
    }
    let (name, target, kind) = (c"bpf", CString::new(BPFFS)?, c"bpf");
    // SAFETY: all strings end in NUL and live through the call; this file system needs no data.
    let result = unsafe { libc::mount(name.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The id of a cgroup2 directory, as the programs see it: its inode number.
pub fn cgroup_id(path: &Path) -> io::Result<u64> {
    if filesystem(path)? != CGROUP2_SUPER_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a cgroup2 directory"));
    }
    Ok(std::fs::metadata(path)?.ino())
}

/// Nanoseconds since boot, suspend included: the clock of the lease.
pub(crate) fn boot_time_ns() -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` lives through the call.
    if unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64))
}

/// Time since boot, suspend included.
pub fn boot_time() -> io::Result<std::time::Duration> {
    boot_time_ns().map(std::time::Duration::from_nanos)
}

/// Moves this thread, which must be one of our own, into a network namespace.
pub(crate) fn enter_netns(netns: impl AsFd) -> io::Result<()> {
    // SAFETY: takes two integers; the descriptor is open through the call.
    let result = unsafe { libc::setns(netns.as_fd().as_raw_fd(), libc::CLONE_NEWNET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Moves this thread, which must be one of our own, into a new network namespace that goes with it.
pub(crate) fn leave_netns() -> io::Result<()> {
    // SAFETY: takes an integer.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A socket to the kernel's routing part, in this thread's network namespace. Whoever waits on it waits a second at most:
/// an answer for which there was no room does not come.
pub(crate) fn route_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes three integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us, and to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let wait = libc::timeval { tv_sec: 1, tv_usec: 0 };
    // SAFETY: `wait` lives through the call, and its size is the one given.
    let result = unsafe {
        let (wait, len) = ((&raw const wait).cast(), size_of::<libc::timeval>() as libc::socklen_t);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, wait, len)
    };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// The same that is told of every device that comes, goes or changes (RTMGRP_LINK), and is never waited for.
pub(crate) fn device_news_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes three integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us, and to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = libc::RTMGRP_LINK as u32;
    let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address lives through the call, and its size is the one given.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// Reads one datagram: its length in bytes, and whether the kernel sent it. Who has `CAP_NET_ADMIN` in a namespace can send
/// to every netlink socket there.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    // SAFETY: an all-zero address is a valid one.
    let mut from: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    let mut from_len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: buffer and address live through the call, with the sizes given.
    let len = unsafe {
        let (bytes, from) = (buffer.as_mut_ptr().cast(), (&raw mut from).cast());
        // With MSG_TRUNC the length is that of the datagram, also where the buffer was too short.
        libc::recvfrom(socket.as_fd().as_raw_fd(), bytes, buffer.len(), libc::MSG_TRUNC, from, &raw mut from_len)
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    if len > buffer.len() {
        return Err(io::Error::other(format!("a datagram of {len} bytes, at most {}", buffer.len())));
    }
    Ok((len, from.nl_pid == 0))
}

/// The id of a pinned program.
pub(crate) fn pinned_program_id(path: &Path) -> io::Result<u32> {
    let program = libbpf_rs::Program::fd_from_pinned_path(path).map_err(io::Error::other)?;
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut len = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` lives through the call and `len` is its size; all zeros ask for nothing behind a pointer.
    let result = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &raw mut info, &raw mut len) };
    if result == 0 { Ok(info.id) } else { Err(io::Error::from_raw_os_error(-result)) }
}

/// Hangs a packet program on a device of this thread's network namespace, before every other there (tcx, Linux 6.6).
pub(crate) fn attach_tcx(program: &ProgramMut<'_>, index: u32) -> io::Result<Link> {
    let index = i32::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let opts = libbpf_sys::bpf_tcx_opts {
        sz: size_of::<libbpf_sys::bpf_tcx_opts>() as _,
        flags: libbpf_sys::BPF_F_BEFORE,
        ..Default::default()
    };
    // SAFETY: the program is loaded, and both live through the call.
    let link =
        unsafe { libbpf_sys::bpf_program__attach_tcx(program.as_libbpf_object().as_ptr(), index, &raw const opts) };
    let link = NonNull::new(link).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: libbpf made it, and nobody else has it.
    Ok(unsafe { Link::from_ptr(link) })
}

/// The ids of the links of a device of this thread's network namespace, in the order in which their programs run; 0 for a
/// program without a link.
pub(crate) fn tcx_links(index: u32, attach: ProgramAttachType) -> io::Result<Vec<u32>> {
    let index = i32::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // BPF_MPROG_MAX of the kernel.
    let (mut programs, mut links) = ([0u32; 64], [0u32; 64]);
    let mut opts = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as _,
        prog_ids: programs.as_mut_ptr(),
        link_ids: links.as_mut_ptr(),
        ..Default::default()
    };
    opts.__bindgen_anon_1.count = 64;
    // SAFETY: the arrays have as many places as is said, and live through the call.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(index, attach as u32, &raw mut opts) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    // SAFETY: both members of the union are the same integer.
    let count = unsafe { opts.__bindgen_anon_1.count } as usize;
    Ok(links.into_iter().take(count).collect())
}
