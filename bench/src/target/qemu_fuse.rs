// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's storage daemon, which exports an image as a file over FUSE.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Environment, FUSE, Kind, LIMIT, Module, Opened, Server, Target, check_mark, version_of};
use crate::sh;

const PROGRAM: &str = "qemu-storage-daemon";

#[derive(Default)]
pub(super) struct QemuFuse(Option<(Server, Vec<PathBuf>)>);

impl Target for QemuFuse {
    fn name(&self) -> String {
        "qemu fuse".into()
    }

    fn about(&self) -> String {
        "FUSE export of qemu-storage-daemon, direct I/O by io_uring".into()
    }

    fn version(&self) -> Result<String> {
        version_of(PROGRAM, &["--version"]).map(|version| format!("QEMU {version}"))
    }

    fn module(&self) -> Option<Module> {
        Some(FUSE)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let home = place.directory(&self.name())?;
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        let mut command = Command::new(sh::which(PROGRAM)?);
        let mut files = Vec::new();
        for (number, image) in images.iter().enumerate() {
            let file = home.join(format!("export-{number}"));
            std::fs::write(&file, "").with_context(|| format!("cannot make {}", file.display()))?;
            // QEMU's syntax doubles a comma in a value.
            let quoted = |path: &Path| path.to_string_lossy().replace(',', ",,");
            command.arg("--blockdev").arg(format!(
                "driver=file,node-name=f{number},filename={},cache.direct=on,aio=io_uring,discard=unmap",
                quoted(image)
            ));
            command.arg("--export").arg(format!(
                "type=fuse,id=e{number},node-name=f{number},mountpoint={},writable=on",
                quoted(&file)
            ));
            files.push(file);
        }
        let server = Server::start(&mut command, home.join("log"))?;
        let (server, files) = self.0.insert((server, files));
        // The mount points are empty files until the exports are mounted.
        server.wait(|| {
            files.iter().all(|file| std::fs::metadata(file).is_ok_and(|metadata| metadata.len() > 0))
        })?;
        files.iter().zip(&images).try_for_each(|(file, image)| check_mark(file, image))?;
        let (path, many) = (files[0].clone(), files[1..].to_vec());
        Ok(Opened { kind: Kind::File, path, many, server: Some(server.pid()) })
    }

    fn tear_down(&mut self) -> Result<()> {
        let Some((mut server, files)) = self.0.take() else { return Ok(()) };
        let stopped = server.stop();
        for file in files.iter().filter(|file| is_mounted(file)) {
            sh::capture(Command::new("umount").arg("--lazy").arg(file), LIMIT)?;
        }
        stopped
    }
}

pub(super) fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let path = path.to_string_lossy();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(&*path))
}
