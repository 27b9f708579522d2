//! A node that is a machine of its own: QEMU without hardware help, OVMF with Secure Boot, a software TPM behind the
//! kernel's own TPM driver, IMA by the kernel. It takes the place of a lab node: same site, name, address and TPM.

use super::image;
use crate::cell::{listen, metrics};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::process::{self, ProcessId};
use crate::state::Ready;
use crate::tool;
use crate::topology::{Kind, Member};
use ambit_model::{Refusal, refusal::Code};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Firmware and variables with Microsoft's and Debian's keys enrolled, from the package ovmf.
const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.ms.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd";
/// From power on to the console's first word; half a minute on two idle cores.
const BOOT_MAX: Duration = Duration::from_secs(240);
/// One command in the guest.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// What a command may say; a log's tail fits.
const SAID_BYTES_MAX: u64 = 4 << 20;
/// A line to the console stays well below what a terminal holds (4096 bytes).
const CHUNK_BYTES: usize = 1500;
/// Where the agent has its files in the guest: a tmpfs, which IMA does not measure.
const AGENT: &str = "/run/ambit";
/// Where the kernel shows the firmware's log and its own.
const BOOT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";
const IMA_LOG: &str = "/sys/kernel/security/ima/binary_runtime_measurements";

/// A guest that runs.
pub(super) struct Guest<'l> {
    lab: &'l Lab,
    member: Member,
    disk: PathBuf,
    console: BufReader<UnixStream>,
}

/// What a command did.
pub(super) struct Said {
    /// Its exit code.
    pub(super) code: i32,
    /// Standard output and error.
    pub(super) bytes: Vec<u8>,
}

