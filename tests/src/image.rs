//! A container image made on the spot, from the one program that is on every machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::node::output;

/// The name of the image.
pub const IMAGE: &str = "polder.test/busybox:1";

/// Of Debian's package busybox-static, or of busybox, which is on many machines and which the other would replace.
const BUSYBOX: &str = "/bin/busybox";

/// Makes the image as an archive that `ctr images import` reads; the file. Beside busybox it has a page, `/www/page`,
/// and a program that says who asks for it, `/www/cgi-bin/who`.
pub fn make(folder: &Path) -> PathBuf {
    let (root, archive) = (folder.join("root"), folder.join("archive"));
    for part in ["bin", "www/cgi-bin", "tmp", "proc", "sys", "dev", "etc"] {
        fs::create_dir_all(root.join(part)).expect("a folder for the image");
    }
    fs::create_dir_all(&archive).expect("a folder for the archive");
    for file in libraries(BUSYBOX).into_iter().chain([PathBuf::from(BUSYBOX)]) {
        let inside = root.join(file.strip_prefix("/").unwrap_or(&file));
        fs::create_dir_all(inside.parent().expect("a folder")).expect("a folder for the image");
        fs::copy(&file, inside).expect("busybox-static is installed");
    }
    fs::write(root.join("www/page"), "the page\n").expect("a file");
    let who = root.join("www/cgi-bin/who");
    fs::write(&who, "#!/bin/busybox sh\necho Content-Type: text/plain\necho\necho $REMOTE_ADDR\n")
        .expect("a file");
    fs::set_permissions(&who, fs::Permissions::from_mode(0o755)).expect("a program");

    let layer = archive.join("layer.tar");
    tar(&root, &layer);
    let digest = Sha256::digest(fs::read(&layer).expect("the layer"));
    let digest = digest.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": ["/bin/busybox", "sleep", "86400"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(archive.join("config.json"), config.to_string()).expect("a file");
    fs::write(archive.join("manifest.json"), manifest.to_string()).expect("a file");
    let image = folder.join("image.tar");
    tar(&archive, &image);
    image
}

/// The libraries that a program needs. A static one needs none.
fn libraries(program: &str) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn tar(folder: &Path, file: &Path) {
    output(Command::new("tar").arg("-C").arg(folder).arg("-cf").arg(file).arg("."));
}
