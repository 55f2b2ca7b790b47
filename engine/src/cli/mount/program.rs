//! A program of FUSE mounts an image, with the rights of whoever asks for it.
//!
//! Knows how such a program is started so that the device ends with it, and what it needs to be there.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::image::Image;
use super::{Device, umount};
use crate::cli::fuse::{self, Offset, Program};
use crate::error::{Error, Kind, Result};
use crate::sys::mntns;

/// Bytes of what a program says that are looked at.
const SAID_MAX: u64 = 4096;
/// How long e2fsck may take to replay a journal, of 1 GiB at the most.
const REPLAY_MAX: Duration = Duration::from_secs(120);

/// The usual program for a file system, if all is here that a plain user needs for it.
pub(super) fn usual(kind: &str) -> Result<String> {
    if let Some(program) = fuse::programs_for(kind).find(|program| fuse::is_here(program.name)) {
        return check().map(|()| program.name.to_owned());
    }
    let names: Vec<&str> = fuse::programs_for(kind).map(|program| program.name).collect();
    if names.is_empty() {
        let message = format!("no program of FUSE is known that mounts {kind}");
        return Err(Error::new(Kind::Unsupported, message)
            .hint(format!("name one with --fuse {kind}=PROGRAM, or mount it as root")));
    }
    let message = format!("{kind} is mounted by {}, which is not installed", names.join(" or "));
    let package = fuse::programs_for(kind).find_map(|program| program.package);
    Err(Error::new(Kind::Unsupported, message).hint(match package {
        Some(package) => {
            format!("install it ('apt install {package}'), or name another with --fuse {kind}=PROGRAM")
        }
        None => format!("no package of Debian has it: build it, name another with --fuse {kind}=PROGRAM, or mount it as root"),
    }))
}

/// Is there what every program of FUSE needs?
pub(in crate::cli) fn check() -> Result<()> {
    let opened = File::options().read(true).write(true).open("/dev/fuse");
    opened.map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "its mode is 0666 where udev runs",
            _ => "load the module with 'modprobe fuse'; a container needs the device passed in",
        };
        Error::os(error, "cannot open /dev/fuse").with_kind(Kind::Unavailable).hint(hint)
    })?;
    if !rustix::process::geteuid().is_root() && fusermount().is_none() {
        let message = "fusermount3, by which users mount, is not installed";
        return Err(Error::new(Kind::Unavailable, message).hint("install it ('apt install fuse3')"));
    }
    Ok(())
}

/// The program with the right to mount and unmount for users.
pub(super) fn fusermount() -> Option<&'static str> {
    ["fusermount3", "fusermount"].into_iter().find(|program| fuse::is_here(program))
}

/// A journal that must be replayed first: fuse2fs 1.47 says that all is well, and dies; others ignore it.
pub(super) fn check_journal(program: &str, image: &Image, replay: bool) -> Result<()> {
    if !image.needs_recovery || replay && !image.read_only {
        return Ok(());
    }
    let shown = image.shown.display();
    let message =
        format!("{shown} was not unmounted, and {program} cannot mount it before its journal is replayed");
    Err(Error::new(Kind::Unsupported, message).hint(match (image.read_only, image.offset) {
        (true, _) => "that writes to the image: mount a copy, with --replay-journal".to_owned(),
        (false, 0) => format!("add --replay-journal, or run 'e2fsck -E journal_only {shown}'"),
        (false, _) => "add --replay-journal".to_owned(),
    }))
}

