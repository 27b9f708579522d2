//! Pods: namespaces behind a node, announced to its agent as a CNI plugin would, running unmodified programs.

use crate::lab::{Lab, LabError, Place, make_folder, write_file};
use crate::process::ProcessId;
use crate::state::{Pod, Ready};
use crate::topology::{PODS_MAX, parse_name};
use crate::{cgroup, net};
use ambit_model::{Refusal, refusal::Code};
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// The user that pods run as, unless told otherwise: not root, so without CAP_NET_RAW.
pub const UID: u32 = 1000;
/// First pod's host number: pod p has .10+p.
const FIRST_HOST: u8 = 11;

impl Lab {
    /// The folder in which a node's agent is told of pods.
    pub fn pods_folder(&self, node: &str) -> PathBuf {
        self.folder(node).join("pods")
    }
    /// Makes a pod without a process: namespace, cgroup, and the file that tells the agent.
    pub fn add_pod(&self, node: &str, name: &str, uid: u32) -> Result<Pod, LabError> {
        let (name, member) = (parse_name(name)?, self.node(node)?);
        let pods = self.state()?.pods;
        if pods.iter().any(|pod| pod.node == node && pod.name == name) {
            return Err(Refusal::new(Code::AlreadyExists, format!("no pod {name} on {node}"), "it exists").into());
        }
        let host = (FIRST_HOST..PODS_MAX).find(|host| {
            let address = member.pod_address(*host);
            !pods.iter().any(|pod| Some(pod.address) == address)
        });
        let address = host.and_then(|host| member.pod_address(host));
        let address =
            address.ok_or_else(|| Refusal::new(Code::Busy, "a free pod address", format!("none on {node}")))?;
        let cgroup = self.cgroup(node, "mesh").join(&name);
        cgroup::create(&cgroup)?;
        let namespace = net::add_pod(&self.spec, &member, &name, address)?;
        let pod = Pod { node: node.into(), name, namespace, cgroup, address, uid };
        self.store.update(|state| state.pods.push(pod.clone()))?;
        self.announce(&pod)?;
        Ok(pod)
    }
    /// Makes what is connected as a pod is, and which no agent is told of: where its commands run, and its address, the `nth`
    /// beyond those of pods.
    pub fn add_bare(&self, node: &str, name: &str, nth: u8) -> Result<(Place, Ipv4Addr), LabError> {
        let (name, member) = (parse_name(name)?, self.node(node)?);
        let address = PODS_MAX.checked_add(nth).and_then(|host| member.pod_address(host));
        let address = address.ok_or_else(|| Refusal::new(Code::BadRequest, "less than 56", nth.to_string()))?;
        let netns = net::add_pod(&self.spec, &member, &name, address)?;
        Ok((Place { netns, cgroup: self.cgroup(node, "host"), uid: None }, address))
    }
    /// Starts a pod's program; its process is named `<node>-<pod>`.
    pub fn start_in_pod(&self, pod: &Pod, argv: &[&str], ready: Ready) -> Result<ProcessId, LabError> {
        let name = format!("{}-{}", pod.node, pod.name);
        let log = self.folder(&pod.node).join(format!("pod-{}.log", pod.name));
        self.start(&name, Some(&pod.node), self.launch(&pod.place(), argv, &log), ready)
    }
    /// Makes a pod and starts its program.
    pub fn start_pod(&self, node: &str, name: &str, argv: &[&str], ready: Ready) -> Result<Pod, LabError> {
        let pod = self.add_pod(node, name, UID)?;
        self.start_in_pod(&pod, argv, ready)?;
        Ok(pod)
    }
    /// Ends a pod: its processes, the file, the namespace, the cgroup.
    pub fn remove_pod(&self, node: &str, name: &str) -> Result<(), LabError> {
        let state = self.state()?;
        let found = state.pods.iter().find(|pod| pod.node == node && pod.name == name);
        let missing = || Refusal::new(Code::NotFound, format!("pod {name} on {node}"), "no such pod");
        let pod = found.ok_or_else(missing)?;
        cgroup::processes(&pod.cgroup).into_iter().for_each(|id| {
            let _ = id.kill();
        });
        let file = self.announcement(pod);
        std::fs::remove_file(&file).map_err(|source| LabError::Io { path: file, source })?;
        net::remove(&pod.namespace)?;
        cgroup::remove(&pod.cgroup)?;
        self.store.update(|state| {
            state.processes.retain(|p| p.name != format!("{node}-{name}"));
            state.pods.retain(|p| p != pod);
        })?;
        Ok(())
    }

    /// Written under another name first, so that the agent never reads half of it.
    fn announce(&self, pod: &Pod) -> Result<(), LabError> {
        let text = serde_json::json!({
            "cgroup": pod.name,
            "netns": net::path(&pod.namespace),
            "address": pod.address,
            "uid": pod.uid,
        });
        make_folder(&self.pods_folder(&pod.node))?;
        let (path, hidden) = (self.announcement(pod), self.pods_folder(&pod.node).join(format!(".{}", pod.name)));
        write_file(&hidden, text.to_string().as_bytes())?;
        std::fs::rename(&hidden, &path).map_err(|source| LabError::Io { path, source })
    }

    fn announcement(&self, pod: &Pod) -> PathBuf {
        self.pods_folder(&pod.node).join(format!("{}.json", pod.name))
    }
}

impl Pod {
    /// Where its commands run.
    pub fn place(&self) -> Place {
        Place { netns: self.namespace.clone(), cgroup: self.cgroup.clone(), uid: Some(self.uid) }
    }
}
