// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts an image with a FUSE driver, with the caller's privileges.
//!
//! Starts the driver so that the device ends with it, and checks its requirements.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::image::MountImage;
use super::{PrivateDevice, umount};
use crate::cli::fuse_drivers::{self, FuseDriver, Offset};
use crate::error::{Error, Kind, Result};
use crate::sys::mntns;

/// Maximum size of driver output to read.
const SAID_MAX: u64 = 4096;
/// Time for e2fsck to replay a journal, of at most 1 GiB.
const REPLAY_MAX: Duration = Duration::from_secs(120);

/// The default driver of a file system, if a plain user can run it.
pub(super) fn default_driver(kind: &str) -> Result<String> {
    if let Some(program) =
        fuse_drivers::drivers_for(kind).find(|program| fuse_drivers::is_installed(program.name))
    {
        return check_fuse().map(|()| program.name.to_owned());
    }
    let names: Vec<&str> = fuse_drivers::drivers_for(kind).map(|program| program.name).collect();
    if names.is_empty() {
        let message = format!("there is no known FUSE driver for {kind}");
        return Err(Error::new(Kind::Unsupported, message)
            .hint(format!("give one with --fuse {kind}=PROGRAM, or mount the image as root")));
    }
    let message = format!("the FUSE driver for {kind}, {}, is not installed", names.join(" or "));
    let package = fuse_drivers::drivers_for(kind).find_map(|program| program.package);
    Err(Error::new(Kind::Unsupported, message).hint(match package {
        Some(package) => {
            format!("install it ('apt install {package}'), or give another driver with --fuse {kind}=PROGRAM")
        }
        None => format!("build it (Debian has no package), give another driver with --fuse {kind}=PROGRAM, or mount the image as root"),
    }))
}

/// Checks the requirements of all FUSE drivers.
pub(in crate::cli) fn check_fuse() -> Result<()> {
    let opened = File::options().read(true).write(true).open("/dev/fuse");
    opened.map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "set its mode to 0666, as udev does",
            _ => "run 'modprobe fuse'; pass the device into a container",
        };
        Error::os(error, "cannot open /dev/fuse").with_kind(Kind::Unavailable).hint(hint)
    })?;
    if !rustix::process::geteuid().is_root() && fusermount().is_none() {
        let message = "cannot mount as this user: fusermount3 is not installed";
        return Err(Error::new(Kind::Unavailable, message).hint("install it ('apt install fuse3')"));
    }
    Ok(())
}

/// The program that mounts and unmounts for users.
pub(super) fn fusermount() -> Option<&'static str> {
    ["fusermount3", "fusermount"].into_iter().find(|program| fuse_drivers::is_installed(program))
}

/// Refuses an image whose journal needs a replay: fuse2fs 1.47 reports success and dies; other
/// drivers ignore the journal.
pub(super) fn check_journal(program: &str, image: &MountImage, replay: bool) -> Result<()> {
    if !image.needs_recovery || replay && !image.read_only {
        return Ok(());
    }
    let shown = image.shown.display();
    let message =
        format!("{shown} was not cleanly unmounted; {program} cannot mount it before a journal replay");
    Err(Error::new(Kind::Unsupported, message).hint(match (image.read_only, image.offset) {
        (true, _) => "mount a copy with --replay-journal, which writes to the image".to_owned(),
        (false, 0) => format!("add --replay-journal, or run 'e2fsck -E journal_only {shown}'"),
        (false, _) => "add --replay-journal".to_owned(),
    }))
}

/// The device for a driver. None: the driver gets the file itself, because it accepts no device or
/// there are no private devices.
pub(super) fn device_for(
    program: &str,
    image: &MountImage,
    serve: impl FnOnce() -> Result<PrivateDevice>,
) -> Result<Option<PrivateDevice>> {
    let known = fuse_drivers::driver(program);
    let within = image.offset > 0;
    let copy = |error: Error| error.hint(format!("extract the file system with {}", image.copy_out()));
    if !known.devices {
        let message = format!("{program} can mount neither a block device for a user nor a part of a file");
        return if within { Err(copy(Error::new(Kind::Unsupported, message))) } else { Ok(None) };
    }
    match serve() {
        Ok(device) => Ok(Some(device)),
        Err(error) if !is_without_devices(error.kind()) => Err(error),
        Err(error) if within && known.offset == Offset::None => {
            let message = format!("{program} cannot mount a part of a file, and {}", error.message());
            Err(copy(Error::new(error.kind(), message)))
        }
        Err(error) if within && image.needs_recovery => {
            let message = format!("e2fsck cannot replay a journal inside a file, and {}", error.message());
            Err(copy(Error::new(error.kind(), message)))
        }
        Err(_) => Ok(None),
    }
}

/// True if the error means that this user has no private devices.
pub(super) fn is_without_devices(kind: Kind) -> bool {
    matches!(kind, Kind::Unavailable | Kind::Unsupported | Kind::Denied | Kind::Quota)
}

