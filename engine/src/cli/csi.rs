// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine csi`: the CSI driver, a separate program and package.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Kind, Result};

/// The program, beside this one or in $PATH.
const PROGRAM: &str = "loopengine-csi";

/// Provide volumes to Kubernetes with the CSI driver.
///
/// Executes the program loopengine-csi, which is a separate package, from the directory of this
/// program or else from $PATH. '--run-dir' is passed on. 'loopengine csi --help' shows this page;
/// 'loopengine csi -- --help' lists the options of the driver.
#[derive(Debug, clap::Args)]
pub(super) struct CsiArgs {
    /// Options of loopengine-csi.
    #[arg(value_name = "ARGS", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

impl CsiArgs {
    /// Returns only on failure.
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let beside = std::env::current_exe().ok().map(|own| own.with_file_name(PROGRAM));
        let beside = beside.filter(|program| program.exists());
        let program = beside.as_deref().map_or(OsStr::new(PROGRAM), Path::as_os_str);
        let error = Command::new(program).args(self.args).env("LOOPENGINE_RUN_DIR", run_dir).exec();
        Err(match error.kind() {
            ErrorKind::NotFound => Error::new(Kind::NotFound, format!("there is no program {PROGRAM}"))
                .hint(format!("install the package {PROGRAM}, or put the program beside this one")),
            _ => Error::os(error, format!("cannot run {}", program.display())),
        })
    }
}
