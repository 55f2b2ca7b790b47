// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine install`: installs this program and its files, and removes them again.
//!
//! Knows the directories that distributions use. A record lists each installed file with a
//! checksum, so that only unchanged files of this program are replaced or removed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

use super::{complete, mount_loop, out, pages};

const UNIT: &str = include_str!("../../share/systemd/loopengine.service");
const SOCKET: &str = include_str!("../../share/systemd/loopengine.socket");
const PRIVATE_SOCKET: &str = include_str!("../../share/systemd/loopengine-private.socket");
const METRICS: &str = include_str!("../../share/systemd/loopengine-metrics.service");
const MONITORING: [(&str, &str); 2] = [
    ("alerts.yml", include_str!("../../share/monitoring/alerts.yml")),
    ("dashboard.json", include_str!("../../share/monitoring/dashboard.json")),
];
/// A drop-in for the unit that makes FUSE files visible. An example.
const FUSE: &str = include_str!("../../share/systemd/fuse.conf");
const DESKTOP: &str = include_str!("../../share/applications/loopengine-mount.desktop");
const UDEV: &str = include_str!("../../share/udev/59-loopengine.rules");
const MODULES_LOAD: &str = include_str!("../../share/modules-load.d/loopengine.conf");
const MODPROBE: &str = include_str!("../../share/modprobe.d/loopengine.conf");
const APPARMOR: &str = include_str!("../../share/apparmor/loopengine");
const VARLINK: [(&str, &str); 2] = [
    ("io.loopengine.varlink", include_str!("../../io.loopengine.varlink")),
    ("io.loopengine.Private.varlink", include_str!("../../io.loopengine.Private.varlink")),
];
/// Exists where AppArmor understands the profile; older versions report it as broken.
const APPARMOR_4: &str = "/etc/apparmor.d/abi/4.0";
/// Path of the program in the unit of the repository.
const PACKAGED: &str = "/usr/bin/loopengine";
/// Record of installed files, below the prefix.
const RECORD: &str = "share/loopengine/installed";
/// Mode of the program; other files have 0644.
const PROGRAM: u32 = 0o755;

/// Install this program.
///
/// Installs the program, mount.loop for mount(8), systemd units, udev rules, settings of the ublk
/// driver, an AppArmor profile, manual pages, completions and varlink interfaces. Does not start the
/// daemon: run 'systemctl enable --now loopengine', or enable loopengine.socket to start it on
/// demand. Refuses to replace files of others, and then installs nothing. The environment variable
/// DESTDIR sets a staging directory.
#[derive(Debug, clap::Args)]
pub(super) struct InstallArgs {
    /// Install below this directory. With '/usr', settings go to /usr/lib instead of /etc.
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,

    /// Remove the installed files, and nothing else.
    #[arg(long)]
    uninstall: bool,

    /// Print the paths only.
    #[arg(long)]
    dry_run: bool,

    /// Staging directory, for packagers. The empty DESTDIR of makefiles means none.
    #[arg(
        long,
        value_name = "DIR",
        env = "DESTDIR",
        default_value = "",
        hide = true,
        hide_env_values = true
    )]
    destdir: OsString,
}

/// A file or link to install.
#[derive(Debug)]
enum Item {
    File { content: Vec<u8>, mode: u32 },
    Link(PathBuf),
}

impl InstallArgs {
    pub(super) fn run(self) -> Result<()> {
        if !self.prefix.is_absolute() {
            let message = format!("the prefix {} is not an absolute path", self.prefix.display());
            return Err(Error::new(Kind::Invalid, message));
        }
        let destination = Destination {
            destdir: self.destdir.into(),
            record: self.prefix.join(RECORD),
            dry_run: self.dry_run,
        };
        match self.uninstall {
            true => destination.uninstall(),
            false => {
                let program = fs::read("/proc/self/exe")
                    .map_err(|error| Error::os(error, "cannot read the program itself"))?;
                let apparmor = destination.in_destdir(Path::new(APPARMOR_4)).exists();
                destination.install(&items(&self.prefix, program, apparmor)?)
            }
        }
    }
}

