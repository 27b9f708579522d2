//! `cargo xtask kernels`: the kernel side's own tests on Debian's other kernels, each in a machine of its own that QEMU emulates.

use crate::{Stop, cargo, deps};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Installed for this verb only.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", "the machine; no KVM needed"),
    ("cpio", "makes its initial root file system"),
    ("busybox-static", "begins in it"),
];
/// Debian 12 brings the first by default, the second from its update of hardware.
const KERNELS: [&str; 2] = ["6.1", "6.12"];
/// Drivers that Debian's cloud kernels have as modules, in the order of loading.
const MODULES: [&str; 10] =
    ["llc", "stp", "bridge", "veth", "tun", "macvlan", "sch_ingress", "cls_bpf", "cls_u32", "act_mirred"];
/// Suites of the crate that is the kernel side.
const SUITES: [&str; 2] = ["kernel", "no_bypass"];
const MEMORY: &str = "2048";

/// Runs every suite on every kernel; prints what each said, and a line for each.
pub(crate) fn run(only: Option<&str>) -> Result<(), Stop> {
    if let Some(other) = only.filter(|only| !KERNELS.contains(only)) {
        return Err(Stop::Usage(format!("kernel {}, not {other}", KERNELS.join(" or "))));
    }
    deps::install(deps::Say::Missing)?;
    deps::install_these(PACKAGES, deps::Say::Missing)?;
    let tests = suites()?;
    let folder = cargo::root()?.join("target/kernels");
    std::fs::create_dir_all(&folder).map_err(|e| Stop::Failed(format!("{}: {e}", folder.display())))?;
    let mut ended = Vec::new();
    for kernel in KERNELS.into_iter().filter(|kernel| only.is_none_or(|only| only == *kernel)) {
        let debian = unpacked(&folder, kernel)?;
        let root = packed(&folder.join(format!("{kernel}-root")), &debian, &tests)?;
        let outcomes = boot(&image(&debian)?, &root)?;
        ended.extend(SUITES.map(|suite| {
            let code = outcomes.iter().find(|(name, _)| name == suite).map(|(_, code)| code.clone());
            (kernel, suite, code.unwrap_or_else(|| "did not end".to_owned()))
        }));
    }
    for (kernel, suite, code) in &ended {
        println!("kernel {kernel}: suite {suite}: {}", if code == "0" { "passed" } else { code });
    }
    match ended.iter().filter(|(_, _, code)| code != "0").count() {
        0 => Ok(()),
        failed => Err(Stop::Failed(format!("{failed} of {} suites failed", ended.len()))),
    }
}

/// The suites' programs, as cargo names them when it has built them.
fn suites() -> Result<Vec<PathBuf>, Stop> {
    let mut all = Vec::new();
    // What one of them starts.
    cargo::cargo(&["build", "--workspace", "--example", "stand_in"])?;
    for suite in SUITES {
        let args = ["test", "--workspace", "--test", suite, "--no-run", "--message-format", "json"];
        let told = cargo::output("cargo", &args)?;
        let marker = "\"executable\":\"";
        let path = told.lines().filter(|line| line.contains("ambit-ebpf")).find_map(|line| {
            let (_, rest) = line.split_once(marker)?;
            rest.split_once('"').map(|(path, _)| PathBuf::from(path))
        });
        all.push(path.ok_or_else(|| Stop::Failed(format!("cargo built no program of suite {suite}")))?);
    }
    Ok(all)
}

/// The newest package of a kernel, never installed: this machine boots its own.
fn unpacked(folder: &Path, kernel: &str) -> Result<PathBuf, Stop> {
    let debian = folder.join(kernel);
    if debian.exists() {
        return Ok(debian);
    }
    let half = folder.join(format!("{kernel}.half"));
    // `6.1.` is no `6.12.`; versions of backports say so in their names.
    let script = "rm -rf \"$1\" && mkdir -p \"$1/root\" && cd \"$1\" && \
        name=$(apt-cache search --names-only \"^linux-image-$(echo \"$2\" | sed 's/[.]/[.]/g')[.][0-9].*cloud-amd64\\$\" | \
        cut -d ' ' -f 1 | grep -v -e dbg -e unsigned | sort -V | tail -n 1) && \
        apt-get -o APT::Sandbox::User=root download \"$name\" && dpkg-deb -x ./*.deb root && rm ./*.deb";
    cargo::program("sh", &["-ec", script, "unpack", &half.display().to_string(), kernel])?;
    let failed = |e: std::io::Error| Stop::Failed(format!("{}: {e}", debian.display()));
    std::fs::rename(half.join("root"), &debian).map_err(failed)?;
    std::fs::remove_dir_all(&half).map_err(failed)?;
    Ok(debian)
}

fn packed(tree: &Path, debian: &Path, tests: &[PathBuf]) -> Result<PathBuf, Stop> {
    let text = |path: &Path| path.display().to_string();
    let (tree_text, debian, modules) = (text(tree), text(debian), MODULES.join(" "));
    let mut args = vec!["deploy/vm/kernels-pack.sh", &tree_text, &debian, "deploy/vm/kernels-init.sh", &modules];
    let tests: Vec<String> = tests.iter().map(|path| text(path)).collect();
    args.extend(tests.iter().map(String::as_str));
    cargo::program("sh", &args)?;
    Ok(PathBuf::from(format!("{tree_text}.cpio")))
}

fn image(debian: &Path) -> Result<PathBuf, Stop> {
    let boot = debian.join("boot");
    let files = std::fs::read_dir(&boot).map_err(|e| Stop::Failed(format!("{}: {e}", boot.display())))?;
    let found = files.flatten().find(|file| file.file_name().as_encoded_bytes().starts_with(b"vmlinuz-"));
    found.map(|file| file.path()).ok_or_else(|| Stop::Failed(format!("no kernel in {}", boot.display())))
}

/// Boots, prints the console, and returns the exit code that each suite ended with.
fn boot(kernel: &Path, root: &Path) -> Result<Vec<(String, String)>, Stop> {
    let (kernel, root) = (kernel.display().to_string(), root.display().to_string());
    let args = [
        "-machine",
        "q35,accel=tcg",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        MEMORY,
        "-nographic",
        "-no-reboot",
        "-nic",
        "none",
        "-kernel",
        &kernel,
        "-initrd",
        &root,
        "-append",
        "console=ttyS0 panic=-1 quiet",
    ];
    let mut command = cargo::command("qemu-system-x86_64", &args)?;
    let failed = |e: std::io::Error| Stop::Failed(format!("qemu-system-x86_64: {e}"));
    let mut machine = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut ended = Vec::new();
    let console = machine.stdout.take().into_iter().flat_map(|out| BufReader::new(out).split(b'\n'));
    for line in console.map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        println!("{line}");
        if let Some((suite, code)) = line.strip_prefix("AMBIT-END ").and_then(|rest| rest.split_once(' ')) {
            ended.push((suite.to_owned(), code.to_owned()));
        }
    }
    machine.wait().map_err(failed)?;
    Ok(ended)
}
