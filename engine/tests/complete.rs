// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shell completion: the real scripts in a real bash, zsh and fish, with a fake daemon.

mod support;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use loopengine::control::SOCKET;
use support::Daemon;

const PROGRAM: &str = env!("CARGO_BIN_EXE_loopengine");

/// Whether the machine has this shell; says so if not.
fn has(shell: &str) -> bool {
    let found = Command::new(shell).args(["-c", "true"]).stderr(Stdio::null()).status();
    let has = found.is_ok_and(|status| status.success());
    if !has {
        eprintln!("skipped: needs {shell}");
    }
    has
}

/// Lines that a shell prints after it has read the completion script `file`.
fn printed(run_dir: &Path, shell: &[&str], file: &str, words: &[&str]) -> Vec<String> {
    let script = format!("{}/share/completions/{file}", env!("CARGO_MANIFEST_DIR"));
    let path = format!("{}:/usr/bin:/bin", Path::new(PROGRAM).parent().unwrap().display());
    let ran = Command::new(shell[0])
        .args(&shell[1..])
        .arg(script)
        .args(words)
        .env("PATH", path)
        .env("HOME", run_dir)
        .env("LOOPENGINE_RUN_DIR", run_dir)
        .current_dir(run_dir)
        .output()
        .unwrap();
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    String::from_utf8(ran.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// The candidates of bash for the last word; options only if it starts with a dash. None: no bash.
fn offered(run_dir: &Path, words: &[&str]) -> Option<Vec<String>> {
    const ASK: &str = "source \"$1\"; shift; COMP_WORDS=(loopengine \"$@\"); COMP_CWORD=$#; COMP_TYPE=9; \
                       _clap_complete_loopengine loopengine \"${@: -1}\" ''; printf '%s\\n' \"${COMPREPLY[@]}\"";
    if !has("bash") {
        return None;
    }
    let mut offered = printed(run_dir, &["bash", "--norc", "-c", ASK, "bash"], "loopengine.bash", words);
    let option = words.last().unwrap().starts_with('-');
    offered.retain(|word| !word.is_empty() && (option || !word.starts_with('-')));
    Some(offered)
}

/// The candidates of zsh, with their descriptions. Without a terminal zsh has no completion system:
/// two functions of it are replaced.
fn offered_by_zsh(run_dir: &Path, words: &[&str]) -> Option<Vec<String>> {
    const ASK: &str = "compdef() { :; }; _describe() { print -l -- ${(P)3}; }; \
                       script=$1; shift; words=(loopengine \"$@\"); CURRENT=$#words; \
                       source $script; _clap_dynamic_completer_loopengine";
    has("zsh").then(|| printed(run_dir, &["zsh", "-f", "-c", ASK, "zsh"], "_loopengine", words))
}

/// The candidates of fish, with their descriptions after a tab.
fn offered_by_fish(run_dir: &Path, words: &[&str]) -> Option<Vec<String>> {
    const ASK: &str = "source $argv[1]; complete --do-complete \"loopengine $argv[2..]\"";
    has("fish").then(|| printed(run_dir, &["fish", "--no-config", "-c", ASK], "loopengine.fish", words))
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
        (&["resize", "build/loop0", "--size", ""], &["4096"]),
        (&["resize", "build/loop1", "--size", ""], &[]),
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
fn completes_in_zsh_and_fish() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    assert_eq!(daemon.run(&["attach", "a.img"]).code, 0);
    for (offered, separator) in [
        (offered_by_zsh(&daemon.run_dir(), &["detach", "def"]), ':'),
        (offered_by_fish(&daemon.run_dir(), &["detach", "def"]), '\t'),
    ] {
        let Some(offered) = offered else { continue };
        let [only] = &offered[..] else { panic!("{offered:?}") };
        let (name, image) = only.split_once(separator).unwrap();
        assert_eq!(name, "default/loop0");
        assert!(image.ends_with("a.img"), "{image}");
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
