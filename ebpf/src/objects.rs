//! The committed objects. They are compiled by `ebpf/build-objects.sh` (clang 19), never by cargo.

/// A compiled program file.
#[derive(Clone, Copy, Debug)]
pub struct BuiltObject {
    /// Its file name under `ebpf/objects`.
    pub name: &'static str,
    /// The ELF file.
    pub bytes: &'static [u8],
}

pub(crate) const ANNEX: BuiltObject =
    BuiltObject { name: "annex.bpf.o", bytes: include_bytes!("../objects/annex.bpf.o") };
/// The decision alone, for [`BuiltObject`]'s one user beside tests: the benchmark.
pub const DECIDE: BuiltObject = BuiltObject { name: "decide.bpf.o", bytes: include_bytes!("../objects/decide.bpf.o") };
pub(crate) const MESH: BuiltObject = BuiltObject { name: "mesh.bpf.o", bytes: include_bytes!("../objects/mesh.bpf.o") };
pub(crate) const POD: BuiltObject = BuiltObject { name: "pod.bpf.o", bytes: include_bytes!("../objects/pod.bpf.o") };
pub(crate) const SOCKETS: BuiltObject =
    BuiltObject { name: "sockets.bpf.o", bytes: include_bytes!("../objects/sockets.bpf.o") };
pub(crate) const VETH: BuiltObject = BuiltObject { name: "veth.bpf.o", bytes: include_bytes!("../objects/veth.bpf.o") };

/// All objects, in the manifest's order.
pub const OBJECTS: [BuiltObject; 6] = [ANNEX, DECIDE, MESH, POD, SOCKETS, VETH];

/// Compiler, flags and SHA-256 of each object, as the build command wrote them.
pub const MANIFEST: &str = include_str!("../objects/MANIFEST");

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn manifest_names_exactly_these_objects() {
        let lines: Vec<&str> = MANIFEST.lines().filter(|line| !line.starts_with('#')).collect();
        let ours: Vec<String> = OBJECTS
            .iter()
            .map(|object| {
                let digest: String = Sha256::digest(object.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{digest}  {}", object.name)
            })
            .collect();
        assert_eq!(lines, ours);
    }
}
