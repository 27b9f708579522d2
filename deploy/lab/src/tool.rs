//! Runs a tool of the machine to its end and names what is missing.

use std::io::Write;
use std::process::{Command, Stdio};

/// What can go wrong with a tool.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed, or could not be started.
    #[error("{tool} could not be started (package {package}; `cargo xtask deps` installs what the lab needs)")]
    Start {
        /// The program.
        tool: String,
        /// The Debian package that has it.
        package: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// It ran and failed.
    #[error("{tool} failed: {output}")]
    Failed {
        /// The program and its arguments.
        tool: String,
        /// What it wrote on standard error.
        output: String,
    },
}

/// The Debian 12 package that has a program which the lab runs.
pub fn package(tool: &str) -> &'static str {
    match tool {
        "ip" => "iproute2",
        "swtpm" => "swtpm",
        "swtpm_setup" | "swtpm_localca" => "swtpm-tools",
        "nginx" => "nginx-light",
        "curl" => "curl",
        "python3" => "python3",
        "tcpdump" => "tcpdump",
        "cpio" => "cpio",
        "ldd" => "libc-bin",
        "mcopy" | "mformat" | "mmd" => "mtools",
        "setpriv" => "util-linux",
        "strip" => "binutils",
        _ => "unknown",
    }
}

/// Runs `tool args` for a lab, feeding `stdin`, and returns what it wrote on standard output. It carries the lab's
/// marker: if the lab is killed meanwhile, clean-up ends the tool before it removes what the tool makes.
pub fn run(lab: &str, tool: &str, args: &[&str], stdin: &str) -> Result<String, ToolError> {
    let start = |source| ToolError::Start { tool: tool.into(), package: package(tool), source };
    let mut child = Command::new(tool)
        .args(args)
        .env(crate::process::MARKER, lab)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut pipe) = child.stdin.take() {
        // A tool that died early tells why on standard error; a broken pipe here would only hide that.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let tool = format!("{tool} {}", args.join(" "));
        return Err(ToolError::Failed { tool, output: text.trim().chars().take(2000).collect() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
