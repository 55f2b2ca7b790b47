// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine stats` and `top`.

use super::*;

#[test]
fn stats_prints_once_or_every_second() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    ok(&daemon.run(&["attach", "a.img"]));
    let json = daemon.run(&["stats", "--json"]);
    let stats: Vec<DeviceStats> = serde_json::from_str(ok(&json)).unwrap();
    assert_eq!((stats[0].in_flight, stats[0].latency.p50_ns), (3, 10_000));
    let table = daemon.run(&["stats", "default/loop0"]);
    assert!(ok(&table).contains("10.0us") && table.out.contains("4.0"), "{table:?}");
    // Each reading advances the fake's clock by one second, and adds 1000 reads.
    let watched = daemon.run(&["stats", "--watch", "--count", "2"]);
    let lines: Vec<&str> = ok(&watched).lines().collect();
    assert_eq!(lines.len(), 3, "one head, two readings: {watched:?}");
    for line in &lines[1..] {
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(&cells[1..3], ["1000", "3.9M/s"], "{watched:?}");
    }
    let json = daemon.run(&["stats", "--watch", "--count", "2", "--json"]);
    for line in ok(&json).lines() {
        let _: Vec<DeviceStats> = serde_json::from_str(line).unwrap();
    }
    ok(&daemon.run(&["stats", "-i", "nobody"]));
}

#[test]
fn watch_ends_with_its_reader() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    ok(&daemon.run(&["attach", "a.img"]));
    let mut child =
        daemon.command(&["stats", "--watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 6]).unwrap();
    drop(out);
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn top_prints_a_table_per_interval() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    daemon.image("b.img", 4096);
    ok(&daemon.run(&["attach", "a.img"]));
    ok(&daemon.run(&["attach", "b.img"]));
    let top = |more: &[&str]| daemon.run(&[&["top", "-d", "0.1"], more].concat());
    // Each reading advances the fake's clock by one second, and adds 1000 reads.
    let printed = top(&["-n", "2", "-o", "DEVICE", "-r"]);
    let lines: Vec<&str> = ok(&printed).lines().collect();
    assert_eq!(lines.len(), 11, "{printed:?}");
    for table in [&lines[..5], &lines[6..]] {
        assert!(table[0].contains(", 2 devices, 0 hidden, by DEVICE reversed"), "{printed:?}");
        assert!(table[1].starts_with("total: IO/S 2000.0 R/S 2000.0 W/S 0.0 RKIB/S 8000.0 "), "{printed:?}");
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let heads =
            "DEVICE USER IO/S R/S W/S RKIB/S WKIB/S AVG_MS P99_MS UTIL% INFLIGHT ERRORS STATE AQU-SZ F/S D/S";
        assert_eq!(cells(table[2]).join(" "), heads);
        let row = "default/loop1 root 1000.0 1000.0 0.0 4000.0 0.0 - - - 3 0 live - 0.0 0.0";
        assert_eq!(cells(table[3]).join(" "), row);
        assert!(table[4].starts_with("default/loop0 "), "{printed:?}");
    }
    let filtered = top(&["-n", "1", "--filter", "B.IMG"]);
    assert!(ok(&filtered).contains("2 devices, 1 hidden") && !filtered.out.contains("loop0"), "{filtered:?}");
    assert_eq!(ok(&top(&["-n", "2", "--json"])).lines().count(), 2);
    for wrong in [&["-d", "0"][..], &["-n", "0"], &["-o", "x"]] {
        assert_eq!(top(wrong).code, 2, "{wrong:?}");
    }
}

#[test]
fn top_ends_with_its_reader() {
    let daemon = Daemon::start();
    let mut top = daemon.command(&["top", "-d", "0.1"]);
    let mut child = top.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 6]).unwrap();
    drop(out);
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}
