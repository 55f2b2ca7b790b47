// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The /dev and /sys of a command.

use super::*;

#[test]
fn names_follow_the_pool() {
    let Some(daemon) = Daemon::start() else { return };
    let script = "echo ready; read go; readlink /dev/loop0 /dev/loop1 /dev/loop1p2; cat /sys/block/loop1/size \
                  /sys/block/loop1/loop1p2/start; echo ready; read go; ls -d /dev/loop[0-9]* /sys/class/block/loop*";
    for uid in [0, PLAIN] {
        let mut child = daemon
            .program(uid)
            .args(["run", "--", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut go = child.stdin.take().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let mut next = || lines.next().unwrap().unwrap();
        assert_eq!(next(), "ready");
        let pool = daemon.pool();
        pool.put(entry(0));
        let partition = |number| PartitionEntry {
            number,
            rdev: rdev(16 + number),
            generation: 1,
            start: 2048 * u64::from(number),
            size: 1 << 20,
        };
        pool.put(DeviceEntry { partitions: vec![partition(1), partition(2)], ..entry(1) });
        writeln!(go).unwrap();
        for want in ["loopfs/loop0", "loopfs/loop1", "loopfs/loop1p2", "16384", "4096", "ready"] {
            assert_eq!(next(), want);
        }
        pool.put(entry(1));
        pool.events.changed(0, || None);
        writeln!(go).unwrap();
        assert_eq!([next(), next()], ["/dev/loop1", "/sys/class/block/loop1"]);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn util_linux_reads_the_tree() {
    let Some(daemon) = Daemon::start() else { return };
    let script = "echo ready; read go; losetup -l -J -O NAME,SIZELIMIT,OFFSET,AUTOCLEAR,RO,BACK-FILE,DIO,LOG-SEC,PARTSCAN; \
                  echo; losetup -j /images/a.img; losetup -a; lsblk -J -b -o NAME,TYPE,SIZE,RO,MAJ:MIN,LOG-SEC,PKNAME,START";
    let mut child = daemon
        .program(0)
        .args(["run", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the command runs", || {
        daemon.fake.pools.lock().unwrap().last().is_some_and(|p| p.listener.lock().unwrap().is_some())
    });
    let pool = daemon.pool();
    let bound = Bound {
        backing_file: "/images/a.img".into(),
        image_device: 1,
        image_inode: 2,
        offset: 512,
        size_limit: 1 << 20,
        flags: flag::READ_ONLY | flag::AUTOCLEAR | flag::PARTSCAN,
    };
    let partition = PartitionEntry { number: 1, rdev: rdev(17), generation: 1, start: 2048, size: 1 << 20 };
    pool.put(entry(0));
    pool.put(DeviceEntry { block_size: 4096, bound: Some(bound), partitions: vec![partition], ..entry(1) });
    writeln!(child.stdin.take().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    eprintln!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let dense: String = text.split_whitespace().collect();
    for want in [
        r#""name":"/dev/loop1","sizelimit":1048576,"offset":512,"autoclear":true,"ro":true,"back-file":"/images/a.img","dio":false,"log-sec":4096,"partscan":true"#,
        r#""name":"loop1p1","type":"part","size":1048576"#,
        r#""name":"loop1","type":"loop","size":8388608,"ro":true,"maj:min":"259:7016","log-sec":4096"#,
    ] {
        assert!(dense.contains(want), "{want}\n{text}");
    }
    assert_eq!(text.matches("(/images/a.img), offset 512, sizelimit 1048576").count(), 2, "{text}");
}
