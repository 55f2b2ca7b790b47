// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine features`: show what this kernel supports.

use crate::error::{Kind, Result};
use crate::instance::Engine;
use crate::instance::spec::Features;

use super::out;

/// Show what this kernel supports.
///
/// Queries the kernel; the daemon need not run. Needs root if there is a ublk driver. All lines except the first two describe
/// block devices of the ublk driver. A line 'fault' says why 'loopengine serve' refuses block devices
/// on this kernel.
#[derive(Debug, clap::Args)]
pub(super) struct FeaturesArgs {
    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl FeaturesArgs {
    pub(super) fn run(self) -> Result<()> {
        let features = Engine::features().map_err(|error| match error.kind() {
            Kind::Denied => error.hint("run this as root; as a plain user, run 'loopengine doctor'"),
            _ => error,
        })?;
        if self.json {
            return out::json(&features).map(drop);
        }
        out::print(&text(&features)).map(drop)
    }
}

fn text(features: &Features) -> String {
    let modes: Vec<&str> = features.io_modes.iter().map(|mode| mode.as_str()).collect();
    let backends: Vec<&str> = features.backends.iter().map(|backend| backend.as_str()).collect();
    let yes = |supported: bool| if supported { "yes" } else { "no" };
    let fault = features.driver_fault.as_ref().map(|fault| format!("fault     {fault}\n"));
    format!(
        "kernel    {}\nbackends  {}\nI/O modes {}\nrecovery  {}\nresize    {}\nflags     {}\n{}",
        features.kernel,
        if backends.is_empty() { "none".to_owned() } else { backends.join(" ") },
        if modes.is_empty() { "none".to_owned() } else { format!("{} (best first)", modes.join(" ")) },
        yes(features.recovery),
        yes(features.resize),
        features.flags.join(" "),
        fault.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::spec::{BackendKind, IoMode};

    #[test]
    fn formats_features() {
        let features = Features {
            kernel: "7.3.4".into(),
            backends: vec![BackendKind::Ublk, BackendKind::Fuse],
            flags: vec!["CMD_IOCTL_ENCODE".into(), "USER_COPY".into()],
            io_modes: vec![IoMode::Auto, IoMode::Copy],
            recovery: true,
            resize: false,
            driver_fault: None,
        };
        let want = "kernel    7.3.4\nbackends  ublk fuse\nI/O modes auto copy (best first)\nrecovery  yes\n\
                    resize    no\nflags     CMD_IOCTL_ENCODE USER_COPY\n";
        assert_eq!(text(&features), want);
        let broken = Features { driver_fault: Some("it crashes".into()), ..features };
        assert_eq!(text(&broken), format!("{want}fault     it crashes\n"));
    }
}
