// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The initramfs of a sealed machine.
//!
//! The same files make the same archive: it has no times, owners or inode numbers of this machine,
//! and files are sorted by name. Knows the cpio format "newc", libraries of programs and
//! dependencies of kernel modules.

use std::collections::BTreeMap;
use std::io::{Result as IoResult, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use loopbench::sh;

use crate::kernel::Kernel;

const LIMIT: Duration = Duration::from_secs(60);
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// Modes and contents by path without the leading slash; the content of a link is its target.
#[derive(Default)]
pub(crate) struct Tree(BTreeMap<String, (u32, Vec<u8>)>);

impl Tree {
    pub(crate) fn directory(&mut self, path: &str) {
        self.put(path, DIRECTORY, Vec::new());
    }

    pub(crate) fn file(&mut self, path: &str, bytes: impl Into<Vec<u8>>) {
        self.put(path, FILE, bytes.into());
    }

    pub(crate) fn link(&mut self, path: &str, to: &str) {
        self.put(path, LINK, to.into());
    }

    pub(crate) fn script(&mut self, path: &str, text: &str) {
        self.put(path, PROGRAM, text.into());
    }

    /// Adds the program at `from` as /bin/`name`, with its libraries.
    pub(crate) fn program(&mut self, name: &str, from: &Path) -> Result<()> {
        self.copy(&format!("bin/{name}"), PROGRAM, from)?;
        // cargo sets it for this machine only.
        let mut ldd = Command::new("ldd");
        ldd.arg(from).env_remove("LD_LIBRARY_PATH");
        // ldd fails on a static program.
        let said = sh::output(&mut ldd, LIMIT)?.stdout;
        for library in libraries(&String::from_utf8_lossy(&said)) {
            self.copy(library.trim_start_matches('/'), PROGRAM, Path::new(library))?;
        }
        Ok(())
    }

    /// Adds modules of `kernel` with their dependencies; unknown ones are built in.
    pub(crate) fn modules(&mut self, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let home = kernel.image.parent().context("the path of the kernel has no directory")?;
        let base = home.ancestors().nth(3).context("the path of the kernel has no directory")?;
        let place = |path: &Path| -> Result<String> {
            Ok(path
                .strip_prefix(base)
                .context("a module is outside the directory of the kernel")?
                .to_string_lossy()
                .into_owned())
        };
        for name in names {
            let mut modprobe = Command::new(sh::which("modprobe")?);
            modprobe.arg("-d").arg(base).args(["-S", &kernel.release, "--show-depends", name]);
            let said = sh::output(&mut modprobe, LIMIT)?.stdout;
            for module in modules(&String::from_utf8_lossy(&said)) {
                self.copy(&place(&module)?, FILE, &module)?;
            }
        }
        for entry in std::fs::read_dir(home)? {
            let path = entry?.path();
            if path.is_file()
                && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("modules."))
            {
                self.copy(&place(&path)?, FILE, &path)?;
            }
        }
        Ok(())
    }

    /// Writes the archive.
    pub(crate) fn write(&self, to: &mut impl Write) -> IoResult<()> {
        for (number, (path, (mode, bytes))) in (1..).zip(&self.0) {
            entry(to, number, path, *mode, bytes)?;
        }
        entry(to, 0, "TRAILER!!!", 0, &[])?;
        to.flush()
    }

    fn copy(&mut self, path: &str, mode: u32, from: &Path) -> Result<()> {
        let bytes = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.put(path, mode, bytes);
        Ok(())
    }

    fn put(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        for (at, _) in path.match_indices('/') {
            self.0.entry(path[..at].to_owned()).or_insert((DIRECTORY, Vec::new()));
        }
        self.0.insert(path.to_owned(), (mode, bytes));
    }
}

fn entry(to: &mut impl Write, number: u32, path: &str, mode: u32, bytes: &[u8]) -> IoResult<()> {
    // Inode, mode, owner, group, links, time, length, four numbers of devices, length of the name,
    // checksum.
    let fields = [number as usize, mode as usize, 0, 0, 1, 0, bytes.len(), 0, 0, 0, 0, path.len() + 1, 0];
    let mut head = String::from("070701");
    fields.iter().for_each(|field| head.push_str(&format!("{field:08X}")));
    head.push_str(path);
    head.push('\0');
    for part in [head.as_bytes(), bytes] {
        to.write_all(part)?;
        to.write_all(&[0; 3][..part.len().wrapping_neg() % 4])?;
    }
    Ok(())
}

/// Paths in the output of ldd: "NAME => PATH (ADDRESS)" or "PATH (ADDRESS)".
fn libraries(said: &str) -> Vec<&str> {
    said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).collect()
}

/// Files in the output of modprobe: "insmod PATH OPTIONS".
fn modules(said: &str) -> Vec<PathBuf> {
    said.lines().filter_map(|line| Some(line.strip_prefix("insmod ")?.split(' ').next()?.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_extracts_the_archive() {
        let mut tree = Tree::default();
        tree.file("etc/a", "abcde");
        tree.script("init", "#!/bin/sh\n");
        tree.link("sbin", "bin");
        let mut archive = Vec::new();
        tree.write(&mut archive).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &archive).unwrap();
        let mut cpio = Command::new("cpio");
        let said =
            sh::capture(cpio.args(["--quiet", "-tvF"]).arg(file.path()).env("TZ", "UTC"), LIMIT).unwrap();
        let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        let names: Vec<&str> = lines.iter().map(|words| words[8]).collect();
        assert_eq!(names, ["etc", "etc/a", "init", "sbin"]);
        let modes: Vec<&str> = lines.iter().map(|words| words[0]).collect();
        assert_eq!(modes, ["drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"]);
        assert_eq!(lines[1][4], "5");
        assert_eq!(lines[3].last(), Some(&"bin"));
    }

    #[test]
    fn finds_libraries_and_modules_in_program_output() {
        let said = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)\n";
        assert_eq!(libraries(said), ["/lib/libc.so.6", "/lib64/ld.so"]);
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
        let said = "builtin fuse\ninsmod /m/a.ko \ninsmod /m/b.ko.xz x=1\n";
        assert_eq!(modules(said), [PathBuf::from("/m/a.ko"), "/m/b.ko.xz".into()]);
    }
}
