// SPDX-License-Identifier: Apache-2.0 OR MIT
//! rublk, another loop device over ublk, if it is installed.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use super::{Environment, LIMIT, Module, Opened, Server, Target, UBLK, block, check_mark, version_of};
use crate::{daemon, sh};

const PROGRAM: &str = "rublk";

#[derive(Default)]
pub(super) struct Rublk(Vec<(Server, u32)>);

impl Target for Rublk {
    fn name(&self) -> String {
        "rublk".into()
    }

    fn about(&self) -> String {
        "rublk's loop target over ublk: one queue per CPU, zero copy if the kernel supports it".into()
    }

    fn version(&self) -> Result<String> {
        version_of(PROGRAM, &["--version"])
            .map(|version| format!("rublk {version}"))
            .map_err(|_| anyhow!("rublk is not installed: cargo install rublk --no-default-features"))
    }

    fn module(&self) -> Option<Module> {
        Some(UBLK)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let zero_copy = daemon::io_modes()?.iter().any(|path| path == "auto");
        let queues = std::thread::available_parallelism().map_or(1, usize::from).to_string();
        let home = place.directory(&self.name())?;
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        for image in &images {
            let id =
                (500..600).find(|id| !node(*id).exists()).context("no free ublk id between 500 and 599")?;
            let mut command = Command::new(sh::which(PROGRAM)?);
            command.args(["add", "loop", "--foreground", "--number", &id.to_string()]);
            command.args(["--queue", &queues, "--depth", "128"]);
            command.args(zero_copy.then_some("--zero-copy")).arg("--file").arg(image);
            self.0.push((Server::start(&mut command, home.join(format!("log-{id}")))?, id));
            let (server, id) = self.0.last_mut().context("no server")?;
            server.wait(|| node(*id).exists())?;
            check_mark(&node(*id), image)?;
        }
        let server = self.0.first().map(|(server, _)| server.pid());
        let mut paths = self.0.iter().map(|(_, id)| node(*id));
        block(paths.next().unwrap_or_default(), paths.collect(), server)
    }

    fn tear_down(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for (mut server, id) in self.0.drain(..) {
            let mut command = Command::new(PROGRAM);
            let deleted = sh::capture(command.args(["del", "--number", &id.to_string()]), LIMIT).map(drop);
            outcome = outcome.and(deleted).and(server.stop());
        }
        outcome
    }
}

fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}
