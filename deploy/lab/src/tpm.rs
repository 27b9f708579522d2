//! The lab's TPMs: a manufacturer, one swtpm per machine, and the state of a real measured boot in its PCRs.

use crate::boot_log::{self, BootLogError};
use crate::gate;
use crate::ima::{self, Digests, ImaError};
use crate::net::{self, NetError};
use crate::process::{self, Launch, ProcessError};
use crate::tpm_wire::{self, Bank, TpmError};
use sha2::{Digest, Sha256};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Boot log of the golden boot: Debian 12 under OVMF with Secure Boot.
pub const BOOT_LOG: &[u8] = include_bytes!("../golden/binary_bios_measurements");
/// IMA log of the golden boot.
pub const IMA_LOG: &[u8] = include_bytes!("../golden/ima_binary_runtime_measurements");
/// How long a TPM may take to be made: creating the CA and an RSA-2048 EK, on a loaded machine.
const SETUP_MAX: Duration = Duration::from_secs(60);
/// How long a started swtpm may take to listen.
const LISTEN_MAX: Duration = Duration::from_secs(10);
/// How long one command may take; extends take microseconds.
const COMMAND_MAX: Duration = Duration::from_secs(10);

/// What can go wrong with a TPM.
#[derive(Debug, thiserror::Error)]
pub enum TpmStateError {
    /// A file of it.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// swtpm_setup did not run.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// swtpm_setup failed.
    #[error("swtpm_setup failed: {0}")]
    Setup(String),
    /// Its namespace.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Nothing listens.
    #[error("the swtpm does not listen")]
    Silent(#[source] std::io::Error),
    /// It answered wrongly.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The boot log.
    #[error(transparent)]
    BootLog(#[from] BootLogError),
    /// The IMA log.
    #[error(transparent)]
    Ima(#[from] ImaError),
    /// The PCRs are not what the logs lead to.
    #[error("PCR {pcr} (sha256) is {found}, but the logs lead to {expected}; was the TPM extended already?")]
    Pcr {
        /// The PCR.
        pcr: usize,
        /// Replay of the logs.
        expected: String,
        /// Value in the TPM.
        found: String,
    },
}

/// The files of the recorded machine that a policy of the lab is learnt from.
pub const REFERENCE: [(&str, &[u8]); 3] = [
    ("binary_bios_measurements", BOOT_LOG),
    ("ima_binary_runtime_measurements", IMA_LOG),
    ("pcrs.sha256", include_bytes!("../golden/pcrs.sha256")),
];

/// The lab's TPM manufacturer: a root and an issuing CA in a private folder. Its class is `lab`, never hardware.
#[derive(Clone, Debug)]
pub struct Manufacturer {
    folder: PathBuf,
}

impl Manufacturer {
    /// The manufacturer in `folder`; [`Manufacturer::prepare`] writes its configuration.
    pub fn new(folder: PathBuf) -> Manufacturer {
        Manufacturer { folder }
    }
    /// Writes the configuration; the first TPM made creates the CA's keys.
    pub fn prepare(&self) -> Result<(), TpmStateError> {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let local_ca = format!(
            "statedir = {}\nsigningkey = {}\nissuercert = {}\ncertserial = {}\n",
            self.folder.display(),
            at("signkey.pem"),
            at("issuercert.pem"),
            at("certserial")
        );
        let options = "--platform-manufacturer Ambit\n--platform-version 1.0\n--platform-model Lab\n".to_owned();
        let tool = crate::preflight::find("swtpm_localca").unwrap_or_else(|| "swtpm_localca".into());
        let setup = format!(
            "create_certs_tool = {}\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\n\
             active_pcr_banks = sha1,sha256,sha384\n",
            tool.display(),
            at("localca.conf"),
            at("localca.options")
        );
        make_folder(&self.folder)?;
        for (name, text) in [("localca.conf", local_ca), ("localca.options", options), ("setup.conf", setup)] {
            write(&self.folder.join(name), text.as_bytes())?;
        }
        Ok(())
    }
    /// Certificates that endorse the EKs: the root and the issuing CA, as a cluster's EK roots need them.
    pub fn certificates(&self) -> [PathBuf; 2] {
        [self.folder.join("swtpm-localca-rootca-cert.pem"), self.folder.join("issuercert.pem")]
    }
    /// Makes a TPM: seeds, EKs, their certificates, three banks.
    pub fn make(&self, lab: &str, cgroup: &Path, name: &str, state: &Path) -> Result<(), TpmStateError> {
        make_folder(state)?;
        let config = self.folder.join("setup.conf").display().to_string();
        let state = format!("dir://{}", state.display());
        let argv = [
            "swtpm_setup",
            "--tpm2",
            "--tpm-state",
            &state,
            "--config",
            &config,
            "--create-ek-cert",
            "--create-platform-cert",
            "--lock-nvram",
            "--vmid",
            name,
            "--pcr-banks",
            "sha1,sha256,sha384",
            "--overwrite",
        ];
        let launch = Launch {
            argv: argv.map(str::to_owned).to_vec(),
            env: Vec::new(),
            netns: None,
            cgroup: Some(cgroup.to_owned()),
            uid: None,
            log: PathBuf::from("/dev/null"),
        };
        let output = process::run(lab, &launch, SETUP_MAX)?;
        if output.status.success() {
            return Ok(());
        }
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let from = text.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
        Err(TpmStateError::Setup(text.get(from..).unwrap_or_default().to_owned()))
    }
}

/// The arguments of a machine's swtpm.
pub fn swtpm_argv(state: &Path) -> Vec<String> {
    let port = gate::SWTPM_PORT;
    let server = format!("type=tcp,port={port},bindaddr=127.0.0.1");
    let state = format!("dir={}", state.display());
    let argv = [
        "swtpm",
        "socket",
        "--tpm2",
        "--tpmstate",
        &state,
        "--server",
        &server,
        "--flags",
        "not-need-init,startup-clear",
    ];
    argv.map(str::to_owned).to_vec()
}

/// Writes the golden boot's logs as a machine's own.
pub fn write_golden_logs(boot_log: &Path, ima_log: &Path) -> Result<(), TpmStateError> {
    write(boot_log, BOOT_LOG)?;
    write(ima_log, IMA_LOG)
}

/// Extends a freshly started swtpm with all that these logs tell, and checks that it arrived. One connection for all:
/// nobody else gets a turn before the machine has booted. Returns the sha256 PCRs.
pub fn boot(namespace: &str, boot_log: &Path, ima_log: &Path) -> Result<Vec<Vec<u8>>, TpmStateError> {
    let extends = extends(&read(boot_log)?, &read(ima_log)?)?;
    let pcrs = net::inside(namespace, || -> Result<_, TpmStateError> {
        let mut tpm = connect_swtpm().map_err(TpmStateError::Silent)?;
        for (pcr, digests) in &extends {
            tpm_wire::extend(&mut tpm, *pcr, digests)?;
        }
        tpm_wire::limit_guesses(&mut tpm)?;
        Ok(tpm_wire::read_pcrs(&mut tpm, Bank::Sha256)?)
    })??;
    check(&extends, &pcrs)?;
    Ok(pcrs)
}

/// The PCRs of a machine's TPM, read through its gate.
pub fn read_pcrs(namespace: &str, bank: Bank) -> Result<Vec<Vec<u8>>, TpmStateError> {
    net::inside(namespace, || {
        let mut tpm = TcpStream::connect(gate::loopback(gate::PORT)).map_err(TpmStateError::Silent)?;
        Ok(tpm_wire::read_pcrs(&mut tpm, bank)?)
    })?
}

/// Frees what a client that was killed left loaded, as the kernel's resource manager would have.
pub fn flush(namespace: &str) -> Result<usize, TpmStateError> {
    net::inside(namespace, || {
        let mut tpm = TcpStream::connect(gate::loopback(gate::PORT)).map_err(TpmStateError::Silent)?;
        Ok(tpm_wire::flush_all(&mut tpm)?)
    })?
}

/// The PCRs of the golden boot, as its kernel showed them.
pub fn golden_pcrs(bank: Bank) -> Vec<Vec<u8>> {
    let text = match bank {
        Bank::Sha1 => include_str!("../golden/pcrs.sha1"),
        Bank::Sha256 => include_str!("../golden/pcrs.sha256"),
        Bank::Sha384 => include_str!("../golden/pcrs.sha384"),
    };
    text.lines().filter_map(|line| hex::decode(line.split_once(' ')?.1).ok()).collect()
}

fn extends(boot_log: &[u8], ima_log: &[u8]) -> Result<Vec<(u32, Digests)>, TpmStateError> {
    let boot = boot_log::parse(boot_log)?.into_iter().map(|event| (event.pcr, event.digests));
    let ima = ima::parse(ima_log)?;
    Ok(boot.chain(ima.iter().map(|record| (record.pcr, record.digests()))).collect())
}

fn check(extends: &[(u32, Digests)], pcrs: &[Vec<u8>]) -> Result<(), TpmStateError> {
    for (pcr, found) in pcrs.iter().enumerate() {
        let mut events = extends.iter().filter(|(to, _)| usize::try_from(*to) == Ok(pcr)).peekable();
        if events.peek().is_none() {
            continue;
        }
        let expected: [u8; 32] = events.fold([0; 32], |value, (_, digests)| {
            Sha256::new().chain_update(value).chain_update(digests.sha256).finalize().into()
        });
        if found != &expected {
            return Err(TpmStateError::Pcr { pcr, expected: hex::encode(expected), found: hex::encode(found) });
        }
    }
    Ok(())
}

fn connect_swtpm() -> std::io::Result<TcpStream> {
    let deadline = Instant::now() + LISTEN_MAX;
    loop {
        match TcpStream::connect(gate::loopback(gate::SWTPM_PORT)) {
            Ok(tpm) => {
                tpm.set_nodelay(true)?;
                tpm.set_read_timeout(Some(COMMAND_MAX))?;
                return Ok(tpm);
            }
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn make_folder(path: &Path) -> Result<(), TpmStateError> {
    std::fs::create_dir_all(path).map_err(|source| TpmStateError::Io { path: path.into(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), TpmStateError> {
    std::fs::write(path, bytes).map_err(|source| TpmStateError::Io { path: path.into(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, TpmStateError> {
    std::fs::read(path).map_err(|source| TpmStateError::Io { path: path.into(), source })
}
