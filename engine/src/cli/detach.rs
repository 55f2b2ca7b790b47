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

/// A relative path means something to us only: the daemon has another working directory.
pub(super) fn device(name: String) -> Selector {
    let relative = name.starts_with("./") || name.starts_with("../");
    let full = relative.then(|| std::path::absolute(&name).ok()).flatten();
    let full = full.and_then(|path| path.into_os_string().into_string().ok());
    Selector::Device(full.unwrap_or(name))
}
