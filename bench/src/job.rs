// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The jobs: each is a plain job file of fio in `fio-jobs/`, which can also be run manually.
//!
//! Knows the files and what each needs of a target. `fio` runs them.

use crate::outcome::JobInfo;

/// What a job needs of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A file or a block device: `${FILENAME}`.
    Data,
    /// A block device: `${FILENAME}`. fio discards on nothing else.
    Block,
    /// Sixteen files or devices, with colons between them: `${FILENAMES}`.
    Many,
    /// A mounted file system: `${DIRECTORY}`.
    Mount,
}

/// Number of devices for a job that needs many.
pub const MANY: usize = 16;

/// A job file.
#[derive(Debug)]
pub struct Job {
    /// Name of the file without its ending.
    pub name: &'static str,
    /// Title for a heading.
    pub title: &'static str,
    /// What the job isolates, and what bounds it.
    pub question: &'static str,
    pub needs: Needs,
    /// Unit of an operation, if it is not an I/O.
    pub unit: Option<&'static str>,
    /// I/Os in flight, if it belongs to the plot of throughput against depth.
    pub depth: Option<u32>,
    /// Runs two processes: meaningless on one CPU.
    pub two_cpus: bool,
    /// Part of `--quick`.
    pub quick: bool,
    pub text: &'static str,
}

/// Reference target of the ratios.
pub const LOOP: &str = "kernel loop";
/// Reference target among mounted file systems.
pub const EXT4_ON_LOOP: &str = "ext4 on kernel loop";

/// A row of the table: name, needs, title, question, and fields that differ from the default.
macro_rules! job {
    ($name:literal on $needs:ident: $title:literal, $question:literal, $($field:ident: $value:expr),* $(,)?) => {
        Job {
            $($field: $value,)*
            ..Job {
                name: $name,
                title: $title,
                question: $question,
                needs: Needs::$needs,
                unit: None,
                depth: None,
                two_cpus: false,
                quick: false,
                text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fio-jobs/", $name, ".fio")),
            }
        }
    };
}

/// 4K random read, one at a time.
pub const QD1: Job = job!(
    "randread-4k-qd1" on Data: "4K random read, depth 1",
    "Round trip of a single request: bound by wake-ups and context switches.",
    depth: Some(1), quick: true,
);
/// 4K random read, 32 at a time.
pub const QD32: Job = job!(
    "randread-4k-qd32" on Data: "4K random read, depth 32",
    "The cost of a request when requests come in batches: bound by the CPU.",
    depth: Some(32), quick: true,
);
/// The same from two processes.
pub const QD32X2: Job = job!(
    "randread-4k-qd32x2" on Data: "4K random read, depth 32, 2 processes",
    "Scaling to two CPUs: bound by the number of queues and by shared locks.",
    two_cpus: true, quick: true,
);
/// 128K sequential read.
pub const SEQ: Job = job!(
    "read-128k-qd8" on Data: "128K sequential read, depth 8",
    "Read bandwidth: bound by memory copies.",
    quick: true,
);

/// 4K random write, an fsync after each.
pub const FSYNC: Job = job!(
    "fsync-4k-qd1" on Data: "4K random write, an fsync after each",
    "Durability: bound by the flush, from the device down to the disk below. The latency is the fsync's.",
    quick: true,
);

