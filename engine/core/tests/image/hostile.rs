// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files that are refused as images, and attacks of callers.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use loopengine_core::Kind;
use loopengine_core::image::{Image, ImageSpec};
use rustix::fs::OFlags;

use crate::support::*;

#[test]
fn callers_cannot_change_the_daemons_file_description() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let image = Image::open(file.try_clone().unwrap().into(), &PLAIN, "image").unwrap();
    let before = flags(&image);
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND | OFlags::NONBLOCK).unwrap();
    file.seek(SeekFrom::Start(17)).unwrap();
    assert_eq!(flags(&image), before);
    assert_eq!(rustix::fs::tell(image.fd()), Ok(0));
}

#[test]
fn respects_the_callers_rights() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let open = |options: &mut OpenOptions| -> OwnedFd { options.open(&path).unwrap().into() };
    let options = OpenOptions::new;

    let file = open(options().read(true).custom_flags(libc::O_PATH));
    refused(Image::open(file, &READ_ONLY, "image"), Kind::Denied, "O_PATH");
    let file = open(options().read(true));
    refused(Image::open(file, &PLAIN, "image"), Kind::Denied, "--read-only");
    let file = open(options().write(true));
    refused(Image::open(file, &PLAIN, "image"), Kind::Denied, "without read access");
    let file = open(options().write(true));
    refused(Image::open(file, &READ_ONLY, "image"), Kind::Denied, "without read access");
    let file = open(options().read(true).append(true));
    refused(Image::open(file, &PLAIN, "image"), Kind::Denied, "for appending only");

    // Fewer rights than the caller has are allowed, and are applied.
    let file = open(options().read(true).write(true));
    let image = Image::open(file, &READ_ONLY, "image").unwrap();
    assert_eq!(flags(&image) & OFlags::RWMODE, OFlags::RDONLY);
    // A caller may have a deleted file open.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    Image::open(file.into(), &READ_ONLY, "image").unwrap();
}

#[test]
fn accepts_only_regular_files_and_block_devices() {
    let directory = temporary();
    let at = |name: &str| directory.path().join(name);
    let take = |file: OwnedFd, source: &ImageSpec| Image::open(file, source, "image");

    let file = File::open(directory.path()).unwrap().into();
    refused(take(file, &READ_ONLY), Kind::Invalid, "is a directory");
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    refused(take(null.into(), &PLAIN), Kind::Invalid, "is a character device");
    run(&format!("mkfifo {}", at("fifo").display())).unwrap();
    let fifo = OpenOptions::new().read(true).write(true).open(at("fifo")).unwrap();
    refused(take(fifo.into(), &PLAIN), Kind::Invalid, "is a pipe");
    let socket = UnixListener::bind(at("socket")).unwrap();
    refused(take(socket.into(), &PLAIN), Kind::Invalid, "is a socket");
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    refused(take(event, &PLAIN), Kind::Invalid, "is not a file");
    for path in ["/proc/self/mem", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        match File::open(path) {
            Ok(file) => {
                let source = ImageSpec { read_only: true, ..BUFFERED };
                refused(take(file.into(), &source), Kind::Invalid, "is a file of ");
            }
            Err(e) => skipped(&format!("{path}: {e}")),
        }
    }
    image_file(&at("empty"), 0);
    refused(attach(&at("empty"), &PLAIN), Kind::Invalid, "is empty");
    // Any path is printed on one line.
    let file = File::open(at("empty")).unwrap();
    let error = Image::open(file.into(), &READ_ONLY, "a\nb\x1b[31m").unwrap_err();
    assert!(error.to_string().starts_with("a?b?[31m is empty"), "{error}");
}

#[test]
fn leaves_a_refused_image_unchanged() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let before = fs::metadata(&path).unwrap();
    let bad = ImageSpec { offset: 100, ..PLAIN };
    refused(attach(&path, &bad), Kind::Invalid, "not a multiple");
    attach(&path, &READ_ONLY).unwrap();
    let after = fs::metadata(&path).unwrap();
    let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    assert_eq!(times(&after), times(&before));
}

#[test]
fn does_not_wait_for_a_lease() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    // The owner of a file may lease it: open() then waits 45 s for the release.
    let script = "import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print('leased', flush=True)
sys.stdin.read()";
    let file = File::open(&path).unwrap();
    let child = Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) => return skipped(&format!("python3: {e}")),
    };
    let mut line = String::new();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    if line == "leased\n" {
        // Opened before the lease; a tenant can send any descriptor.
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let writable =
            || OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&link);
        assert_eq!(writable().unwrap_err().raw_os_error(), Some(libc::EWOULDBLOCK));
        let image = Image::open(file.into(), &READ_ONLY, "image").unwrap();
        let (identity, shape) = (image.identity(), image.geometry());
        let begun = std::time::Instant::now();
        refused(Image::reopen(&path, &PLAIN, &identity, &shape), Kind::Busy, "holds a lease");
        assert!(begun.elapsed().as_secs() < 5);
    } else {
        skipped("cannot lease a file here");
    }
    drop(child.stdin.take());
    child.wait().unwrap();
}