/// All files and links to install. Packages are made of this list too (`cargo lab package`).
fn items(prefix: &Path, program: Vec<u8>, apparmor: bool) -> Result<BTreeMap<PathBuf, Item>> {
    let file = |content: &[u8]| Item::File { content: content.to_vec(), mode: 0o644 };
    let bin = prefix.join("bin/loopengine");
    let [unit, metrics] = [UNIT, METRICS].map(|text| text.replace(PACKAGED, &bin.to_string_lossy()));
    // Older systemd and udev do not read /usr/local.
    let settings = Path::new(if prefix == Path::new("/usr") { "/usr/lib" } else { "/etc" });
    // mount(8) searches only this directory.
    let sbin = Path::new(if Path::new("/sbin").is_symlink() { "/usr/sbin" } else { "/sbin" });
    // Relative where it can be, as distributions demand, so that it also holds in a staging directory.
    let link = if sbin.parent() == Some(prefix) { "../bin/loopengine".into() } else { bin.clone() };
    let desktop = DESKTOP.replace(PACKAGED, &bin.to_string_lossy());
    let profile = APPARMOR.replace(PACKAGED, &bin.to_string_lossy());
    let mut items = BTreeMap::from([
        (bin, Item::File { content: program, mode: PROGRAM }),
        (sbin.join(mount_loop::NAME), Item::Link(link)),
        (settings.join("systemd/system/loopengine.service"), file(unit.as_bytes())),
        (settings.join("systemd/system/loopengine-metrics.service"), file(metrics.as_bytes())),
        (settings.join("systemd/system/loopengine.socket"), file(SOCKET.as_bytes())),
        (settings.join("systemd/system/loopengine-private.socket"), file(PRIVATE_SOCKET.as_bytes())),
        (prefix.join("share/applications/loopengine-mount.desktop"), file(desktop.as_bytes())),
        (prefix.join("share/loopengine/fuse.conf"), file(FUSE.as_bytes())),
        (prefix.join("share/loopengine/apparmor"), file(profile.as_bytes())),
        (settings.join("udev/rules.d/59-loopengine.rules"), file(UDEV.as_bytes())),
        (settings.join("modules-load.d/loopengine.conf"), file(MODULES_LOAD.as_bytes())),
        (settings.join("modprobe.d/loopengine.conf"), file(MODPROBE.as_bytes())),
    ]);
    if apparmor {
        items.insert("/etc/apparmor.d/loopengine".into(), file(profile.as_bytes()));
    }
    let share = prefix.join("share");
    for (name, text) in MONITORING {
        items.insert(share.join("loopengine/monitoring").join(name), file(text.as_bytes()));
    }
    for (name, text) in VARLINK {
        items.insert(share.join("loopengine/varlink").join(name), file(text.as_bytes()));
    }
    for (name, text) in pages::PAGES {
        let section = name.rsplit('.').next().unwrap_or("1");
        items.insert(share.join(format!("man/man{section}")).join(name), file(text.as_bytes()));
    }
    for (name, text) in complete::scripts() {
        let path = match name.as_str() {
            "loopengine.bash" => "bash-completion/completions/loopengine".to_owned(),
            "loopengine.fish" => format!("fish/vendor_completions.d/{name}"),
            _ => format!("zsh/site-functions/{name}"),
        };
        items.insert(share.join(path), file(&text));
    }
    Ok(items)
}

/// The target of an installation.
struct Destination {
    destdir: PathBuf,
    record: PathBuf,
    dry_run: bool,
}

