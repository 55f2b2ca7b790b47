// SPDX-License-Identifier: Apache-2.0 OR MIT
//! loopengine, through its public program: over ublk in each I/O mode, with devices of the kernel's
//! loop driver, and over FUSE.
//!
//! Each target has its own daemon, so that its cost can be measured.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{Environment, FUSE, Kind, LOOP, Module, Opened, Target, UBLK, block, check_mark, engine, kernel};
use crate::daemon::{self, Daemon};
use crate::varlink::Client;

/// loopengine over ublk: in one I/O mode, or in the best one with durable writes.
pub(super) struct Ublk {
    mode: Option<&'static str>,
    daemon: Option<Daemon>,
}

impl Ublk {
    pub(super) fn new(mode: &'static str) -> Ublk {
        Ublk { mode: Some(mode), daemon: None }
    }

    pub(super) fn durable() -> Ublk {
        Ublk { mode: None, daemon: None }
    }

    fn check_granted(&self) -> Result<()> {
        let Some(wanted) = self.mode else { return Ok(()) };
        if !daemon::io_modes()?.iter().any(|mode| mode == wanted) {
            bail!("this kernel ({}) does not support I/O mode {wanted}", kernel());
        }
        Ok(())
    }
}

impl Target for Ublk {
    fn name(&self) -> String {
        format!("loopengine {}", self.mode.unwrap_or("durable"))
    }

    fn about(&self) -> String {
        match self.mode {
            Some(mode) => format!("loopengine over ublk, I/O mode {mode}"),
            None => "loopengine over ublk, best I/O mode, every write durable".into(),
        }
    }

    fn version(&self) -> Result<String> {
        let version = engine()?;
        // The I/O modes are known only once the driver is loaded.
        if UBLK.is_loaded() {
            self.check_granted()?;
        }
        Ok(version)
    }

    fn module(&self) -> Option<Module> {
        Some(UBLK)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        self.check_granted()?;
        let name = self.name();
        let daemon = self.daemon.insert(start(place, &name, "ublk")?);
        let words = self.mode.map_or(vec!["--durable"], |mode| vec!["--io-mode", mode]);
        let (path, many) = attach_all(place, &name, daemon, &words)?;
        block(path, many, Some(daemon.pid()))
    }

    fn tear_down(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::stop)
    }

    fn punts(&self) -> Option<u64> {
        punts(self.daemon.as_ref()?)
    }
}

/// loopengine with a backend that has no I/O modes to choose from.
pub(super) struct Other {
    backend: &'static str,
    about: &'static str,
    module: Module,
    kind: Kind,
    daemon: Option<Daemon>,
}

impl Other {
    /// The same engine and workers over FUSE.
    pub(super) fn fuse() -> Other {
        let about = "the same engine and workers over FUSE, several threads, clone_fd";
        Other { backend: "fuse", about, module: FUSE, kind: Kind::File, daemon: None }
    }

    /// The daemon manages devices, the kernel's loop driver serves them.
    pub(super) fn kernel_loop() -> Other {
        let about = "loopengine with devices of the kernel's loop driver, with direct I/O";
        Other { backend: "loop", about, module: LOOP, kind: Kind::Block, daemon: None }
    }
}

impl Target for Other {
    fn name(&self) -> String {
        format!("loopengine {}", self.backend)
    }

    fn about(&self) -> String {
        self.about.into()
    }

    fn version(&self) -> Result<String> {
        engine()
    }

    fn module(&self) -> Option<Module> {
        Some(self.module)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let name = self.name();
        let daemon = self.daemon.insert(start(place, &name, self.backend)?);
        let (path, many) = attach_all(place, &name, daemon, &[])?;
        match self.kind {
            Kind::Block => block(path, many, Some(daemon.pid())),
            kind => Ok(Opened { kind, path, many, server: Some(daemon.pid()) }),
        }
    }

    fn tear_down(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), Daemon::stop)
    }

    fn punts(&self) -> Option<u64> {
        punts(self.daemon.as_ref()?)
    }
}

/// A daemon with one frontend.
pub(super) fn start(place: &Environment, name: &str, frontend: &str) -> Result<Daemon> {
    Daemon::start_with(&place.directory(name)?.join("run"), &["--backend", frontend])
}

fn attach_all(
    place: &Environment,
    name: &str,
    daemon: &Daemon,
    words: &[&str],
) -> Result<(PathBuf, Vec<PathBuf>)> {
    let attach = |image: &PathBuf| -> Result<PathBuf> {
        let device = daemon.attach(image, words)?;
        check_mark(&device, image)?;
        Ok(device)
    };
    let path = attach(&place.image(name)?)?;
    let many = place.many(name)?.iter().map(attach).collect::<Result<_>>()?;
    Ok((path, many))
}

/// Sum over all devices of a daemon.
fn punts(daemon: &Daemon) -> Option<u64> {
    let devices = Client::new(&daemon.socket()).and_then(|mut client| client.stats()).ok()?;
    devices.iter().map(|device| device["punts"].as_u64().context("no punts").ok()).sum()
}
