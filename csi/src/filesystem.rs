// SPDX-License-Identifier: Apache-2.0 OR MIT
//! File systems: what a device holds, making, checking, mounting and growing.
//!
//! Nothing is made on a device unless blkid finds nothing at all and no record says that there was something.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use tonic::Status;

use crate::failed;

/// What blkid reads to find a file system, and somewhat more.
const HEAD: usize = 1 << 20;

/// The result of a program.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(program: &str, words: &[&str]) -> Result<Ran, Status> {
    let mut command = Command::new(program);
    let output = command.args(words).env("LC_ALL", "C").stdin(std::process::Stdio::null()).output();
    let output = output.map_err(|error| failed(format_args!("cannot run {program}"), &error))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().replace('\n', "; ");
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(Ran { code: output.status.code(), out, err: text(&output.stderr) })
}

fn succeed(program: &str, words: &[&str]) -> Result<(), Status> {
    let Ran { code, err, .. } = run(program, words)?;
    match code {
        Some(0) => Ok(()),
        _ => Err(Status::internal(format!("{program} {} failed: {err}", words.join(" ")))),
    }
}

/// What the device holds: the name of a file system, or of a partition table. None: nothing.
pub fn probe(node: &str) -> Result<Option<String>, Status> {
    // blkid reports a device that it cannot read as empty.
    let unreadable = |error: std::io::Error| failed(format_args!("cannot read {node}"), &error);
    let mut head = Vec::with_capacity(HEAD);
    File::open(node).map_err(unreadable)?.take(HEAD as u64).read_to_end(&mut head).map_err(unreadable)?;
    let Ran { code, out, err } = run("blkid", &["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", node])?;
    let value = |key: &str| out.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    match code {
        Some(2) => Ok(None),
        Some(0) => match (value("PTTYPE="), value("TYPE=")) {
            (Some(table), _) => Ok(Some(format!("a partition table ({table})"))),
            (None, Some(name)) => Ok(Some(name)),
            (None, None) => Ok(Some("something that blkid does not name".to_owned())),
        },
        _ => Err(Status::internal(format!("blkid cannot tell what {node} holds: {err}"))),
    }
}

/// Makes a file system. `keep_blocks`: the image stays allocated.
pub fn make(node: &str, fs_type: &str, keep_blocks: bool) -> Result<(), Status> {
    match fs_type {
        "xfs" if keep_blocks => succeed("mkfs.xfs", &["-q", "-f", "-K", node]),
        "xfs" => succeed("mkfs.xfs", &["-q", "-f", node]),
        _ if keep_blocks => succeed("mkfs.ext4", &["-q", "-F", "-m0", "-E", "nodiscard", node]),
        _ => succeed("mkfs.ext4", &["-q", "-F", "-m0", node]),
    }
}

/// Repairs what can be repaired without a decision. XFS does that when it is mounted.
pub fn check(node: &str, fs_type: &str) -> Result<(), Status> {
    if fs_type != "ext4" {
        return Ok(());
    }
    let Ran { code, out, .. } = run("e2fsck", &["-p", node])?;
    match code {
        // Bit 4: errors are left. Others say that it could not run: the mount decides, then.
        Some(code) if code & 4 != 0 => Err(Status::internal(format!(
            "the file system on {node} has errors; stop its pods and run e2fsck: {}",
            out.trim().replace('\n', "; ")
        ))),
        Some(0 | 1) => Ok(()),
        code => {
            tracing::warn!("e2fsck -p {node} ended with {code:?}");
            Ok(())
        }
    }
}

/// Mounts a device.
pub fn mount(node: &str, fs_type: &str, options: &[String], path: &Path) -> Result<(), Status> {
    let path = path.display().to_string();
    succeed("mount", &["-i", "-t", fs_type, "-o", &options.join(","), node, &path])
}

/// Mounts what is at `from` at `to`, too.
pub fn bind(from: &Path, to: &Path, read_only: bool) -> Result<(), Status> {
    let options = if read_only { "bind,ro" } else { "bind" };
    succeed("mount", &["-i", "-o", options, &from.display().to_string(), &to.display().to_string()])
}

/// Grows a mounted file system to the size of its device.
pub fn grow(node: &str, fs_type: &str, path: &Path) -> Result<(), Status> {
    match fs_type {
        "xfs" => succeed("xfs_growfs", &["-d", &path.display().to_string()]),
        _ => succeed("resize2fs", &[node]),
    }
}
