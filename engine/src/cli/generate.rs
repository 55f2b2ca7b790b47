//! `loopengine generate`: manual pages and completions, from the definitions of this command line.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::complete;

/// Write manual pages or shell completions. For packagers.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Args {
    /// What to write.
    what: What,

    /// Directory to write to.
    dir: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    /// Manual pages.
    Man,
    /// Completions for bash, zsh and fish.
    Completions,
}

impl Args {
    pub(super) fn run(self) -> Result<()> {
        match self.what {
            What::Man => man(&self.dir),
            What::Completions => completions(&self.dir),
        }
    }
}

/// Writes a completion for each shell to `dir`.
pub fn completions(dir: &Path) -> Result<()> {
    for (name, text) in complete::scripts() {
        write(dir, &name, &text)?;
    }
    Ok(())
}

/// This command line as shells complete it.
pub(super) fn shown() -> clap::Command {
    let mut command = super::command();
    command.build();
    visible(&command)
}

/// The built `command` without the hidden ones, which clap would complete all the same.
fn visible(command: &clap::Command) -> clap::Command {
    // Building the copy adds these again.
    let built_in = |name: &str| ["help", "version"].contains(&name);
    let args = command.get_arguments().filter(|arg| !built_in(arg.get_id().as_str())).cloned();
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set() && !built_in(sub.get_name()));
    let has_version = command.get_arguments().any(|arg| arg.get_id() == "version");
    // clap takes only names that live as long as the program, which ends soon.
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
    for (name, text) in super::man::pages()? {
        write(dir, &name, &text)?;
    }
    Ok(())
}

fn write(dir: &Path, name: &str, text: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let cannot = |error| Error::os(error, format!("cannot write {}", path.display()));
    fs::create_dir_all(dir).map_err(cannot)?;
    fs::write(&path, text).map_err(cannot)
}
