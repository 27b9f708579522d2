//! A TPM behind the access broker, tpm2-abrmd, on a message bus of this test's own.

use super::common::{Swtpm, ca_in};
use super::verified;
use ambit_tpm::{AkKind, Attester, Bank, Options};
use ambit_verify::EkClass;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the process that reaches the TPM: the library finds the bus by its environment, which a test must not change
/// for those that run beside it.
const FOLDER: &str = "AMBIT_TEST_TABRMD";
const BUS: &str = "DBUS_SESSION_BUS_ADDRESS";

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_tpm_behind_the_access_broker_attests_too() {
    if let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) {
        // Two that want the TPM at once: the broker's part is to keep their sessions and objects apart.
        let open = |name: &str| {
            let state = folder.join(name);
            std::fs::create_dir_all(&state).unwrap();
            Attester::start(Options { ak: AkKind::EccP256, ..Options::new("tabrmd:bus_type=session", &state) }).unwrap()
        };
        let (a, b) = (open("a"), open("b"));
        let proves = |attester| {
            let ca = ca_in(&folder.join("ca"));
            verified(ca, attester, Bank::Sha256, ambit_verify::Bank::Sha256, EkClass::Lab)
        };
        tokio::join!(proves(&a), proves(&b));
        return;
    }
    let tpm = Swtpm::start();
    tpm.tool("tpm2_pcrextend", &[&format!("16:sha256={}", "11".repeat(32))]);
    let folder = tpm.file("");
    let (_bus, address) = bus(&tpm);
    let broker = Command::new("tpm2-abrmd")
        .args(["--session", "--allow-root", &format!("--tcti={}", tpm.tcti())])
        .env(BUS, &address)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let _broker = Ended(broker.expect("tpm2-abrmd is installed"));
    // The library looks for the broker once; it takes its name on the bus when it has the TPM.
    let until = Instant::now() + Duration::from_secs(20);
    while !named(&address) {
        assert!(Instant::now() < until, "tpm2-abrmd does not come up");
        std::thread::sleep(Duration::from_millis(50));
    }
    let itself = ["--exact", "tabrmd::a_tpm_behind_the_access_broker_attests_too", "--nocapture"];
    let mut child = Command::new(std::env::current_exe().unwrap());
    let out = child.args(itself).env(FOLDER, &folder).env(BUS, &address).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&out.stderr));
}

/// A bus and its address.
fn bus(tpm: &Swtpm) -> (Ended, String) {
    let listen = format!("--address=unix:path={}", tpm.file("bus").display());
    let args = ["--session", "--nofork", "--nopidfile", "--print-address=1", &listen];
    let bus = Command::new("dbus-daemon").args(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut bus = Ended(bus.expect("dbus-daemon is installed"));
    let mut address = String::new();
    BufReader::new(bus.0.stdout.take().unwrap()).read_line(&mut address).unwrap();
    (bus, address.trim().to_owned())
}

fn named(address: &str) -> bool {
    let ask =
        ["--print-reply", "--dest=org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus.ListNames"];
    let out = Command::new("dbus-send").arg(format!("--bus={address}")).args(ask).output().expect("dbus-send");
    String::from_utf8_lossy(&out.stdout).contains("com.intel.tss2.Tabrmd")
}
