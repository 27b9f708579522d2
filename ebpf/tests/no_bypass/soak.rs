//! Programs replaced and agents killed under load: no wrong verdict, no byte in clear, and how many flows it cost.

use crate::rig::{self, FAR, Rig, tables};
use crate::support::POD;
use ambit_ebpf::Kernel;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const KILLS: usize = 20;
/// Of all programs, between two kills.
const UPGRADES: usize = 5;
/// Programs on the cgroup.
const PROGRAMS: usize = 10;

const LEASE: Duration = Duration::from_secs(600);

/// Allowed and denied calls in turn, beside a flow that is kept: `right wrong refused kept lost`, when its input ends.
/// Refused is an allowed call that found no agent: not wrong, and never in clear.
const LOAD: &str = r#"
import select
right = wrong = refused = kept = lost = 0
flow = None
print('ready', flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for port in (8080, 9090):
        s = socket.socket(); s.settimeout(2)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        try:
            s.connect((FAR, port)); told = 0
            s.sendall(MARK)
        except OSError as e: told = e.errno or errno.ETIMEDOUT
        if port == 9090:
            if told == errno.EPERM: right += 1
            else: wrong += 1
        elif told == 0: right += 1
        elif told in (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE): refused += 1
        else: wrong += 1
        s.close()
    try:
        if flow is None:
            flow = socket.create_connection((FAR, 8080), 2)
        flow.sendall(MARK)
        if flow.recv(100)[:4] == MARK[:4]: kept += 1
        else: raise OSError
    except OSError:
        if flow is not None: lost += 1; flow.close()
        flow = None
print(right, wrong, refused, kept, lost, flush=True)
"#;

struct Agent(Child);

impl Agent {
    fn start(rig: &Rig) -> Self {
        let exe = std::env::current_exe().unwrap();
        let examples = exe.parent().and_then(|deps| deps.parent()).unwrap().join("examples");
        let options = rig.options();
        let netns = |pid: u32| format!("/proc/{pid}/ns/net");
        let mut child = Command::new(examples.join("stand_in"))
            .arg(&options.cgroup_root)
            .arg(&options.pin_dir)
            .arg(options.capacity.verdicts.to_string())
            .args([netns(rig.node.outside.id()), netns(rig.node.pod.id()), POD.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example `stand_in`, which cargo test builds");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }
}

impl Drop for Agent {
    /// SIGKILL.
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn under_load_swaps_and_kills_cost_flows_and_nothing_else() {
    let mut rig = Rig::new();
    let kernel = rig.open().unwrap();
    kernel.install(&tables(rig::SERVER)).unwrap();
    kernel.set_workload(rig.node.cgroup("client"), rig::CLIENT).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    let mut agent = Agent::start(&rig);
    let mark = format!("SOAK{:06}", std::process::id());
    let mut load = rig.node.worker("client", &format!("FAR, MARK = '{FAR}', b'{mark}'\n{LOAD}"));
    assert_eq!(load.answer(), "ready");
    let start = Instant::now();
    for kill in 0..KILLS {
        // An emulated machine takes a quarter of an hour for all of it.
        kernel.renew_lease(LEASE).unwrap();
        for upgrade in 0..UPGRADES {
            drop(Kernel::open(&rig.options()).unwrap());
            // The other set, and back: what is allowed is the same in both.
            kernel.install(&tables(if (kill + upgrade) % 2 == 0 { rig::SERVER } else { rig::OTHER_NUMBER })).unwrap();
        }
        std::thread::sleep(Duration::from_millis(30));
        drop(agent);
        std::thread::sleep(Duration::from_millis(30));
        agent = Agent::start(&rig);
    }
    load.ask("stop");
    let counts: Vec<u64> = load.answer().split(' ').map(|n| n.parse().unwrap()).collect();
    let [right, wrong, refused, kept, lost] = counts[..] else { panic!("{counts:?}") };
    drop((load, agent));
    let in_clear = rig.seen(&mark);
    println!(
        "{} program swaps, {} table swaps, {KILLS} kill -9 in {:.1} s: {right} right verdicts, {wrong} wrong; {in_clear} frames in clear; \
         {refused} calls found no agent; a kept flow answered {kept} times and was lost {lost} times",
        (KILLS * (UPGRADES + 1)) * PROGRAMS,
        KILLS * UPGRADES,
        start.elapsed().as_secs_f64()
    );
    assert_eq!((wrong, in_clear), (0, 0));
    assert!(right > 500 && kept > 100, "too little load to tell");
    // The one that it carried, and at most one more that was waiting for it to accept.
    assert!((1..=2 * KILLS as u64).contains(&lost), "a death of an agent ends the flows that it carried: {lost}");
}
