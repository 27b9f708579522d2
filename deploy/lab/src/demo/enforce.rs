//! Workloads: identities, one call allowed, one denied, nothing readable on the wire, and a policy change on its way.

use super::Demo;
use super::enrol::wait;
use crate::chaos::calls::{Calls, epoch_ms};
use crate::lab::{LabError, Place, make_folder, write_file};
use crate::state::{Pod, Ready};
use ambit_model::{Refusal, refusal::Code};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// What the database answers; it must not be seen on the wire.
pub(crate) const SECRET: &str = "AMBIT-DEMO-SECRET-4711";
/// Commands of a moment, on two loaded cores.
const COMMAND_MAX: Duration = Duration::from_secs(20);
/// A slice, a certificate and a record of a peer each take well under a second.
const SETTLE_MAX: Duration = Duration::from_secs(20);
pub(crate) const PORT: u16 = 8080;
const SHOP: &str = "10.96.0.10:8080";

const WEST_DOCUMENTS: &str = "
kind: Policy
metadata: {name: web-to-db}
spec: {target: spiffe://west/db, action: allow, from: [spiffe://east/web], ports: [8080]}
---
kind: Policy
metadata: {name: web-to-shop}
spec: {target: spiffe://west/shop, action: allow, from: [spiffe://east/web], ports: [8080]}
---
kind: Service
metadata: {name: shop}
spec: {address: 10.96.0.10, port: 8080, backends: [spiffe://west/shop, spiffe://east/shop], order: first-backend}
";
const EAST_DOCUMENTS: &str = "
kind: Policy
metadata: {name: web-to-shop}
spec: {target: spiffe://east/shop, action: allow, from: [spiffe://east/web], ports: [8080]}
";
const WEST_CUT: &str = "
kind: Policy
metadata: {name: freeze-db}
spec: {target: spiffe://west/db, action: deny, from: [spiffe://east/web]}
";

impl Demo<'_> {
    pub(crate) fn start_workloads(&mut self) -> Result<(), LabError> {
        self.say.chapter("Workloads: unmodified programs (python3, curl) in pods behind their nodes");
        let all = [
            ("west", "west-n1", "db", SECRET),
            ("west", "west-n2", "shop", "west"),
            ("east", "east-n1", "web", ""),
            ("east", "east-n1", "other", ""),
            ("east", "east-n2", "shop", "east"),
        ];
        for (site, node, name, page) in all {
            let id = format!("spiffe://{site}/{name}");
            let selector = format!("cgroup:{name}");
            self.lab.ambit(
                site,
                &["entry", "create", "--id", name, "--spiffe-id", &id, "--cluster", site, "--selector", &selector],
            )?;
            let pod = self.lab.add_pod(node, name, crate::workload::UID)?;
            if !page.is_empty() {
                self.serve(&pod, page)?;
            }
            self.say.step(&format!("{id} at {} on {node}", pod.address));
        }
        self.apply("west", "policies", WEST_DOCUMENTS)?;
        self.apply("east", "policies", EAST_DOCUMENTS)?;
        let web = self.pod("east-n1", "web")?;
        let db = format!("http://{}:{PORT}/", self.pod("west-n1", "db")?.address);
        let took = wait(SETTLE_MAX, "the first call from east/web to west/db", || Ok(self.curl(&web, &db)?.0 == 0))?;
        self.say.good(&format!("first cross-cluster call {:.1} s after the last policy", took.as_secs_f32()));
        Ok(())
    }

    pub(super) fn check_svids(&mut self) -> Result<(), LabError> {
        self.say.chapter("SVIDs: fetched over the SPIFFE Workload API, judged by OpenSSL");
        for (node, name, cell) in [("west-n1", "db", &self.west), ("east-n1", "web", &self.east)] {
            let pod = self.pod(node, name)?;
            let out = self.lab.folder(node).join(format!("svid-{name}"));
            make_folder(&out)?;
            let agent = crate::preflight::own_binary("ambit-agent")?.display().to_string();
            let (socket, folder) = (self.lab.workload_socket(node).display().to_string(), out.display().to_string());
            // As root of the pod's cgroup: the program may lie where the pod's user cannot read; cgroup selects.
            let place = Place { uid: None, ..pod.place() };
            self.lab.must_run_in(&place, &[&agent, "fetch", "--socket", &socket, "--out", &folder], COMMAND_MAX)?;
            let (root, svid) = (cell.root().display().to_string(), out.join("svid.pem").display().to_string());
            let operator = self.lab.operator();
            let verify = ["openssl", "verify", "-x509_strict", "-CAfile", &root, "-untrusted", &svid, &svid];
            let verdict = self.lab.must_run_in(&operator, &verify, COMMAND_MAX)?;
            let show = ["openssl", "x509", "-in", &svid, "-noout", "-ext", "subjectAltName", "-enddate"];
            self.say.quote(&self.lab.must_run_in(&operator, &show, COMMAND_MAX)?);
            self.say.good(&format!("openssl verify: {}", verdict.trim().rsplit('/').next().unwrap_or_default()));
        }
        Ok(())
    }

    pub(super) fn allow_and_deny(&mut self) -> Result<(), LabError> {
        self.say.chapter("One call allowed, one denied, and the wire in between");
        let (web, other, db) = (self.pod("east-n1", "web")?, self.pod("east-n1", "other")?, self.pod("west-n1", "db")?);
        let url = format!("http://{}:{PORT}/", db.address);
        let capture = self.capture()?;
        let (code, body) = self.curl(&web, &url)?;
        expect(code == 0 && body.contains(SECRET), "east/web reads west/db", &format!("curl {code}: {body}"))?;
        self.say.good(&format!("east/web -> west/db: 200, \"{}\"", body.trim()));
        let begun = Instant::now();
        let (code, body) = self.curl(&other, &url)?;
        // 7: could not connect. EPERM comes at once; a dropped packet would cost seconds.
        expect(code == 7, "east/other refused by connect()", &format!("curl {code}: {body}"))?;
        let ms = begun.elapsed().as_millis();
        self.say.good(&format!("east/other -> west/db: connect() refused by the kernel, curl ended after {ms} ms"));
        self.say.quote(&self.lab.ambit("west", &["explain", "spiffe://east/other", "spiffe://west/db:8080"])?);
        let (code, _) = self.curl_from("west-n2", &url)?;
        expect(code == 7, "plain inbound to west/db refused", &format!("curl {code}"))?;
        self.say.good("west-n2 -> west/db in clear text, past the mesh: refused at the workload");
        self.clear_control()?;
        self.judge(capture)
    }

    /// A call in clear text over west's link, which a capture there must show.
    pub(crate) fn clear_control(&self) -> Result<(), LabError> {
        let control = format!("http://{}/healthz", crate::cell::metrics(&self.member("west-n1")?));
        self.curl_from("east-n2", &control).map(drop)
    }

    /// A capture on west's link: the control shows that it sees plaintext where there is some.
    pub(crate) fn judge(&self, capture: (Child, PathBuf)) -> Result<(), LabError> {
        let in_clear = self.on_the_wire(capture)?;
        expect(in_clear == 0, "no plaintext of the call on the link", &format!("{in_clear} bytes"))
    }

    /// How many bytes of what is secret a capture on west's link shows.
    pub(crate) fn on_the_wire(&self, (capture, path): (Child, PathBuf)) -> Result<usize, LabError> {
        std::thread::sleep(Duration::from_millis(500));
        end(capture);
        let bytes = std::fs::read(&path).map_err(|source| LabError::Io { path: path.clone(), source })?;
        let count = |needle: &[u8]| bytes.windows(needle.len()).filter(|w| *w == needle).count();
        let argv = ["tcpdump", "-nn", "-r", &path.display().to_string(), "tcp port 15008"];
        let tunnelled = self.lab.must_run_in(&self.lab.operator(), &argv, COMMAND_MAX)?.lines().count();
        let (secrets, control) = (count(SECRET.as_bytes()), count(b"GET /healthz"));
        expect(control > 0, "the capture sees a clear-text control call", "none")?;
        expect(tunnelled > 0, "tunnel packets on the link", "none")?;
        self.say.good(&format!(
            "capture on west's link: {tunnelled} tunnel packets, plaintext of the call {secrets} times, of a clear control {control}"
        ));
        Ok(secrets * SECRET.len())
    }

    pub(super) fn change_policy(&mut self) -> Result<(), LabError> {
        self.say.chapter("A policy changed in west, enforced by east's kernel");
        let db = SocketAddr::from((self.pod("west-n1", "db")?.address, PORT));
        let calls = Calls::start(&self.lab, "east-n1-web", db, Duration::from_millis(5))?;
        calls.flow(0.0, SETTLE_MAX, "calls that succeed before the change")?;
        let begun = epoch_ms();
        self.apply("west", "freeze", WEST_CUT)?;
        let refused = || calls.between(begun, f64::INFINITY).iter().find(|c| !c.ok).map(|c| c.t_ms);
        wait(SETTLE_MAX, "calls refused after the change", || Ok(refused().is_some()))?;
        let at = refused().unwrap_or(f64::INFINITY);
        drop(calls);
        self.figures.put("policy change -> enforced in the other cluster", at - begun, "ms", Some(500.0));
        self.say
            .good(&format!("denied {:.0} ms after `ambit policy apply` was started in the other cluster", at - begun));
        self.lab.ambit("west", &["policy", "delete", "freeze-db"])?;
        let (web, url) = (self.pod("east-n1", "web")?, format!("http://{db}/"));
        wait(SETTLE_MAX, "calls allowed again", || Ok(self.curl(&web, &url)?.0 == 0))?;
        self.say.good("allowed again after the policy was deleted");
        let (code, body) = self.curl(&web, &format!("http://{SHOP}/"))?;
        expect(code == 0, "a call to the service", &format!("curl {code}"))?;
        self.say.good(&format!("service {SHOP} answers from {}", body.trim()));
        Ok(())
    }

    /// That policy once more, before it is made this time.
    pub(super) fn plan_on_what_was_seen(&mut self) -> Result<(), LabError> {
        self.say.chapter("What a policy would break, told before it is made");
        let file = self.document("west", "freeze").display().to_string();
        let plan = || self.lab.ambit("west", &["policy", "plan", "-f", &file]);
        let broken = "spiffe://east/web  spiffe://west/db  8080  denied";
        // Nodes tell every ten seconds who called whom.
        wait(SETTLE_MAX, "a plan with a flow that was seen", || Ok(plan()?.contains(broken)))?;
        self.say.quote(&plan()?);
        // What a kernel refuses, its node tells as well. (What it had seen before it was booted again may not have been told.)
        let (other, db) = (self.pod("east-n1", "other")?, self.pod("west-n1", "db")?.address);
        let (code, _) = self.curl(&other, &format!("http://{db}:{PORT}/"))?;
        expect(code == 7, "east/other refused by connect()", &format!("curl {code}"))?;
        let seen = || self.lab.ambit("east", &["policy", "flows"]);
        let refused = ["spiffe://east/other", "spiffe://west/db", "8080", "denied"];
        let is_refused = |line: &str| line.split_whitespace().take(4).eq(refused);
        wait(SETTLE_MAX, "a flow that was refused", || Ok(seen()?.lines().any(is_refused)))?;
        self.say.step("and who called whom, as east's nodes saw it (`ambit policy flows`):");
        self.say.quote(&seen()?);
        Ok(())
    }

    /// Python's own web server, with one page. Its listening queue of five would overflow whenever two busy cores keep it
    /// waiting for 30 ms; the kernel then drops the SYN, and a call fails a second later, mesh or no mesh.
    pub(crate) fn serve(&self, pod: &Pod, page: &str) -> Result<(), LabError> {
        let folder = self.lab.folder(&pod.node).join(format!("www-{}", pod.name));
        make_folder(&folder)?;
        write_file(&folder.join("index.html"), format!("{page}\n").as_bytes())?;
        open_to_all(&folder.join("index.html"))?;
        let (address, folder, port) = (pod.address.to_string(), folder.display().to_string(), PORT.to_string());
        const SERVER: &str = "import runpy, socketserver; socketserver.TCPServer.request_queue_size = 1024; \
                              runpy.run_module('http.server', run_name='__main__', alter_sys=True)";
        let argv = ["python3", "-c", SERVER, &port, "--bind", &address, "--directory", &folder];
        self.lab.start_in_pod(pod, &argv, Ready::Listening(SocketAddr::from((pod.address, PORT)))).map(drop)
    }

    pub(crate) fn apply(&self, site: &str, name: &str, documents: &str) -> Result<String, LabError> {
        let path = self.document(site, name);
        write_file(&path, documents.as_bytes())?;
        self.lab.ambit(site, &["policy", "apply", "-f", &path.display().to_string()])
    }

    fn document(&self, site: &str, name: &str) -> std::path::PathBuf {
        self.lab.folder("operator").join(format!("{site}-{name}.yaml"))
    }

    pub(crate) fn pod(&self, node: &str, name: &str) -> Result<Pod, LabError> {
        let found = self.lab.state()?.pods.into_iter().find(|p| p.node == node && p.name == name);
        found.ok_or_else(|| Refusal::new(Code::NotFound, format!("pod {name} on {node}"), "none").into())
    }

    fn member(&self, role: &str) -> Result<crate::topology::Member, LabError> {
        let found = self.lab.spec().member(role);
        found.ok_or_else(|| Refusal::new(Code::NotFound, "a member", role.to_owned()).into())
    }

    /// curl's exit code and what it read.
    pub(crate) fn call(&self, pod: &Pod, url: &str) -> Result<(i32, String), LabError> {
        self.curl(pod, url)
    }
    fn curl(&self, pod: &Pod, url: &str) -> Result<(i32, String), LabError> {
        self.curl_in(&pod.place(), url)
    }
    fn curl_from(&self, role: &str, url: &str) -> Result<(i32, String), LabError> {
        self.curl_in(&self.lab.place(role)?, url)
    }
    fn curl_in(&self, place: &Place, url: &str) -> Result<(i32, String), LabError> {
        let output = self.lab.run_in(place, &["curl", "-sS", "--max-time", "5", url], COMMAND_MAX)?;
        Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    pub(crate) fn capture(&self) -> Result<(Child, PathBuf), LabError> {
        let path = self.lab.folder("operator").join("west-link.pcap");
        let place = self.lab.place("router")?;
        let argv = [
            "tcpdump",
            "--immediate-mode",
            "-U",
            "-Z",
            "root",
            "-i",
            "west",
            "-s",
            "0",
            "-w",
            &path.display().to_string(),
        ];
        let launch = self.lab.launch(&place, &argv, &self.lab.folder("operator").join("tcpdump.log"));
        let mut command = crate::process::command(self.lab.name(), &launch)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| LabError::Io { path: "tcpdump".into(), source })?;
        wait(Duration::from_secs(5), "the capture", || Ok(path.exists()))?;
        std::thread::sleep(Duration::from_millis(300));
        Ok((child, path))
    }
}

fn end(mut child: Child) {
    // Ours, by its handle; already ended is as good.
    let _ = child.kill();
    let _ = child.wait();
}

fn open_to_all(path: &std::path::Path) -> Result<(), LabError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
        .map_err(|source| LabError::Io { path: path.to_owned(), source })
}

pub(super) fn expect(holds: bool, what: &str, found: &str) -> Result<(), LabError> {
    if holds { Ok(()) } else { Err(Refusal::new(Code::Internal, what.to_owned(), found.to_owned()).into()) }
}
