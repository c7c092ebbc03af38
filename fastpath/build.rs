//! Compiles the BPF programs with clang.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "bpf/fastpath.c";

/// Where the headers of the kernel for the building machine are: Debian has those that depend on the processor in a folder
/// of their own, which clang does not search for this target.
fn headers() -> PathBuf {
    let of_debian = format!("/usr/include/{}-linux-gnu", env::consts::ARCH);
    Some(PathBuf::from(of_debian)).filter(|folder| folder.is_dir()).unwrap_or_else(|| "/usr/include".into())
}

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let folder = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let object = Path::new(&folder).join("fastpath.o");
    // The type information (-g) declares the maps.
    let status = Command::new(&clang)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", "-Werror", "-I"])
        .arg(headers())
        .args(["-c", SOURCE, "-o"])
        .arg(&object)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{clang} cannot compile {SOURCE}: {status}"),
        Err(error) => panic!(
            "cannot run {clang}: {error}. Install clang (Debian: apt-get install clang linux-libc-dev)"
        ),
    }
}
