//! The room `image` on real files: everything that this machine can offer as an image, and
//! everything that must not become one. What needs root or a tool that is missing is skipped, and
//! says so.

mod image_support;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use loopengine::image::{Geometry, Identity, Image, Source, create};
use loopengine::{Error, Kind, Result};
use rustix::fs::OFlags;

use image_support::{Mounted, aligned, loop_device, run, skipped, temporary};

const MIB: u64 = 1 << 20;
const PLAIN: Source = Source {
    offset: 0,
    size_limit: 0,
    block_size: 0,
    read_only: false,
    buffered: false,
};
const READ_ONLY: Source = Source {
    read_only: true,
    ..PLAIN
};
const BUFFERED: Source = Source {
    buffered: true,
    ..PLAIN
};

fn image_file(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
}

fn attach(path: &Path, source: &Source) -> Result<Image> {
    let file = OpenOptions::new()
        .read(true)
        .write(!source.read_only)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Image::open(file.into(), source, &path.to_string_lossy())
}

fn flags(image: &Image) -> OFlags {
    rustix::fs::fcntl_getfl(image.fd()).unwrap()
}

/// One line, with a next step, of the kind expected.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: Kind, text: &str) -> Error {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "'{error}' lacks '{text}'");
    assert!(!error.to_string().contains('\n'), "{error:?}");
    assert!(error.next_step().is_some(), "what next? {error}");
    error
}

// ---- what may become an image ----

/// All that every image must be able to do, wherever its bytes live.
fn check_image(directory: &Path, source: &Source, what: &str) -> Geometry {
    let path = directory.join("image");
    image_file(&path, 4 * MIB);
    // Leave dirty pages in the cache.
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all(&vec![7; MIB as usize])
        .unwrap();

    let mut image = attach(&path, source).unwrap_or_else(|e| panic!("{what}: {e}"));
    let g = image.geometry();
    assert_eq!((g.size, g.offset), (4 * MIB, 0), "{what}");
    assert!(!image.is_block_device());
    assert_eq!(
        flags(&image).contains(OFlags::DIRECT),
        !source.buffered,
        "{what}"
    );
    assert!(
        !flags(&image).contains(OFlags::NONBLOCK),
        "{what}: io_uring would answer EAGAIN"
    );
    assert_eq!(
        rustix::io::fcntl_getfd(image.fd()).unwrap(),
        rustix::io::FdFlags::CLOEXEC
    );

    // I/O of one block, at the alignment promised and at no better one.
    let block = g.block_size as usize;
    let mut memory = aligned(block, g.dma_align as usize);
    assert_eq!(
        rustix::io::pread(image.fd(), memory.bytes(), 0),
        Ok(block),
        "{what}"
    );
    assert!(
        memory.bytes().iter().all(|byte| *byte == 7),
        "{what}: not what was written"
    );
    if !source.read_only {
        memory.bytes().fill(9);
        let last = g.size - block as u64;
        assert_eq!(
            rustix::io::pwrite(image.fd(), memory.bytes(), last),
            Ok(block),
            "{what}"
        );
        let mut seen = vec![0; block];
        File::open(&path)
            .unwrap()
            .read_exact_at(&mut seen, last)
            .unwrap();
        assert!(seen.iter().all(|byte| *byte == 9), "{what}");
    } else {
        let written = rustix::io::pwrite(image.fd(), memory.bytes(), 0);
        assert_eq!(written, Err(rustix::io::Errno::BADF), "{what}");
    }
    assert!(!(g.can_discard && source.read_only), "{what}");
    if g.can_discard {
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let granularity = u64::from(g.discard_granularity);
        let before = fs::metadata(&path).unwrap().blocks();
        rustix::fs::fallocate(image.fd(), mode, 0, granularity).unwrap();
        let after = fs::metadata(&path).unwrap().blocks();
        assert!(after < before, "{what}: {granularity} bytes were not freed");
    }

    // Live resize, and one that cannot be.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(5 * MIB + 100).unwrap();
    assert_eq!(image.refresh().unwrap().size, 5 * MIB, "{what}");
    file.set_len(0).unwrap();
    refused(image.refresh(), Kind::Invalid, "is empty");
    assert_eq!(
        image.geometry().size,
        5 * MIB,
        "{what}: a failed refresh must change nothing"
    );

    // The file and its identity outlive the name.
    let identity = image.identity();
    fs::remove_file(&path).unwrap();
    file.set_len(MIB).unwrap();
    assert_eq!(image.refresh().unwrap().size, MIB, "{what}");
    assert_eq!(image.identity(), identity);
    println!("{what}: {g:?}");
    g
}

