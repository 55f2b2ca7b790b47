// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private loop devices in the demo: two containers at the same time, each with its own /dev/loop0,
//! use unmodified losetup and mount with the default capabilities of a runtime.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use loopbench::daemon::Daemon;
use loopbench::sh;

const LIMIT: Duration = Duration::from_secs(60);

/// Script of a container; its argument is written into the image. Prints the device, and continues
/// after a line on standard input.
const SCRIPT: &str = r#"set -e
cd /work
mount -o loop disk.img mnt
echo "$1" >mnt/name
losetup --noheadings --output NAME,BACK-FILE
read -r _
cat mnt/name
umount mnt"#;

/// Links of a root directory with merged /usr.
const INTO_USR: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// A container.
struct Tenant {
    child: Child,
    said: BufReader<ChildStdout>,
    /// Mount point of its pool.
    pool: PathBuf,
}

impl Tenant {
    /// Makes a pool and starts a container with it that has the directory `home` at /work.
    fn start(daemon: &Daemon, runtime: &Path, home: &Path, word: &str, backend: &str) -> Result<Tenant> {
        let [pool, bundle, root] = ["pool", "bundle", "bundle/root"].map(|name| home.join(name));
        for dir in [&pool, &bundle, &root, &home.join("mnt")] {
            std::fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        for name in INTO_USR {
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
        }
        let words = ["instance", "mount", "--container", "--name", word, "--max", "2", "--mount", "ext4"];
        sh::capture(daemon.command(&words).args(["--backend", backend]).arg(&pool), LIMIT)?;
        sh::capture(Command::new(runtime).arg("spec").current_dir(&bundle), LIMIT)?;
        let file = bundle.join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", SCRIPT, "sh", word]);
        config["root"] = json!({ "path": "root" });
        let mounts = config["mounts"].as_array_mut().context("the runtime's config.json has no mounts")?;
        let bind = |from: &Path, to: &str, how: &str| json!({ "destination": to, "type": "bind", "source": from, "options": ["rbind", how] });
        mounts.extend([bind(Path::new("/usr"), "/usr", "ro"), bind(home, "/work", "rw")]);
        std::fs::write(&file, config.to_string())?;
        let with = sh::capture(daemon.command(&["oci", "print-config", "--pool", word]).arg(&file), LIMIT)?;
        std::fs::write(&file, with)?;
        let mut command = Command::new(runtime);
        command.arg("--root").arg(home.join("state")).args(["run", "--bundle"]).arg(&bundle).arg(word);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Tenant { child, said, pool })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.said.read_line(&mut line)? == 0 {
            bail!("a container ended early with {}", self.child.wait()?);
        }
        Ok(line.trim().to_owned())
    }

    fn end(mut self) -> Result<String> {
        let mut stdin = self.child.stdin.take().context("no standard input")?;
        stdin.write_all(b"\n")?;
        let word = self.line()?;
        sh::ended(&mut self.child, "a container", LIMIT)?;
        Ok(word)
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = sh::capture(Command::new("umount").args(["-R", "-l"]).arg(&self.pool), LIMIT);
    }
}

/// Runs two containers at the same time, with images in `place` and devices of this backend.
pub(crate) fn show(daemon: &Daemon, place: &Path, backend: &str, say: impl Fn(&str)) -> Result<()> {
    let Some(runtime) = ["crun", "runc"].iter().find_map(|name| sh::which(name).ok()) else {
        say("skipped: containers need a runtime (crun or runc)");
        return Ok(());
    };
    let words = ["apple", "pear"];
    let mut tenants = Vec::new();
    for word in words {
        let home = place.join(format!("{word}-{backend}"));
        std::fs::create_dir(&home)?;
        let image = home.join("disk.img");
        sh::capture(daemon.command(&["create"]).arg(&image).args(["--size", "32M"]), LIMIT)?;
        sh::capture(Command::new(sh::which("mkfs.ext4")?).arg("-q").arg(&image), LIMIT)?;
        let mut tenant = Tenant::start(daemon, &runtime, &home, word, backend)?;
        let line = tenant.line()?;
        let has: Vec<_> = line.split_whitespace().collect();
        ensure!(has == ["/dev/loop0", "/work/disk.img"], "a container has {line:?}");
        say(&format!("'mount -o loop' in container {word}: /dev/loop0 is its disk.img"));
        tenants.push((tenant, word));
    }
    for (tenant, word) in tenants {
        let read = tenant.end()?;
        ensure!(read == word, "read {read:?} instead of {word:?}");
    }
    say("both had /dev/loop0 at the same time, read back their own bytes, and are gone");
    Ok(())
}
