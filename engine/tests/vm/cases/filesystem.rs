// SPDX-License-Identifier: Apache-2.0 OR MIT
//! File systems on devices: make, mount, copy a real tree in, check, come back later.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{IO_MODES, MIB};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::{Mount, Store, fsck, mkfs};
use crate::{host, tools};

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        for kind in ["ext4", "xfs"] {
            let name = format!("filesystem::{kind}::{io_mode}");
            let case = case(name, Needs::IoMode(io_mode), 150, move |ctx| tree_survives(ctx, kind, io_mode));
            all.push(case.variant_if((kind == "xfs") != (io_mode == "auto")));
        }
    }
    all
}

fn tree_survives(ctx: &Ctx, kind: &str, io_mode: &str) -> Res {
    let tree = real_tree()?;
    // Each kind on top of the other, so both also serve as the store.
    let store = match kind {
        "ext4" => Store::xfs(ctx)?,
        _ => Store::ext4(ctx)?,
    };
    let image = store.sparse("image", 400 * MIB)?;
    let daemon = Daemon::start(ctx)?;

    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    mkfs(kind, &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    let copy = format!("{}/tree", mount.dir);
    tools::ok(&["cp", "-a", &tree, &copy])?;
    let expected = checksums(&tree)?;
    ensure!(checksums(&copy)? == expected, "the copy differs while it is cached");
    mount.umount()?;
    fsck(kind, &device).at("check after the first use")?;
    daemon.detach(&device)?;

    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    ensure!(checksums(&copy)? == expected, "the copy differs after detach and attach");
    tools::ok(&["rm", "-rf", &copy])?;
    tools::ok(&["fstrim", &mount.dir])?;
    tools::ok(&["cp", "-a", &tree, &copy])?;
    mount.umount()?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    ensure!(checksums(&copy)? == expected, "the copy differs after trim and a second copy");
    mount.umount()?;
    fsck(kind, &device).at("check after trim")?;
    daemon.detach(&device)?;
    // The image is an ordinary file with that file system in it.
    fsck(kind, &image).at("check of the image itself")?;
    daemon.stop()
}

/// A tree of real files, made in memory once: some of what this machine has installed, as much as
/// its (in the lab slow) root gives within a few seconds, and files of every size around a block.
fn real_tree() -> Res<String> {
    let tree = format!("{}/tree", host::SCRATCH);
    if Path::new(&tree).exists() {
        return Ok(tree);
    }
    let new = format!("{tree}.new");
    let deep = format!("{new}/deep/er/still");
    std::fs::create_dir_all(&deep)?;
    for number in 0..250_u64 {
        let len = usize::try_from(number * number)?;
        std::fs::write(format!("{deep}/file{number}"), pattern(number, len))?;
    }
    symlink("still/file1", format!("{new}/deep/er/soft"))?;
    std::fs::hard_link(format!("{deep}/file2"), format!("{new}/deep/hard"))?;
    std::fs::File::create(format!("{new}/deep/sparse"))?.set_len(3 * MIB)?;
    let mut copied = 0;
    let until = Instant::now() + Duration::from_secs(15);
    for source in ["/usr/share/perl5", "/usr/lib/python3", "/etc"] {
        copied += copy_some(Path::new(source), Path::new(&new), until)?;
    }
    eprintln!("  a tree of {copied} files of this machine and 252 made ones");
    std::fs::rename(new, &tree)?;
    Ok(tree)
}

/// Copies regular files below `source` to the same place below `target`, until the time is over.
fn copy_some(source: &Path, target: &Path, until: Instant) -> Res<u64> {
    let mut copied = 0;
    let below = target.join(source.strip_prefix("/").unwrap_or(source));
    for entry in std::fs::read_dir(source).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if Instant::now() > until {
            break;
        }
        if kind.is_dir() {
            copied += copy_some(&entry.path(), target, until)?;
        } else if kind.is_file() && entry.metadata().is_ok_and(|m| m.len() < MIB) {
            std::fs::create_dir_all(&below)?;
            std::fs::copy(entry.path(), below.join(entry.file_name()))?;
            copied += 1;
        }
    }
    Ok(copied)
}

/// Checksums of every file below a directory, names and links included.
fn checksums(dir: &str) -> Res<String> {
    let sums = tools::sh(format!(
        "cd {dir}; find . -type f -print0 | sort -z | xargs -0 sha256sum; \
         find . -printf '%P %y %m %l\\n' | sort"
    ))?;
    ensure!(sums.lines().count() > 500, "hardly any file in {dir}");
    Ok(sums)
}
