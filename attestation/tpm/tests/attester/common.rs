//! A software TPM with its own manufacturer CA, for one test; gone when the test ends, also by panic.

pub(crate) mod proxy;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(crate) struct Swtpm {
    dir: PathBuf,
    port: u16,
    child: Child,
}

impl Swtpm {
    /// Manufactures and starts a TPM. Its CA is its own: two of them trust nothing of each other.
    pub(crate) fn start() -> Swtpm {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ambit-tpm-{}-{count}", std::process::id()));
        let text = |p: &Path| p.to_str().expect("a path in UTF-8").to_owned();
        for folder in ["tpm", "ca", "state"] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let ca = text(&dir.join("ca"));
        let conf = format!(
            "statedir = {ca}\nsigningkey = {ca}/signkey.pem\nissuercert = {ca}/issuercert.pem\ncertserial = {ca}/certserial\n"
        );
        std::fs::write(dir.join("localca.conf"), conf).unwrap();
        let options = "--platform-manufacturer Ambit\n--platform-version 1\n--platform-model test\n";
        std::fs::write(dir.join("localca.options"), options).unwrap();
        let setup = format!(
            "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\n",
            text(&dir.join("localca.conf")),
            text(&dir.join("localca.options"))
        );
        std::fs::write(dir.join("setup.conf"), setup).unwrap();
        let made = Command::new("swtpm_setup")
            .args(["--tpm2", "--create-ek-cert", "--lock-nvram", "--overwrite", "--vmid", "test"])
            .args(["--pcr-banks", "sha1,sha256,sha384"])
            .args(["--tpm-state", &format!("dir://{}", text(&dir.join("tpm")))])
            .args(["--config", &text(&dir.join("setup.conf"))])
            .output()
            .expect("swtpm_setup is installed");
        assert!(made.status.success(), "swtpm_setup: {}{}", lossy(&made.stdout), lossy(&made.stderr));
        let port = two_free_ports();
        let child = power_on(&dir, port);
        let tpm = Swtpm { dir, port, child };
        tpm.wait();
        tpm
    }

    /// Takes its power away and gives it back: what was loaded is gone, PCRs are zero.
    pub(crate) fn reset(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = power_on(&self.dir, self.port);
        self.wait();
    }

    fn wait(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self.try_tool("tpm2_getrandom", &["--hex", "4"]).status.success() {
            assert!(Instant::now() < until, "swtpm on port {} does not answer", self.port);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// A folder for the attester's state.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// A path for a test's own files.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.file(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// DER of the manufacturer's root and of its issuing CA.
    pub(crate) fn ca(&self) -> (Vec<u8>, Vec<u8>) {
        ca_in(&self.file("ca"))
    }

    /// Runs one of tpm2-tools in this TPM's folder; it must succeed.
    pub(crate) fn tool(&self, name: &str, args: &[&str]) {
        let out = self.try_tool(name, args);
        assert!(out.status.success(), "{name} {args:?}: {}{}", lossy(&out.stdout), lossy(&out.stderr));
    }

    pub(crate) fn try_tool(&self, name: &str, args: &[&str]) -> std::process::Output {
        let tool = Command::new(name).args(args).current_dir(&self.dir).env("TPM2TOOLS_TCTI", self.tcti()).output();
        tool.unwrap_or_else(|e| panic!("{name}: {e}"))
    }
}

/// DER of root and issuing CA in a folder of swtpm_localca.
pub(crate) fn ca_in(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    let der = |name: &str| CertificateDer::from_pem_file(folder.join(name)).expect(name).to_vec();
    (der("swtpm-localca-rootca-cert.pem"), der("issuercert.pem"))
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn power_on(dir: &Path, port: u16) -> Child {
    Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .args(["--tpmstate", &format!("dir={}", dir.join("tpm").display())])
        .args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")])
        .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("swtpm is installed")
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
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
