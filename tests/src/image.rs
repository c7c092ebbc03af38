//! Container images created by tests from programs of this machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::agent::dist;
use crate::node::output;

/// Name of the image.
pub const IMAGE: &str = "polder.test/busybox:1";

/// From Debian's package busybox-static, or from busybox, which many machines have and which busybox-static would
/// replace.
const BUSYBOX: &str = "/bin/busybox";

/// Creates the image as an archive for `ctr images import` and returns its path. In addition to busybox, it has a page,
/// `/www/page`, and a program that prints the client's address, `/www/cgi-bin/who`.
pub fn make(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    for part in ["bin", "www/cgi-bin", "tmp", "proc", "sys", "dev", "etc"] {
        fs::create_dir_all(root.join(part)).expect("a folder for the image");
    }
    for file in libraries(Path::new(BUSYBOX)).into_iter().chain([PathBuf::from(BUSYBOX)]) {
        put(&file, &root.join(file.strip_prefix("/").unwrap_or(&file)));
    }
    fs::write(root.join("www/page"), "the page\n").expect("a file");
    let who = root.join("www/cgi-bin/who");
    fs::write(&who, "#!/bin/busybox sh\necho Content-Type: text/plain\necho\necho $REMOTE_ADDR\n")
        .expect("a file");
    fs::set_permissions(&who, fs::Permissions::from_mode(0o755)).expect("a program");

    pack(folder, IMAGE, json!({ "Cmd": ["/bin/busybox", "sleep", "86400"] }))
}

/// Creates an image of that name with these programs in `/usr/local/bin` and their libraries. Returns the path of the
/// archive.
pub fn of_programs(folder: &Path, name: &str, programs: &[PathBuf]) -> PathBuf {
    let root = folder.join("root");
    for program in programs {
        for library in libraries(program) {
            put(&library, &root.join(library.strip_prefix("/").unwrap_or(&library)));
        }
        put(program, &root.join("usr/local/bin").join(program.file_name().expect("a program")));
    }
    pack(folder, name, json!({}))
}

/// Creates Polder's own image from the tested binaries. Returns the path of the archive.
pub fn of_polder(folder: &Path) -> PathBuf {
    let file = folder.join("polder.tar");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/image");
    output(Command::new(script).arg("--from").arg(dist()).arg("--to").arg(&file));
    file
}

fn put(file: &Path, inside: &Path) {
    fs::create_dir_all(inside.parent().expect("a folder")).expect("a folder for the image");
    fs::copy(file, inside).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}

/// Creates an image of that name from `root`. Returns the path of the archive.
fn pack(folder: &Path, name: &str, runs: Value) -> PathBuf {
    let (root, archive) = (folder.join("root"), folder.join("archive"));
    fs::create_dir_all(&archive).expect("a folder for the archive");
    let layer = archive.join("layer.tar");
    tar(&root, &layer);
    let digest = Sha256::digest(fs::read(&layer).expect("the layer"));
    let digest = digest.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": runs,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(archive.join("config.json"), config.to_string()).expect("a file");
    fs::write(archive.join("manifest.json"), manifest.to_string()).expect("a file");
    let image = folder.join("image.tar");
    tar(&archive, &image);
    image
}

/// The libraries of a program; none for a static program.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn tar(folder: &Path, file: &Path) {
    output(Command::new("tar").arg("-C").arg(folder).arg("-cf").arg(file).arg("."));
}
