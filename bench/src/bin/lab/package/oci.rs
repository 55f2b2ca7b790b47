// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A container image in OCI's image layout: a directory that podman, skopeo and containerd read.
//!
//! ```text
//!  oci-layout, index.json ── manifest ──┬── config: command, platform
//!                                       └── layer: the static program, licenses
//! ```
//! Knows the image specification; no daemon and no registry takes part.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use loopbench::sh;

use crate::programs;

use super::{PackageKind, Release, empty, gzip, name, sha256, size, tar};

/// The file that names all others.
pub(super) const INDEX: &str = "index.json";
const BLOBS: &str = "blobs/sha256";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const LIMIT: Duration = Duration::from_secs(60);

/// Writes an image that holds the static `program` and serves by default.
pub(super) fn image(release: &Release, program: &Path) -> Result<PathBuf> {
    let root = release.target.join("release/image");
    layer_tree(program, &root)?;
    let layout = release.out.join(name(PackageKind::Oci, &release.version));
    empty(&layout)?;
    fs::create_dir_all(layout.join(BLOBS))?;
    // Nothing links to it, so that a run that is interrupted here is visible as such.
    let archive = layout.join("layer.tar");
    tar(release, &root, &["usr"], &archive)?;
    let uncompressed = sha256(&archive)?;
    let layer = blob(&layout, &gzip(&archive)?, LAYER)?;

    let created = created(release)?;
    let labels = json!({
        "org.opencontainers.image.title": "loopengine",
        "org.opencontainers.image.version": release.version,
        "org.opencontainers.image.licenses": "Apache-2.0 OR MIT",
    });
    let config = json!({
        "created": created,
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": ["/usr/bin/loopengine"],
            "Cmd": ["serve"],
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "Labels": labels,
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{uncompressed}")] },
        "history": [{ "created": created, "created_by": "cargo lab package oci" }],
    });
    let config = json_blob(&layout, &config, CONFIG)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": [layer],
        "annotations": labels,
    });
    let mut manifest = json_blob(&layout, &manifest, MANIFEST)?;
    manifest["platform"] = json!({ "architecture": architecture(), "os": "linux" });
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": release.version });
    fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    // Last: without this file the directory is no image.
    fs::write(layout.join(INDEX), index.to_string())?;
    Ok(layout)
}

fn layer_tree(program: &Path, root: &Path) -> Result<()> {
    empty(root)?;
    let (bin, licenses) = (root.join("usr/bin"), root.join("usr/share/licenses/loopengine"));
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&licenses)?;
    fs::copy(program, bin.join("loopengine"))
        .with_context(|| format!("cannot copy {}", program.display()))?;
    fs::set_permissions(bin.join("loopengine"), fs::Permissions::from_mode(0o755))?;
    for license in ["LICENSE-APACHE", "LICENSE-MIT"] {
        fs::copy(programs::workspace().join(license), licenses.join(license))?;
    }
    Ok(())
}

/// Moves `file` to the place that its checksum names; returns its descriptor.
fn blob(layout: &Path, file: &Path, media_type: &str) -> Result<Value> {
    let (sum, size) = (sha256(file)?, size(file)?);
    fs::rename(file, layout.join(BLOBS).join(&sum))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{sum}"), "size": size }))
}

fn json_blob(layout: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let file = layout.join("blob.new");
    fs::write(&file, value.to_string())?;
    blob(layout, &file, media_type)
}

/// The file that `descriptor` names, if size and checksum are as it says.
fn verified(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let digest = descriptor["digest"].as_str().context("a descriptor has no digest")?;
    let sum = digest.strip_prefix("sha256:").with_context(|| format!("{digest} is not a SHA-256 digest"))?;
    let file = layout.join(BLOBS).join(sum);
    if sha256(&file)? != sum || Some(size(&file)?) != descriptor["size"].as_u64() {
        bail!("{} has another size or checksum than its descriptor: build the image again", file.display());
    }
    Ok(file)
}

/// Unpacks the image in `layout` to `root` as a container runtime does, and returns its command.
pub(super) fn unpack(layout: &Path, root: &Path) -> Result<Vec<String>> {
    let read = |file: PathBuf| -> Result<Value> {
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", file.display()))
    };
    let index = read(layout.join(INDEX))?;
    let manifest = read(verified(layout, &index["manifests"][0])?)?;
    let config = read(verified(layout, &manifest["config"])?)?;
    let layers = manifest["layers"].as_array().context("the manifest has no layers")?;
    let sums = config["rootfs"]["diff_ids"].as_array().context("the configuration has no layers")?;
    ensure!(layers.len() == sums.len(), "manifest and configuration name different layers");
    empty(root)?;
    for (layer, sum) in layers.iter().zip(sums) {
        let archive = root.with_extension("tar");
        let line = format!(
            "gzip --decompress --stdout {} > {}",
            sh::quote(&[verified(layout, layer)?.to_string_lossy()]),
            sh::quote(&[archive.to_string_lossy()])
        );
        sh::capture(Command::new("sh").args(["-c", &line]), LIMIT)?;
        ensure!(
            Some(format!("sha256:{}", sha256(&archive)?).as_str()) == sum.as_str(),
            "layer differs: {sum}"
        );
        sh::capture(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(root), LIMIT)?;
        fs::remove_file(&archive)?;
    }
    let words = |name: &str| config["config"][name].as_array().cloned().unwrap_or_default();
    let command = [words("Entrypoint"), words("Cmd")].concat();
    Ok(command.iter().filter_map(|word| Some(word.as_str()?.to_owned())).collect())
}

fn created(release: &Release) -> Result<String> {
    let mut date = Command::new("date");
    date.args(["--utc", "+%Y-%m-%dT%H:%M:%SZ", "--date"]).arg(format!("@{}", release.time));
    Ok(sh::capture(&mut date, LIMIT)?.trim().to_owned())
}

/// The name that images use for this machine's architecture.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(dir: &Path) -> Release {
        Release {
            version: "1.2.3".into(),
            time: "1000000000".into(),
            target: dir.join("target"),
            out: dir.to_owned(),
        }
    }

    #[test]
    fn an_image_holds_the_program_and_its_command() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "#!/bin/true\n").unwrap();
        let layout = image(&release(dir.path()), &program).unwrap();
        let root = dir.path().join("root");
        assert_eq!(unpack(&layout, &root).unwrap(), ["/usr/bin/loopengine", "serve"]);
        let unpacked = root.join("usr/bin/loopengine");
        assert_eq!(fs::read(&unpacked).unwrap(), b"#!/bin/true\n");
        assert_eq!(fs::metadata(&unpacked).unwrap().permissions().mode() & 0o777, 0o755);
        let before = fs::read(layout.join(INDEX)).unwrap();
        image(&release(dir.path()), &program).unwrap();
        assert_eq!(fs::read(layout.join(INDEX)).unwrap(), before, "the same program gives the same image");
    }

    #[test]
    fn rejects_a_damaged_image() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "").unwrap();
        let layout = image(&release(dir.path()), &program).unwrap();
        for entry in fs::read_dir(layout.join(BLOBS)).unwrap() {
            fs::write(entry.unwrap().path(), "{}").unwrap();
        }
        let error = unpack(&layout, &dir.path().join("root")).unwrap_err().to_string();
        assert!(error.contains("build the image again"), "{error}");
    }
}