/// The device for a program. None: it gets the file itself, since it takes no device or none can be had.
pub(super) fn device(
    program: &str,
    image: &Image,
    serve: impl FnOnce() -> Result<Device>,
) -> Result<Option<Device>> {
    let known = fuse::known(program);
    let within = image.offset > 0;
    let copy = |error: Error| error.hint(format!("copy the file system out: {}", image.copy_out()));
    if !known.devices {
        let message = format!("{program} mounts no block device for a user, and no part of a file");
        return if within { Err(copy(Error::new(Kind::Unsupported, message))) } else { Ok(None) };
    }
    match serve() {
        Ok(device) => Ok(Some(device)),
        Err(error) if !is_without_devices(error.kind()) => Err(error),
        Err(error) if within && known.offset == Offset::None => {
            let message = format!("{program} mounts no part of a file, and {}", error.message());
            Err(copy(Error::new(error.kind(), message)))
        }
        Err(error) if within && image.needs_recovery => {
            let message = format!("e2fsck replays no journal within a file, and {}", error.message());
            Err(copy(Error::new(error.kind(), message)))
        }
        Err(_) => Ok(None),
    }
}

/// Whether an error says that there are no private devices here, or none for this user.
pub(super) fn is_without_devices(kind: Kind) -> bool {
    matches!(kind, Kind::Unavailable | Kind::Unsupported | Kind::Denied | Kind::Quota)
}

/// Has `program` mount `device`, or the image itself, on `dir`.
pub(super) fn mount(program: &str, device: Option<&Device>, image: &Image, dir: &Path) -> Result<()> {
    let shown = image.shown.display();
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = format!("cannot mount on {}: it is not empty", dir.display());
        return Err(Error::new(Kind::Invalid, message).hint("give an empty directory"));
    }
    let known = fuse::known(program);
    let cannot = |error: std::io::Error| Error::os(error, format!("cannot run {program}"));
    // The program inherits the pool, which ends with it, and the lock on the image.
    let inherited =
        |fd: BorrowedFd<'_>| fcntl_setfd(fd, FdFlags::empty()).map_err(|error| cannot(error.into()));
    device.map_or(Ok(()), |device| inherited(device.pool.as_fd()))?;
    inherited(image.file.as_fd())?;
    let source = match device {
        Some(device) => device.path(),
        // It is the name that df shows, and this program shows no other.
        None if known.shows_source => image.path.clone(),
        None => format!("/proc/self/fd/{}", image.file.as_raw_fd()).into(),
    };
    if image.needs_recovery {
        replay(&source, image)?;
    }
    if known.locks {
        image.unlock();
    }
    let mut command = fuse::command(program);
    command.arg(&source).arg(dir).args(["-o", &options(known, image, device.is_none())]);
    if device.is_none() && image.offset > 0 && known.offset == Offset::Flag {
        command.arg(format!("--offset={}", image.offset));
    }
    let (finished, said) = run(&mut command, fuse::finish).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::os(error, format!("{program} is not installed"))
            .with_kind(Kind::Unsupported)
            .hint(format!("name another with --fuse {}=PROGRAM", image.kind)),
        _ => cannot(error),
    })?;
    let mounted = || mntns::kind_at(dir).is_some_and(|kind| kind.starts_with("fuse"));
    let why = match finished {
        Ok(()) if mounted() => match fuse::answers(dir) {
            Ok(_) => return Ok(()),
            Err(error) => {
                // Whether or not it can be: the user is told why it is useless.
                let _ = umount::leave(dir, true);
                format!("{program} has mounted {shown}, and does not answer ({error})")
            }
        },
        Ok(()) => format!("{program} has not mounted {shown}"),
        Err(Errno::TIMEDOUT) => {
            if mounted() {
                let _ = umount::leave(dir, true);
            }
            let message = format!("{program} took too long to mount {shown}");
            return Err(Error::new(Kind::Deadline, message));
        }
        Err(_) => format!("{program} cannot mount {shown}"),
    };
    let said = said.map(|line| line.replace(&*source.to_string_lossy(), &shown.to_string()));
    let error = Error::new(Kind::Io, said.as_ref().map_or(why.clone(), |line| format!("{why}: {line}")));
    Err(match advice(said.as_deref().unwrap_or_default(), image) {
        Some(advice) => error.hint(advice),
        None => error,
    })
}

