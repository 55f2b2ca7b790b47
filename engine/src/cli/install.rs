//! `loopengine install`: places this program and all that belongs to it, and takes it away again.
//!
//! Knows where distributions look for things. What was placed is written down with a checksum of
//! each file, so that only these files are replaced or removed, and only as long as nobody has
//! changed them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

use super::{complete, man, mount_loop, out};

const UNIT: &str = include_str!("../../share/systemd/loopengine.service");
const SOCKET: &str = include_str!("../../share/systemd/loopengine.socket");
const PRIVATE_SOCKET: &str = include_str!("../../share/systemd/loopengine-private.socket");
/// A drop-in for the unit, for who serves files: an example.
const FUSE: &str = include_str!("../../share/systemd/fuse.conf");
const DESKTOP: &str = include_str!("../../share/applications/loopengine-mount.desktop");
const UDEV: &str = include_str!("../../share/udev/59-loopengine.rules");
const MODULES_LOAD: &str = include_str!("../../share/modules-load.d/loopengine.conf");
const MODPROBE: &str = include_str!("../../share/modprobe.d/loopengine.conf");
/// Where the unit in the repository expects the program.
const PACKAGED: &str = "/usr/bin/loopengine";
/// What was placed, below the prefix.
const RECORD: &str = "share/loopengine/installed";
/// Mode of the program; what is not a program is 0644.
const PROGRAM: u32 = 0o755;

/// Install this program on this machine.
///
/// Places the program, mount.loop for mount(8), the systemd units, rules for udev, settings for the
/// ublk driver, manual pages and completions. 'systemctl enable --now loopengine.socket' instead of
/// 'loopengine' starts the daemon when it is first used. Refuses to replace files that it did not place, and
/// then places none. With the environment variable DESTDIR, everything is placed below that
/// directory. Starts nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where programs and manual pages go. With '/usr', settings go to /usr/lib instead of /etc.
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,

    /// Take away what was placed, and nothing else.
    #[arg(long)]
    uninstall: bool,

    /// Only print the paths.
    #[arg(long)]
    dry_run: bool,

    /// Directory below which to place everything, for packagers.
    #[arg(long, value_name = "DIR", env = "DESTDIR", hide = true, hide_env_values = true)]
    destdir: Option<PathBuf>,
}

/// What a path is to be.
#[derive(Debug)]
enum Item {
    File { content: Vec<u8>, mode: u32 },
    Link(PathBuf),
}

impl Args {
    pub(super) fn run(self) -> Result<()> {
        if !self.prefix.is_absolute() {
            let message = format!("the prefix {} is not an absolute path", self.prefix.display());
            return Err(Error::new(Kind::Invalid, message));
        }
        let destination = Destination {
            below: self.destdir.unwrap_or_default(),
            record: self.prefix.join(RECORD),
            dry: self.dry_run,
        };
        match self.uninstall {
            true => destination.uninstall(),
            false => {
                let program = fs::read("/proc/self/exe")
                    .map_err(|error| Error::os(error, "cannot read the program itself"))?;
                destination.install(&items(&self.prefix, program)?)
            }
        }
    }
}

