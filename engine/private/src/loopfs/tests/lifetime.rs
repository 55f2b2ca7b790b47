// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifetime of a directory, and the namespaces of its mount.

use std::io;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use super::*;
use crate::sys::mntns;

fn wait_for(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn ends_with_its_last_descriptor() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    let file = File::open(test.path("loop-control")).unwrap();
    let TestMount { mount, ended, fake, directory } = test;
    drop(directory);
    drop(mount);
    assert_eq!(control(&file, 0x4C82, 0), Ok(0), "still in use");
    assert_eq!(ended.load(Ordering::Relaxed), 0);
    drop(file);
    wait_for("the end", || ended.load(Ordering::Relaxed) == 1);
    // No reference to the pool is left.
    wait_for("the pool", || Arc::strong_count(&fake) == 1);
    fake.make(3);
}

#[test]
fn ends_on_request() {
    if !can_mount() {
        return;
    }
    for by_pool in [false, true] {
        let test = TestMount::new();
        let file = File::open(test.path("loop-control")).unwrap();
        match by_pool {
            true => test.fake.changes.lock().unwrap().as_ref().unwrap().ended(),
            false => test.directory.end(),
        }
        wait_for("the end", || control(&file, 0x4C82, 0) == Err(libc::ENOTCONN));
        assert_eq!(errno(test.stat("loop-control")), libc::ENOTCONN);
        wait_for("the threads", || Arc::strong_count(&test.fake) == 1);
        assert_eq!(test.ended.load(Ordering::Relaxed), 0, "no callback on request");
        test.directory.end();
    }
}

#[test]
fn attaches_in_another_mount_namespace() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    test.fake.make(0);
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().to_owned();
    let TestMount { mount, ended, .. } = test;
    let counted = ended.clone();
    let attached = std::thread::spawn(move || {
        if let Err(error) = mntns::enter_own() {
            eprintln!("skipped: no mount namespace of its own here: {error}");
            return;
        }
        attach::attach_mount_read_only(mount.as_fd(), &target).unwrap();
        drop(mount);
        assert_eq!(mntns::mounted("fuse.loop", "fake"), std::slice::from_ref(&target));
        File::open(target.join("loop0")).unwrap();
        let file = File::open(target.join("loop-control")).unwrap();
        assert_eq!(control(&file, 0x4C80, 4), Ok(4));
        drop(file);
        assert_eq!(errno(fs::remove_file(target.join("loop4"))), libc::EROFS);
        assert_eq!(counted.load(Ordering::Relaxed), 0);
        rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
    });
    attached.join().unwrap();
    wait_for("the end", || ended.load(Ordering::Relaxed) == 1);
}

/// Runs as a child in a user namespace, with a mount as standard input.
#[test]
#[ignore = "child of attaches_for_an_unprivileged_user"]
fn within_a_user_namespace() {
    let Some(target) = std::env::var_os("LOOPFS_TARGET").map(PathBuf::from) else { return };
    attach::attach_mount(io::stdin().as_fd(), &target).unwrap();
    File::open(target.join("loop0")).unwrap();
    File::options().read(true).write(true).open(target.join("loop0")).unwrap();
    let file = File::options().read(true).write(true).open(target.join("loop-control")).unwrap();
    assert_eq!(control(&file, 0x4C80, 4), Ok(4));
    assert_eq!(target.join("loop4").symlink_metadata().unwrap().uid(), 0);
    fs::set_permissions(target.join("loop4"), PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_file(target.join("loop4")).unwrap();
}

#[test]
fn attaches_for_an_unprivileged_user() {
    if !can_mount() {
        return;
    }
    let can = Command::new("setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "-Urm", "true"])
        .output();
    if !can.is_ok_and(|ran| ran.status.success()) {
        eprintln!("skipped: users may not make user namespaces here");
        return;
    }
    let test = TestMount::of(FakeDevices::new(1000));
    test.fake.make(0);
    let TestMount { mount, ended, .. } = test;
    // A directory that the user can search, with a copy of this program.
    let dir = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let program = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let target = dir.path().join("dev");
    fs::create_dir(&target).unwrap();
    std::os::unix::fs::chown(&target, Some(1000), Some(1000)).unwrap();
    let ran = Command::new("setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "-Urm"])
        .arg(&program)
        .args(["--ignored", "--exact", "loopfs::tests::lifetime::within_a_user_namespace"])
        .env("LOOPFS_TARGET", &target)
        .current_dir("/")
        .stdin(Stdio::from(mount))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{ran:?}");
    wait_for("the end", || ended.load(Ordering::Relaxed) == 1);
}
