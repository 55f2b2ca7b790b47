// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A result as a long run would have it, made of chance: twelve targets, eight jobs.
//!
//! For tests of what is written about it; its numbers are plausible, and mean nothing.

use std::collections::BTreeMap;

use super::outcome::*;

/// Name, what it is, its speed beside the kernel loop's, whether it serves ext4.
const TARGETS: [(&str, &str, f64, bool); 12] = [
    ("raw file", "the data file by itself, nothing in between", 1.6, false),
    ("kernel loop", "the kernel's loop driver with direct I/O", 1.0, false),
    ("loopengine batch", "loopengine, zero copy with batched completions", 1.3, false),
    ("loopengine auto", "loopengine, buffers registered by the kernel", 1.2, false),
    ("loopengine copy", "loopengine, data copied by the engine", 0.8, false),
    ("loopengine poll", "loopengine, polling instead of waiting", 1.4, false),
    ("loopengine fuse", "loopengine serving a file over FUSE, in place of a device", 0.55, false),
    ("qemu fuse", "qemu-storage-daemon, FUSE export", 0.4, false),
    ("qemu nbd", "qemu-nbd behind the kernel's NBD driver", 0.3, false),
    ("fuse passthrough", "a FUSE file system that hands the file through", 0.9, false),
    ("ext4 on kernel loop", "ext4 on the kernel's loop device", 1.0, true),
    ("ext4 on loopengine", "ext4 on loopengine batch", 1.1, true),
];

/// Name, title, operations a second of the kernel loop, bytes an operation, depth.
const JOBS: [(&str, &str, f64, f64, Option<u32>); 8] = [
    ("randread-4k-qd1", "4K random read, depth 1", 9_000.0, 4096.0, Some(1)),
    ("randread-4k-qd4", "4K random read, depth 4", 22_000.0, 4096.0, Some(4)),
    ("randread-4k-qd32", "4K random read, depth 32", 56_000.0, 4096.0, Some(32)),
    ("randread-4k-qd128", "4K random read, depth 128", 61_000.0, 4096.0, Some(128)),
    ("randwrite-4k-qd32", "4K random write, depth 32", 41_000.0, 4096.0, None),
    ("read-128k-qd8", "128K sequential read, depth 8", 6_900.0, 131_072.0, None),
    ("write-128k-qd8", "128K sequential write, depth 8", 5_100.0, 131_072.0, None),
    ("fs-create", "Creation of small files on ext4", 3_300.0, 4096.0, None),
];

/// The same for the same number of rounds. Whole numbers: they come back from JSON as they went.
pub fn outcome(rounds: u32) -> Outcome {
    let mut random = fastrand::Rng::with_seed(3);
    let mut samples = Vec::new();
    let mut latencies = Vec::new();
    for (job, _, base, bytes, depth) in JOBS {
        for (target, _, speed, on_ext4) in TARGETS {
            if on_ext4 != (job == "fs-create") || target == "qemu nbd" {
                continue;
            }
            for round in 0..rounds {
                let iops = (base * speed * (0.92 + 0.16 * random.f64())).round();
                samples.push(sample(round, job, target, iops, bytes, f64::from(depth.unwrap_or(8))));
            }
            let middle = f64::from(depth.unwrap_or(8)) * 1e9 / (base * speed);
            let counts = (0..160).map(|step| {
                let times = 1.06f64.powi(step);
                ((middle * 0.7 * times) as u64, (9e4 * f64::from(rounds) / times.powf(2.2 + speed)) as u64)
            });
            let counts = counts.filter(|(_, often)| *often > 0).collect();
            latencies.push(Latency { job: job.into(), target: target.into(), counts });
        }
    }
    Outcome {
        schema: SCHEMA,
        manifest: manifest(rounds),
        warnings: vec![
            Warning {
                what: "the governor of cpu0 is powersave".into(),
                advice: "cpupower frequency-set --governor performance".into(),
            },
            Warning {
                what: "the machine was 31 % busy before the first round".into(),
                advice: "stop what else runs".into(),
            },
        ],
        targets: TARGETS.map(|(name, about, ..)| target(name, about)).into(),
        jobs: JOBS.map(|(name, title, _, _, depth)| job(name, title, depth)).into(),
        samples,
        latencies,
        attach: vec![
            attach("kernel loop", "call", 0, 2e5),
            attach("loopengine", "call", 0, 1.6e7),
            attach("loopengine", "command", 1000, 2.1e8),
        ],
        idle: vec![Idle {
            target: "loopengine".into(),
            devices: 1000,
            pss_kib: 48_146,
            pss_kib_before: 5_606,
            cpu_ns: 1_200_000,
            over_ns: 10_000_000_000,
        }],
    }
}

fn manifest(rounds: u32) -> Manifest {
    let notes = [
        ("revision", "3eafd860c66c378268d7c8c873d42a3c59c00dda"),
        ("command", "loopbench run --mode smp --rounds 5 --run-ms 2000"),
        (
            "store",
            "XFS on a memory-backed null_blk, image preallocated and written, direct I/O, scheduler none",
        ),
    ];
    Manifest {
        date: "2026-11-22".into(),
        kernel: "7.3.4+deb13-amd64".into(),
        mode: Mode::Smp,
        cpus: 2,
        host_cpu: "AMD EPYC 9B14".into(),
        fio: "fio-3.33".into(),
        rounds,
        run_ms: 2000,
        ramp_ms: 400,
        complete: true,
        notes: BTreeMap::from(notes.map(|(name, value)| (name.into(), value.into()))),
    }
}

fn target(name: &str, about: &str) -> TargetInfo {
    let unavailable = (name == "qemu nbd").then(|| "qemu-nbd is not installed".to_owned());
    TargetInfo { name: name.into(), about: about.into(), version: "7.3.4".into(), unavailable }
}

fn job(name: &str, title: &str, depth: Option<u32>) -> JobInfo {
    let files = name == "fs-create";
    JobInfo {
        name: name.into(),
        title: title.into(),
        question: "What does the way of a request through the driver cost, when nothing else is in its way? Bound by \
            the CPU of the side that serves it."
            .into(),
        unit: files.then(|| "file".to_owned()),
        reference: if files { "ext4 on kernel loop" } else { "kernel loop" }.into(),
        depth,
    }
}

fn sample(round: u32, job: &str, target: &str, iops: f64, bytes: f64, depth: f64) -> Sample {
    let ns = 1e9 / iops;
    let served = target.contains("loopengine") || target.contains("qemu");
    let cost = Cost {
        submitter_ns: Some((ns * 0.3).round()),
        engine_ns: served.then_some((ns * 0.45).round()),
        system_ns: None,
        switches: served.then_some(0.4),
        punts: target.starts_with("loopengine").then_some(0.001),
    };
    let (job, target) = (job.to_owned(), target.to_owned());
    let (p50_ns, p99_ns) = ((ns * depth) as u64, (ns * depth * 2.4) as u64);
    Sample { round, job, target, iops, bytes_per_s: iops * bytes, p50_ns, p99_ns, cost }
}

fn attach(target: &str, how: &str, present: u32, ns: f64) -> Attach {
    let times =
        |factor: f64| (0..50).map(|index| (ns * factor * (1.0 + f64::from(index) / 90.0)) as u64).collect();
    Attach { target: target.into(), how: how.into(), present, attach_ns: times(1.0), detach_ns: times(0.6) }
}
