// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's network block device, served by a local qemu-nbd.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Environment, LIMIT, MANY, Module, NBD, Opened, Server, Target, block, check_mark, version_of};
use crate::sh;

const PROGRAM: &str = "qemu-nbd";

#[derive(Default)]
pub(super) struct QemuNbd(Vec<(Server, PathBuf)>);

impl Target for QemuNbd {
    fn name(&self) -> String {
        "qemu nbd".into()
    }

    fn about(&self) -> String {
        "nbd of the kernel, served by qemu-nbd, direct I/O by io_uring".into()
    }

    fn version(&self) -> Result<String> {
        version_of(PROGRAM, &["--version"]).map(|version| format!("QEMU {version}"))
    }

    fn module(&self) -> Option<Module> {
        Some(NBD)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let home = place.directory(&self.name())?;
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        for image in &images {
            let node = free_node()?;
            let mut command = Command::new(sh::which(PROGRAM)?);
            command.arg(format!("--connect={}", node.display()));
            // Without --verbose it would fork to the background.
            command
                .args(["--verbose", "--format=raw", "--cache=none", "--aio=io_uring", "--discard=unmap"])
                .arg(image);
            let log = home.join(format!("log-{}", self.0.len()));
            self.0.push((Server::start(&mut command, log)?, node.clone()));
            let (server, _) = self.0.last_mut().context("no server")?;
            server.wait(|| is_connected(&node))?;
            check_mark(&node, image)?;
        }
        let server = self.0.first().map(|(server, _)| server.pid());
        let mut paths = self.0.iter().map(|(_, node)| node.clone());
        block(paths.next().unwrap_or_default(), paths.collect(), server)
    }

    fn tear_down(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for (mut server, node) in self.0.drain(..) {
            let mut command = Command::new(PROGRAM);
            let disconnected = sh::capture(command.arg("--disconnect").arg(&node), LIMIT).map(drop);
            outcome = outcome.and(disconnected).and(server.stop());
        }
        outcome
    }
}

fn size_of(node: &Path) -> u64 {
    let name = node.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(format!("/sys/block/{name}/size")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn is_connected(node: &Path) -> bool {
    size_of(node) > 0
}

/// The driver creates all devices when it is loaded.
fn free_node() -> Result<PathBuf> {
    (0..2 * MANY)
        .map(|number| PathBuf::from(format!("/dev/nbd{number}")))
        .find(|node| node.exists() && !is_connected(node) && !has_pid(node))
        .context("all nbd devices are taken: modprobe nbd nbds_max=32")
}

fn has_pid(node: &Path) -> bool {
    let name = node.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Path::new(&format!("/sys/block/{name}/pid")).exists()
}
