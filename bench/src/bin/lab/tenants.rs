//! The part of the demo about private loop devices: two tenants at a time, each with a /dev/loop0 of
//! its own, used by the system's unmodified losetup and mount.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use loopbench::daemon::Daemon;
use loopbench::sh;

const LIMIT: Duration = Duration::from_secs(60);

/// Arguments: image, directory, a word to write into the image. Says which device it has, and goes on
/// when it is told to.
const SCRIPT: &str = r#"set -e
mount -o loop "$1" "$2"
echo "$3" >"$2/name"
losetup --noheadings --output NAME,BACK-FILE
read -r _
cat "$2/name"
umount "$2""#;

/// A command under `loopengine run`.
struct Tenant {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Tenant {
    fn start(daemon: &Daemon, image: &Path, directory: &Path, word: &str) -> Result<Tenant> {
        let mut command = daemon.command(&["run", "--max", "2", "--", "sh", "-c", SCRIPT, "tenant"]);
        command.arg(image).arg(directory).arg(word);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Tenant { child, said })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.said.read_line(&mut line)? == 0 {
            bail!("a tenant ended early with {}", self.child.wait()?);
        }
        Ok(line.trim().to_owned())
    }

    fn end(mut self) -> Result<String> {
        let mut stdin = self.child.stdin.take().context("no standard input")?;
        stdin.write_all(b"\n")?;
        let word = self.line()?;
        sh::ended(&mut self.child, "a tenant", LIMIT)?;
        Ok(word)
    }
}

/// Two of them beside each other. Their images lie in `place`.
pub(crate) fn show(daemon: &Daemon, place: &Path, say: impl Fn(&str)) -> Result<()> {
    let directory = place.join("mnt");
    std::fs::create_dir(&directory)?;
    let words = ["apple", "pear"];
    let mut tenants = Vec::new();
    for word in words {
        let image = place.join(format!("{word}.img"));
        sh::capture(daemon.command(&["create"]).arg(&image).args(["--size", "32M"]), LIMIT)?;
        sh::capture(Command::new(sh::which("mkfs.ext4")?).arg("-q").arg(&image), LIMIT)?;
        let mut tenant = Tenant::start(daemon, &image, &directory, word)?;
        let line = tenant.line()?;
        let expected = image.display().to_string();
        ensure!(line.starts_with("/dev/loop0 ") && line.ends_with(&expected), "a tenant has {line:?}");
        say(&format!(
            "'mount -o loop' in a tenant: {}",
            line.split_whitespace().collect::<Vec<_>>().join(" is ")
        ));
        tenants.push((tenant, word));
    }
    for (tenant, word) in tenants {
        let read = tenant.end()?;
        ensure!(read == word, "read {read:?} instead of {word:?}");
    }
    std::fs::remove_dir(&directory)?;
    say("both had /dev/loop0 at the same time, read back their own bytes, and are gone");
    Ok(())
}
