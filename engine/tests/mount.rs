// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine mount` without private devices: FUSE drivers mount the image itself.
//!
//! Runs the installed drivers, and needs /dev/fuse. With devices: `private::mount_command` in the
//! VM.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A directory, and no daemon.
struct Bed {
    dir: TempDir,
}

struct Ran {
    code: i32,
    err: String,
}

impl Bed {
    /// None if something is missing, which it prints.
    fn new(programs: &[&str]) -> Option<Bed> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
            eprintln!("skipped: cannot open /dev/fuse: {error}");
            return None;
        }
        let here = |program: &&&str| Command::new("which").arg(program).output().unwrap().status.success();
        if let Some(missing) = programs.iter().find(|program| !here(program)) {
            eprintln!("skipped: {missing} is not installed");
            return None;
        }
        let bed = Bed { dir: TempDir::new().unwrap() };
        fs::create_dir(bed.path("dir")).unwrap();
        fs::create_dir(bed.path("dir2")).unwrap();
        Some(bed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn shell(&self, script: &str) -> Output {
        let ran = Command::new("sh").args(["-ec", script]).current_dir(self.dir.path()).output().unwrap();
        assert!(ran.status.success(), "{script}: {ran:?}");
        ran
    }

    fn run(&self, words: &str) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopengine"));
        command.args(words.split(' ')).current_dir(self.dir.path());
        // The program that `--open` runs.
        command.env("XDG_RUNTIME_DIR", self.path("session"));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.path("bin").display()));
        let ran = command.env("LOOPENGINE_RUN_DIR", self.path("none")).output().unwrap();
        Ran { code: ran.status.code().unwrap(), err: String::from_utf8(ran.stderr).unwrap() }
    }

    fn works(&self, words: &str) {
        let ran = self.run(words);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{words}");
    }

    fn refused(&self, words: &str, says: &[&str]) {
        let ran = self.run(words);
        assert!(ran.code != 0 && says.iter().all(|text| ran.err.contains(text)), "{words}: {}", ran.err);
        assert_eq!(ran.err.matches('\n').count(), 1, "one line: {}", ran.err);
    }

    /// Type and source of the mount on this directory.
    fn mounted(&self, name: &str) -> Option<(String, String)> {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let dir = self.path(name);
        let line = table.lines().find(|line| line.split(' ').nth(1) == dir.to_str())?;
        let mut fields = line.split(' ');
        let source = fields.next()?.to_owned();
        Some((fields.nth(1)?.to_owned(), source))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Left by a failed test.
        for name in [
            "dir",
            "dir2",
            "dir/1",
            "dir/2",
            "session/loopengine-mounts/one",
            "session/loopengine-mounts/disk/1",
        ] {
            if self.mounted(name).is_some() {
                let _ = rustix::mount::unmount(self.path(name), rustix::mount::UnmountFlags::DETACH);
            }
        }
    }
}

const EXT4: &str = "--fuse ext4=fuse2fs";

#[test]
fn mounts_an_image_and_leaves_it_intact() {
    let Some(bed) = Bed::new(&["fuse2fs", "mkfs.ext4", "e2fsck"]) else { return };
    bed.shell("truncate -s 16M a; mkfs.ext4 -q a; cp a b; mkdir full; : > full/x");
    bed.works(&format!("mount {EXT4} a dir"));
    let source = bed.path("a").canonicalize().unwrap().to_str().unwrap().to_owned();
    assert_eq!(bed.mounted("dir"), Some(("fuse.ext4".to_owned(), source)));
    fs::write(bed.path("dir/file"), "hello").unwrap();
    bed.refused(&format!("mount {EXT4} a dir2"), &["a is mounted already", "loopengine umount a"]);
    bed.refused(&format!("mount -r {EXT4} a dir2"), &["a is mounted already"]);
    bed.refused(&format!("mount {EXT4} b dir"), &["an image is mounted on "]);
    bed.works("umount dir");
    assert_eq!(bed.mounted("dir"), None);
    bed.shell("e2fsck -fn a");
    bed.works(&format!("mount -r {EXT4} a dir"));
    bed.works(&format!("mount -r {EXT4} a dir2"));
    assert_eq!(fs::read_to_string(bed.path("dir2/file")).unwrap(), "hello");
    assert!(fs::write(bed.path("dir/file"), "x").is_err());
    bed.works("umount a");
    assert_eq!((bed.mounted("dir"), bed.mounted("dir2")), (None, None));
    bed.refused(&format!("mount {EXT4} b full"), &["it is not empty; give an empty directory"]);
}