impl Destination {
    /// A path in the staging directory.
    fn in_destdir(&self, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(relative) if !self.destdir.as_os_str().is_empty() => self.destdir.join(relative),
            _ => path.to_owned(),
        }
    }

    fn install(&self, items: &BTreeMap<PathBuf, Item>) -> Result<()> {
        let before = self.read_record()?;
        for (path, item) in items {
            self.check(path, item, &before)?;
        }
        let mut record = before.clone();
        if !self.dry_run {
            self.make_parents(&self.record, &mut record)?;
        }
        let mut text = String::new();
        for (path, item) in items {
            let at = self.in_destdir(path);
            if !self.dry_run {
                self.make_parents(path, &mut record)?;
                // After an interruption here, the next run recognizes the file by its contents.
                write_atomically(&at, item)?;
                record.insert(path.clone(), checksum_of(item));
                self.write_record(&record)?;
            }
            text.push_str(&format!("{}\n", at.display()));
        }
        // Files of an earlier version that this version lacks.
        for (path, sum) in
            before.iter().filter(|(path, sum)| **sum != Checksum::Directory && !items.contains_key(*path))
        {
            if !self.dry_run && self.remove_unchanged(path, *sum)? {
                record.remove(path);
                self.write_record(&record)?;
            }
        }
        out::print(&text)?;
        if !self.dry_run && self.destdir.as_os_str().is_empty() {
            out::message(format_args!(
                "start the daemon with 'systemctl daemon-reload && systemctl enable --now loopengine'"
            ));
        }
        Ok(())
    }

    fn uninstall(&self) -> Result<()> {
        let mut record = self.read_record()?;
        if record.is_empty() {
            let message =
                format!("nothing was installed: {} is missing", self.in_destdir(&self.record).display());
            return Err(Error::new(Kind::NotFound, message).hint("give the --prefix of the installation"));
        }
        let mut left = BTreeMap::new();
        // Directories last, deepest first.
        let (directories, files): (Vec<_>, Vec<_>) =
            std::mem::take(&mut record).into_iter().partition(|(_, sum)| *sum == Checksum::Directory);
        for (path, sum) in files {
            if self.dry_run || self.remove_unchanged(&path, sum)? {
                out::print(&format!("{}\n", self.in_destdir(&path).display()))?;
            } else {
                left.insert(path, sum);
            }
        }
        if self.dry_run {
            return Ok(());
        }
        let _ = fs::remove_file(self.in_destdir(&self.record));
        for (path, _) in directories.into_iter().rev() {
            // A directory with files of others stays.
            let _ = fs::remove_dir(self.in_destdir(&path));
        }
        match left.keys().next() {
            None => Ok(()),
            Some(path) => {
                let message = format!("did not remove a changed file: {}", self.in_destdir(path).display());
                Err(Error::new(Kind::Exists, message).hint("remove the file yourself"))
            }
        }
    }

    /// Refuses to replace files of others, and changed files.
    fn check(&self, path: &Path, item: &Item, record: &BTreeMap<PathBuf, Checksum>) -> Result<()> {
        let at = self.in_destdir(path);
        let present =
            checksum_at(&at).map_err(|error| Error::os(error, format!("cannot access {}", at.display())))?;
        let Some(present) = present else { return Ok(()) };
        if present == checksum_of(item) || record.get(path) == Some(&present) {
            return Ok(());
        }
        let shown = at.display();
        if at.is_symlink() && at.canonicalize().ok() == fs::read_link("/proc/self/exe").ok() {
            let message = format!("{shown} is a link to the program that runs");
            return Err(Error::new(Kind::Exists, message).hint(format!("remove it ('rm {shown}')")));
        }
        let message = match record.contains_key(path) {
            true => format!("{shown} was changed since it was installed"),
            false => format!("{shown} exists and does not belong to loopengine"),
        };
        Err(Error::new(Kind::Exists, message).hint("move the file away first"))
    }

    /// Removes a file unless it was changed. True if it no longer exists.
    fn remove_unchanged(&self, path: &Path, sum: Checksum) -> Result<bool> {
        let at = self.in_destdir(path);
        let cannot = |error| Error::os(error, format!("cannot remove {}", at.display()));
        match checksum_at(&at).map_err(cannot)? {
            None => Ok(true),
            Some(present) if present == sum => fs::remove_file(&at).map(|()| true).map_err(cannot),
            Some(_) => Ok(false),
        }
    }

    /// Creates missing parent directories of `path` and records them.
    fn make_parents(&self, path: &Path, record: &mut BTreeMap<PathBuf, Checksum>) -> Result<()> {
        let missing: Vec<&Path> =
            path.ancestors().skip(1).take_while(|above| !self.in_destdir(above).exists()).collect();
        for directory in missing.into_iter().rev() {
            let at = self.in_destdir(directory);
            let cannot =
                |error| Error::os(error, format!("cannot create {}", at.display())).hint("run this as root");
            fs::create_dir_all(&at).map_err(cannot)?;
            fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).map_err(cannot)?;
            record.insert(directory.to_owned(), Checksum::Directory);
        }
        Ok(())
    }

    fn read_record(&self) -> Result<BTreeMap<PathBuf, Checksum>> {
        let at = self.in_destdir(&self.record);
        let text = match fs::read_to_string(&at) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(Error::os(error, format!("cannot read {}", at.display()))),
        };
        let entry = |line: &str| {
            let (sum, path) = line.split_once(' ')?;
            let sum = if sum == "directory" {
                Checksum::Directory
            } else {
                Checksum::Of(u64::from_str_radix(sum, 16).ok()?)
            };
            Some((PathBuf::from(path), sum))
        };
        let record: Option<BTreeMap<PathBuf, Checksum>> = text.lines().map(entry).collect();
        record.ok_or_else(|| Error::new(Kind::Invalid, format!("{} is damaged", at.display())))
    }

    fn write_record(&self, record: &BTreeMap<PathBuf, Checksum>) -> Result<()> {
        let line = |(path, sum): (&PathBuf, &Checksum)| match sum {
            Checksum::Directory => format!("directory {}\n", path.display()),
            Checksum::Of(sum) => format!("{sum:016x} {}\n", path.display()),
        };
        let at = self.in_destdir(&self.record);
        let content = record.iter().map(line).collect::<String>().into_bytes();
        write_atomically(&at, &Item::File { content, mode: 0o644 })
    }
}

