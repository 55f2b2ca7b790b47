// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine create`.

use super::*;

#[test]
fn create_makes_images() {
    let daemon = Daemon::start();
    let path = daemon.image("x", 0).with_file_name("new.img");
    ok(&daemon.run(&["create", "new.img", "--size", "3M"]));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 << 20);
    fails(&daemon.run(&["create", "new.img", "--size", "3M"]), 4, "File exists");
    std::fs::remove_file(&path).unwrap();
    fails(&daemon.run(&["create", "new.img", "--size", "1000"]), 2, "multiple of 512");
    fails(&daemon.run(&["create", "new.img", "--size", "0"]), 2, "empty image");
    fails(&daemon.run(&["create", "no/new.img", "--size", "1M"]), 3, "directory");
    assert!(!path.exists());
    let ran = daemon.run(&["create", "new.img", "--size", "2M", "--preallocate"]);
    if ran.code == 7 {
        assert!(!path.exists(), "nothing is left behind");
    } else {
        use std::os::unix::fs::MetadataExt;
        ok(&ran);
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= 2 << 20);
    }
    // Larger than any file system: refused, and the file is removed.
    let huge = path.with_file_name("huge.img");
    let ran = daemon.run(&["create", "huge.img", "--size", "7E", "--preallocate"]);
    assert!(ran.code != 0 && ran.err.matches('\n').count() == 1, "{ran:?}");
    assert!(!huge.exists(), "{ran:?}");
}

#[test]
fn create_removes_the_file_when_interrupted() {
    // The signal arrives in time only if the file system reserves space by writing, which is slow;
    // elsewhere the command succeeds first. Both results are valid.
    let daemon = Daemon::start();
    let path = daemon.image("x", 0).with_file_name("new.img");
    let mut child = daemon
        .command(&["create", "new.img", "--size", "1G", "--preallocate"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !path.exists() && started.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = rustix::process::Pid::from_child(&child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    let made = child.wait().unwrap().success();
    assert_eq!(path.exists(), made);
    let _ = std::fs::remove_file(path);
}
