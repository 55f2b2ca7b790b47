// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine generate`: write manual pages and completions of this command line.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::complete;

/// Write manual pages or shell completions, for packagers.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct GenerateArgs {
    /// Files to write.
    what: What,

    /// Target directory.
    dir: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    /// Manual pages.
    Man,
    /// Completions for bash, zsh and fish.
    Completions,
}

impl GenerateArgs {
    pub(super) fn run(self) -> Result<()> {
        match self.what {
            What::Man => man(&self.dir),
            What::Completions => completions(&self.dir),
        }
    }
}

/// Writes the completion script of each shell to `dir`.
pub fn completions(dir: &Path) -> Result<()> {
    for (name, text) in complete::scripts() {
        write(dir, &name, &text)?;
    }
    Ok(())
}

/// The command line as shells complete it.
pub(super) fn completed_command() -> clap::Command {
    let mut command = super::command();
    command.build();
    visible(&command)
}

/// A copy of the built `command` without hidden commands, which clap would complete too.
fn visible(command: &clap::Command) -> clap::Command {
    // Building the copy adds these again.
    let built_in = |name: &str| ["help", "version"].contains(&name);
    let args = command.get_arguments().filter(|arg| !built_in(arg.get_id().as_str())).cloned();
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set() && !built_in(sub.get_name()));
    let has_version = command.get_arguments().any(|arg| arg.get_id() == "version");
    // clap needs static names; the process ends soon.
    clap::Command::new(&*command.get_name().to_owned().leak())
        .version(env!("CARGO_PKG_VERSION"))
        .disable_version_flag(!has_version)
        .about(command.get_about().cloned().unwrap_or_default())
        .args(args)
        .groups(command.get_groups().cloned())
        .subcommands(subcommands.map(visible))
}

/// Writes all manual pages to `dir`.
pub fn man(dir: &Path) -> Result<()> {
    for (name, text) in super::pages::PAGES {
        write(dir, name, text.as_bytes())?;
    }
    Ok(())
}

fn write(dir: &Path, name: &str, text: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let cannot = |error| Error::os(error, format!("cannot write {}", path.display()));
    fs::create_dir_all(dir).map_err(cannot)?;
    fs::write(&path, text).map_err(cannot)
}