/// Has e2fsck do what is in the journal, and nothing else.
fn replay(source: &Path, image: &Image) -> Result<()> {
    let shown = image.shown.display();
    let mut command = fuse::command("e2fsck");
    // Without a terminal it asks nothing with "-p" only.
    command.args(["-p", "-E", "journal_only"]).arg(source);
    let (ended, said) = run(&mut command, |child| fuse::wait(child, REPLAY_MAX)).map_err(|error| {
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let error = Error::os(error, "cannot run e2fsck, which replays journals");
        if missing { error.hint("install it ('apt install e2fsprogs')") } else { error }
    })?;
    // 1: it has changed something, which is what it was asked for.
    if ended.is_ok_and(|status| matches!(status.code(), Some(0 | 1))) {
        return Ok(());
    }
    let said = said.unwrap_or_default().replace(&*source.to_string_lossy(), &shown.to_string());
    let message = format!("e2fsck cannot replay the journal of {shown}: {said}");
    Err(Error::new(Kind::Io, message).hint(checker(image).unwrap_or_default()))
}

/// Runs a command to what `until` calls its end; the line of what it has said that counts.
fn run<T>(
    command: &mut Command,
    until: impl FnOnce(&mut Child) -> T,
) -> std::io::Result<(T, Option<String>)> {
    // Files, so that nobody waits for the end of a program that stays.
    let said = || memfd_create("said", MemfdFlags::CLOEXEC).map(File::from);
    let (out, errors) = (said()?, said()?);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(errors.try_clone()?);
    let ended = until(&mut command.spawn()?);
    // What follows a complaint is advice on options that are ours to give.
    let (complaint, remark) = (lines(errors), lines(out));
    Ok((ended, complaint.into_iter().next().or(remark.into_iter().next_back())))
}

/// The next step after what a program has said.
fn advice(said: &str, image: &Image) -> Option<String> {
    if said.contains("user_allow_other") {
        return Some(
            "have root write 'user_allow_other' into /etc/fuse.conf, or mount it as root".to_owned(),
        );
    }
    // These complain of the directory, or of /dev/fuse: the image is well.
    let of_fuse = ["fuse: ", "fusermount: ", "fusermount3: "].iter().any(|word| said.contains(word));
    if of_fuse { None } else { checker(image) }
}

/// How to check the image.
fn checker(image: &Image) -> Option<String> {
    let shown = image.shown.display();
    let program = match image.kind {
        "ext2" | "ext3" | "ext4" if image.offset > 0 => {
            return Some(format!("check it with 'e2fsck -fn {shown}?offset={}'", image.offset));
        }
        _ if image.offset > 0 => return None,
        "ext2" | "ext3" | "ext4" => "e2fsck -fn",
        "vfat" => "fsck.vfat -n",
        "exfat" => "fsck.exfat -n",
        "ntfs" => "ntfsfix -n",
        "xfs" => "xfs_repair -fn",
        "erofs" => "fsck.erofs",
        _ => return None,
    };
    Some(format!("check it with '{program} {shown}'"))
}

/// What the program is told. `file`: it gets the file, with what is before the file system.
fn options(known: &Program, image: &Image, file: bool) -> String {
    let access = if image.read_only { "ro" } else { "rw" };
    let mut options: Vec<String> = [access, "nosuid", "nodev"].map(str::to_owned).into();
    options.extend(known.options.iter().copied().map(str::to_owned));
    if file && image.offset > 0 && known.offset == Offset::Option {
        options.push(format!("offset={}", image.offset));
    }
    // What df and findmnt show, in the words of e2fsprogs; and by what `umount` finds it.
    if let Some(name) = image.path.to_str().filter(|name| known.fsname && !name.contains([',', '\\', '\n'])) {
        let within = if image.offset > 0 { format!("?offset={}", image.offset) } else { String::new() };
        options.push(format!("fsname={name}{within}"));
    }
    options.join(",")
}