/// All jobs, in the order of a report.
pub const JOBS: &[Job] = &[
    QD1,
    job!(
        "randread-4k-qd4" on Data: "4K random read, depth 4",
        "Little concurrency: still bound by latency; some requests share a wake-up.",
        depth: Some(4),
    ),
    QD32,
    job!(
        "randread-4k-qd128" on Data: "4K random read, depth 128",
        "The full depth of a device queue: bound by the CPU, with the largest batches.",
        depth: Some(128),
    ),
    QD32X2,
    job!(
        "randwrite-4k-qd1" on Data: "4K random write, depth 1",
        "A single write: bound by wake-ups and by the locks of the backing file system.",
    ),
    job!(
        "randwrite-4k-qd32" on Data: "4K random write, depth 32",
        "The cost of a write in batches: bound by the CPU and by the backing file's lock.",
        quick: true,
    ),
    job!(
        "randwrite-4k-qd32x2" on Data: "4K random write, depth 32, 2 processes",
        "Writes from two CPUs to one image: bound by the lock of the backing file, if one is taken.",
        two_cpus: true,
    ),
    job!(
        "mix-70-30-4k-qd32" on Data: "4K random, 70 % reads, depth 32",
        "Reads among writes: bound by the CPU, and by reads that wait behind writes.",
    ),
    SEQ,
    job!(
        "write-128k-qd8" on Data: "128K sequential write, depth 8",
        "Write bandwidth: bound by memory copies.",
    ),
    job!(
        "read-1m-qd4" on Data: "1M sequential read, depth 4",
        "Requests larger than a device takes at once: bound by splitting them and by copies.",
    ),
    job!(
        "write-1m-qd4" on Data: "1M sequential write, depth 4",
        "The same for writes.",
    ),
    FSYNC,
    job!(
        "many-16-4k" on Many: "4K random read on 16 devices, 4 in flight on each",
        "Many devices in use at once: bound by the CPU, and by costs per device.",
    ),
    job!(
        "discard-64k" on Block: "64K discard, then written again",
        "Discards, half of the operations: bound by the file system below, which frees and allocates blocks.",
    ),
    job!(
        "smallfile-create" on Mount: "Small files: create, write 4K, fsync, close",
        "What an unpacked archive or a mail store does: bound by journal commits and flushes.",
        unit: Some("file"), quick: true,
    ),
    job!(
        "smallfile-read" on Mount: "Small files: open, read 4K not cached, close",
        "What a build or a web server does after boot: bound by single 4K reads, one at a time.",
        unit: Some("file"),
    ),
    job!(
        "database-8k" on Mount: "8K random in a file, 70 % reads, fdatasync every 16 writes",
        "What a database with its own cache does: bound by single reads, and by flushes.",
        quick: true,
    ),
];

/// The job of that name.
pub fn by_name(name: &str) -> Option<&'static Job> {
    JOBS.iter().find(|job| job.name == name)
}

impl Job {
    /// The job as a result describes it.
    pub fn info(&self) -> JobInfo {
        JobInfo {
            name: self.name.into(),
            title: self.title.into(),
            question: self.question.into(),
            unit: self.unit.map(str::to_owned),
            reference: if self.needs == Needs::Mount { EXT4_ON_LOOP } else { LOOP }.into(),
            depth: self.depth,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Variables that fio replaces in a job.
    fn variables(text: &str) -> BTreeSet<&str> {
        text.split("${").skip(1).map(|rest| rest.split('}').next().unwrap_or(rest)).collect()
    }

    #[test]
    fn the_table_and_the_directory_are_the_same() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../fio-jobs");
        let files: BTreeSet<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| name.strip_suffix(".fio").map(str::to_owned))
            .collect();
        let table: BTreeSet<String> = JOBS.iter().map(|job| job.name.to_owned()).collect();
        assert_eq!(files, table);
        assert_eq!(table.len(), JOBS.len(), "a name stands twice");
    }

    #[test]
    fn a_file_has_one_section_of_its_name_and_the_variables_of_what_it_needs() {
        for job in JOBS {
            let sections: Vec<&str> = job.text.lines().filter(|line| line.starts_with('[')).collect();
            assert_eq!(sections, [format!("[{}]", job.name)]);
            let place = match job.needs {
                Needs::Data | Needs::Block => "FILENAME",
                Needs::Many => "FILENAMES",
                Needs::Mount => "DIRECTORY",
            };
            let timed = BTreeSet::from([place, "RAMP", "RUNTIME"]);
            // There are few files, so each counts.
            let at_once = BTreeSet::from([place, "RUNTIME"]);
            let expected = if job.unit.is_some() { at_once } else { timed };
            assert_eq!(variables(job.text), expected, "{}", job.name);
        }
    }

    #[test]
    fn the_table_agrees_with_the_files() {
        for job in JOBS {
            let has = |line: &str| job.text.lines().any(|other| other == line);
            assert!(has("group_reporting=1"), "{}: a sum of its processes is read", job.name);
            assert_eq!(has("numjobs=2"), job.two_cpus, "{}", job.name);
            assert_eq!(has("unlink=1"), job.needs == Needs::Mount, "{}: leaves files behind", job.name);
            assert!(job.needs != Needs::Many || has(&format!("iodepth={}", 4 * MANY)));
            if let Some(depth) = job.depth {
                assert!(has("rw=randread") && has(&format!("iodepth={depth}")), "{}", job.name);
            }
        }
        assert_eq!(JOBS.iter().filter(|job| job.quick).count(), 8);
        assert_eq!(by_name("read-128k-qd8").map(|job| job.title), Some(SEQ.title));
        assert!(by_name("nosuch").is_none());
    }
}