/// State of a path after its installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksum {
    /// A directory that did not exist before.
    Directory,
    /// A file or link with this checksum.
    Of(u64),
}

fn checksum_of(item: &Item) -> Checksum {
    match item {
        Item::File { content, .. } => checksum(b"file", content),
        Item::Link(target) => checksum(b"link", target.as_os_str().as_encoded_bytes()),
    }
}

/// None if nothing exists there. Special files never match.
fn checksum_at(path: &Path) -> io::Result<Option<Checksum>> {
    let kind = match fs::symlink_metadata(path) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if kind.is_symlink() {
        return Ok(Some(checksum(b"link", fs::read_link(path)?.as_os_str().as_encoded_bytes())));
    }
    if kind.is_file() {
        return Ok(Some(checksum(b"file", &fs::read(path)?)));
    }
    Ok(Some(Checksum::Of(0)))
}

/// Detects changes, not attacks.
fn checksum(kind: &[u8], content: &[u8]) -> Checksum {
    Checksum::Of(crate::hash::fnv1a(kind.iter().chain(content)))
}

/// Replaces the file atomically: nobody sees a partial file, and a running program can be replaced.
fn write_atomically(path: &Path, item: &Item) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let placed = (|| {
        let _ = fs::remove_file(&temporary);
        match item {
            Item::File { content, mode } => {
                let mut file = fs::File::create_new(&temporary)?;
                io::Write::write_all(&mut file, content)?;
                file.set_permissions(fs::Permissions::from_mode(*mode))?;
            }
            Item::Link(target) => symlink(target, &temporary)?,
        }
        fs::rename(&temporary, path)
    })();
    placed.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        let made = Error::os(error, format!("cannot write {}", path.display()));
        if made.kind() == Kind::Denied { made.hint("run this as root") } else { made }
    })
}
