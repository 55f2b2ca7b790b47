//! `loopengine detach`: takes devices away.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;

use super::list::{Image, InstanceDevice, gather};
use super::{complete, daemon, out};

/// Take devices away.
///
/// What was written is safe in the image when the command returns. A device that is in use is left
/// alone unless '--force' is given. Prints the paths that are gone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Devices: a path that leads to one, NAME/loopN, or loopN of the instance 'default'. Or the image of one.
    #[arg(value_name = "DEVICE|IMAGE", required_unless_present = "all", conflicts_with = "all", add = complete::devices())]
    device: Vec<String>,

    /// All devices, of the daemon or of one instance.
    #[arg(long)]
    all: bool,

    /// With '--all': only the devices of this instance.
    #[arg(short, long, value_name = "NAME", requires = "all", add = complete::instances())]
    instance: Option<String>,

    /// Also if it is in use. Whoever uses it gets input/output errors.
    #[arg(short, long)]
    force: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let which = match (self.all, self.instance) {
            (true, None) => vec![Selector::All],
            (true, Some(instance)) => vec![Selector::Instance(instance)],
            (false, _) => self.device.into_iter().map(|name| target(name, run_dir)).collect::<Result<_>>()?,
        };
        daemon::ask(run_dir, async |client| {
            // On after a failure, as the daemon does with --all; the first one is reported.
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

/// The device that is meant: by its name, or by its image, which has only one.
fn target(name: String, run_dir: &Path) -> Result<Selector> {
    if is_device(&name, run_dir) {
        return Ok(device(name));
    }
    let image = Image::named(Path::new(&name))?;
    let found = gather(run_dir, Some(&image))?;
    let names: Vec<String> = found
        .devices
        .iter()
        .map(|InstanceDevice { device, .. }| format!("{}/loop{}", device.instance, device.number))
        .collect();
    match (&names[..], found.pools.first()) {
        ([_], _) => Ok(Selector::Device(names.concat())),
        ([], None) if Path::new(&name).exists() => {
            Err(Error::new(Kind::NotFound, format!("{name} is not attached"))
                .hint("'loopengine list --all' shows all devices"))
        }
        // The daemon says what it takes for a name.
        ([], None) => Ok(device(name)),
        ([], Some(pool)) => {
            let number = pool.devices.first().map_or(0, |device| device.number);
            let holder = pool.process.as_ref().map_or(String::new(), |process| format!(", {process}"));
            let user = pool.user.clone().unwrap_or_else(|| pool.uid.to_string());
            let message =
                format!("{name} is loop{number} of private pool {} (user {user}{holder})", pool.name);
            Err(Error::new(Kind::Busy, message).hint(format!(
                "unbind it there: 'loopengine losetup --pool {} --detach loop{number}'",
                pool.name
            )))
        }
        _ => Err(Error::new(Kind::Invalid, format!("{name} is attached as {}", names.join(", ")))
            .hint("give one of these devices")),
    }
}

/// Whether a name can only be a device's: one of the daemon's names, or a path that leads to one.
fn is_device(name: &str, run_dir: &Path) -> bool {
    let number = |name: &str| name.strip_prefix("loop").is_some_and(|number| number.parse::<u32>().is_ok());
    let path = std::fs::canonicalize(name).unwrap_or_else(|_| name.into());
    let run_dir = std::fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let by_name = match name.split_once('/') {
        Some((instance, device)) => !instance.is_empty() && !instance.starts_with('.') && number(device),
        None => number(name),
    };
    by_name || path.starts_with(run_dir) || path.to_string_lossy().starts_with("/dev/ublkb")
}

/// What a user calls a device, as the daemon understands it: it has another working directory, and
/// knows its own paths only. So a path that leads to a disk becomes the path of that disk.
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
    fn paths_become_absolute_and_names_stay() {
        assert_eq!(sent("loop0"), "loop0");
        assert_eq!(sent("default/loop0"), "default/loop0");
        assert_eq!(sent("/nonexistent/loop0"), "/nonexistent/loop0");
        let here = std::env::current_dir().unwrap();
        assert_eq!(sent("./nonexistent"), here.join("nonexistent").to_str().unwrap());
    }

    #[test]
    fn a_link_to_a_disk_becomes_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("loop0");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert_eq!(sent(link.to_str().unwrap()), "/dev/null");
    }
}