/// All that is placed.
fn items(prefix: &Path, program: Vec<u8>) -> Result<BTreeMap<PathBuf, Item>> {
    let file = |content: &[u8]| Item::File { content: content.to_vec(), mode: 0o644 };
    let bin = prefix.join("bin/loopengine");
    let unit = UNIT.replace(PACKAGED, &bin.to_string_lossy());
    // Older versions of some of the readers do not look below /usr/local.
    let settings = Path::new(if prefix == Path::new("/usr") { "/usr/lib" } else { "/etc" });
    // mount(8) looks nowhere else.
    let sbin = Path::new(if Path::new("/sbin").is_symlink() { "/usr/sbin" } else { "/sbin" });
    let desktop = DESKTOP.replace(PACKAGED, &bin.to_string_lossy());
    let mut items = BTreeMap::from([
        (bin.clone(), Item::File { content: program, mode: PROGRAM }),
        (sbin.join(mount_loop::NAME), Item::Link(bin)),
        (settings.join("systemd/system/loopengine.service"), file(unit.as_bytes())),
        (settings.join("systemd/system/loopengine.socket"), file(SOCKET.as_bytes())),
        (settings.join("systemd/system/loopengine-private.socket"), file(PRIVATE_SOCKET.as_bytes())),
        (prefix.join("share/applications/loopengine-mount.desktop"), file(desktop.as_bytes())),
        (prefix.join("share/loopengine/fuse.conf"), file(FUSE.as_bytes())),
        (settings.join("udev/rules.d/59-loopengine.rules"), file(UDEV.as_bytes())),
        (settings.join("modules-load.d/loopengine.conf"), file(MODULES_LOAD.as_bytes())),
        (settings.join("modprobe.d/loopengine.conf"), file(MODPROBE.as_bytes())),
    ]);
    let share = prefix.join("share");
    for (name, text) in man::pages()? {
        let section = name.rsplit('.').next().unwrap_or("1");
        items.insert(share.join(format!("man/man{section}")).join(&name), file(&text));
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

/// Where things go.
struct Destination {
    below: PathBuf,
    record: PathBuf,
    dry: bool,
}

impl Destination {
    /// Where a path is really.
    fn at(&self, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(relative) if !self.below.as_os_str().is_empty() => self.below.join(relative),
            _ => path.to_owned(),
        }
    }

    fn install(&self, items: &BTreeMap<PathBuf, Item>) -> Result<()> {
        let before = self.read_record()?;
        for (path, item) in items {
            self.check(path, item, &before)?;
        }
        let mut record = before.clone();
        if !self.dry {
            self.make_parents(&self.record, &mut record)?;
        }
        let mut text = String::new();
        for (path, item) in items {
            let at = self.at(path);
            if !self.dry {
                self.make_parents(path, &mut record)?;
                // Should this end here, it is taken for ours when it is tried again: it is the same.
                place(&at, item)?;
                record.insert(path.clone(), sum_of(item));
                self.write_record(&record)?;
            }
            text.push_str(&format!("{}\n", at.display()));
        }
        // What an earlier version had and this one has not.
        for (path, sum) in
            before.iter().filter(|(path, sum)| **sum != Sum::Directory && !items.contains_key(*path))
        {
            if !self.dry && self.take(path, *sum)? {
                record.remove(path);
                self.write_record(&record)?;
            }
        }
        out::print(&text)?;
        if !self.dry && self.below.as_os_str().is_empty() {
            eprintln!(
                "loopengine: start it with 'systemctl daemon-reload && systemctl enable --now loopengine'"
            );
        }
        Ok(())
    }

    fn uninstall(&self) -> Result<()> {
        let mut record = self.read_record()?;
        if record.is_empty() {
            let message = format!("nothing was installed: {} is missing", self.at(&self.record).display());
            return Err(
                Error::new(Kind::NotFound, message).hint("give the --prefix that it was installed with")
            );
        }
        let mut left = BTreeMap::new();
        // Directories last, the deepest first.
        let (directories, files): (Vec<_>, Vec<_>) =
            std::mem::take(&mut record).into_iter().partition(|(_, sum)| *sum == Sum::Directory);
        for (path, sum) in files {
            if self.dry || self.take(&path, sum)? {
                out::print(&format!("{}\n", self.at(&path).display()))?;
            } else {
                left.insert(path, sum);
            }
        }
        if self.dry {
            return Ok(());
        }
        let _ = fs::remove_file(self.at(&self.record));
        for (path, _) in directories.into_iter().rev() {
            // Others may have put something there: then it stays.
            let _ = fs::remove_dir(self.at(&path));
        }
        match left.keys().next() {
            None => Ok(()),
            Some(path) => {
                let message = format!("left what was changed: {}", self.at(path).display());
                Err(Error::new(Kind::Exists, message).hint("remove it by hand"))
            }
        }
    }

    /// Refuses to replace what is not ours, or not as we left it.
    fn check(&self, path: &Path, item: &Item, record: &BTreeMap<PathBuf, Sum>) -> Result<()> {
        let at = self.at(path);
        let present =
            sum_at(&at).map_err(|error| Error::os(error, format!("cannot look at {}", at.display())))?;
        let Some(present) = present else { return Ok(()) };
        if present == sum_of(item) || record.get(path) == Some(&present) {
            return Ok(());
        }
        let shown = at.display();
        let message = match record.contains_key(path) {
            true => format!("{shown} was changed since it was installed"),
            false => format!("{shown} is there already, and is not ours"),
        };
        Err(Error::new(Kind::Exists, message).hint("move it away first"))
    }

    /// Removes a file, unless it is another by now. True: it is gone.
    fn take(&self, path: &Path, sum: Sum) -> Result<bool> {
        let at = self.at(path);
        let cannot = |error| Error::os(error, format!("cannot remove {}", at.display()));
        match sum_at(&at).map_err(cannot)? {
            None => Ok(true),
            Some(present) if present == sum => fs::remove_file(&at).map(|()| true).map_err(cannot),
            Some(_) => Ok(false),
        }
    }

    /// Makes the directories that `path` lies in, and notes those that were missing.
    fn make_parents(&self, path: &Path, record: &mut BTreeMap<PathBuf, Sum>) -> Result<()> {
        let missing: Vec<&Path> =
            path.ancestors().skip(1).take_while(|above| !self.at(above).exists()).collect();
        for directory in missing.into_iter().rev() {
            let at = self.at(directory);
            let cannot =
                |error| Error::os(error, format!("cannot make {}", at.display())).hint("run this as root");
            fs::create_dir_all(&at).map_err(cannot)?;
            fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).map_err(cannot)?;
            record.insert(directory.to_owned(), Sum::Directory);
        }
        Ok(())
    }

    fn read_record(&self) -> Result<BTreeMap<PathBuf, Sum>> {
        let at = self.at(&self.record);
        let text = match fs::read_to_string(&at) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(Error::os(error, format!("cannot read {}", at.display()))),
        };
        let entry = |line: &str| {
            let (sum, path) = line.split_once(' ')?;
            let sum =
                if sum == "directory" { Sum::Directory } else { Sum::Of(u64::from_str_radix(sum, 16).ok()?) };
            Some((PathBuf::from(path), sum))
        };
        let record: Option<BTreeMap<PathBuf, Sum>> = text.lines().map(entry).collect();
        record.ok_or_else(|| Error::new(Kind::Invalid, format!("{} is damaged", at.display())))
    }

    fn write_record(&self, record: &BTreeMap<PathBuf, Sum>) -> Result<()> {
        let line = |(path, sum): (&PathBuf, &Sum)| match sum {
            Sum::Directory => format!("directory {}\n", path.display()),
            Sum::Of(sum) => format!("{sum:016x} {}\n", path.display()),
        };
        let at = self.at(&self.record);
        let content = record.iter().map(line).collect::<String>().into_bytes();
        place(&at, &Item::File { content, mode: 0o644 })
    }
}

