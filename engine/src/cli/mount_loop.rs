// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `mount.loop`: the helper that mount(8) runs for `mount -t loop loop DIR -o max=8`.
//!
//! The same program under another name. Knows the option strings and exit codes of mount(8).

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::config::RUN_DIR;
use crate::error::{Error, Kind, Result};
use crate::loopfs::attach::{attach_mount, attach_mount_read_only};

use super::out;
use super::pool_options::{PoolOptions, open_pool, parse_mode};

/// File name that mount(8) searches.
pub(crate) const NAME: &str = "mount.loop";

/// Exit codes of mount(8).
const WRONG_USE: u8 = 1;
const NOT_MOUNTED: u8 = 32;

/// Mount a private pool of loop devices, for mount(8).
#[derive(Debug, Parser)]
#[command(name = NAME, version, disable_help_subcommand = true)]
struct MountLoopArgs {
    /// Source; ignored, by convention 'loop'.
    source: String,

    /// Mount point.
    dir: PathBuf,

    /// Ignore unknown options.
    #[arg(short)]
    sloppy: bool,

    /// Do everything except the mount.
    #[arg(short)]
    fake: bool,

    /// No effect: there is no mount table to write.
    #[arg(short)]
    no_table: bool,

    /// Print the name of the pool.
    #[arg(short)]
    verbose: bool,

    /// Mount namespace; not supported.
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,

    /// Type; must be 'loop'.
    #[arg(short, value_name = "TYPE")]
    typed: Option<String>,

    /// Comma-separated options.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Parsed options.
#[derive(Debug, Default, PartialEq, Eq)]
struct MountOptions {
    pool: PoolOptions,
    read_only: bool,
}

/// Entry point under this name.
pub fn main() -> ExitCode {
    let args = match MountLoopArgs::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { WRONG_USE.into() } else { ExitCode::SUCCESS };
        }
    };
    match args.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{NAME}: {error}");
            let code = if error.kind() == Kind::Invalid { WRONG_USE } else { NOT_MOUNTED };
            code.into()
        }
    }
}

impl MountLoopArgs {
    fn run(self) -> Result<()> {
        if self.namespace.is_some() {
            return Err(Error::new(Kind::Unsupported, "-N (another mount namespace) is not supported")
                .hint("run 'nsenter --mount=NAMESPACE mount' instead"));
        }
        if let Some(typed) = self.typed.filter(|typed| typed != "loop") {
            return Err(Error::new(Kind::Invalid, format!("the type is '{typed}', not 'loop'")));
        }
        let options = parse(self.options.iter().flat_map(|list| list.split(',')), self.sloppy)?;
        if self.fake {
            return Ok(());
        }
        let run_dir = std::env::var_os("LOOPENGINE_RUN_DIR").map_or_else(|| RUN_DIR.into(), PathBuf::from);
        let name = mount(&run_dir, &self.dir, &options)?;
        match self.verbose {
            true => {
                let line = format!("{NAME}: pool {name} is mounted on {}.\n", self.dir.display());
                out::print(&line).map(drop)
            }
            false => Ok(()),
        }
    }
}

fn mount(run_dir: &Path, dir: &Path, options: &MountOptions) -> Result<String> {
    let (name, mount) = open_pool(run_dir, &options.pool)?;
    match options.read_only {
        true => attach_mount_read_only(mount.as_fd(), dir)?,
        false => attach_mount(mount.as_fd(), dir)?,
    }
    Ok(name)
}

