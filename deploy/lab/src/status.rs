//! `ambit-lab status`: what runs, what does not, and which faults are in force.

use ambit_lab::{Lab, LabError, net};
use std::process::ExitCode;

/// Prints the lab; the exit code is 0 only if every kept process runs and no fault is in force.
pub(crate) fn show(lab: &Lab, json: bool) -> Result<ExitCode, LabError> {
    let state = lab.state()?;
    let leases = lab.leases()?;
    let kept: Vec<_> = state.processes.iter().filter(|p| !p.name.starts_with("keeper-")).collect();
    let running = kept.iter().filter(|p| p.id.alive()).count();
    if json {
        let processes: Vec<_> = kept
            .iter()
            .map(|p| serde_json::json!({"name": p.name, "member": p.member, "pid": p.id.pid, "running": p.id.alive()}))
            .collect();
        let value = serde_json::json!({
            "spec": state.spec, "complete": state.complete, "processes": processes, "pods": state.pods,
            "faults": leases, "namespaces": net::list(lab.name()),
        });
        println!("{value:#}");
    } else {
        println!("{:<12} {:<16} {:<6} PROCESSES", "MACHINE", "ADDRESS", "LINK");
        for member in lab.spec().members() {
            let role = member.role();
            let link = if net::link_up(lab.spec(), &member.site, Some(&member))? { "up" } else { "CUT" };
            let own = kept.iter().filter(|p| p.member.as_deref() == Some(&role));
            let short = |name: &str| match name.strip_prefix(&role) {
                Some("") => "ambitd".to_owned(),
                rest => rest.unwrap_or(name).trim_start_matches('-').to_owned(),
            };
            let processes: Vec<String> = own
                .map(|p| {
                    format!("{} {}", short(&p.name), if p.id.alive() { p.id.pid.to_string() } else { "DEAD".into() })
                })
                .collect();
            println!("{role:<12} {:<16} {link:<6} {}", member.address().to_string(), processes.join(", "));
        }
        for pod in &state.pods {
            println!("pod {}-{}  {}", pod.node, pod.name, pod.address);
        }
        for lease in &leases {
            println!("fault {:?} {}: reverts in {} s", lease.fault, lease.target, lease.left_ms().div_ceil(1000));
        }
        println!("{running} of {} processes run, {} faults", kept.len(), leases.len());
    }
    let well = running == kept.len() && leases.is_empty();
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
