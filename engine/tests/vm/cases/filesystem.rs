//! File systems on devices: make, mount, copy a real tree in, check, come back later.

use std::path::Path;
use std::time::Duration;

use super::{MIB, PATHS};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::store::{Mount, Store, fsck, mkfs};
use crate::{host, tools};

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for path in PATHS {
        for kind in ["ext4", "xfs"] {
            let name = format!("filesystem::{kind}::{path}");
            all.push(case(name, Needs::Path(path), 150, move |ctx| {
                tree_survives(ctx, kind, path)
            }));
        }
    }
    all
}

fn tree_survives(ctx: &Ctx, kind: &str, path: &str) -> Res {
    let tree = real_tree()?;
    // Each kind on top of the other, so both also serve as the store.
    let store = match kind {
        "ext4" => Store::xfs(ctx)?,
        _ => Store::ext4(ctx)?,
    };
    let image = store.sparse("image", 400 * MIB)?;
    let daemon = Daemon::start(ctx)?;

    let device = daemon.attach(&[&image, "--path", path])?;
    mkfs(kind, &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    let copy = format!("{}/tree", mount.dir);
    tools::ok(&["cp", "-a", &tree, &copy])?;
    let expected = checksums(&tree)?;
    ensure!(
        checksums(&copy)? == expected,
        "the copy differs while it is cached"
    );
    mount.umount()?;
    fsck(kind, &device).at("check after the first use")?;
    daemon.detach(&device)?;

    let device = daemon.attach(&[&image, "--path", path])?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    ensure!(
        checksums(&copy)? == expected,
        "the copy differs after detach and attach"
    );
    tools::ok(&["rm", "-rf", &copy])?;
    tools::ok(&["fstrim", &mount.dir])?;
    tools::ok(&["cp", "-a", &tree, &copy])?;
    mount.umount()?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    ensure!(
        checksums(&copy)? == expected,
        "the copy differs after trim and a second copy"
    );
    mount.umount()?;
    fsck(kind, &device).at("check after trim")?;
    daemon.detach(&device)?;
    // The image is an ordinary file with that file system in it.
    fsck(kind, &image).at("check of the image itself")?;
    daemon.stop()
}

/// A tree of real files, copied to memory once: part of this kernel's modules, and some more.
fn real_tree() -> Res<String> {
    let tree = format!("{}/tree", host::SCRATCH);
    if !Path::new(&tree).exists() {
        let script = format!(
            r#"mkdir -p {tree}.new/etc {tree}.new/deep/er/still
            cp -rL /lib/modules/$(uname -r)/kernel/fs/{{ext4,xfs,fat,nls}} /lib/modules/$(uname -r)/kernel/lib {tree}.new/
            cp -r /etc/apt /etc/default /etc/security /etc/pam.d {tree}.new/etc/ 2>/dev/null || true
            for i in $(seq 200); do head -c $((i * 97)) /dev/urandom > {tree}.new/deep/er/file$i; done
            ln -s ../er/file1 {tree}.new/deep/er/still/link; ln {tree}.new/deep/er/file2 {tree}.new/deep/hard
            truncate -s 3M {tree}.new/deep/sparse; setfattr -n user.a -v b {tree}.new/deep/hard 2>/dev/null || true
            mv {tree}.new {tree}"#
        );
        let words = ["bash", "-euo", "pipefail", "-c", &script];
        tools::run_for(Duration::from_secs(90), &words)?
            .ok()
            .at("copy a tree")?;
    }
    Ok(tree)
}

/// Checksums of every file below a directory, names and links included.
fn checksums(dir: &str) -> Res<String> {
    let sums = tools::sh(format!(
        "cd {dir}; find . -type f -print0 | sort -z | xargs -0 sha256sum; \
         find . -printf '%P %y %m %l\\n' | sort"
    ))?;
    ensure!(sums.lines().count() > 300, "hardly any file in {dir}");
    Ok(sums)
}