/// Parses options. A later option overrides an earlier one.
fn parse<'a>(words: impl Iterator<Item = &'a str>, sloppy: bool) -> Result<MountOptions> {
    let mut options = MountOptions::default();
    for word in words.filter(|word| !word.is_empty()) {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let pool = &mut options.pool;
        match key {
            "name" if !value.is_empty() => pool.name = Some(value.to_owned()),
            "max" => {
                pool.max = Some(number(word, value).and_then(|max| match max {
                    0 => {
                        Err(Error::new(Kind::Invalid, format!("'{word}': a pool needs at least one device")))
                    }
                    max => Ok(max),
                })?)
            }
            "uid" => pool.uid = Some(number(word, value)?),
            "gid" => pool.gid = Some(number(word, value)?),
            "mode" => {
                let mode =
                    parse_mode(value).map_err(|why| Error::new(Kind::Invalid, format!("'{word}': {why}")))?;
                pool.mode = Some(mode);
            }
            "backend" => {
                let backend =
                    value.parse().map_err(|why| Error::new(Kind::Invalid, format!("'{word}': {why}")))?;
                pool.backend = Some(backend);
            }
            "ro" => options.read_only = true,
            "rw" => options.read_only = false,
            "nodev" => {
                let message = "'nodev' would prevent opening the devices";
                return Err(Error::new(Kind::Invalid, message).hint("omit it, or add 'dev' after 'user'"));
            }
            "remount" => {
                let message = "'remount' is not supported: the options of a pool are fixed";
                return Err(Error::new(Kind::Invalid, message).hint("unmount the pool and mount a new one"));
            }
            key if is_ignored(key) => {}
            _ if sloppy => {}
            _ => {
                let message = format!("'{word}' is not an option of this file system");
                return Err(Error::new(Kind::Invalid, message)
                    .hint("use max=, uid=, gid=, mode=, name= and backend="));
            }
        }
    }
    Ok(options)
}

fn number(word: &str, value: &str) -> Result<u32> {
    value.parse().map_err(|_| Error::new(Kind::Invalid, format!("'{word}': '{value}' is not a number")))
}

/// Options of mount(8) and systemd, and options without effect.
fn is_ignored(key: &str) -> bool {
    const MOUNTING: &[&str] = &[
        "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers", "group",
        "nogroup", "owner", "noowner", "comment", "helper", "uhelper",
    ];
    const WITHOUT_EFFECT: &[&str] = &[
        "nosuid",
        "suid",
        "noexec",
        "exec",
        "dev",
        "sync",
        "async",
        "dirsync",
        "silent",
        "loud",
        "mand",
        "nomand",
        "iversion",
        "noiversion",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "norelatime",
        "strictatime",
        "nostrictatime",
        "lazytime",
        "nolazytime",
    ];
    MOUNTING.contains(&key) || WITHOUT_EFFECT.contains(&key) || key.starts_with("x-") || key.starts_with("X-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::BackendKind;

    fn parsed(text: &str) -> std::result::Result<MountOptions, String> {
        parse(text.split(','), false).map_err(|error| error.to_string())
    }

    #[test]
    fn parses_options() {
        let all =
            parsed("rw,max=3,uid=1000,gid=7,mode=0640,name=ci,backend=loop,_netdev,x-systemd.automount")
                .unwrap();
        let pool = PoolOptions {
            name: Some("ci".to_owned()),
            max: Some(3),
            uid: Some(1000),
            gid: Some(7),
            mode: Some(0o640),
            backend: Some(BackendKind::Loop),
        };
        assert_eq!(all, MountOptions { pool, read_only: false });
        assert_eq!(parsed("").unwrap(), MountOptions::default());
        assert!(parsed("ro,noexec,nosuid,relatime").unwrap().read_only);
        assert!(!parsed("ro,rw").unwrap().read_only, "the later wins");
    }

    #[test]
    fn refuses_unknown_options() {
        for (text, says) in [
            ("max=0", "at least one device"),
            ("max=many", "'many' is not a number"),
            ("max", "'' is not a number"),
            ("uid=-1", "'-1'"),
            ("mode=888", "'mode=888'"),
            ("mode=7777", "'mode=7777'"),
            ("name=", "'name='"),
            ("backend=nbd", "'nbd'"),
            ("user,noexec,nosuid,nodev", "add 'dev'"),
            ("remount,ro", "remount"),
            ("context=x", "'context=x' is not an option"),
            ("bind", "'bind'"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(parse(["bind", "max=2"].into_iter(), true).is_ok(), "sloppy");
        assert!(parse(["max=x"].into_iter(), true).is_err(), "bad values are errors");
    }
}
