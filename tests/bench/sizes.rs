//! How large the parts are on disk.

use std::fs;
use std::path::Path;

use crate::Figure;

/// Sizes of what `make install` installed.
pub fn measure() -> Vec<Figure> {
    let husk = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|directory| directory.join("husk"))
        .find(|path| path.exists())
        .expect("husk is not installed");
    let husk = fs::canonicalize(husk).unwrap();
    let prefix = husk.parent().and_then(Path::parent).unwrap();
    [
        "bin/containerd-shim-husk-v2",
        "bin/husk",
        "libexec/husk/husk-vmm",
        "libexec/husk/husk-fsd",
        "libexec/husk/husk-standin",
        "lib/husk/initramfs.cpio",
        "lib/husk/vmlinux",
    ]
    .into_iter()
    .map(|file| Figure {
        name: format!(
            "size of {}",
            Path::new(file).file_name().unwrap().to_string_lossy()
        ),
        unit: "kB",
        values: vec![fs::metadata(prefix.join(file)).unwrap().len() as f64 / 1000.0],
    })
    .collect()
}
