//! The least that an agent is: it governs one pod and echoes what comes to the capture listener. Tests kill it.
//!
//! `stand_in CGROUP_ROOT PIN_DIR VERDICTS_MAX NODE_NETNS POD_NETNS POD_ADDRESS`; says `ready` when it carries.
#![allow(clippy::print_stdout, reason = "whoever started it waits for a line")]

use ambit_ebpf::{Capacity, Kernel, Options, netns_cookie};
use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [root, pins, verdicts, node, pod, address] = args.as_slice() else { return Err("six arguments".into()) };
    let capacity = Capacity { verdicts: verdicts.parse()?, ..Capacity::default() };
    let options = Options { cgroup_root: PathBuf::from(root), pin_dir: PathBuf::from(pins), capacity };
    let address: Ipv4Addr = address.parse()?;
    let (node, pod) = (File::open(node)?, Arc::new(File::open(pod)?));
    let kernel = Arc::new(Kernel::open(&options)?);
    kernel.renew_lease(Duration::from_secs(60))?;

    let inside = pod.clone();
    let listener = std::thread::spawn(move || {
        nix::sched::setns(&*inside, nix::sched::CloneFlags::CLONE_NEWNET)?;
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
    });
    let listener = listener.join().map_err(|_| "no listener")??;
    let (guards, guarded) = (kernel.clone(), pod.clone());
    let wires = std::thread::spawn(move || -> Result<(), Box<dyn Error + Send + Sync>> {
        nix::sched::setns(node, nix::sched::CloneFlags::CLONE_NEWNET)?;
        guards.guard_wires("pod", guarded.as_fd(), address)?;
        Ok(())
    });
    wires.join().map_err(|_| "no wires")??;
    kernel.attach_pod("pod", pod.as_fd(), address, listener.as_fd())?;
    println!("ready");
    loop {
        let (stream, _) = listener.accept()?;
        let kernel = kernel.clone();
        std::thread::spawn(move || echo(&kernel, stream));
    }
}

/// As the agent does: a connection whose destination the kernel does not know is reset.
fn echo(kernel: &Kernel, mut stream: TcpStream) -> Option<()> {
    let cookie = netns_cookie(&stream).ok()?;
    let (std::net::SocketAddr::V4(peer), std::net::SocketAddr::V4(local)) =
        (stream.peer_addr().ok()?, stream.local_addr().ok()?)
    else {
        return None;
    };
    kernel.original_destination(cookie, peer, local)?;
    let mut buffer = [0; 256];
    loop {
        let len = stream.read(&mut buffer).ok().filter(|len| *len > 0)?;
        stream.write_all(buffer.get(..len)?).ok()?;
    }
}
