// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shell completion: the real script in a real bash, with a fake daemon.

mod support;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use loopengine::control::SOCKET;
use support::Daemon;

const PROGRAM: &str = env!("CARGO_BIN_EXE_loopengine");

/// The candidates of bash for the last word; options only if it starts with a dash. None: no bash.
fn offered(run_dir: &Path, words: &[&str]) -> Option<Vec<String>> {
    const ASK: &str = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9; \
                       _clap_complete_loopengine loopengine \"${@: -1}\" ''; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let found = Command::new("bash").args(["-c", "true"]).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        eprintln!("skipped: needs bash");
        return None;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/share/completions/loopengine.bash");
    let path = format!("{}:/usr/bin:/bin", Path::new(PROGRAM).parent().unwrap().display());
    let ran = Command::new("bash")
        .args(["--norc", "-c", ASK, "bash", script, "loopengine"])
        .args(words)
        .env("PATH", path)
        .env("LOOPENGINE_RUN_DIR", run_dir)
        .current_dir(run_dir)
        .output()
        .unwrap();
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    let option = words.last().unwrap().starts_with('-');
    let offered = String::from_utf8(ran.stdout).unwrap();
    let offered = offered.lines().filter(|word| !word.is_empty() && (option || !word.starts_with('-')));
    Some(offered.map(str::to_owned).collect())
}

#[test]
fn completes_names_of_the_daemon() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    for words in
        [&["instance", "create", "build"][..], &["attach", "a.img"], &["attach", "-i", "build", "a.img"]]
    {
        assert_eq!(daemon.run(words).code, 0);
    }
    let run_dir = daemon.run_dir();
    let elsewhere = run_dir.display().to_string();
    for (words, names) in [
        (&["detach", ""][..], &["default/loop0", "build/loop0"][..]),
        (&["stats", "b"], &["build/loop0"]),
        (&["resize", "default/"], &["default/loop0"]),
        (&["recover", "build/loop0"], &["build/loop0"]),
        (&["attach", "--instance", ""], &["build", "default"]),
        (&["instance", "remove", "b"], &["build"]),
        (&["list", "-i", "d"], &["default"]),
        // Images, too; the only file here is the daemon's.
        (&["detach", "lo"], &["lock"]),
        (&["--run-dir", "/nonexistent", "instance", "remove", ""], &[]),
        (&["--run-dir", &elsewhere, "instance", "remove", ""], &["build", "default"]),
    ] {
        let Some(offered) = offered(&run_dir, words) else { return };
        assert_eq!(offered, names, "{words:?}");
    }
}

#[test]
fn omits_hidden_commands() {
    let dir = tempfile::tempdir().unwrap();
    let Some(commands) = offered(dir.path(), &[""]) else { return };
    for command in ["attach", "detach", "serve", "limit"] {
        assert!(commands.iter().any(|offered| offered == command), "{command}: {commands:?}");
    }
    for hidden in ["mounter", "mount-maker", "release-mounts", "generate"] {
        assert!(commands.iter().all(|offered| offered != hidden), "{hidden}: {commands:?}");
        assert_eq!(offered(dir.path(), &[hidden]).unwrap(), [""; 0]);
    }
    assert!(offered(dir.path(), &["attach", "--read"]).unwrap().iter().any(|word| word == "--read-only"));
}

/// A daemon that accepts connections and never answers, and no daemon.
#[test]
fn returns_within_a_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let Some(nothing) = offered(dir.path(), &["instance", "remove", ""]) else { return };
    assert_eq!(nothing, [""; 0]);
    let _silent = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
    let started = Instant::now();
    assert_eq!(offered(dir.path(), &["instance", "remove", ""]).unwrap(), [""; 0]);
    let took = started.elapsed();
    assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "{took:?}");
}
