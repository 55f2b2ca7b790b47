// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine losetup`, compared with this machine's losetup, and on a fake pool.

mod fake;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Args as _, FromArgMatches as _};
use fake::{Fake, entry};

use super::{LosetupArgs, NAME};
use crate::loops::{Bound, DeviceEntry, Errno, LoopInfo, LoopStatus, NAME_BYTES, flag};

/// The output of a run, and its exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ran {
    out: String,
    err: String,
    code: i32,
}

/// Parses `words`, starting with the program name. For a program called losetup.
fn parse(words: impl IntoIterator<Item = OsString>) -> Result<LosetupArgs, clap::Error> {
    let command = LosetupArgs::augment_args(clap::Command::new(NAME)).version(env!("CARGO_PKG_VERSION"));
    LosetupArgs::from_arg_matches(&command.try_get_matches_from(words)?)
}

fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// Runs losetup of this machine, if there is one.
fn real(words: &[&str]) -> Option<Ran> {
    let command = Command::new("losetup").args(words).env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output();
    let Ok(output) = command else {
        skipped("no losetup");
        return None;
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Ran {
        out: text(&output.stdout),
        err: text(&output.stderr),
        code: output.status.code().unwrap_or(-1),
    })
}

/// Loop devices of the kernel, which a drop detaches.
struct Kernel(Vec<String>);

impl Kernel {
    fn add(&mut self, words: &[&str]) -> Option<String> {
        let ran = real(&[&["--find", "--show"], words].concat())?;
        if ran.code != 0 {
            skipped(&ran.err);
            return None;
        }
        let name = ran.out.trim().to_owned();
        self.0.push(name.clone());
        Some(name)
    }

    /// A fake pool with the same devices, read from sysfs.
    fn pool(&self) -> Fake {
        let mut fake = Fake::of(0);
        for name in &self.0 {
            let number: u32 = name.trim_start_matches("/dev/loop").parse().unwrap();
            let sys = PathBuf::from(format!("/sys/block/loop{number}"));
            let text = |what: &str| fs::read_to_string(sys.join(what)).unwrap().trim_end().to_owned();
            let is = |what: &str, flag: u32| if text(what) == "1" { flag } else { 0 };
            let flags = is("ro", flag::READ_ONLY)
                | is("loop/autoclear", flag::AUTOCLEAR)
                | is("loop/partscan", flag::PARTSCAN)
                | is("loop/dio", flag::DIRECT_IO);
            let path = text("loop/backing_file");
            let meta = fs::metadata(&path).unwrap();
            let bound = Bound {
                offset: text("loop/offset").parse().unwrap(),
                size_limit: text("loop/sizelimit").parse().unwrap(),
                backing_file: path.into(),
                image_device: meta.dev(),
                image_inode: meta.ino(),
                flags,
            };
            let device = DeviceEntry {
                rdev: fs::metadata(name).unwrap().rdev(),
                block_size: text("queue/logical_block_size").parse().unwrap(),
                bound: Some(bound),
                ..entry(number)
            };
            let info = LoopInfo::default();
            let status = LoopStatus { number, device: meta.dev(), inode: meta.ino(), rdevice: 0, info };
            fake.entries.insert(number, (device, Some(status)));
        }
        fake
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = real(&["--detach", name]);
        }
    }
}