fn check_directory(directory: &Path, what: &str) {
    let writable = check_image(directory, &PLAIN, what);
    assert!(writable.can_discard && writable.can_write_zeroes, "{what}");
    let read_only = check_image(directory, &READ_ONLY, what);
    assert!(read_only.read_only && !read_only.can_discard);
    let buffered = check_image(directory, &BUFFERED, what);
    assert_eq!(
        (buffered.block_size, buffered.dma_align),
        (512, 512),
        "{what}"
    );
}

#[test]
fn on_the_disk_of_this_machine() {
    check_directory(temporary().path(), "disk");
}

#[test]
fn on_tmpfs() {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(directory) => check_directory(directory.path(), "tmpfs"),
        Err(e) => skipped(&format!("no /dev/shm: {e}")),
    }
}

#[test]
fn on_file_systems_of_all_kinds() {
    for (mkfs, sector, block_size, granularity) in [
        ("mkfs.xfs -q", 512, 512, 4096),
        ("mkfs.xfs -q -b size=1024", 512, 512, 1024),
        ("mkfs.xfs -q -s size=4096", 4096, 4096, 4096),
        ("mkfs.ext4 -q -b 4096", 512, 512, 4096),
        ("mkfs.ext4 -q -b 1024", 512, 512, 1024),
        ("mkfs.ext4 -q -b 4096", 4096, 4096, 4096),
        ("mkfs.btrfs -q", 512, 4096, 4096),
    ] {
        let what = format!("{mkfs} on sectors of {sector}");
        let Some(mounted) = Mounted::new(mkfs, sector, "") else {
            continue;
        };
        check_directory(mounted.path(), &what);
        let g = check_image(mounted.path(), &PLAIN, &what);
        assert_eq!(
            (g.block_size, g.discard_granularity),
            (block_size, granularity),
            "{what}"
        );
    }
}

#[test]
fn a_file_system_without_direct_io_is_served_buffered_only() {
    let Some(mounted) = Mounted::new("mkfs.ext4 -q", 512, "data=journal") else {
        return;
    };
    let path = mounted.path().join("image");
    image_file(&path, MIB);
    refused(
        attach(&path, &PLAIN),
        Kind::Unsupported,
        "no direct I/O for",
    );
    attach(&path, &BUFFERED).unwrap();
}

#[test]
fn block_devices() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, 64 * MIB);
    for sector in [512, 4096] {
        let Some(device) = loop_device(&path, sector) else {
            return;
        };
        let mut image = attach(device.path(), &PLAIN).unwrap();
        assert!(image.is_block_device());
        let g = image.geometry();
        assert_eq!((g.size, g.block_size), (64 * MIB, sector));
        assert!(g.can_write_zeroes);
        println!("loop device: {g:?}");

        let size_limit = Source {
            offset: MIB,
            size_limit: 2 * MIB,
            ..PLAIN
        };
        let part = attach(device.path(), &size_limit).unwrap();
        assert_eq!(
            (part.geometry().offset, part.geometry().size),
            (MIB, 2 * MIB)
        );
        assert_eq!(part.identity(), image.identity());

        // Another node of the same device is the same image.
        let node = directory.path().join("node");
        let number = fs::metadata(device.path()).unwrap().rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        run(&format!("mknod {} b {major} {minor}", node.display())).unwrap();
        assert_eq!(
            attach(&node, &READ_ONLY).unwrap().identity(),
            image.identity()
        );
        Image::reopen(&node, &PLAIN, &image.identity()).unwrap();
        fs::remove_file(&node).unwrap();

        // Live resize.
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(65 * MIB)
            .unwrap();
        run(&format!(
            "losetup --set-capacity {}",
            device.path().display()
        ))
        .unwrap();
        assert_eq!(image.refresh().unwrap().size, 65 * MIB);
        image_file(&path, 64 * MIB);
    }
}

#[test]
fn the_largest_sparse_file() {
    let Some(mounted) = Mounted::new("mkfs.xfs -q", 512, "") else {
        return;
    };
    let path = mounted.path().join("image");
    image_file(&path, i64::MAX as u64);
    let image = attach(&path, &PLAIN).unwrap();
    assert_eq!(image.geometry().size, i64::MAX as u64 - 511);
    let end = Source {
        offset: i64::MAX as u64 - 511,
        ..PLAIN
    };
    refused(attach(&path, &end), Kind::Invalid, "511 bytes of");
    let end = Source {
        offset: i64::MAX as u64 - 1023,
        ..PLAIN
    };
    assert_eq!(attach(&path, &end).unwrap().geometry().size, 512);
}