/// What a program said, in lines, without what a terminal might obey.
fn lines(mut said: File) -> Vec<String> {
    let mut bytes = Vec::new();
    // What came before an error is worth showing.
    let _ = said.rewind().and_then(|()| said.take(SAID_MAX).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let shown = |line: &str| line.chars().filter(|letter| !letter.is_control()).collect::<String>();
    text.lines().map(shown).filter(|line| !line.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(path: &str, read_only: bool) -> Image {
        Image {
            file: File::open("/dev/null").unwrap(),
            shown: path.into(),
            path: path.into(),
            read_only,
            offset: 0,
            size_limit: 0,
            kind: "ext4",
            needs_recovery: false,
        }
    }

    fn told(program: &str, image: &Image, file: bool) -> String {
        options(fuse::known(program), image, file)
    }

    #[test]
    fn what_programs_are_told() {
        assert_eq!(told("squashfuse", &image("/a b", true), false), "ro,nosuid,nodev,fsname=/a b");
        assert_eq!(told("ntfs-3g", &image("/a", false), true), "rw,nosuid,nodev,no_def_opts");
        let fuse2fs = told("/opt/fuse2fs", &image("/x", false), false);
        assert!(fuse2fs.starts_with("rw,nosuid,nodev,fakeroot,no_default_opts,"), "{fuse2fs}");
        for name in ["/a,suid", "/a\\,suid", "/a\nb"] {
            assert_eq!(
                told("squashfuse", &image(name, false), true),
                "rw,nosuid,nodev",
                "no name is an option"
            );
        }
        let part = Image { offset: 512, ..image("/x", true) };
        assert_eq!(told("other", &part, true), "ro,nosuid,nodev,fsname=/x?offset=512");
        assert_eq!(told("squashfuse", &part, true), "ro,nosuid,nodev,offset=512,fsname=/x?offset=512");
        assert_eq!(told("squashfuse", &part, false), "ro,nosuid,nodev,fsname=/x?offset=512");
    }

    #[test]
    fn advice_fits() {
        let ext4 = image("/x", false);
        let check = Some("check it with 'e2fsck -fn /x'".to_owned());
        assert_eq!(advice("/x: Bad magic number in super-block", &ext4), check);
        assert_eq!(advice("", &Image { kind: "btrfs", ..image("/x", true) }), None);
        for of_fuse in
            ["fuse: mountpoint is not empty", "fusermount3: user has no write access to mountpoint /x"]
        {
            assert_eq!(advice(of_fuse, &ext4), None, "{of_fuse}");
        }
        let other = "fusermount: option allow_other only allowed if 'user_allow_other' is set";
        assert!(advice(other, &ext4).unwrap().contains("/etc/fuse.conf"));
    }

    #[test]
    fn a_journal_is_replayed_where_asked() {
        let needs = |read_only, offset| Image { needs_recovery: true, offset, ..image("/x", read_only) };
        let refused =
            |image: &Image, replay| check_journal("fuse2fs", image, replay).unwrap_err().to_string();
        assert!(check_journal("fuse2fs", &image("/x", false), false).is_ok());
        assert!(check_journal("fuse2fs", &needs(false, 0), true).is_ok());
        assert!(refused(&needs(false, 0), false).contains("'e2fsck -E journal_only /x'"));
        assert!(!refused(&needs(false, 512), false).contains("e2fsck"), "it would look at byte 0");
        assert!(refused(&needs(true, 0), true).contains("mount a copy"));
    }

    #[test]
    fn what_was_said() {
        let said: [(&str, &[&str]); 3] =
            [("", &[]), ("a\n\nb\n", &["a", "b"]), ("\x1b[2Jx\u{9b}y", &["[2Jxy"])];
        for (text, shown) in said {
            let mut file = File::from(memfd_create("said", MemfdFlags::CLOEXEC).unwrap());
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(lines(file), shown, "{text:?}");
        }
    }
}
