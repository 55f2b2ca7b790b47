//! `loopengine detach`: takes devices away.

use std::path::Path;

use crate::error::Result;
use crate::instance::Selector;

use super::{daemon, out};

/// Take devices away.
///
/// What was written is safe in the image when the command returns. A device that is in use is left
/// alone unless '--force' is given. Prints the paths that are gone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Devices: a path that leads to one, NAME/loopN, or loopN of the instance 'default'.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    device: Vec<String>,

    /// All devices, of the daemon or of one instance.
    #[arg(long)]
    all: bool,

    /// With '--all': only the devices of this instance.
    #[arg(short, long, value_name = "NAME", requires = "all")]
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
            (false, _) => self.device.into_iter().map(device).collect(),
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