#[test]
fn cached_pages_are_dropped() {
    let directory = temporary();
    let path = directory.path().join("image");
    fs::write(&path, vec![1; 4 * MIB as usize]).unwrap();
    let cached = || {
        let command = format!(
            "fincore --bytes --noheadings --output RES {}",
            path.display()
        );
        run(&command).map(|text| text.trim().parse::<u64>().unwrap())
    };
    match cached() {
        Ok(before) => assert!(before > 0, "the test itself is wrong"),
        Err(why) => return skipped(&why),
    }
    let _image = attach(&path, &PLAIN).unwrap();
    assert_eq!(cached(), Ok(0));
}

// ---- what must not become an image ----

#[test]
fn a_caller_cannot_change_our_file_description() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let image = Image::open(file.try_clone().unwrap().into(), &PLAIN, "image").unwrap();
    let before = flags(&image);
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND | OFlags::NONBLOCK).unwrap();
    file.seek(SeekFrom::Start(17)).unwrap();
    assert_eq!(flags(&image), before);
    assert_eq!(rustix::fs::tell(image.fd()), Ok(0));
}

#[test]
fn the_callers_rights_are_not_exceeded() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let open = |options: &mut OpenOptions| -> OwnedFd { options.open(&path).unwrap().into() };
    let options = OpenOptions::new;

    let file = open(options().read(true).custom_flags(libc::O_PATH));
    refused(
        Image::open(file, &READ_ONLY, "image"),
        Kind::Denied,
        "O_PATH",
    );
    let file = open(options().read(true));
    refused(
        Image::open(file, &PLAIN, "image"),
        Kind::Denied,
        "--read-only",
    );
    let file = open(options().write(true));
    refused(
        Image::open(file, &PLAIN, "image"),
        Kind::Denied,
        "without read access",
    );
    let file = open(options().write(true));
    refused(
        Image::open(file, &READ_ONLY, "image"),
        Kind::Denied,
        "without read access",
    );
    let file = open(options().read(true).append(true));
    refused(
        Image::open(file, &PLAIN, "image"),
        Kind::Denied,
        "for appending only",
    );

    // Less than what the caller has is fine, and less it is.
    let file = open(options().read(true).write(true));
    let image = Image::open(file, &READ_ONLY, "image").unwrap();
    assert_eq!(flags(&image) & OFlags::RWMODE, OFlags::RDONLY);
    // A caller may have a file that nobody else can open any more.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    Image::open(file.into(), &READ_ONLY, "image").unwrap();
}

#[test]
fn only_regular_files_and_block_devices_are_taken() {
    let directory = temporary();
    let at = |name: &str| directory.path().join(name);
    let take = |file: OwnedFd, source: &Source| Image::open(file, source, "image");

    let file = File::open(directory.path()).unwrap().into();
    refused(take(file, &READ_ONLY), Kind::Invalid, "is a directory");
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    refused(
        take(null.into(), &PLAIN),
        Kind::Invalid,
        "is a character device",
    );
    run(&format!("mkfifo {}", at("fifo").display())).unwrap();
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .open(at("fifo"))
        .unwrap();
    refused(take(fifo.into(), &PLAIN), Kind::Invalid, "is a pipe");
    let socket = UnixListener::bind(at("socket")).unwrap();
    refused(take(socket.into(), &PLAIN), Kind::Invalid, "is a socket");
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    refused(take(event, &PLAIN), Kind::Invalid, "is not a file");
    for path in [
        "/proc/self/mem",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ] {
        match File::open(path) {
            Ok(file) => {
                let source = Source {
                    read_only: true,
                    ..BUFFERED
                };
                refused(take(file.into(), &source), Kind::Invalid, "is a file of ");
            }
            Err(e) => skipped(&format!("{path}: {e}")),
        }
    }
    image_file(&at("empty"), 0);
    refused(attach(&at("empty"), &PLAIN), Kind::Invalid, "is empty");
    // A path is shown as one line, whatever it is.
    let file = File::open(at("empty")).unwrap();
    let error = Image::open(file.into(), &READ_ONLY, "a\nb\x1b[31m").unwrap_err();
    assert!(
        error.to_string().starts_with("a?b?[31m is empty"),
        "{error}"
    );
}

#[test]
fn refusing_an_image_leaves_it_as_it_was() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    let before = fs::metadata(&path).unwrap();
    let bad = Source {
        offset: 100,
        ..PLAIN
    };
    refused(attach(&path, &bad), Kind::Invalid, "not a multiple");
    attach(&path, &READ_ONLY).unwrap();
    let after = fs::metadata(&path).unwrap();
    let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    assert_eq!(times(&after), times(&before));
}

