// SPDX-License-Identifier: Apache-2.0 OR MIT
//! FUSE passthrough: files that this program opens, and whose data the kernel moves.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::qemu_fuse::is_mounted;
use super::{Environment, FUSE, Kind, LIMIT, Module, Opened, Server, Target, check_mark, kernel};
use crate::sh;

#[derive(Default)]
pub(super) struct FusePassthrough(Option<(Server, PathBuf)>);

impl Target for FusePassthrough {
    fn name(&self) -> String {
        "fuse passthrough".into()
    }

    fn about(&self) -> String {
        "a file of FUSE that the kernel passes through to the image (Linux 6.9); no size limit, no statistics"
            .into()
    }

    fn version(&self) -> Result<String> {
        Ok(kernel())
    }

    fn module(&self) -> Option<Module> {
        Some(FUSE)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let home = place.directory(&self.name())?;
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        let mount = home.join("mnt");
        std::fs::create_dir_all(&mount)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("passthrough").arg(&mount).args(&images);
        let server = Server::start(&mut command, home.join("log"))?;
        let (server, mount) = self.0.insert((server, mount));
        server.wait(|| is_mounted(mount))?;
        let files: Vec<PathBuf> = (0..images.len()).map(|number| mount.join(number.to_string())).collect();
        files.iter().zip(&images).try_for_each(|(file, image)| check_mark(file, image))?;
        let (path, many) = (files[0].clone(), files[1..].to_vec());
        Ok(Opened { kind: Kind::File, path, many, server: Some(server.pid()) })
    }

    fn tear_down(&mut self) -> Result<()> {
        let Some((mut server, mount)) = self.0.take() else { return Ok(()) };
        // The server ends with its file system.
        if is_mounted(&mount) {
            sh::capture(Command::new("umount").arg(&mount), LIMIT)?;
        }
        server.stop()
    }
}
