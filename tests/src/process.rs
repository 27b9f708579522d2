//! Processes, folders and ports of one test. Nothing of it outlives the test: not after a panic, not after its death.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Ports are chosen below the range that the kernel gives to outgoing connections (32768 and up), so that none of
/// those takes a port between its choice and its use.
const PORT_FIRST: u32 = 18_000;
const PORTS: u32 = 14_000;

/// What is to happen by itself happens within this.
pub const SOON: Duration = Duration::from_secs(30);

/// Asked until it is so.
#[allow(clippy::panic, reason = "a test in which it never is fails")]
pub fn until<T>(what: &str, mut of: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = of() {
            return found;
        }
        assert!(begun.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A folder that is removed at its end. No log that was written in it may hold a private key.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new one.
    pub fn new() -> Result<Folder> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ambit-tests-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Folder(path))
    }
    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    #[allow(clippy::panic, reason = "a test whose logs hold a key fails")]
    fn drop(&mut self) {
        let found = crate::secrets::in_logs(&self.0);
        // Left behind only where the disk itself fails; a test has nothing to add to that.
        let _ = std::fs::remove_dir_all(&self.0);
        match found {
            _ if std::thread::panicking() => {}
            Ok(found) if found.is_empty() => {}
            Ok(found) => panic!("private keys in {found:?}"),
            Err(error) => panic!("logs that cannot be searched: {error:#}"),
        }
    }
}

/// A running program, ended with its handle.
#[derive(Debug)]
pub struct Started {
    child: Child,
}

impl Started {
    /// Starts `argv` with its output in the file `log`. The kernel kills it where the test's thread dies first.
    pub fn start(argv: &[&str], log: &Path) -> Result<Started> {
        let out = File::options().create(true).append(true).open(log).context("a log file")?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("starting {argv:?}"))?;
        Ok(Started { child })
    }
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
    /// Resident memory, bytes.
    pub fn resident(&self) -> Result<u64> {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.id()))?;
        let pages: u64 = statm.split_whitespace().nth(1).context("statm")?.parse()?;
        Ok(pages * 4096)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a tool to its end, whatever that is.
pub fn run(argv: &[&str]) -> Result<Output> {
    let (program, args) = argv.split_first().context("a program")?;
    Command::new(program).args(args).stdin(Stdio::null()).output().with_context(|| format!("running {argv:?}"))
}

/// Runs a tool that must succeed; what it printed.
pub fn must_run(argv: &[&str]) -> Result<String> {
    let out = run(argv)?;
    if !out.status.success() {
        bail!("{argv:?}: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The first of `count` free ports in a row on 127.0.0.1.
pub fn free_ports(count: u16) -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..2_000 {
        // Test programs that run side by side start at places of their own.
        let at = std::process::id().wrapping_mul(64) + NEXT.fetch_add(u32::from(count), Ordering::Relaxed);
        let first = u16::try_from(PORT_FIRST + at % PORTS)?;
        let free = (first..first + count).all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
        if free {
            return Ok(first);
        }
    }
    bail!("no {count} free ports in a row")
}

/// A free address.
pub fn free_address() -> Result<SocketAddr> {
    Ok((Ipv4Addr::LOCALHOST, free_ports(1)?).into())
}

/// A binary of this workspace, as cargo built it beside the test program.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    // A test is target/<profile>/deps/<test>, a binary target/<profile>/<binary>.
    let folder = me.parent().context("a target folder")?;
    let profile = if folder.ends_with("deps") { folder.parent().context("a target folder")? } else { folder };
    let binary = profile.join(name);
    if !binary.is_file() {
        bail!("{} is missing: run `cargo build --workspace --bins` first (`cargo xtask test` does)", binary.display());
    }
    Ok(binary)
}