#[test]
fn a_lease_does_not_hold_us_up() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, MIB);
    // Whoever owns a file may lease it, and open() waits 45 s for its owner to give it back.
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
        // The descriptor is ours from before the lease; a tenant would hand over any.
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let writable = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&link)
        };
        assert_eq!(
            writable().unwrap_err().raw_os_error(),
            Some(libc::EWOULDBLOCK)
        );
        let identity = Image::open(file.into(), &READ_ONLY, "image")
            .unwrap()
            .identity();
        let begun = std::time::Instant::now();
        refused(
            Image::reopen(&path, &PLAIN, &identity),
            Kind::Busy,
            "holds a lease",
        );
        assert!(begun.elapsed().as_secs() < 5);
    } else {
        skipped("cannot lease a file here");
    }
    drop(child.stdin.take());
    child.wait().unwrap();
}

// ---- after a restart ----

#[test]
fn an_image_is_found_again_only_if_it_is_the_same() {
    let directory = temporary();
    let (path, other) = (
        directory.path().join("image"),
        directory.path().join("other"),
    );
    image_file(&path, MIB);
    image_file(&other, MIB);
    let identity = attach(&path, &PLAIN).unwrap().identity();
    let text = serde_json::to_string(&identity).unwrap();
    let identity: Identity = serde_json::from_str(&text).unwrap();

    assert_eq!(
        Image::reopen(&path, &PLAIN, &identity).unwrap().identity(),
        identity
    );
    refused(
        Image::reopen(&other, &PLAIN, &identity),
        Kind::NotFound,
        "is not the file",
    );
    refused(
        Image::reopen(directory.path(), &PLAIN, &identity),
        Kind::NotFound,
        "is not the file",
    );
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    Image::reopen(&link, &PLAIN, &identity).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(
        Image::reopen(&path, &PLAIN, &identity).unwrap_err().kind(),
        Kind::NotFound
    );

    // A new file often gets the inode number of the one that is gone.
    image_file(&path, MIB);
    let again = attach(&path, &PLAIN).unwrap().identity();
    assert!(!again.is_still(&identity), "{again:?} {identity:?}");
    refused(
        Image::reopen(&path, &PLAIN, &identity),
        Kind::NotFound,
        "is not the file",
    );
    if again.ino != identity.ino {
        println!("(the inode number was not used again)");
    }
}

// ---- new images ----

#[test]
fn creating_images() {
    let directory = temporary();
    let path = directory.path().join("image");
    create(&path, 10 * MIB, false, |_, _| panic!("nothing to report")).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (10 * MIB, 0));
    refused(
        create(&path, MIB, true, |_, _| {}),
        Kind::Exists,
        "choose another name",
    );
    assert_eq!(
        fs::metadata(&path).unwrap().len(),
        10 * MIB,
        "it was there before us"
    );

    let path = directory.path().join("full");
    let mut reports = Vec::new();
    create(&path, 10 * MIB, true, |done, all| reports.push((done, all))).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 10 * MIB);
    assert!(metadata.blocks() * 512 >= 10 * MIB);
    assert_eq!(reports.first(), Some(&(0, 10 * MIB)));
    assert_eq!(reports.last(), Some(&(10 * MIB, 10 * MIB)));
    assert!(attach(&path, &PLAIN).is_ok());
}

#[test]
fn what_cannot_be_created_leaves_nothing_behind() {
    let directory = temporary();
    let path = directory.path().join("image");
    let sparse = |path: &Path, size| create(path, size, false, |_, _| {});
    refused(sparse(&path, 0), Kind::Invalid, "empty image");
    refused(sparse(&path, 1000), Kind::Invalid, "multiple of 512");
    refused(sparse(&path, 1 << 63), Kind::Invalid, "8 EiB");
    refused(sparse(&path, u64::MAX), Kind::Invalid, "8 EiB");
    refused(sparse(Path::new("/"), MIB), Kind::Invalid, "file name");
    let nowhere = sparse(&directory.path().join("no/image"), MIB);
    assert_eq!(nowhere.unwrap_err().kind(), Kind::NotFound);

    // A full file system: more than ext4 can hold, and more than there is.
    if let Some(mounted) = Mounted::new("mkfs.ext4 -q", 512, "") {
        let path = mounted.path().join("image");
        refused(sparse(&path, 1 << 60), Kind::Invalid, "smaller size");
        refused(
            create(&path, 1 << 40, true, |_, _| {}),
            Kind::Quota,
            "free some space",
        );
        assert!(!path.exists());
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn preallocating_where_only_writing_helps() {
    // ext2's driver knows no fallocate; ext4's driver serving ext2 neither.
    let Some(mounted) = Mounted::new("mkfs.ext2 -q", 512, "") else {
        return;
    };
    let path = mounted.path().join("image");
    let mut reports = 0;
    create(&path, 3 * MIB + 512, true, |_, _| reports += 1).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 3 * MIB + 512);
    assert!(metadata.blocks() * 512 >= 3 * MIB);
    assert!(reports > 3, "written in chunks");
}
