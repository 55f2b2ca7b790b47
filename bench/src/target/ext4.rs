// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ext4 in the image: mounted by the kernel from kernel loop or from loopengine, or served by
//! fuse2fs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::kernel_loop::LoopDevice;
use super::qemu_fuse::is_mounted;
use super::{
    Environment, FUSE, Kind, LIMIT, LOOP, Module, Opened, Server, Target, UBLK, engine, kernel, loopengine,
    version_of,
};
use crate::daemon::Daemon;
use crate::{job, sh, store};

/// ext4, mounted by the kernel.
pub(super) struct Ext4 {
    below: Below,
    mounted: Option<PathBuf>,
}

enum Below {
    Loop(Option<LoopDevice>),
    Engine(Option<Daemon>),
}

impl Ext4 {
    pub(super) fn on_loop() -> Ext4 {
        Ext4 { below: Below::Loop(None), mounted: None }
    }

    pub(super) fn on_loopengine() -> Ext4 {
        Ext4 { below: Below::Engine(None), mounted: None }
    }
}

impl Target for Ext4 {
    fn name(&self) -> String {
        match self.below {
            Below::Loop(_) => job::EXT4_ON_LOOP.into(),
            Below::Engine(_) => "ext4 on loopengine".into(),
        }
    }

    fn about(&self) -> String {
        match self.below {
            Below::Loop(_) => "ext4 of the kernel on kernel loop with direct I/O".into(),
            Below::Engine(_) => "ext4 of the kernel on loopengine in its default I/O mode".into(),
        }
    }

    fn version(&self) -> Result<String> {
        match self.below {
            Below::Loop(_) => Ok(kernel()),
            Below::Engine(_) => engine(),
        }
    }

    fn module(&self) -> Option<Module> {
        Some(match self.below {
            Below::Loop(_) => LOOP,
            Below::Engine(_) => UBLK,
        })
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let name = self.name();
        let image = formatted(place, &name)?;
        let (node, server) = match &mut self.below {
            Below::Loop(device) => (device.insert(place.loops.attach(&image, true)?).path().to_owned(), None),
            Below::Engine(daemon) => {
                let daemon = daemon.insert(loopengine::start(place, &name, "ublk")?);
                (daemon.attach(&image, &[])?, Some(daemon.pid()))
            }
        };
        store::set_scheduler_none(&node)?;
        let directory = place.directory(&format!("{name} mount"))?;
        sh::capture(Command::new("mount").args(["-t", "ext4"]).arg(&node).arg(&directory), LIMIT)?;
        self.mounted = Some(directory.clone());
        Ok(Opened { kind: Kind::Mount, path: directory, many: Vec::new(), server })
    }

    fn tear_down(&mut self) -> Result<()> {
        let unmounted = self.mounted.take().map_or(Ok(()), |directory| umount(&directory));
        let gone = match &mut self.below {
            Below::Loop(device) => {
                drop(device.take());
                Ok(())
            }
            Below::Engine(daemon) => daemon.take().map_or(Ok(()), Daemon::stop),
        };
        unmounted.and(gone)
    }
}

/// The same image, served by fuse2fs.
#[derive(Default)]
pub(super) struct Fuse2fs(Option<(Server, PathBuf)>);

impl Target for Fuse2fs {
    fn name(&self) -> String {
        "fuse2fs".into()
    }

    fn about(&self) -> String {
        "the same image through fuse2fs, without a block device or the kernel's ext4".into()
    }

    fn version(&self) -> Result<String> {
        version_of("fuse2fs", &["--version"]).map(|version| format!("fuse2fs {version}"))
    }

    fn module(&self) -> Option<Module> {
        Some(FUSE)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let image = formatted(place, "fuse2fs")?;
        let directory = place.directory("fuse2fs mount")?;
        let mut command = Command::new(sh::which("fuse2fs")?);
        command.arg(&image).arg(&directory).args(["-f", "-o", "rw"]);
        let server = Server::start(&mut command, place.scratch.join("fuse2fs.log"))?;
        let (server, directory) = self.0.insert((server, directory));
        server.wait(|| is_mounted(directory))?;
        let (path, server) = (directory.clone(), Some(server.pid()));
        Ok(Opened { kind: Kind::Mount, path, many: Vec::new(), server })
    }

    fn tear_down(&mut self) -> Result<()> {
        let Some((mut server, directory)) = self.0.take() else { return Ok(()) };
        let unmounted = if is_mounted(&directory) { umount(&directory) } else { Ok(()) };
        unmounted.and(server.stop())
    }
}

fn formatted(place: &Environment, name: &str) -> Result<PathBuf> {
    let image = place.image(name)?;
    let mut mkfs = Command::new(sh::which("mkfs.ext4")?);
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]).arg(&image);
    sh::capture(&mut mkfs, LIMIT)?;
    Ok(image)
}

fn umount(directory: &Path) -> Result<()> {
    sh::capture(Command::new("umount").arg(directory), LIMIT).map(drop)
}
