//! The questions: each is one plain fio file of `fio-jobs/`, which anyone can run by hand.
//!
//! Knows the files and what each needs of a target; does not run them (that is `fio`).

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

/// A job file.
#[derive(Debug)]
pub struct Job {
    /// Its name, that of the file.
    pub name: &'static str,
    /// As a heading.
    pub title: &'static str,
    /// What it isolates, and what bounds it.
    pub question: &'static str,
    pub needs: Needs,
    /// What an operation is, where it is not an I/O.
    pub unit: Option<&'static str>,
    /// I/Os in flight, if it belongs to the plot of throughput against depth.
    pub depth: Option<u32>,
    /// Two processes: says nothing on one CPU.
    pub two_cpus: bool,
    /// Part of `--quick`.
    pub quick: bool,
    pub text: &'static str,
}

/// The target that ratios are to.
pub const LOOP: &str = "kernel loop";
/// The same among mounted file systems.
pub const EXT4_ON_LOOP: &str = "ext4 on kernel loop";

impl Job {
    /// As a result describes it.
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
