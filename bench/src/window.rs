// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Marks a window in the middle of a job, for a profile by `cargo lab profile`.
//!
//! A mark is an instruction with a constant that no other program has; QEMU's plugin
//! (`bin/lab/profile/plugin.c`) recognises it. Runs inside the machine. Also sends what the host
//! needs to name addresses: files that processes execute, and symbols of the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::fio::Length;
use crate::{handover, raw};

/// Constants of the marks, "loopprof" and "loopproF" as bytes.
pub const START: u64 = u64::from_le_bytes(*b"loopprof");
pub const STOP: u64 = u64::from_le_bytes(*b"loopproF");

/// Raw file with the kernel's symbols.
pub const SYMBOLS: &str = "kallsyms";

/// A window of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Executable memory of all processes.
    pub mappings: BTreeSet<Mapping>,
}

/// A part of a file that processes execute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mapping {
    /// Name of the program, without its directory.
    pub program: String,
    pub start: u64,
    pub end: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Path of the file, or a name in brackets.
    pub file: String,
}

/// Runs fio with `run`, and marks a fifth of the time that it measures, in the middle. fio starts
/// within less than two fifths.
pub fn mark_during<T>(length: Length, run: impl FnOnce() -> Result<T>) -> Result<(T, Window)> {
    let part = Duration::from_millis(u64::from(length.run_ms)) / 10;
    let ramp = Duration::from_millis(length.ramp_ms.into());
    let marker = std::thread::spawn(move || {
        // Reading them takes as long as hundreds of I/Os, so it must be over when fio measures.
        std::thread::sleep(ramp / 2);
        let mappings = mappings();
        std::thread::sleep(ramp / 2 + 5 * part);
        mark_start();
        std::thread::sleep(2 * part);
        mark_stop();
        Window { mappings }
    });
    let done = run();
    let window = marker.join().map_err(|_| anyhow!("the marking thread panicked"))?;
    Ok((done?, window))
}

/// Two functions, so that each has its constant in an instruction.
#[inline(never)]
fn mark_start() {
    black_box(START);
}

#[inline(never)]
fn mark_stop() {
    black_box(STOP);
}

/// Sends the kernel's functions, in the format of /proc/kallsyms.
pub fn send_symbols(out: &Path) -> Result<()> {
    let all = fs::read_to_string("/proc/kallsyms").context("cannot read the kernel's symbols")?;
    let functions = functions(&all);
    raw::keep(out, SYMBOLS, functions.as_bytes())?;
    handover::send(SYMBOLS, functions.as_bytes()).context("cannot send the kernel's symbols to the host")
}

/// The lines of functions.
fn functions(kallsyms: &str) -> String {
    let is_function = |line: &&str| matches!(line.split(' ').nth(1), Some("t" | "T" | "w" | "W"));
    kallsyms.lines().filter(is_function).flat_map(|line| [line, "\n"]).collect()
}

/// Executable mappings of all processes.
fn mappings() -> BTreeSet<Mapping> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let of = |process: fs::DirEntry| {
        let program = fs::read_link(process.path().join("exe")).ok()?;
        let maps = fs::read_to_string(process.path().join("maps")).ok()?;
        let program = program.file_name()?.to_string_lossy().into_owned();
        Some(maps.lines().filter_map(|line| mapping(&program, line)).collect::<Vec<_>>())
    };
    processes.filter_map(of).flatten().collect()
}

/// Parses a line of /proc/PID/maps, if the memory is executable.
fn mapping(program: &str, line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    words.next().filter(|access| access.contains('x'))?;
    let hex = |word: &str| u64::from_str_radix(word, 16).ok();
    let offset = hex(words.next()?)?;
    let file = words.nth(2).unwrap_or("[anonymous]").to_owned();
    Some(Mapping { program: program.to_owned(), start: hex(start)?, end: hex(end)?, offset, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_constants_in_instructions() {
        mark_start();
        mark_stop();
        let program = fs::read(std::env::current_exe().unwrap()).unwrap();
        for mark in [START, STOP] {
            // A move of a constant to a register: a prefix, the register, eight bytes.
            let is_mark = |bytes: &[u8]| {
                matches!(bytes[..2], [0x48 | 0x49, 0xb8..=0xbf]) && bytes[2..] == mark.to_le_bytes()
            };
            assert!(program.windows(10).any(is_mark), "{mark:x}");
        }
    }

    #[test]
    fn executable_memory_is_parsed() {
        let line = "555555554000-555555560000 r-xp 00002000 08:01 42                 /bin/fio";
        let (start, end) = (0x5555_5555_4000, 0x5555_5556_0000);
        let expected = |file: &str, offset| {
            Some(Mapping { program: "fio".into(), start, end, offset, file: file.into() })
        };
        assert_eq!(mapping("fio", line), expected("/bin/fio", 0x2000));
        assert_eq!(mapping("fio", "555555554000-555555560000 r-xp 0 00:00 0"), expected("[anonymous]", 0));
        assert_eq!(mapping("fio", &line.replace("r-xp", "rw-p")), None);
        assert_eq!(mapping("fio", ""), None);
        assert!(!mappings().is_empty());
    }

    #[test]
    fn only_functions_are_sent() {
        let all = "1 T a\n2 D b\n3 t c\t[m]\n4 r d\n";
        assert_eq!(functions(all), "1 T a\n3 t c\t[m]\n");
    }
}
