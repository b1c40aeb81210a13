//! Links every guest as a static program at 2 MiB.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=guest.ld");
    // The target's default is a relocatable executable, and nobody relocates a guest.
    for argument in [&format!("-T{folder}/guest.ld"), "--no-pie", "-znorelro", "--build-id=none"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
