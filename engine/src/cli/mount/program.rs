//! A program of FUSE mounts an image, with the rights of whoever asks for it.
//!
//! Knows how such a program is started so that the device ends with it, and what it needs to be there.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::Device;
use super::image::Image;
use crate::cli::private::mounter;
use crate::error::{Error, Kind, Result};
use crate::sys::mntns;

/// Bytes of what a program says that are looked at.
const SAID_MAX: u64 = 4096;

/// The usual program for a file system, if all is here that a plain user needs for it.
pub(super) fn usual(kind: &str) -> Result<String> {
    let Some(program) = mounter::program_for(kind) else {
        let message = format!("no program of FUSE is known that mounts {kind}");
        return Err(Error::new(Kind::Unsupported, message)
            .hint(format!("name one with --fuse {kind}=PROGRAM, or mount it as root")));
    };
    if !mounter::is_here(program) {
        let message = format!("{kind} is mounted by {program}, which is not installed");
        return Err(Error::new(Kind::Unsupported, message).hint(format!(
            "install it ('apt install {program}'), or name another with --fuse {kind}=PROGRAM"
        )));
    }
    check()?;
    Ok(program.to_owned())
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
    ["fusermount3", "fusermount"].into_iter().find(|program| mounter::is_here(program))
}

/// Has `program` mount `device` on `dir`.
pub(super) fn mount(program: &str, device: &Device, image: &Image, dir: &Path) -> Result<()> {
    let shown = image.shown.display();
    let cannot = |error: std::io::Error| Error::os(error, format!("cannot run {program}"));
    // The program inherits the pool, which ends with it.
    fcntl_setfd(&device.pool, FdFlags::empty()).map_err(|error| cannot(error.into()))?;
    let said = || memfd_create("said", MemfdFlags::CLOEXEC).map(File::from);
    // Files, so that nobody waits for the end of a program that stays.
    let (out, errors) =
        (said().map_err(|error| cannot(error.into()))?, said().map_err(|error| cannot(error.into()))?);
    let mut command = Command::new(program);
    command.arg(device.path()).arg(dir).args(["-o", &options(program, image)]);
    command.stdin(Stdio::null()).stdout(out.try_clone().map_err(cannot)?);
    let child = command.stderr(errors.try_clone().map_err(cannot)?).spawn();
    let mut child = child.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::os(error, format!("{program} is not installed"))
            .with_kind(Kind::Unsupported)
            .hint(format!("name another with --fuse {}=PROGRAM", image.kind)),
        _ => cannot(error),
    })?;
    let why = match mounter::finish(&mut child) {
        Ok(()) if mntns::kind_at(dir).is_some_and(|kind| kind.starts_with("fuse")) => return Ok(()),
        Ok(()) => format!("{program} has not mounted {shown}"),
        Err(Errno::TIMEDOUT) => {
            let message = format!("{program} took too long to mount {shown}");
            return Err(Error::new(Kind::Deadline, message));
        }
        Err(_) => format!("{program} cannot mount {shown}"),
    };
    // What follows a complaint is advice on options that are ours to give.
    let (complaint, remark) = (lines(errors), lines(out));
    let message = match complaint.first().or(remark.last()) {
        Some(line) => format!("{why}: {line}"),
        None => why,
    };
    Err(Error::new(Kind::Io, message).hint(match (image.kind.starts_with("ext"), image.offset) {
        (true, 0) => format!("check it with 'e2fsck -fn {shown}'"),
        (true, offset) => format!("check it with 'e2fsck -fn {shown}?offset={offset}'"),
        (false, _) => format!("check {shown}"),
    }))
}

/// What the program is told.
fn options(program: &str, image: &Image) -> String {
    let mut options = vec![if image.read_only { "ro" } else { "rw" }, "nosuid", "nodev"];
    if Path::new(program).file_name().is_some_and(|name| name == "fuse2fs") {
        // The image is its user's, whoever the files in it belong to. And without these two it would add
        // "allow_other,suid,dev", of which a plain user may have none, and root should not.
        options.extend(["fakeroot", "no_default_opts", "subtype=ext4", "attr_timeout=0"]);
    }
    let mut options = options.join(",");
    // What df and findmnt show.
    if let Some(name) = image.path.to_str().filter(|name| !name.contains([',', '\\', '\n'])) {
        options.push_str(",fsname=");
        options.push_str(name);
    }
    options
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
        }
    }

    #[test]
    fn what_programs_are_told() {
        assert_eq!(options("squashfuse", &image("/a b", true)), "ro,nosuid,nodev,fsname=/a b");
        let told = options("/opt/fuse2fs", &image("/x", false));
        assert!(told.starts_with("rw,nosuid,nodev,fakeroot,no_default_opts,"), "{told}");
        for name in ["/a,suid", "/a\\,suid", "/a\nb"] {
            let told = options("squashfuse", &image(name, false));
            assert_eq!(told, "rw,nosuid,nodev", "no name is an option");
        }
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