/// Mounts `device`, or the image itself, on `dir` with `program`.
pub(super) fn mount(
    program: &str,
    device: Option<&PrivateDevice>,
    image: &MountImage,
    dir: &Path,
) -> Result<()> {
    let shown = image.shown.display();
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = format!("cannot mount on {}: it is not empty", dir.display());
        return Err(Error::new(Kind::Invalid, message).hint("give an empty directory"));
    }
    let known = fuse_drivers::driver(program);
    let cannot = |error: std::io::Error| Error::os(error, format!("cannot run {program}"));
    // The driver inherits the pool, which ends with it, and the lock on the image.
    let inherited =
        |fd: BorrowedFd<'_>| fcntl_setfd(fd, FdFlags::empty()).map_err(|error| cannot(error.into()));
    device.map_or(Ok(()), |device| inherited(device.pool.as_fd()))?;
    inherited(image.file.as_fd())?;
    let source = match device {
        Some(device) => device.path(),
        // This driver shows its source path in df.
        None if known.shows_source => image.path.clone(),
        None => format!("/proc/self/fd/{}", image.file.as_raw_fd()).into(),
    };
    if image.needs_recovery {
        replay(&source, image)?;
    }
    if known.locks {
        image.unlock();
    }
    let mut command = fuse_drivers::command(program);
    command.arg(&source).arg(dir).args(["-o", &options(known, image, device.is_none())]);
    if device.is_none() && image.offset > 0 && known.offset == Offset::Flag {
        command.arg(format!("--offset={}", image.offset));
    }
    let (finished, said) =
        run(&mut command, fuse_drivers::wait_mounted).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::os(error, format!("{program} is not installed"))
                .with_kind(Kind::Unsupported)
                .hint(format!("give another driver with --fuse {}=PROGRAM", image.kind)),
            _ => cannot(error),
        })?;
    let mounted = || mntns::kind_at(dir).is_some_and(|kind| kind.starts_with("fuse"));
    let why = match finished {
        Ok(()) if mounted() => match fuse_drivers::probe(dir) {
            Ok(_) => return Ok(()),
            Err(error) => {
                // Ignore a failure: the user gets the error of the mount.
                let _ = umount::unmount_dir(dir, true);
                format!("{program} mounted {shown} but does not answer ({error})")
            }
        },
        Ok(()) => format!("{program} did not mount {shown}"),
        Err(Errno::TIMEDOUT) => {
            if mounted() {
                let _ = umount::unmount_dir(dir, true);
            }
            let message = format!("{program} did not mount {shown} in time");
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

/// Replays the journal with e2fsck, without further checks.
fn replay(source: &Path, image: &MountImage) -> Result<()> {
    let shown = image.shown.display();
    let mut command = fuse_drivers::command("e2fsck");
    // Without a terminal, e2fsck needs "-p" to ask nothing.
    command.args(["-p", "-E", "journal_only"]).arg(source);
    let (ended, said) =
        run(&mut command, |child| fuse_drivers::wait_exit(child, REPLAY_MAX)).map_err(|error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let error = Error::os(error, "cannot run e2fsck to replay the journal");
            if missing { error.hint("install it ('apt install e2fsprogs')") } else { error }
        })?;
    // 1: e2fsck changed something, as intended.
    if ended.is_ok_and(|status| matches!(status.code(), Some(0 | 1))) {
        return Ok(());
    }
    let said = said.unwrap_or_default().replace(&*source.to_string_lossy(), &shown.to_string());
    let message = format!("e2fsck cannot replay the journal of {shown}: {said}");
    Err(Error::new(Kind::Io, message).hint(checker(image).unwrap_or_default()))
}

/// Runs a command until `until` returns. Also returns the relevant line of its output.
fn run<T>(
    command: &mut Command,
    until: impl FnOnce(&mut Child) -> T,
) -> std::io::Result<(T, Option<String>)> {
    // Files instead of pipes: a resident driver would keep a pipe open.
    let output = || memfd_create("said", MemfdFlags::CLOEXEC).map(File::from);
    let (out, errors) = (output()?, output()?);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(errors.try_clone()?);
    let ended = until(&mut command.spawn()?);
    // The first line of errors is the reason; later lines give advice on options that we set.
    let (complaint, remark) = (lines(errors), lines(out));
    Ok((ended, complaint.into_iter().next().or(remark.into_iter().next_back())))
}

/// The next step for an error message of a driver.
fn advice(said: &str, image: &MountImage) -> Option<String> {
    if said.contains("user_allow_other") {
        return Some(
            "have root add 'user_allow_other' to /etc/fuse.conf, or mount the image as root".to_owned(),
        );
    }
    // Errors of the mount point or /dev/fuse: the image is fine.
    let of_fuse = ["fuse: ", "fusermount: ", "fusermount3: "].iter().any(|word| said.contains(word));
    if of_fuse { None } else { checker(image) }
}

/// The command that checks the image.
fn checker(image: &MountImage) -> Option<String> {
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

/// The mount options for the driver. `file`: the driver gets the whole file.
fn options(known: &FuseDriver, image: &MountImage, file: bool) -> String {
    let access = if image.read_only { "ro" } else { "rw" };
    let mut options: Vec<String> = [access, "nosuid", "nodev"].map(str::to_owned).into();
    options.extend(known.options.iter().copied().map(str::to_owned));
    if file && image.offset > 0 && known.offset == Offset::Option {
        options.push(format!("offset={}", image.offset));
    }
    // The source in df and findmnt, in e2fsprogs syntax. `umount` searches it.
    if let Some(name) = image.path.to_str().filter(|name| known.fsname && !name.contains([',', '\\', '\n'])) {
        let within = if image.offset > 0 { format!("?offset={}", image.offset) } else { String::new() };
        options.push(format!("fsname={name}{within}"));
    }
    options.join(",")
}

/// The lines of a driver's output, without control characters.
fn lines(mut said: File) -> Vec<String> {
    let mut bytes = Vec::new();
    // Keep the output before a read error.
    let _ = said.rewind().and_then(|()| said.take(SAID_MAX).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    let shown = |line: &str| line.chars().filter(|letter| !letter.is_control()).collect::<String>();
    text.lines().map(shown).filter(|line| !line.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(path: &str, read_only: bool) -> MountImage {
        MountImage {
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

    fn driver_options(program: &str, image: &MountImage, file: bool) -> String {
        options(fuse_drivers::driver(program), image, file)
    }

    #[test]
    fn builds_driver_options() {
        assert_eq!(driver_options("squashfuse", &image("/a b", true), false), "ro,nosuid,nodev,fsname=/a b");
        assert_eq!(driver_options("ntfs-3g", &image("/a", false), true), "rw,nosuid,nodev,no_def_opts");
        let fuse2fs = driver_options("/opt/fuse2fs", &image("/x", false), false);
        assert!(fuse2fs.starts_with("rw,nosuid,nodev,fakeroot,no_default_opts,"), "{fuse2fs}");
        for name in ["/a,suid", "/a\\,suid", "/a\nb"] {
            assert_eq!(
                driver_options("squashfuse", &image(name, false), true),
                "rw,nosuid,nodev",
                "a name cannot add options"
            );
        }
        let part = MountImage { offset: 512, ..image("/x", true) };
        assert_eq!(driver_options("other", &part, true), "ro,nosuid,nodev,fsname=/x?offset=512");
        assert_eq!(
            driver_options("squashfuse", &part, true),
            "ro,nosuid,nodev,offset=512,fsname=/x?offset=512"
        );
        assert_eq!(driver_options("squashfuse", &part, false), "ro,nosuid,nodev,fsname=/x?offset=512");
    }

    #[test]
    fn advises_by_message() {
        let ext4 = image("/x", false);
        let check = Some("check it with 'e2fsck -fn /x'".to_owned());
        assert_eq!(advice("/x: Bad magic number in super-block", &ext4), check);
        assert_eq!(advice("", &MountImage { kind: "btrfs", ..image("/x", true) }), None);
        for of_fuse in
            ["fuse: mountpoint is not empty", "fusermount3: user has no write access to mountpoint /x"]
        {
            assert_eq!(advice(of_fuse, &ext4), None, "{of_fuse}");
        }
        let other = "fusermount: option allow_other only allowed if 'user_allow_other' is set";
        assert!(advice(other, &ext4).unwrap().contains("/etc/fuse.conf"));
    }

    #[test]
    fn replays_a_journal_on_request() {
        let needs = |read_only, offset| MountImage { needs_recovery: true, offset, ..image("/x", read_only) };
        let refused =
            |image: &MountImage, replay| check_journal("fuse2fs", image, replay).unwrap_err().to_string();
        assert!(check_journal("fuse2fs", &image("/x", false), false).is_ok());
        assert!(check_journal("fuse2fs", &needs(false, 0), true).is_ok());
        assert!(refused(&needs(false, 0), false).contains("'e2fsck -E journal_only /x'"));
        assert!(!refused(&needs(false, 512), false).contains("e2fsck"), "it would look at byte 0");
        assert!(refused(&needs(true, 0), true).contains("mount a copy"));
    }

    #[test]
    fn reads_output_lines() {
        let said: [(&str, &[&str]); 3] =
            [("", &[]), ("a\n\nb\n", &["a", "b"]), ("\x1b[2Jx\u{9b}y", &["[2Jxy"])];
        for (text, shown) in said {
            let mut file = File::from(memfd_create("said", MemfdFlags::CLOEXEC).unwrap());
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(lines(file), shown, "{text:?}");
        }
    }
}
