//! Generates the message types and service stubs; nothing generated is committed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let files =
        ["common", "cluster", "node", "identity", "policy", "agent", "cell", "watch", "admin", "revocation", "traffic"]
            .map(|f| format!("ambit/v1/{f}.proto"));
    // No key or token is ever printed: these messages have a `Debug` of ours (`discreet!`), or nothing compiles.
    tonic_prost_build::configure()
        .skip_debug([
            "CreateClusterTokenResponse",
            "CreateJoinTokenResponse",
            "CreateReplicaTokenResponse",
            "EvidenceHeader",
            "NewJWTSVIDResponse",
            "ProveRequest",
            "RegisterPeerRequest",
            "ReplicaJoinRequest",
        ])
        .file_descriptor_set_path(out.join("ambit.bin"))
        .compile_protos(&files, &[".".to_owned()])?;
    tonic_prost_build::configure()
        // The same set is the same bytes, also where it has several bundles.
        .btree_map(".")
        .skip_debug(["X509SVID", "JWTSVID", "ValidateJWTSVIDRequest"])
        .file_descriptor_set_path(out.join("spiffe.bin"))
        .compile_protos(&["spiffe/workload.proto", "spiffe/broker.proto"], &["."])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .skip_debug(["TlsCertificate", "DiscoveryResponse", "Resource"])
        .file_descriptor_set_path(out.join("envoy.bin"))
        .compile_protos(
            &["envoy/service/secret/v3/sds.proto", "envoy/extensions/transport_sockets/tls/v3/secret.proto"],
            &["."],
        )?;
    println!("cargo:rerun-if-changed=envoy");
    println!("cargo:rerun-if-changed=google");
    println!("cargo:rerun-if-changed=ambit");
    println!("cargo:rerun-if-changed=spiffe");
    Ok(())
}
