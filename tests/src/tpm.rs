//! Software TPMs of a manufacturer of their own, each brought to the state of the golden boot (a real machine's).

use crate::process::{Folder, Started, free_ports, must_run};
use ambit_identity::keys::certificates_from_pem;
use ambit_lab::tpm_wire::Bank;
use ambit_lab::{boot_log, ima, tpm, tpm_wire};
use anyhow::{Context, Result, ensure};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// PCRs that the golden logs lead to.
const BOOTED: [usize; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14];
const LISTEN_MAX: Duration = Duration::from_secs(20);

/// A TPM manufacturer: a root and an issuing CA. Two of them trust nothing of each other.
pub struct Maker {
    folder: Folder,
}

impl Maker {
    /// Writes its configuration; the first TPM made creates its keys.
    pub fn new() -> Result<Maker> {
        let folder = Folder::new()?;
        let at = |name: &str| folder.path(name).display().to_string();
        std::fs::create_dir_all(folder.path("ca"))?;
        let ca = at("ca");
        let local = format!(
            "statedir = {ca}\nsigningkey = {ca}/signkey.pem\nissuercert = {ca}/issuercert.pem\ncertserial = {ca}/certserial\n"
        );
        std::fs::write(folder.path("localca.conf"), local)?;
        let options = "--platform-manufacturer Ambit\n--platform-version 1\n--platform-model Test\n";
        std::fs::write(folder.path("localca.options"), options)?;
        let setup = format!(
            "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\n",
            at("localca.conf"),
            at("localca.options")
        );
        std::fs::write(folder.path("setup.conf"), setup)?;
        Ok(Maker { folder })
    }

    /// Root and issuing CA (DER), as a cluster's EK roots. There once the first TPM is made.
    pub fn roots(&self) -> Result<Vec<Vec<u8>>> {
        let mut roots = Vec::new();
        for name in ["swtpm-localca-rootca-cert.pem", "issuercert.pem"] {
            let pem = std::fs::read_to_string(self.folder.path("ca").join(name))?;
            // swtpm_localca writes the certificate in words before its PEM.
            roots.extend(certificates_from_pem(&pem)?.first().map(|der| der.to_vec()));
        }
        Ok(roots)
    }

    /// Makes, starts and boots a TPM.
    pub fn tpm(&self, name: &str) -> Result<Tpm> {
        let folder = Folder::new()?;
        for sub in ["tpm", "state"] {
            std::fs::create_dir_all(folder.path(sub))?;
        }
        let (state, config) = (folder.path("tpm").display().to_string(), self.folder.path("setup.conf"));
        let (state_url, config) = (format!("dir://{state}"), config.display().to_string());
        must_run(&[
            "swtpm_setup",
            "--tpm2",
            "--create-ek-cert",
            "--lock-nvram",
            "--overwrite",
            "--vmid",
            name,
            "--pcr-banks",
            "sha1,sha256,sha384",
            "--tpm-state",
            &state_url,
            "--config",
            &config,
        ])?;
        Tpm::start(folder)
    }
}

/// A running TPM at golden PCRs.
pub struct Tpm {
    port: u16,
    process: Option<Started>,
    folder: Folder,
}

impl Tpm {
    /// Starts and boots the TPM whose state lies in the folder.
    fn start(folder: Folder) -> Result<Tpm> {
        let mut tpm = Tpm { port: free_ports(2)?, process: None, folder };
        tpm.reset()?;
        Ok(tpm)
    }

    /// Power off, power on, boot.
    pub(crate) fn reset(&mut self) -> Result<()> {
        self.process = None;
        let (state, port) = (self.folder.path("tpm").display().to_string(), self.port);
        let argv = [
            "swtpm".to_owned(),
            "socket".to_owned(),
            "--tpm2".to_owned(),
            "--flags".to_owned(),
            "not-need-init,startup-clear".to_owned(),
            "--tpmstate".to_owned(),
            format!("dir={state}"),
            "--server".to_owned(),
            format!("type=tcp,port={port},bindaddr=127.0.0.1"),
            "--ctrl".to_owned(),
            format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1),
        ];
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        self.process = Some(Started::start(&argv, &self.folder.path("swtpm.log"))?);
        boot(port)
    }

    /// Another TPM with this one's state of now: what a copied virtual machine has.
    pub(crate) fn copied(&self) -> Result<Tpm> {
        let folder = Folder::new()?;
        for sub in ["tpm", "state"] {
            std::fs::create_dir_all(folder.path(sub))?;
            for file in std::fs::read_dir(self.folder.path(sub))? {
                let file = file?;
                if file.file_type()?.is_file() {
                    std::fs::copy(file.path(), folder.path(sub).join(file.file_name()))?;
                }
            }
        }
        Tpm::start(folder)
    }

    /// Extends a PCR in all banks. Nobody else may be connected.
    pub(crate) fn extend(&self, pcr: u32, digests: &ima::Digests) -> Result<()> {
        Ok(tpm_wire::extend(&mut connect(self.port)?, pcr, digests)?)
    }

    /// Has it answer nothing any more, for good.
    pub(crate) fn hang(&self) -> Result<()> {
        let process = self.process.as_ref().context("a running TPM")?;
        must_run(&["kill", "-STOP", &process.id().to_string()]).map(drop)
    }

    /// How to reach it.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }
    /// Where its attester keeps the AK.
    pub fn state(&self) -> std::path::PathBuf {
        self.folder.path("state")
    }
    /// Whether its files are there.
    pub fn is_made(&self) -> bool {
        Path::exists(&self.folder.path("tpm"))
    }
}

/// Extends the events of the golden boot and of its IMA log, and checks where they led.
fn boot(port: u16) -> Result<()> {
    let mut tpm = connect(port)?;
    for event in boot_log::parse(tpm::BOOT_LOG)? {
        tpm_wire::extend(&mut tpm, event.pcr, &event.digests)?;
    }
    for record in ima::parse(tpm::IMA_LOG)? {
        tpm_wire::extend(&mut tpm, record.pcr, &record.digests())?;
    }
    let (found, golden) = (tpm_wire::read_pcrs(&mut tpm, Bank::Sha256)?, tpm::golden_pcrs(Bank::Sha256));
    for pcr in BOOTED {
        ensure!(found.get(pcr) == golden.get(pcr), "PCR {pcr} is not that of the golden boot");
    }
    Ok(())
}

fn connect(port: u16) -> Result<TcpStream> {
    let until = Instant::now() + LISTEN_MAX;
    let tpm = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(tpm) => break tpm,
            Err(e) if Instant::now() > until => return Err(e).context("swtpm does not listen"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    tpm.set_nodelay(true)?;
    tpm.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(tpm)
}
