// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine detach`: detach devices.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::frontend::kernel_loop;
use crate::instance::Selector;

use super::list::{ImageQuery, InstanceDevice, ROOT_ONLY, gather};
use super::pool_use::PoolUse;
use super::{complete, daemon, out};

/// Detach devices.
///
/// Flushes all writes to the image before it returns. Refuses to detach a device that is in use,
/// unless '--force' is given. Prints the paths of the detached devices.
#[derive(Debug, clap::Args)]
pub(super) struct DetachArgs {
    /// Devices to detach: a path, NAME/loopN, or loopN of the instance 'default'. Or an image with
    /// one device.
    #[arg(value_name = "DEVICE|IMAGE", required_unless_present = "all", conflicts_with = "all", add = complete::devices())]
    device: Vec<String>,

    /// Detach all devices of the daemon, or of one instance.
    #[arg(long)]
    all: bool,

    /// With '--all': detach only the devices of this instance.
    #[arg(short, long, value_name = "NAME", requires = "all", add = complete::instances())]
    instance: Option<String>,

    /// Detach devices that are in use. Their users get I/O errors.
    #[arg(short, long)]
    force: bool,
}

impl DetachArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let named: Vec<_> =
            self.device.into_iter().map(|name| target(name, run_dir)).collect::<Result<_>>()?;
        daemon::ask(run_dir, async |client| {
            let which = match (self.all, self.instance) {
                (false, _) => named,
                // One by one, to print those that are detached before one that is in use.
                (true, instance) => {
                    let all = instance.map_or(Selector::All, Selector::Instance);
                    let devices = client.devices(&all).await?.into_iter();
                    devices
                        .map(|one| Selector::Device(format!("{}/loop{}", one.instance, one.number)))
                        .collect()
                }
            };
            // Continue after a failure, as the daemon does with --all. Report the first failure.
            let mut failed = None;
            for which in &which {
                match client.detach(which, self.force).await {
                    Ok(gone) => {
                        let lines: String = gone.iter().map(|path| format!("{path}\n")).collect();
                        out::print(&lines)?;
                    }
                    Err(error) => {
                        failed.get_or_insert(error);
                    }
                }
            }
            failed.map_or(Ok(()), Err)
        })
    }
}

/// The selected device: by its name, or by an image that has one device.
pub(super) fn target(name: String, run_dir: &Path) -> Result<Selector> {
    if is_device(&name, run_dir) {
        return Ok(device(name));
    }
    let image = ImageQuery::named(Path::new(&name))?;
    let found = gather(run_dir, Some(&image))?;
    let names: Vec<String> = found
        .devices
        .iter()
        .map(|InstanceDevice { device, .. }| format!("{}/loop{}", device.instance, device.number))
        .collect();
    let pool_use = || PoolUse::first(&found.pools, Path::new(&name));
    match &names[..] {
        [_] => Ok(Selector::Device(names.concat())),
        [] => match pool_use() {
            Some(pool_use) => Err(pool_use.error(Path::new(&name))),
            None if Path::new(&name).exists() => Err(not_attached(&name)),
            // The daemon reports which names are valid.
            None => Ok(device(name)),
        },
        _ => Err(Error::new(Kind::Invalid, format!("{name} is attached as {}", names.join(", ")))
            .hint("give one of these device names")),
    }
}

fn not_attached(name: &str) -> Error {
    match rustix::process::geteuid().is_root() {
        true => Error::new(Kind::NotFound, format!("{name} is not attached"))
            .hint("'loopengine list --all' lists all devices"),
        false => {
            Error::new(Kind::NotFound, format!("{name} has no device that this user can see")).hint(ROOT_ONLY)
        }
    }
}

/// True if the name denotes a device: a name of the daemon, or a path to a device.
fn is_device(name: &str, run_dir: &Path) -> bool {
    let number = |name: &str| name.strip_prefix("loop").is_some_and(|number| number.parse::<u32>().is_ok());
    let path = std::fs::canonicalize(name).unwrap_or_else(|_| name.into());
    let run_dir = std::fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let by_name = match name.split_once('/') {
        Some((instance, device)) => !instance.is_empty() && !instance.starts_with('.') && number(device),
        None => number(name),
    };
    by_name
        || path.starts_with(run_dir)
        || path.to_string_lossy().starts_with("/dev/ublkb")
        || kernel_loop::is_node(&path)
}

/// The device selector for the daemon. The daemon has another working directory and knows only its
/// own paths, so a path becomes absolute, and a link to a disk becomes the path of the disk.
pub(super) fn device(name: String) -> Selector {
    let is_path = ["/", "./", "../"].iter().any(|start| name.starts_with(start));
    if !is_path {
        return Selector::Device(name);
    }
    let leads_to = std::fs::canonicalize(&name).ok().filter(|path| path.starts_with("/dev"));
    let path = leads_to.or_else(|| std::path::absolute(&name).ok());
    let path = path.and_then(|path| path.into_os_string().into_string().ok());
    Selector::Device(path.unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(name: &str) -> String {
        match device(name.to_owned()) {
            Selector::Device(name) => name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn makes_paths_absolute_and_keeps_names() {
        assert_eq!(sent("loop0"), "loop0");
        assert_eq!(sent("default/loop0"), "default/loop0");
        assert_eq!(sent("/nonexistent/loop0"), "/nonexistent/loop0");
        let here = std::env::current_dir().unwrap();
        assert_eq!(sent("./nonexistent"), here.join("nonexistent").to_str().unwrap());
    }

    #[test]
    fn resolves_links_to_disks() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("loop0");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert_eq!(sent(link.to_str().unwrap()), "/dev/null");
    }
}
