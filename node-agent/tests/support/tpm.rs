//! A software TPM for one test, without certificates; gone when the test ends, also by panic.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(crate) struct Swtpm {
    pub(crate) dir: PathBuf,
    port: u16,
    child: Child,
}

impl Swtpm {
    pub(crate) fn start() -> Swtpm {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ambit-agent-tpm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        for folder in ["tpm", "state"] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let state = dir.join("tpm").display().to_string();
        let setup = Command::new("swtpm_setup")
            .args(["--tpm2", "--overwrite", "--pcr-banks", "sha256,sha384", "--tpm-state", &format!("dir://{state}")])
            .output()
            .expect("swtpm_setup is installed");
        assert!(setup.status.success(), "{setup:?}");
        // From the choice of ports until they are taken: two tests must not choose the same.
        static PORTS: Mutex<()> = Mutex::new(());
        let _choosing = PORTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let port = two_free_ports();
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .args(["--tpmstate", &format!("dir={state}")])
            .args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")])
            .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("swtpm is installed");
        let mut tpm = Swtpm { dir, port, child };
        let until = Instant::now() + Duration::from_secs(20);
        while !tpm.tool("tpm2_getrandom", &["--hex", "4"]).status.success() {
            assert!(Instant::now() < until, "swtpm on port {port} does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(tpm.child.try_wait().unwrap().is_none(), "another program answers on port {port}");
        tpm
    }

    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.file(name), bytes).unwrap();
    }
    /// One of tpm2-tools, in this TPM's folder.
    pub(crate) fn tool(&self, name: &str, args: &[&str]) -> Output {
        let tool = Command::new(name).args(args).current_dir(&self.dir).env("TPM2TOOLS_TCTI", self.tcti()).output();
        tool.unwrap_or_else(|e| panic!("{name}: {e}"))
    }
    /// The TPM hangs: commands are taken and not answered.
    pub(crate) fn hang(&self) {
        self.signal(Signal::SIGSTOP);
    }
    pub(crate) fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The TCTI takes the control port to be the one after the server's.
fn two_free_ports() -> u16 {
    for _ in 0..100 {
        let Ok(first) = TcpListener::bind("127.0.0.1:0") else { continue };
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
    panic!("no two free ports in a row");
}
