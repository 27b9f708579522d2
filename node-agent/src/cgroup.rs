//! What a process's cgroup says of it: its name in the mesh, its systemd unit, its container. Pure.
//!
//! A cgroup is made by whoever its parent belongs to, so only what lies above every delegated part counts.

use ambit_model::Selector;
use ambit_model::entry::is_unit_name;
use std::io;
use std::path::{Path, PathBuf};

/// Where the mesh's cgroups are, as `/proc/<pid>/cgroup` writes it: relative to the cgroup2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshRoot(PathBuf);

impl MeshRoot {
    /// Finds the cgroup2 mount that `cgroup_root` lies on.
    pub fn find(cgroup_root: &Path) -> io::Result<Self> {
        Self::in_mounts(&std::fs::read_to_string("/proc/mounts")?, cgroup_root)
            .ok_or_else(|| io::Error::other(format!("{} is not on a cgroup2 mount", cgroup_root.display())))
    }
    fn in_mounts(mounts: &str, cgroup_root: &Path) -> Option<Self> {
        mounts
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let (at, kind) = (words.nth(1)?, words.next()?);
                (kind == "cgroup2").then(|| cgroup_root.strip_prefix(at).ok()).flatten()
            })
            .min_by_key(|below| below.as_os_str().len())
            .map(|below| Self(Path::new("/").join(below)))
    }
    /// The mesh cgroup that a process is in, given its path.
    fn cgroup_of<'a>(&self, path: &'a str) -> Option<&'a str> {
        Path::new(path).strip_prefix(&self.0).ok()?.components().next()?.as_os_str().to_str()
    }
}

/// What a process can be recognised by, given its `/proc/<pid>/cgroup`.
pub fn selectors(proc_cgroup: &str, mesh: &MeshRoot) -> Vec<Selector> {
    // The line of the unified hierarchy (cgroups(7)). One with `..` lies outside our cgroup namespace.
    let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let Some(path) = path.filter(|path| !path.split('/').any(|part| part == "..")) else { return vec![] };
    let mesh = mesh.cgroup_of(path).and_then(|name| format!("cgroup:{name}").parse().ok());
    let unit = unit(path).map(|name| Selector::SystemdUnit(name.to_owned()));
    [mesh, unit, container(path).map(Selector::ContainerId)].into_iter().flatten().collect()
}

/// The system's unit: the first part that is not a slice. What a user's own manager or a unit with `Delegate=` makes lies
/// below it and does not count (systemd's cg_path_get_unit).
fn unit(path: &str) -> Option<&str> {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let first = parts.find(|part| !part.ends_with(".slice"))?;
    // A leading underscore keeps a unit's name from being taken for a file of the kernel's (cg_escape).
    let name = first.strip_prefix('_').unwrap_or(first);
    is_unit_name(name).then_some(name)
}

/// The outermost part that names a container, as runtimes write it: `<id>`, `<runtime>-<id>` or `<runtime>-<id>.scope`.
/// Below a service or another scope anybody may have made it.
fn container(path: &str) -> Option<[u8; 32]> {
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let stem = part.strip_suffix(".scope").unwrap_or(part);
        let digits = stem.rsplit_once('-').map_or(stem, |(_, id)| id);
        let lower = digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut id = [0; 32];
        if lower && hex::decode_to_slice(digits, &mut id).is_ok() {
            return Some(id);
        }
        if is_unit_name(part) {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroup_below_the_mesh_counts() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let mesh = MeshRoot::in_mounts(mounts, Path::new("/sys/fs/cgroup/unified/n1/mesh")).unwrap();
        assert_eq!(mesh, MeshRoot("/n1/mesh".into()));
        assert_eq!(MeshRoot::in_mounts(mounts, Path::new("/tmp/mesh")), None);
        for (text, names) in [
            ("1:cpu:/x\n0::/n1/mesh/web\n", vec!["cgroup:web"]),
            ("0::/n1/mesh/web/inner/deeper\n", vec!["cgroup:web"]),
            ("0::/n1/mesh\n", vec![]),
            ("0::/n1/meshes/web\n", vec![]),
            ("0::/n2/mesh/web\n", vec![]),
            ("0::/n1/mesh/web/../../mesh/db\n", vec![]),
            ("4:name=x:/n1/mesh/web\n", vec![]),
            ("", vec![]),
        ] {
            let found: Vec<String> = selectors(text, &mesh).iter().map(ToString::to_string).collect();
            assert_eq!(found, names, "{text:?}");
        }
    }

    #[test]
    fn units_and_containers_are_those_that_nobody_else_could_have_made() {
        let (id, other) = ("ab12".repeat(16), "cd34".repeat(16));
        let (unit, container) = (|name: &str| format!("systemd:unit:{name}"), |id: &str| format!("container:id:{id}"));
        for (path, found) in [
            ("/system.slice/nginx.service".to_owned(), vec![unit("nginx.service")]),
            ("/a.slice/a-b.slice/x@1.service/inner".to_owned(), vec![unit("x@1.service")]),
            ("/_x.service/y".to_owned(), vec![unit("x.service")]),
            ("/init.scope".to_owned(), vec![unit("init.scope")]),
            // Whatever user 7's manager made says nothing.
            ("/user.slice/user-7.slice/user@7.service/app.slice/db.service".to_owned(), vec![unit("user@7.service")]),
            (format!("/user.slice/user-7.slice/user@7.service/libpod-{id}.scope"), vec![unit("user@7.service")]),
            (format!("/system.slice/own.service/docker-{id}.scope"), vec![unit("own.service")]),
            (format!("/system.slice/x.scope/{id}"), vec![unit("x.scope")]),
            // As Docker, containerd, CRI-O and Podman write theirs, under either cgroup driver.
            (format!("/system.slice/docker-{id}.scope"), vec![unit(&format!("docker-{id}.scope")), container(&id)]),
            (format!("/docker/{id}"), vec![container(&id)]),
            (format!("/kubepods/burstable/pod1b2c-3d/{id}"), vec![container(&id)]),
            (
                format!("/kubepods.slice/kubepods-podx.slice/cri-containerd-{id}.scope"),
                vec![unit(&format!("cri-containerd-{id}.scope")), container(&id)],
            ),
            (format!("/machine.slice/libpod-{id}.scope"), vec![unit(&format!("libpod-{id}.scope")), container(&id)]),
            // A container within a container is the outer one's affair.
            (format!("/docker/{id}/docker/{other}"), vec![container(&id)]),
            (format!("/docker/{}", id.to_uppercase()), vec![]),
            (format!("/docker/{}", &id[1..]), vec![]),
            (format!("/docker/{id}0"), vec![]),
            (format!("/../docker/{id}"), vec![]),
            ("/system.slice".to_owned(), vec![]),
            ("/".to_owned(), vec![]),
        ] {
            let text = format!("0::{path}\n");
            let texts: Vec<String> =
                selectors(&text, &MeshRoot("/mesh".into())).iter().map(ToString::to_string).collect();
            assert_eq!(texts, found, "{path}");
        }
    }
}
