//! Links the program as a kernel: at a fixed address, without a C library. Only where it is one, in the release profile,
//! which alone has `panic = "abort"`; build scripts are not told that directly.

fn main() {
    println!("cargo::rerun-if-changed=kernel.ld");
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        for argument in [
            "-nostdlib",
            "-nostartfiles",
            "-no-pie",
            "-static",
            "-Wl,--build-id=none",
            "-Wl,-z,max-page-size=4096",
            &format!("-Wl,-T,{directory}/kernel.ld"),
        ] {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
