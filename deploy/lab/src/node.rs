//! Starts node agents: renders their configuration, gets a join token, waits for what they report.

use crate::cell::{listen, metrics, quoted};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::preflight::own_binary;
use crate::state::{Process, Ready};
use crate::topology::{Kind, Member};
use crate::{gate, net, process};
use ambit_model::{Refusal, refusal::Code};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Port of tunnels between nodes.
const HBONE_PORT: u16 = 15008;
/// How long an agent that ends lets connections end, seconds: a lab is in a hurry.
pub(crate) const DRAIN_S: u64 = 5;
/// One request for a page of an agent; a page of metrics is some kilobytes.
const PAGE_MAX: Duration = Duration::from_secs(2);
/// The most that is read of a page.
const PAGE_BYTES_MAX: u64 = 4 << 20;

impl Lab {
    /// Gives a node a fresh join token and starts its agent. Ready means that it runs, not that it is enrolled: see
    /// [`Lab::wait_enrolled`].
    pub fn start_agent(&self, node: &str) -> Result<(), LabError> {
        let member = self.node(node)?;
        let token = self.ambit(&member.site, &["node", "token", "--cluster", &member.site])?;
        self.start_agent_with(node, Some(token.trim()))
    }
    /// Starts a node's agent with this join token, or with none.
    pub fn start_agent_with(&self, node: &str, token: Option<&str>) -> Result<(), LabError> {
        let member = self.node(node)?;
        let folder = self.folder(node);
        make_folder(&folder.join("agent"))?;
        make_folder(&self.pods_folder(node))?;
        let token = token.map(|token| {
            let path = folder.join("agent").join("join-token");
            write_file(&path, token.as_bytes()).map(|()| path)
        });
        let token = token.transpose()?;
        let config = folder.join("agent.toml");
        write_file(&config, self.agent_config(&member, token.as_deref())?.as_bytes())?;
        let program = own_binary("ambit-agent")?.display().to_string();
        let config = config.display().to_string();
        let argv = [program.as_str(), "run", "--config", config.as_str()];
        let mut place = self.place(node)?;
        place.cgroup = self.cgroup(node, "agent");
        let launch = self.launch(&place, &argv, &self.agent_log(node));
        self.start(&format!("{node}-agent"), Some(node), launch, Ready::Listening(metrics(&member))).map(drop)
    }
    /// Starts a new agent of a node, which takes over from the one that runs, and waits until that one has drained.
    pub fn upgrade_agent(&self, node: &str, limit: Duration) -> Result<(), LabError> {
        let name = format!("{node}-agent");
        let missing = || Refusal::new(Code::NotFound, "an agent that runs", name.clone());
        let former = self.state()?.process(&name).cloned().filter(|p| p.id.alive()).ok_or_else(missing)?;
        let mut launch = former.launch.clone();
        if !launch.argv.iter().any(|arg| arg == "--take-over") {
            launch.argv.push("--take-over".into());
        }
        let id = process::spawn(self.name(), &launch)?;
        let taken = process::wait_ready(id, &launch, limit, || !former.id.alive());
        if taken.is_err() {
            let _ = id.kill();
        }
        taken?;
        self.store.update(|state| state.record(Process { id, launch, ..former }))?;
        Ok(())
    }
    /// The log of a node's agent.
    pub fn agent_log(&self, node: &str) -> PathBuf {
        self.folder(node).join("agent.log")
    }
    /// The socket of a node's Workload API.
    pub fn workload_socket(&self, node: &str) -> PathBuf {
        self.folder(node).join("workload.sock")
    }
    /// Waits until a node's agent says that it is ready (`/readyz`): enrolled, with its slice in the kernel.
    pub fn wait_enrolled(&self, node: &str, limit: Duration) -> Result<Duration, LabError> {
        let member = self.node(node)?;
        let start = Instant::now();
        loop {
            let page = self.page(node, metrics(&member), "/readyz");
            if page.as_ref().is_ok_and(|(status, _)| *status == 200) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > limit {
                let said = page.map(|(status, body)| format!("{status} {body}")).unwrap_or_else(|e| e.to_string());
                let log = process::log_tail(&self.agent_log(node));
                let expected = format!("the agent of {node} ready within {} s", limit.as_secs());
                return Err(Refusal::new(Code::Unavailable, expected, format!("{said}; its log ends:\n{log}")).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    /// Fetches a page over plain HTTP from inside a role's namespace: status and body.
    pub fn page(&self, role: &str, address: SocketAddr, path: &str) -> Result<(u16, String), LabError> {
        let failed = |e: std::io::Error| {
            LabError::from(Refusal::new(Code::Unavailable, format!("http://{address}{path}"), e.to_string()))
        };
        net::inside(&self.place(role)?.netns, || get(address, path))?.map_err(failed)
    }

    pub(crate) fn node(&self, node: &str) -> Result<Member, LabError> {
        let member = self.spec().member(node).filter(|m| matches!(m.kind, Kind::Node(_)));
        member.ok_or_else(|| Refusal::new(Code::NotFound, "a node such as west-n1", node.to_owned()).into())
    }

    fn agent_config(&self, member: &Member, token: Option<&Path>) -> Result<String, LabError> {
        let (role, site) = (member.role(), &member.site);
        let cell = self.cell(site)?;
        let replicas = self.spec().members().into_iter().filter(|m| &m.site == site);
        let replicas = replicas.filter(|m| matches!(m.kind, Kind::Replica(_)));
        let servers: Vec<String> = replicas.map(|m| format!("\"{}\"", listen(&m))).collect();
        let (servers, address, port) = (servers.join(", "), member.address(), gate::PORT);
        let mut text = format!(
            "cluster = \"{site}\"\ntrust_domain = \"{site}\"\nfingerprint = \"{}\"\nservers = [{servers}]\n\
             node_address = \"{address}\"\ntcti = \"swtpm:host=127.0.0.1,port={port}\"\n\
             metrics_listen = \"{}\"\nhbone_listen = \"{address}:{HBONE_PORT}\"\ndrain_max_s = {DRAIN_S}\n",
            cell.fingerprint,
            metrics(member)
        );
        // One of each pair has its own key in its TPM.
        if let Kind::Node(2) = member.kind {
            text.push_str("node_key = \"tpm\"\n");
        }
        let paths = [
            ("data_dir", self.folder(&role).join("agent")),
            ("boot_log", self.boot_log(&role)),
            ("ima_log", self.ima_log(&role)),
            ("cgroup_root", self.cgroup(&role, "mesh")),
            ("pin_dir", self.pins(&role)),
            ("pods_dir", self.pods_folder(&role)),
            ("workload_socket", self.workload_socket(&role)),
        ];
        for (key, path) in paths.iter().map(|(k, p)| (*k, p.as_path())).chain(token.map(|t| ("join_token_file", t))) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key} = {}", quoted(path));
        }
        Ok(text)
    }
}

fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, PAGE_MAX)?;
    stream.set_read_timeout(Some(PAGE_MAX))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(PAGE_BYTES_MAX).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "no HTTP answer"))?;
    Ok((status, body.to_owned()))
}