#[test]
fn replays_a_journal_on_request() {
    let Some(bed) = Bed::new(&["fuse2fs", "mkfs.ext4", "e2fsck", "debugfs"]) else { return };
    bed.shell("truncate -s 16M a; mkfs.ext4 -q a; debugfs -w -R 'feature +needs_recovery' a; cp a was");
    let asked = "--replay-journal --fuse ext4=fuse2fs";
    bed.refused(
        &format!("mount {EXT4} a dir"),
        &["a was not cleanly unmounted", "'e2fsck -E journal_only a'"],
    );
    bed.refused(&format!("mount -r {asked} a dir"), &["mount a copy"]);
    assert_eq!(bed.mounted("dir"), None);
    bed.shell("cmp a was");
    // e2fsck 1.47 cannot replay a journal in a part of a file.
    bed.shell("{ head -c 1M /dev/zero; cat a; } > part");
    bed.refused(&format!("mount {asked} --offset 1M part dir"), &["'dd if=part ", "skip=1048576"]);
    bed.works(&format!("mount {asked} a dir"));
    fs::write(bed.path("dir/file"), "hello").unwrap();
    bed.works("umount a");
    bed.shell("e2fsck -fn a");
}

/// As fuse2fs 1.47 does if the journal needs recovery: it reports success, and dies.
#[test]
fn fails_if_the_driver_dies() {
    let Some(bed) = Bed::new(&["fuse2fs", "mkfs.ext4", "pgrep"]) else { return };
    bed.shell("truncate -s 16M a; mkfs.ext4 -q a");
    let script = "#!/bin/sh\nfuse2fs \"$@\" && kill -9 $(pgrep -f \"^[^ ]*fuse2fs .* $2 \")\n";
    fs::write(bed.path("dies"), script).unwrap();
    fs::set_permissions(bed.path("dies"), PermissionsExt::from_mode(0o755)).unwrap();
    let dies = bed.path("dies").to_str().unwrap().to_owned();
    bed.refused(&format!("mount --fuse ext4={dies} a dir"), &["mounted a but does not answer"]);
    assert_eq!(bed.mounted("dir"), None);
    // A driver that dies later.
    bed.works(&format!("mount {EXT4} a dir"));
    let dir = bed.path("dir").canonicalize().unwrap();
    bed.shell(&format!("kill -9 $(pgrep -f '^[^ ]*fuse2fs .* {} ')", dir.display()));
    bed.refused(&format!("mount {EXT4} a dir"), &["cannot mount on dir", "loopengine umount dir"]);
    bed.works("umount dir");
    assert_eq!(bed.mounted("dir"), None);
}

#[test]
fn mounts_one_or_all_partitions() {
    let Some(bed) = Bed::new(&["fuse2fs", "squashfuse", "mksquashfs", "sfdisk", "mkfs.ext4"]) else { return };
    bed.shell(
        "truncate -s 16M one; mkfs.ext4 -q one; mkdir tree; echo squash > tree/file
        mksquashfs tree two -quiet -no-progress; truncate -s 32M disk
        printf '%s\\n' 'label: gpt' 'start=2048, size=32768' 'start=34816, size=16384' 'size=2048' | sfdisk -q disk
        dd if=one of=disk bs=1M seek=1 conv=notrunc; dd if=two of=disk bs=1M seek=17 conv=notrunc",
    );
    let programs = "--fuse ext4=fuse2fs,squashfs=squashfuse";
    bed.refused(&format!("mount {programs} disk dir"), &["--partition N, or mount all with --all"]);
    bed.works(&format!("mount {programs} -p 2 disk dir2"));
    assert_eq!(fs::read_to_string(bed.path("dir2/file")).unwrap(), "squash\n");
    assert!(bed.mounted("dir2").unwrap().1.ends_with("/disk?offset=17825792"));
    bed.works("umount dir2");
    let all = bed.run(&format!("mount --all {programs} disk dir"));
    assert_eq!(all.code, 0, "{}", all.err);
    assert!(all.err.contains("partition 3 of disk is not mounted"), "{}", all.err);
    fs::write(bed.path("dir/1/file"), "hello").unwrap();
    assert_eq!(fs::read_to_string(bed.path("dir/2/file")).unwrap(), "squash\n");
    bed.refused(&format!("mount {programs} -p 1 disk dir2"), &["disk is mounted already"]);
    fs::create_dir(bed.path("dir/7")).unwrap();
    bed.works("umount --all dir");
    let left: Vec<_> =
        fs::read_dir(bed.path("dir")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["7"], "only directories that mount created are removed");
    bed.shell("dd if=disk of=one bs=1M skip=1 count=16 conv=notrunc; e2fsck -fn one");
    // A failure is reported, and does not prevent the others.
    bed.refused_after("mount --all --fuse squashfs=squashfuse,ext4=false disk dir", "partition 1: ");
    assert_eq!((bed.mounted("dir/1"), bed.path("dir/1").exists()), (None, false));
    assert!(bed.mounted("dir/2").is_some());
    bed.works("umount disk");
    assert_eq!(bed.mounted("dir/2"), None);
    bed.refused("mount --all one dir", &["one has no partitions", "without --all"]);
}

