//! Generates the message types and service stubs; nothing generated is committed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let files = ["common", "cluster", "node", "identity", "policy", "agent", "cell", "watch", "admin", "revocation"]
        .map(|f| format!("ambit/v1/{f}.proto"));
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("ambit.bin"))
        .compile_protos(&files, &[".".to_owned()])?;
    tonic_prost_build::configure()
        // The same set is the same bytes, also where it has several bundles; and no key or token is ever printed.
        .btree_map(".")
        .skip_debug(["X509SVID", "JWTSVID"])
        .file_descriptor_set_path(out.join("spiffe.bin"))
        .compile_protos(&["spiffe/workload.proto", "spiffe/broker.proto"], &["."])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .skip_debug(["TlsCertificate"])
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
