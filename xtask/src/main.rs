//! The project's chores: `cargo xtask <verb>`.
//!
//! It only starts other programs (apt-get, cargo, ambit-lab) and sums up what they say. It never downloads anything
//! but Debian packages by name, Python packages by hash and, for `deny`, cargo-deny from the registry; it has no
//! dependencies, so that it builds in a second.
#![forbid(unsafe_code)]

mod cargo;
mod counts;
mod deny;
mod deps;
mod fuzz;
mod interop;
mod kernels;
mod lab;
mod mutants;
mod sim;
mod table;
mod test;
mod unbuilt;
mod vm;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <verb>

  deps                  install the Debian packages that building and testing need, saying which and why; and the
                        Python environment of the interoperability tests
  demo [--json FILE] [--keep] [--logs FOLDER]
                        two attested clusters on this machine, the whole way through (root; Linux namespaces)
  test                  format, lints, every test of the workspace; last line: N passed, N failed, N skipped
  lab up|down|status    the one-machine lab that demo uses, to explore by hand (root)
  chaos --smoke | --node [--brief] | --outage MINUTES | --kills N [--seed S] [--minutes M]
                        kill each process of a lab in turn; or tables swapped, agents killed and upgraded under load; or
                        no node hears its cell for a while; or N kills of replicas and other faults at random, every
                        history checked; last line: N lost, N duplicated, N non-linearizable
  drills [NAME..]       the drills of deploy/drills, or these, in a lab; last line: N drills, N passed (root; 6 minutes)
  vm                    a node as a machine of its own, with Secure Boot, a TPM driver and IMA (root; QEMU; 2 minutes)
  kernels [6.1|6.12]    the kernel side's tests on Debian's other kernels (root; QEMU without KVM; minutes each)
  sim --seeds N | --seed S | --mutants   cells of the real code under simulated faults (--from S, --seconds T); replay one
                        seed with a trace; find planted faults. Last line: N seeds, M violations (N mutants, M caught)
  bench memory          resident memory of idle release processes; last line: N figures, M met
  bench streams         1,000 streams of the Workload API at one agent: its memory, and how soon a change is told to all
  bench policy          a decision in user space at 10 to 100,000 policies, compiled and by walking over them (release)
  bench audit           what the audit log costs an issued leaf: CPU time and bytes, with it and without it in turn (release)
  bench revoke          from a ban to the other cluster's kernel, 50 times; last line: N figures, M met
  bench deny            from the denial of an identity to the end of its live connections and refusals on every node, 50 times
  bench dataplane       what carrying traffic costs, beside no carrier and two bare relays, in turn (3 minutes)
  bench failover        the loss of a leader 50 times, and of a whole cluster 30 times, as distributions (release; 20 minutes)
  bench attest          CPU time of enrolments and rounds, and of 10,000 nodes that attest (release; 6 minutes)
  bench propagation [NODES]  from a change of a policy to the last of 1,000 acknowledging streams, or of so many; 100,000
                        entries, 10,000 policies (release; 2 minutes, of 10,000 streams 3)
  bench raft            a cell of three replicas beside etcd of Debian, in turn: writes, reads, failover, restart, memory
                        (release; 6 minutes)
  bench issuance        certificates from a cell of three replicas beside cfssl of Debian, in turn (release; 4 minutes)
  bench kernel          a decision in the kernel, alone and in connect(), from 1 to 131,072 entries (release; a minute)
  build-bpf [--check]   compile the kernel programs again; --check compares with the committed objects
  mutants [PART]        break each check of attestation in a copy; last line: N checks, N proven
  fuzz --seconds N [--target NAME] [--merge]
                        parsers of attestation and policies under libFuzzer, N seconds in all; last line: N executions, N crashes
  deny                  licences, bans and sources of all dependencies (cargo-deny)

not built yet; these say so, prove nothing and therefore end with 1:
  bench NAME            (any other name) last line: 0 figures, 0 met

Ends with 0 only where all holds, with 1 where something failed or nothing was proven, with 2 on wrong usage.";

/// Why a verb did not end well.
enum Stop {
    /// The arguments make no sense: what is wrong with them.
    Usage(String),
    /// Something was done and failed, or nothing was proven: what to tell, if it was not told yet.
    Failed(String),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Failed(why)) => {
            if !why.is_empty() {
                eprintln!("xtask: {why}");
            }
            ExitCode::from(1)
        }
        Err(Stop::Usage(why)) => {
            eprintln!("xtask: {why}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &[&str]) -> Result<(), Stop> {
    match args {
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        ["deps"] => deps::install(deps::Say::All).and_then(|()| interop::install()),
        ["demo", options @ ..] => lab::demo(options),
        ["test"] => test::run(),
        ["lab", verb @ ("up" | "down" | "status"), options @ ..] => lab::run(&[&[*verb], options].concat()),
        ["vm"] => vm::run(),
        ["kernels"] => kernels::run(None),
        ["kernels", kernel] => kernels::run(Some(*kernel)),
        ["chaos", options @ ..] => lab::chaos(options),
        ["drills", drills @ ..] => lab::run(&[&["drills"], drills].concat()),
        ["build-bpf"] => cargo::program("sh", &["ebpf/build-objects.sh"]),
        ["build-bpf", "--check"] => cargo::program("sh", &["ebpf/build-objects.sh", "--check"]),
        ["deny"] => deny::run(),
        ["mutants"] => mutants::run(""),
        ["mutants", part] => mutants::run(part),
        ["sim", "--mutants"] => sim::mutants(),
        ["sim", options @ ..] if !options.is_empty() => sim::run(options),
        ["bench", name @ ("memory" | "revoke" | "deny" | "streams" | "dataplane" | "failover")] => lab::bench(name),
        ["bench", "policy"] => lab::bench_of("ambit-policy", "bench_policy"),
        ["bench", "audit"] => lab::bench_of("ambitd", "bench_audit"),
        ["bench", name @ ("attest" | "issuance" | "propagation" | "raft")] => lab::bench_cell(&[name]),
        ["bench", "propagation", nodes] if nodes.parse::<u32>().is_ok() => lab::bench_cell(&["propagation", nodes]),
        ["bench", "kernel"] => lab::bench_kernel(),
        ["bench", name] if !name.starts_with('-') => unbuilt::bench(name),
        ["fuzz", options @ ..] => fuzz::run(options),
        [] => Err(Stop::Usage("which verb?".into())),
        _ => Err(Stop::Usage(format!("'{}' is not a verb with these arguments", args.join(" ")))),
    }
}