impl Said {
    /// What it said, as text.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Ends what stands in for a node's hardware in the lab, and makes room for a guest on its link.
pub(super) fn make_room(lab: &Lab, node: &str) -> Result<(), LabError> {
    for part in ["measurer", "tpm-gate", "swtpm"] {
        end(lab, &format!("{node}-{part}"))?;
    }
    let lines = "addr flush dev eth0\nlink add br0 type bridge\nlink set eth0 master br0\n\
                 tuntap add dev tap0 mode tap\nlink set tap0 master br0\nlink set tap0 up\nlink set br0 up\n";
    let namespace = lab.place(node)?.netns;
    Ok(tool::run(lab.name(), "ip", &["-n", &namespace, "-batch", "-"], lines).map(drop)?)
}

/// Ends a kept process for good: the lab forgets it.
fn end(lab: &Lab, name: &str) -> Result<(), LabError> {
    if let Some(process) = lab.state()?.process(name) {
        process.id.kill();
    }
    Ok(lab.store.update(|state| state.processes.retain(|p| p.name != name))?)
}

impl<'l> Guest<'l> {
    /// Switches the node's machine on with this disk. Its TPM keeps its keys from one boot to the next and starts with
    /// clear PCRs, as hardware does.
    pub(super) fn boot(lab: &'l Lab, node: &str, disk: &Path) -> Result<Guest<'l>, LabError> {
        let member = lab.spec().member(node).filter(|m| matches!(m.kind, Kind::Node(_)));
        let member = member.ok_or_else(|| Refusal::new(Code::NotFound, "a node such as west-n1", node.to_owned()))?;
        let folder = lab.folder(node);
        let variables = folder.join("vars.fd");
        if !variables.exists() {
            std::fs::copy(VARIABLES, &variables).map_err(|source| io(Path::new(VARIABLES), source))?;
        }
        let place = lab.place(node)?;
        let (tpm, console) = (folder.join("vtpm.sock"), folder.join("console.sock"));
        for socket in [&tpm, &console] {
            // Left by the boot before.
            let _ = std::fs::remove_file(socket);
        }
        let state = format!("dir={}", folder.join("tpm").display());
        let control = format!("type=unixio,path={}", tpm.display());
        let argv = [
            "swtpm",
            "socket",
            "--tpm2",
            "--tpmstate",
            &state,
            "--ctrl",
            &control,
            "--flags",
            "startup-clear",
            "--terminate",
        ];
        let launch = lab.launch(&place, &argv, &folder.join("vtpm.log"));
        let vtpm = lab.start(&format!("{node}-vtpm"), Some(node), launch.clone(), Ready::Started)?;
        process::wait_ready(vtpm, &launch, Duration::from_secs(10), || tpm.exists())?;

        let argv = qemu_argv(&member, &folder, disk, &tpm, &console);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let launch = lab.launch(&place, &argv, &folder.join("qemu.log"));
        let qemu = lab.start(&format!("{node}-qemu"), Some(node), launch.clone(), Ready::Started)?;
        let mut stream = None;
        process::wait_ready(qemu, &launch, Duration::from_secs(20), || {
            stream = UnixStream::connect(&console).ok();
            stream.is_some()
        })?;
        let stream = stream.ok_or_else(|| Refusal::new(Code::Internal, "a console", "none"))?;
        let mut guest = Guest { lab, member, disk: disk.to_owned(), console: BufReader::new(stream) };
        guest.wait_up(qemu)?;
        guest.join_network()?;
        Ok(guest)
    }
    /// Switches it off, hard, and on again. The agent's own folder outlasts that as a disk would have it (the AK is in
    /// it; another AK would need `ambit node evict`); all else is as the image has it.
    pub(super) fn reboot(&mut self) -> Result<(), LabError> {
        let node = self.member.role();
        let kept = self.must_run(&format!("tar -c -C {AGENT} agent"))?.bytes;
        end(self.lab, &format!("{node}-qemu"))?;
        end(self.lab, &format!("{node}-vtpm"))?;
        *self = Guest::boot(self.lab, &node, &self.disk)?;
        self.write("/tmp/kept.tar", &kept)?;
        self.must(&format!("tar -x -C {AGENT} -f /tmp/kept.tar")).map(drop)
    }
    /// Runs a line of shell in the guest.
    pub(super) fn run(&mut self, line: &str) -> Result<Said, LabError> {
        self.patience(COMMAND_MAX)?;
        self.send(line)?;
        let mut encoded = String::new();
        loop {
            let said = self.line()?;
            if let Some(code) = said.strip_prefix("AMBIT-DONE ") {
                let code = code.parse().unwrap_or(-1);
                return Ok(Said { code, bytes: decoded(&encoded)? });
            }
            encoded.push_str(&said);
        }
    }
    /// Runs a line of shell that must succeed; returns what it said.
    pub(super) fn must(&mut self, line: &str) -> Result<String, LabError> {
        Ok(self.must_run(line)?.text())
    }
    /// Reads a file of the guest; one of the kernel's too, which tells no length beforehand.
    pub(super) fn read(&mut self, path: &str) -> Result<Vec<u8>, LabError> {
        Ok(self.must_run(&format!("cat {path}"))?.bytes)
    }
    /// Writes a file in the guest.
    pub(super) fn write(&mut self, path: &str, bytes: &[u8]) -> Result<(), LabError> {
        self.must(&format!(": > {path}"))?;
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.must(&format!("printf %s {} | xxd -r -p >> {path}", hex::encode(chunk)))?;
        }
        Ok(())
    }
    /// Starts the agent with a join token; it enrols by itself.
    pub(super) fn start_agent(&mut self, token: &str) -> Result<(), LabError> {
        let config = self.agent_config()?;
        self.write(&format!("{AGENT}/join-token"), token.as_bytes())?;
        self.write(&format!("{AGENT}/agent.toml"), config.as_bytes())?;
        let agent = format!("exec /bin/ambit-agent run --config {AGENT}/agent.toml");
        let own_cgroup = "echo $$ > /sys/fs/cgroup/agent/cgroup.procs";
        self.must(&format!("setsid sh -c '{own_cgroup}; {agent}' > {AGENT}/agent.log 2>&1 & true")).map(drop)
    }
    /// The end of the agent's log.
    pub(super) fn agent_log(&mut self) -> Result<String, LabError> {
        Ok(self.run(&format!("tail -n 30 {AGENT}/agent.log"))?.text())
    }
    /// Waits until the agent says that it is ready (`/readyz`).
    pub(super) fn wait_enrolled(&mut self, limit: Duration) -> Result<Duration, LabError> {
        let begun = Instant::now();
        loop {
            let page = self.lab.page("operator", metrics(&self.member), "/readyz");
            if page.as_ref().is_ok_and(|(status, _)| *status == 200) {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > limit {
                let said = page.map(|(status, body)| format!("{status} {body}")).unwrap_or_else(|e| e.to_string());
                let found = format!("{said}; its log ends:\n{}", self.agent_log()?);
                let expected = format!("the agent of {} ready within {} s", self.member.role(), limit.as_secs());
                return Err(Refusal::new(Code::Unavailable, expected, found).into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    /// Makes a pod as the lab does on its own nodes (`Lab::add_pod`), and tells the agent.
    pub(super) fn add_pod(&mut self, name: &str, uid: u32) -> Result<(), LabError> {
        let address = |host| self.member.pod_address(host).map(|a| a.to_string()).unwrap_or_default();
        let (gateway, own) = (address(1), address(11));
        let link = crate::net::pod_link(name);
        let pod =
            serde_json::json!({"cgroup": name, "netns": format!("/run/netns/{name}"), "address": own, "uid": uid});
        for line in [
            format!("mkdir -p /sys/fs/cgroup/mesh/{name} && /sbin/ip netns add {name}"),
            format!(
                "/sbin/ip link add {link} type veth peer name eth0 netns {name} && /sbin/ip addr add {gateway}/32 dev {link}"
            ),
            format!("/sbin/ip link set {link} up && /sbin/ip route add {own}/32 dev {link}"),
            format!(
                "/sbin/ip -n {name} link set lo up && /sbin/ip -n {name} addr add {own}/32 dev eth0 && /sbin/ip -n {name} link set eth0 up"
            ),
            format!("/sbin/ip -n {name} route add {gateway}/32 dev eth0 scope link"),
            format!("/sbin/ip -n {name} route add default via {gateway} src {own}"),
            format!("echo '{pod}' > {AGENT}/pods/.{name} && mv {AGENT}/pods/.{name} {AGENT}/pods/{name}.json"),
        ] {
            self.must(&line)?;
        }
        Ok(())
    }
    /// Runs a command in a pod: its cgroup, its namespace, its user.
    pub(super) fn run_in_pod(&mut self, name: &str, uid: u32, command: &str) -> Result<Said, LabError> {
        let enter = format!("echo $$ > /sys/fs/cgroup/mesh/{name}/cgroup.procs");
        let user = format!("/sbin/setpriv --reuid {uid} --regid {uid} --clear-groups");
        self.run(&format!("sh -c '{enter}; exec nsenter --net=/run/netns/{name} {user} {command}'"))
    }
    /// Adds a line to the measured program and runs it: the kernel measures the new content and extends PCR 10.
    pub(super) fn alter_measured_file(&mut self) -> Result<(), LabError> {
        self.must(&format!("echo 'echo altered' >> {0} && {0}", image::MEASURED)).map(drop)
    }

    /// Has every file of its image measured, as a machine that has run for long would have. Root reads are measured.
    pub(super) fn measure_image(&mut self) -> Result<(), LabError> {
        self.must("find / -xdev -type f -exec cat {} + > /dev/null").map(drop)
    }
    /// Writes what the machine measured into a folder, as `ambit attest policy learn` reads it.
    pub(super) fn evidence(&mut self, folder: &Path) -> Result<(), LabError> {
        make_folder(folder)?;
        let values =
            |bank: &str| format!("for n in $(seq 0 23); do echo $n $(cat /sys/class/tpm/tpm0/pcr-{bank}/$n); done");
        for bank in ["sha1", "sha256", "sha384"] {
            write_file(&folder.join(format!("pcrs.{bank}")), self.must(&values(bank))?.as_bytes())?;
        }
        for (name, path) in [("binary_bios_measurements", BOOT_LOG), ("ima_binary_runtime_measurements", IMA_LOG)] {
            write_file(&folder.join(name), &self.read(path)?)?;
        }
        Ok(())
    }

    fn must_run(&mut self, line: &str) -> Result<Said, LabError> {
        let said = self.run(line)?;
        if said.code == 0 {
            return Ok(said);
        }
        let (command, output) =
            (format!("in {}: {line}", self.member.role()), format!("{}: {}", said.code, said.text()));
        Err(LabError::Command { command, output })
    }

    fn agent_config(&self) -> Result<String, LabError> {
        let site = &self.member.site;
        let cell = self.lab.cell(site)?;
        let replicas = self.lab.spec().members().into_iter().filter(|m| &m.site == site);
        let replicas = replicas.filter(|m| matches!(m.kind, Kind::Replica(_)));
        let servers: Vec<String> = replicas.map(|m| format!("\"{}\"", listen(&m))).collect();
        let (servers, address) = (servers.join(", "), self.member.address());
        Ok(format!(
            "cluster = \"{site}\"\ntrust_domain = \"{site}\"\nfingerprint = \"{}\"\nservers = [{servers}]\n\
             node_address = \"{address}\"\ntcti = \"device:/dev/tpmrm0\"\nmetrics_listen = \"{}\"\n\
             hbone_listen = \"{address}:15008\"\ndata_dir = \"{AGENT}/agent\"\n\
             boot_log = \"{BOOT_LOG}\"\nima_log = \"{IMA_LOG}\"\n\
             cgroup_root = \"/sys/fs/cgroup/mesh\"\npin_dir = \"/sys/fs/bpf/ambit\"\npods_dir = \"{AGENT}/pods\"\n\
             workload_socket = \"{AGENT}/workload.sock\"\njoin_token_file = \"{AGENT}/join-token\"\n",
            cell.fingerprint,
            metrics(&self.member)
        ))
    }

    fn join_network(&mut self) -> Result<(), LabError> {
        let (address, gateway) = (self.member.address(), self.member.gateway());
        self.must(&format!("/sbin/ip addr add {address}/24 dev eth0 && /sbin/ip link set eth0 up"))?;
        self.must(&format!("/sbin/ip route add default via {gateway}"))?;
        let own = self.member.clone();
        for other in self.lab.spec().members().iter().filter(|m| m.site == own.site && **m != own) {
            if let Some(pods) = other.pod_address(0) {
                self.must(&format!("/sbin/ip route add {pods}/24 via {}", other.address()))?;
            }
        }
        Ok(())
    }

    fn wait_up(&mut self, qemu: ProcessId) -> Result<(), LabError> {
        let begun = Instant::now();
        self.patience(Duration::from_secs(1))?;
        let mut line = String::new();
        while !line.contains("AMBIT-READY") {
            // What came before a time-out stays in `line`.
            let read = self.console.read_line(&mut line);
            let late = begun.elapsed() > BOOT_MAX;
            if late || !qemu.alive() || matches!(read, Ok(0)) {
                let folder = self.lab.folder(&self.member.role());
                let found = ["qemu.log", "serial.log"].map(|log| process::log_tail(&folder.join(log))).join("\n");
                let expected = format!("{} up within {} s", self.member.role(), BOOT_MAX.as_secs());
                return Err(Refusal::new(Code::Unavailable, expected, found).into());
            }
        }
        Ok(())
    }

    fn send(&mut self, line: &str) -> Result<(), LabError> {
        let sent = self.console.get_mut().write_all(format!("{line}\n").as_bytes());
        sent.map_err(|source| self.failed(source))
    }

    fn line(&mut self) -> Result<String, LabError> {
        let mut line = String::new();
        let read = (&mut self.console).take(SAID_BYTES_MAX).read_line(&mut line);
        match read {
            Ok(0) => Err(self.failed(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn patience(&self, limit: Duration) -> Result<(), LabError> {
        self.console.get_ref().set_read_timeout(Some(limit)).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> LabError {
        io(&self.lab.folder(&self.member.role()).join("console.sock"), source)
    }
}

fn qemu_argv(member: &Member, folder: &Path, disk: &Path, tpm: &Path, console: &Path) -> Vec<String> {
    let at = |name: &str| folder.join(name).display().to_string();
    let mac = format!("52:54:00:{:02x}:00:{:02x}", member.octet, member.address().octets()[3]);
    let pairs = [
        // Without KVM: nested virtualisation is missing or broken on many machines, and a guest needs little.
        ("-machine", "q35,smm=on".to_owned()),
        ("-accel", "tcg".into()),
        ("-cpu", "max".into()),
        ("-m", "1024".into()),
        ("-smp", "1".into()),
        ("-display", "none".into()),
        // Secure Boot's variables can be written in SMM only.
        ("-global", "driver=cfi.pflash01,property=secure,value=on".into()),
        ("-drive", format!("if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE}")),
        ("-drive", format!("if=pflash,format=raw,unit=1,file={}", at("vars.fd"))),
        ("-drive", format!("if=none,id=disk,format=raw,readonly=on,file={}", disk.display())),
        ("-device", "virtio-blk-pci,drive=disk".into()),
        ("-chardev", format!("socket,id=tpm,path={}", tpm.display())),
        ("-tpmdev", "emulator,id=tpm0,chardev=tpm".into()),
        ("-device", "tpm-crb,tpmdev=tpm0".into()),
        ("-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no".into()),
        ("-device", format!("virtio-net-pci,netdev=net,romfile=,mac={mac}")),
        ("-serial", format!("file:{}", at("serial.log"))),
        ("-serial", format!("unix:{},server=on,wait=off", console.display())),
    ];
    let fixed = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned);
    fixed.into_iter().chain(pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value])).collect()
}

/// The console speaks in hexadecimal digits, so that no byte of an answer looks like its end.
fn decoded(encoded: &str) -> Result<Vec<u8>, LabError> {
    Ok(hex::decode(encoded)
        .map_err(|e| Refusal::new(Code::Internal, "hexadecimal digits from the console", e.to_string()))?)
}

fn io(path: &Path, source: std::io::Error) -> LabError {
    LabError::Io { path: PathBuf::from(path), source }
}