fn file(directory: &Path, name: &str, size: u64) -> String {
    let path = directory.join(name);
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn prints_what_losetup_prints() {
    let directory = tempfile::tempdir().unwrap();
    let mut kernel = Kernel(Vec::new());
    let plain = file(directory.path(), "plain", 1 << 20);
    let odd = file(directory.path(), "ünï \"x\" back\\slash\ttab\nline", 1 << 20);
    let long = file(directory.path(), &"x".repeat(200), 1 << 20);
    let Some(only) = kernel.add(&[&odd]) else { return };
    let options: &[&[&str]] = &[
        &[&plain],
        &["--offset", "4096", &plain],
        &["--sizelimit", "8k", "--read-only", &plain],
        &["-o", "0x1000", "--sizelimit", "65536", "--sector-size", "4096", &plain],
        &["--partscan", "--direct-io=on", &plain],
        &[&long],
    ];
    for words in options {
        if kernel.add(words).is_none() {
            return;
        }
    }
    let mut pool = kernel.pool();
    let sorted = |ran: &Ran| {
        let mut lines: Vec<String> = ran.out.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        (lines, ran.err.clone(), ran.code)
    };
    let tables: &[&[&str]] = &[
        &[],
        &["-l"],
        &["-l", "-n"],
        &["-O", "NAME"],
        &["-O", "MAJ:MIN"],
        &["-O", "name,Back-File"],
        &["-O", "BACK-FILE,NAME"],
        &["-O", "BACK-MAJ:MIN,BACK-INO,MAJ:MIN,PARTSCAN,DIO,RO,AUTOCLEAR,LOG-SEC,OFFSET,SIZELIMIT"],
        &["-O", "+PARTSCAN"],
        &["-l", "--raw"],
        &["--raw", "-n", "-O", "BACK-FILE,SIZELIMIT,NAME"],
        &["-l", "-J"],
        &["-J", "-O", "NAME,BACK-INO,BACK-FILE,PARTSCAN"],
    ];
    for words in tables {
        // One line: equal byte by byte.
        for more in [&["-j", odd.as_str()][..], &["-j", &long]] {
            let words = [words, more].concat();
            assert_eq!(pool.ran(&words), real(&words).unwrap(), "{words:?}");
        }
        // One device (by its name, -l is needed).
        let words = [words, &["-l", only.as_str()][..]].concat();
        assert_eq!(pool.ran(&words), real(&words).unwrap(), "{words:?}");
    }
    for words in tables.iter().filter(|words| !words.contains(&"-J")) {
        // losetup lists in directory order.
        let words = [words, &["-j", plain.as_str()][..]].concat();
        assert_eq!(sorted(&pool.ran(&words)), sorted(&real(&words).unwrap()), "{words:?}");
    }
    let words: &[&[&str]] =
        &[&["-j", &plain, "-o", "4096"], &["-j", &plain, "-o", "7"], &["-j", "/nowhere"], &["-j", "/"]];
    for words in words {
        assert_eq!(sorted(&pool.ran(words)), sorted(&real(words).unwrap()), "{words:?}");
    }
    for name in &kernel.0 {
        assert_eq!(pool.ran(&[name]), real(&[name]).unwrap());
    }
}

#[test]
fn fails_as_losetup_does() {
    let directory = tempfile::tempdir().unwrap();
    let image = file(directory.path(), "image", 1 << 20);
    let cases: &[&[&str]] = &[
        &["-x"],
        &["-ax"],
        &["--frobnicate"],
        &["--offset"],
        &["-o"],
        &["-O"],
        &["-j"],
        &["--help=1"],
        &["--raw=1"],
        &["-J", "--raw"],
        &["--list", "-f"],
        &["-o", "abc", "-f", &image],
        &["-o", "1x", "-f", &image],
        &["--sizelimit", "99999999999999999999", "-f", &image],
        &["--sizelimit", "1G", "-a"],
        &["-r", "-a"],
        &["-o", "5", "-a"],
        &["--show"],
        &["-f", &image, "extra"],
        &["-O", "foo"],
        &["-O", "NAME,foo"],
        &["-O", ""],
        &["-P", "/dev/loop0"],
        &["-d", "foo"],
        &["/dev/null"],
        &["-l", "/dev/null"],
        &["loop01"],
        &["-j", "/nowhere"],
        &["-j", "/nowhere", "-l", "-J"],
        &["-j", "/nowhere", "-l"],
        &["-j", "/nowhere", "--raw"],
        &["--direct-io=maybe", "-f", &image],
    ];
    let mut known = Fake::of(0);
    known.add(0).ok();
    let mut wrong = Vec::new();
    for words in cases {
        let Some(real) = real(words) else { return };
        let mut ours = known.ran(words);
        // util-linux 2.41 added --remove.
        if !real.err.contains("--remove") {
            ours.err = ours.err.replace(" --remove", "");
        }
        if ours != real {
            wrong.push((words, ours, real));
        }
    }
    assert!(wrong.is_empty(), "ours, then losetup's: {wrong:#?}");
}

#[test]
fn finds_binds_and_detaches() {
    let directory = tempfile::tempdir().unwrap();
    let image = file(directory.path(), "image", 1 << 20);
    let mut pool = Fake::of(3);
    pool.does(&["-f"], "/dev/loop0\n");
    pool.does(&["-f", "--show", &image], "/dev/loop0\n");
    pool.does(&["-f"], "/dev/loop1\n");
    pool.does(&["-f", &image, "-o", "1M", "--sizelimit", "2K", "-b", "4k", "-P", "--direct-io"], "");
    let (entry, status) = pool.entries[&1].clone();
    let bound = entry.bound.unwrap();
    assert_eq!((bound.offset, bound.size_limit, entry.block_size), (1 << 20, 2048, 4096));
    assert_eq!(bound.flags, flag::PARTSCAN | flag::DIRECT_IO);
    let name = status.unwrap().info.file_name;
    assert!(name.starts_with(&image.as_bytes()[..image.len().min(NAME_BYTES - 1)]));
    pool.does(&["/dev/loop2", &image, "--loop-ref", "mine", "-r"], "");
    assert_eq!(pool.flags(2), flag::READ_ONLY);
    pool.does(&["-O", "REF", "-n", "loop2"], "mine\n");
    pool.fails(&["-f"], "cannot find an unused loop device: No space left on device");
    pool.fails(&["-f", &image], "cannot find an unused loop device: No space left on device");
    pool.fails(
        &["loop2", &image],
        &format!("{image}: failed to set up loop device: Device or resource busy"),
    );
    pool.fails(
        &["loop3", &image],
        &format!("{image}: failed to set up loop device: No such file or directory"),
    );
    let ran = pool.ran(&["-d", "/dev/loop0", "/dev/loop7", "loop1"]);
    assert_eq!(ran.err, "losetup: /dev/loop7: detach failed: No such file or directory\n");
    assert_eq!((ran.code, pool.calls.last().unwrap().as_str()), (1, "clear 1"));
    pool.fails(&["-d", "loop0"], "/dev/loop0: detach failed: No such device or address");
    pool.fails(&["-d", "nonsense", "loop2"], "nonsense: failed to use device: No such device");
    pool.does(&["-D"], "");
    pool.does(&["-l"], "");
    pool.does(&["-J"], "{\n   \"loopdevices\": [\n\n   ]\n}\n");
    pool.fails(&["loop0"], "/dev/loop0: No such file or directory");
    pool.does(&["--remove", "loop0", "loop2"], "");
    pool.fails(&["--remove", "loop0"], "/dev/loop0: remove failed: No such device");
    pool.fails(&["-f", "/nowhere"], "/nowhere: failed to set up loop device: No such file or directory");
    pool.fails(&["-d"], "no loop device specified");
    pool.fails(&["loop0", "-f", "-c"], "mutually exclusive arguments: --detach-all --all --set-capacity --detach --find --associated --remove");
}

#[test]
fn changes_devices() {
    let directory = tempfile::tempdir().unwrap();
    let image = file(directory.path(), "image", 1 << 20);
    let mut pool = Fake::of(3);
    pool.does(&["-f", &image], "");
    pool.does(&["-c", "loop0"], "");
    pool.does(&["--direct-io", "loop0"], "");
    assert_eq!(pool.flags(0), flag::DIRECT_IO);
    pool.does(&["--direct-io=off", "/dev/loop0"], "");
    pool.does(&["-b", "4096", "loop0"], "");
    assert_eq!(
        pool.calls.split_off(pool.calls.len() - 4),
        ["set_capacity 0", "set_direct_io 0 true", "set_direct_io 0 false", "set_block_size 0 4096"]
    );
    let all = ["set_capacity", "set_direct_io", "set_block_size"];
    pool.fails = all.map(|name| (name, Errno::INVAL)).to_vec();
    pool.fails(&["-c", "loop0"], "/dev/loop0: set capacity failed: Invalid argument");
    pool.fails(&["--direct-io", "loop0"], "/dev/loop0: set direct io failed: Invalid argument");
    pool.fails(&["-b", "3", "loop0"], "/dev/loop0: set logical block size failed: Invalid argument");
    // Without permission for the status, losetup prints less.
    pool.fails = vec![("status", Errno::PERM)];
    pool.does(&["-a"], &format!("/dev/loop0: []: ({image})\n"));
}

#[test]
fn retries_if_another_process_is_faster() {
    let directory = tempfile::tempdir().unwrap();
    let image = file(directory.path(), "image", 1 << 20);
    let mut pool = Fake::of(3);
    pool.fails = vec![("configure", Errno::BUSY), ("configure", Errno::AGAIN)];
    pool.does(&["-f", "--show", &image], "/dev/loop0\n");
    pool.fails = vec![("configure", Errno::NODEV)];
    pool.fails(&["-f", &image], &format!("{image}: failed to set up loop device: No such device"));
}

#[test]
fn avoids_overlaps() {
    let directory = tempfile::tempdir().unwrap();
    let image = file(directory.path(), "image", 1 << 20);
    let other = file(directory.path(), "other", 1 << 20);
    let mut pool = Fake::of(9);
    let exists = format!("{image}: overlapping loop device exists");
    pool.does(&["-L", "-f", "--show", &image, "-o", "4096", "--sizelimit", "4096"], "/dev/loop0\n");
    pool.entries.get_mut(&0).unwrap().0.bound.as_mut().unwrap().flags |= flag::AUTOCLEAR;
    pool.does(&["-L", "-f", "--show", &image, "-o", "4096", "--sizelimit", "4096"], "/dev/loop0\n");
    assert_eq!(pool.flags(0), 0, "a reused device is not cleared at its last close");
    pool.fails(&["-L", "-f", &image], &exists);
    pool.fails(&["-L", "-f", &image, "-o", "8191"], &exists);
    pool.fails(&["-L", "-f", &image, "--sizelimit", "4097"], &exists);
    pool.fails(&["-L", "loop3", &image, "-o", "4096", "--sizelimit", "4096"], &exists);
    pool.does(&["-L", "-f", "--show", &image, "-o", "8192"], "/dev/loop1\n");
    pool.does(&["-L", "-f", "--show", &image, "--sizelimit", "4096"], "/dev/loop2\n");
    pool.does(&["-L", "-f", "--show", &other, "-r"], "/dev/loop3\n");
    pool.does(&["-L", "-f", "--show", &other, "-r"], "/dev/loop3\n");
    pool.fails(&["-L", "-f", &other], &format!("{other}: overlapping read-only loop device exists"));
    pool.fails = vec![("set_status", Errno::PERM)];
    pool.fails(&["-L", "-f", "-r", &other], &format!("{other}: failed to re-use loop device"));
}

#[test]
fn warns_of_sizes_that_do_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let cases = [(100, "file is smaller than 512 bytes"), (1000, "file does not end on a 512-byte sector")];
    for (size, warning) in cases {
        let image = file(directory.path(), "image", size);
        let ran = Fake::of(1).ran(&["-f", "--show", &image]);
        assert_eq!((ran.out.as_str(), ran.code), ("/dev/loop0\n", 0));
        assert!(ran.err.starts_with(&format!("losetup: {image}: Warning: {warning}")), "{ran:?}");
    }
    let device = fs::metadata("/dev/loop0").is_ok_and(|meta| meta.file_type().is_block_device());
    if !device {
        skipped("no block device to bind");
    } else {
        let ran = Fake::of(1).ran(&["-f", "-r", "/dev/loop0"]);
        assert_eq!((ran.err.as_str(), ran.code), ("", 0));
    }
}
