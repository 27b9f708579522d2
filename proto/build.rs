//! Generates the message types and service stubs; nothing generated is committed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let files = ["common", "cluster", "node", "identity", "policy", "agent", "cell", "watch", "admin", "revocation"]
        .map(|f| format!("ambit/v1/{f}.proto"));
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("ambit.bin"))
        .compile_protos(&files, &[".".to_owned()])?;
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("spiffe.bin"))
        .compile_protos(&["spiffe/workload.proto"], &["."])?;
    println!("cargo:rerun-if-changed=ambit");
    println!("cargo:rerun-if-changed=spiffe");
    Ok(())
}
