//! What is generated and kept in the repository is what would be generated now.
//!
//! `UPDATE=1 cargo test --test fresh` writes it anew.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use loopengine::cli::generate;

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn files(dir: &Path) -> BTreeMap<String, String> {
    let read = fs::read_dir(dir).into_iter().flatten().map(|entry| {
        let entry = entry.unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), text)
    });
    read.collect()
}

fn updating() -> bool {
    std::env::var_os("UPDATE").is_some()
}

fn compare(name: &str, generated: &Path) {
    let kept = kept(name);
    if updating() {
        let _ = fs::remove_dir_all(&kept);
        fs::create_dir_all(&kept).unwrap();
        for (name, text) in files(generated) {
            fs::write(kept.join(name), text).unwrap();
        }
    }
    let (want, have) = (files(generated), files(&kept));
    assert!(!want.is_empty());
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want), names(&have), "{name}: run 'UPDATE=1 cargo test --test fresh'");
    for (file, text) in want {
        assert!(text == have[&file], "{name}/{file} is stale: run 'UPDATE=1 cargo test --test fresh'");
    }
}

#[test]
fn manual_pages() {
    let dir = tempfile::tempdir().unwrap();
    generate::man(dir.path()).unwrap();
    compare("share/man", dir.path());
}

#[test]
fn completions() {
    let dir = tempfile::tempdir().unwrap();
    generate::completions(dir.path()).unwrap();
    compare("share/completions", dir.path());
}

/// What a running daemon says of itself is what the interface file says.
#[test]
fn interface() {
    use std::io::{BufRead, BufReader, Write};
    let daemon = support::Daemon::start();
    let socket = daemon.run_dir().join(loopengine::control::SOCKET);
    let mut socket = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let call = b"{\"method\":\"org.varlink.service.GetInterfaceDescription\",\"parameters\":{\"interface\":\"io.loopengine\"}}\0";
    socket.write_all(call).unwrap();
    let mut answer = Vec::new();
    BufReader::new(socket).read_until(0, &mut answer).unwrap();
    answer.pop();
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    let text = answer["parameters"]["description"].as_str().unwrap();
    let file = kept("io.loopengine.varlink");
    if updating() {
        fs::write(&file, laid_out(text)).unwrap();
    }
    let have = fs::read_to_string(&file).unwrap_or_default();
    // White space aside: the description of zlink has none to spare.
    let dense = |text: &str| text.split_whitespace().collect::<String>();
    assert!(dense(text) == dense(&have), "run 'UPDATE=1 cargo test --test fresh'");
}

/// One field a line, comments above what they describe.
fn laid_out(text: &str) -> String {
    let text = text.replace("(#", "(\n#").replace(", #", ",\n#").replace("#  ", "# ");
    let mut out = String::new();
    let mut inside = false;
    for line in text.trim().lines() {
        let line = line.trim();
        let ends = inside && line.ends_with(')') && !line.starts_with('#');
        let line = if ends { line.strip_suffix(')').unwrap() } else { line };
        if !line.is_empty() || !ends {
            let indent = if inside && !line.is_empty() { "  " } else { "" };
            out.push_str(&format!("{indent}{line}\n"));
        }
        if ends {
            out.push_str(")\n");
            inside = false;
        }
        inside |= line.ends_with('(');
    }
    out
}

#[test]
fn the_example_configuration_is_valid() {
    let text = fs::read_to_string(kept("share/loopengine.toml")).unwrap();
    loopengine::config::Config::parse(&text, "as it is").unwrap();
    // What is commented out as an example, too.
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with([' ', '#']) => rest,
        _ => line,
    });
    let all = lines.collect::<Vec<_>>().join("\n");
    let config = loopengine::config::Config::parse(&all, "with examples").unwrap();
    assert_eq!(config.instances().count(), 1);
    assert_eq!(config.tuning().poll_us, 50);
}
