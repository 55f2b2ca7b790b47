// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest side of the power cut tests: durable writes before the cut, and their check after it.
//!
//! The images' blocks are unwritten extents at first, so a write whose metadata was not committed
//! reads as zeros after the cut. Knows nothing of VMs.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use loopbench::daemon::Daemon;
use loopbench::sh;

/// What the guest does in a boot.
#[derive(clap::Subcommand)]
pub(crate) enum Boot {
    /// Make a file system on the disk, serve images on it, and write durably until the power is cut
    Write {
        #[arg(long)]
        fs: String,
    },
    /// Check the durable writes, which are listed one per line, as "fsync 12"
    Verify {
        #[arg(long, value_name = "FILE")]
        durable: PathBuf,
    },
}

const DISK: &str = "/dev/vda";
const STORE: &str = "/run/store";
const INSIDE: &str = "/run/inside";
const LIMIT: Duration = Duration::from_secs(120);
const BLOCK: usize = 4096;
/// Blocks of durable writes; as many blocks behind them take other writes.
const BLOCKS: u64 = 8192;

const FORMAT: &str = "a durable write is listed as kind and number";

/// Runs one of the two boots.
pub(crate) fn run(boot: &Boot) -> Result<()> {
    for directory in [STORE, INSIDE] {
        std::fs::create_dir_all(directory)?;
    }
    match boot {
        Boot::Write { fs } => write(fs),
        Boot::Verify { durable } => verify(durable),
    }
}

fn write(fs: &str) -> Result<()> {
    tool(&[&format!("mkfs.{fs}"), "-q", DISK])?;
    tool(&["mount", DISK, STORE])?;
    let [blocks, files, lone] = ["blocks", "files", "lone"].map(|name| Path::new(STORE).join(name));
    for image in [&blocks, &files, &lone] {
        tool(&["fallocate", "-l", "64M", &image.to_string_lossy()])?;
    }
    tool(&["sync"])?;
    let daemon = Daemon::start(Path::new("/run/loopengine-power-cut"))?;
    let (blocks, files) = (daemon.attach(&blocks, &[])?, daemon.attach(&files, &[])?);
    let lone = open(&daemon.attach(&lone, &[])?, OFlags::empty())?;
    tool(&["mkfs.ext4", "-q", &files.to_string_lossy()])?;
    tool(&["mount", &files.to_string_lossy(), INSIDE])?;

    let plain = open(&blocks, OFlags::empty())?;
    let through = open(&blocks, OFlags::DSYNC)?;
    let mut out = std::io::stdout().lock();
    for number in 0..BLOCKS / 2 {
        // A write, then a flush.
        plain.write_all_at(Aligned::new(&pattern("fsync", number)).bytes(), number * 2 * BLOCK as u64)?;
        plain.sync_all()?;
        writeln!(out, "durable fsync {number}")?;
        // A FUA write is durable when it completes.
        through
            .write_all_at(Aligned::new(&pattern("fua", number)).bytes(), (number * 2 + 1) * BLOCK as u64)?;
        writeln!(out, "durable fua {number}")?;
        // Journals use FUA like this: nothing follows the commit record.
        let mut file = File::create(file_path(number))?;
        file.write_all(&pattern("file", number))?;
        file.sync_all()?;
        writeln!(out, "durable file {number}")?;
        // After several of these, the engine makes the write itself durable. Every seventh time
        // another write comes before, and ends that.
        if number % 7 == 0 {
            let noise = Aligned::new(&pattern("noise", number));
            lone.write_all_at(noise.bytes(), (BLOCKS + number) * BLOCK as u64)?;
        }
        lone.write_all_at(Aligned::new(&pattern("lone", number)).bytes(), number * BLOCK as u64)?;
        lone.sync_all()?;
        writeln!(out, "durable lone {number}")?;
        // Other writes, which need not be durable.
        plain.write_all_at(
            Aligned::new(&pattern("noise", number)).bytes(),
            (BLOCKS + number) * BLOCK as u64,
        )?;
        out.flush()?;
    }
    bail!("all blocks were written before the power was cut")
}

fn verify(durable: &Path) -> Result<()> {
    tool(&["modprobe", "loop"])?;
    tool(&["mount", DISK, STORE])?;
    let image = Path::new(STORE).join("files");
    // Mounting replays the journal.
    tool(&["mount", "-o", "loop", &image.to_string_lossy(), INSIDE])?;
    let [blocks, lone] = ["blocks", "lone"].map(|name| File::open(Path::new(STORE).join(name)));
    let (blocks, lone) = (blocks?, lone?);
    let durable = std::fs::read_to_string(durable).context("cannot read the list of durable writes")?;
    for entry in durable.lines() {
        let (kind, number) = entry.split_once(' ').context(FORMAT)?;
        let number: u64 = number.parse().context(FORMAT)?;
        let mut found = vec![0; BLOCK];
        let read = match kind {
            "fsync" => blocks.read_exact_at(&mut found, number * 2 * BLOCK as u64),
            "fua" => blocks.read_exact_at(&mut found, (number * 2 + 1) * BLOCK as u64),
            "lone" => lone.read_exact_at(&mut found, number * BLOCK as u64),
            _ => std::fs::read(file_path(number)).map(|bytes| found = bytes),
        };
        let kept = read.is_ok() && found == pattern(kind, number);
        println!("{} {entry}", if kept { "kept" } else { "lost" });
    }
    tool(&["umount", INSIDE])?;
    match tool(&["e2fsck", "-f", "-n", &image.to_string_lossy()]) {
        Ok(()) => println!("clean"),
        Err(error) => println!("damaged: {error:#}"),
    }
    Ok(())
}

fn open(device: &Path, flags: OFlags) -> Result<File> {
    let flags = (OFlags::DIRECT | flags).bits();
    OpenOptions::new()
        .write(true)
        .custom_flags(i32::try_from(flags)?)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))
}

fn file_path(number: u64) -> PathBuf {
    Path::new(INSIDE).join(format!("file-{number}"))
}

/// A block filled with its kind and number.
fn pattern(kind: &str, number: u64) -> Vec<u8> {
    let word = format!("{kind} {number}\n");
    word.bytes().cycle().take(BLOCK).collect()
}

fn tool(words: &[&str]) -> Result<()> {
    sh::capture(Command::new(sh::which(words[0])?).args(&words[1..]), LIMIT).map(drop)
}

/// A copy of a block, aligned for direct I/O.
struct Aligned {
    buffer: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(block: &[u8]) -> Aligned {
        let mut buffer = vec![0; block.len() + BLOCK];
        let start = buffer.as_ptr().align_offset(BLOCK);
        buffer[start..start + block.len()].copy_from_slice(block);
        Aligned { buffer, start }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.buffer.len() - BLOCK]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_for_direct_io_is_aligned_and_whole() {
        for number in [0, 7, 12_345] {
            let block = pattern("fua", number);
            let aligned = Aligned::new(&block);
            assert_eq!(aligned.bytes(), block);
            assert_eq!(aligned.bytes().as_ptr().addr() % BLOCK, 0);
        }
        assert_ne!(pattern("fua", 1), pattern("fua", 2));
    }
}