/// What a path was when it was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sum {
    /// A directory that was not there before.
    Directory,
    /// A file or link with this checksum.
    Of(u64),
}

fn sum_of(item: &Item) -> Sum {
    match item {
        Item::File { content, .. } => checksum(b"file", content),
        Item::Link(target) => checksum(b"link", target.as_os_str().as_encoded_bytes()),
    }
}

/// None: nothing is there. What is neither file nor link is never ours.
fn sum_at(path: &Path) -> io::Result<Option<Sum>> {
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
    Ok(Some(Sum::Of(0)))
}

fn checksum(kind: &[u8], content: &[u8]) -> Sum {
    Sum::Of(crate::hash::fnv1a(kind.iter().chain(content)))
}

/// Puts it there in one step: nobody sees a part of a file, and a program that runs can be replaced.
fn place(path: &Path, item: &Item) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    let placed = (|| {
        let _ = fs::remove_file(&fresh);
        match item {
            Item::File { content, mode } => {
                let mut file = fs::File::create_new(&fresh)?;
                io::Write::write_all(&mut file, content)?;
                file.set_permissions(fs::Permissions::from_mode(*mode))?;
            }
            Item::Link(target) => symlink(target, &fresh)?,
        }
        fs::rename(&fresh, path)
    })();
    placed.map_err(|error| {
        let _ = fs::remove_file(&fresh);
        let made = Error::os(error, format!("cannot write {}", path.display()));
        if made.kind() == Kind::Denied { made.hint("run this as root") } else { made }
    })
}