/// As on a desktop: one file system, or all partitions.
#[test]
fn opens_an_image() {
    let Some(bed) = Bed::new(&["fuse2fs", "mkfs.ext4", "sfdisk", "e2fsck"]) else { return };
    bed.shell(
        "truncate -s 16M one; mkfs.ext4 -q one; truncate -s 20M disk; mkdir bin session
        printf '%s\\n' 'label: gpt' 'start=2048, size=32768' | sfdisk -q disk
        dd if=one of=disk bs=1M seek=1 conv=notrunc
        printf '#!/bin/sh\\nls \"$1\" > shown\\n' > bin/xdg-open; chmod +x bin/xdg-open",
    );
    let shown = || fs::read_to_string(bed.path("shown")).unwrap();
    bed.works(&format!("mount --open {EXT4} one"));
    assert_eq!(shown(), "lost+found\n");
    fs::write(bed.path("session/loopengine-mounts/one/file"), "hello").unwrap();
    bed.works("umount session/loopengine-mounts/one");
    assert!(!bed.path("session/loopengine-mounts/one").exists());
    bed.shell("e2fsck -fn one");
    bed.works(&format!("mount --open {EXT4} disk"));
    assert_eq!(shown(), "1\n");
    assert!(bed.path("session/loopengine-mounts/disk/1/lost+found").exists());
    bed.works("umount --all session/loopengine-mounts/disk");
    assert!(!bed.path("session/loopengine-mounts/disk").exists());
    for image in ["one", "disk"] {
        bed.works(&format!("mount --open {EXT4} {image}"));
        bed.works(&format!("umount --all {image}"));
        assert!(!bed.path(&format!("session/loopengine-mounts/{image}")).exists(), "{image}");
    }
    bed.refused("mount --open none", &["none"]);
    assert_eq!(fs::read_dir(bed.path("session/loopengine-mounts")).unwrap().count(), 0);
}

impl Bed {
    /// Like `refused`, but with warnings before the error.
    fn refused_after(&self, words: &str, says: &str) {
        let ran = self.run(words);
        assert!(ran.code != 0 && ran.err.lines().last().unwrap().contains(says), "{words}: {}", ran.err);
    }
}

#[test]
fn passes_supported_options_to_drivers() {
    let kinds = [
        (
            "mkfs.vfat",
            "mkfs.vfat a",
            "vfat=fusefat",
            "fusefat does not write vfat reliably: mounted read-only",
        ),
        ("mkfs.ntfs", "mkfs.ntfs -q -F a", "ntfs=ntfs-3g", ""),
        ("genisoimage", "mkdir tree; : > tree/file; genisoimage -quiet -o a tree", "iso9660=fuseiso", ""),
        ("mkfs.erofs", "mkdir tree; : > tree/file; rm a; mkfs.erofs a tree", "erofs=erofsfuse", ""),
    ];
    for (tool, make, fuse, says) in kinds {
        let program = fuse.split('=').nth(1).unwrap();
        let Some(bed) = Bed::new(&[tool, program]) else { continue };
        bed.shell(&format!("truncate -s 16M a; {make}"));
        let ran = bed.run(&format!("mount --fuse {fuse} a dir"));
        assert_eq!(ran.code, 0, "{fuse}: {}", ran.err);
        assert!(ran.err.contains(says) && ran.err.is_empty() == says.is_empty(), "{fuse}: {}", ran.err);
        fs::read_dir(bed.path("dir")).unwrap();
        let writes = fs::write(bed.path("dir/new"), "x").is_ok();
        assert_eq!(writes, program == "ntfs-3g", "{fuse}");
        bed.works("umount a");
        assert_eq!(bed.mounted("dir"), None, "{fuse}");
    }
}

#[test]
fn hints_match_the_error() {
    let Some(bed) = Bed::new(&["fuse2fs", "fuseiso", "genisoimage", "mkfs.ext4"]) else { return };
    bed.shell("truncate -s 16M a; mkfs.ext4 -q a; mkdir tree; genisoimage -quiet -o iso tree");
    bed.shell("head -c 4096 a > broken; truncate -s 16M broken; { head -c 1M /dev/zero; cat iso; } > part");
    bed.refused(&format!("mount {EXT4} broken dir"), &["fuse2fs cannot mount broken", "'e2fsck -fn broken'"]);
    let within = "mount --fuse iso9660=fuseiso --offset 1M part dir";
    bed.refused(
        within,
        &["fuseiso cannot mount a part of a file", "cannot reach the daemon", "'dd if=part "],
    );
    // A name with a leading dash is not an option.
    bed.shell("cp a a,suid");
    bed.works(&format!("mount {EXT4} a,suid dir"));
    assert!(bed.mounted("dir").is_some_and(|(_, source)| !source.contains("suid")));
    bed.refused("umount dir", &["fusermount3 -u dir"]);
}
