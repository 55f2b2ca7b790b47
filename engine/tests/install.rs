// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine install` and the helper of mount(8), in temporary directories.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_loopengine");

struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Root {
        Root(tempfile::tempdir().unwrap())
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.arg("install").args(words).env("DESTDIR", self.0.path()).output().unwrap()
    }

    fn ok(&self, words: &[&str]) -> String {
        let ran = self.run(words);
        assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    }

    fn fails(&self, words: &[&str], code: i32, says: &str) {
        let ran = self.run(words);
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!((ran.status.code(), said.lines().count()), (Some(code), 1), "{ran:?}");
        assert!(said.starts_with("loopengine: ") && said.contains(says), "{ran:?}");
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    /// All files, including directories.
    fn all(&self) -> BTreeSet<PathBuf> {
        fn walk(at: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                found.insert(path.clone());
                if path.is_dir() && !path.is_symlink() {
                    walk(&path, found);
                }
            }
        }
        let mut found = BTreeSet::new();
        walk(self.0.path(), &mut found);
        found
    }
}

fn sbin() -> &'static str {
    if Path::new("/sbin").is_symlink() { "/usr/sbin" } else { "/sbin" }
}

#[test]
fn installs_and_removes_all_files() {
    let root = Root::new();
    let foreign = root.at("/etc/udev/rules.d/10-other.rules");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    fs::write(&foreign, "theirs").unwrap();
    let before = root.all();
    let listed = root.ok(&["--dry-run"]);
    assert_eq!(root.all(), before, "a dry run changes nothing");
    assert_eq!(root.ok(&[]), listed);
    let placed: BTreeSet<PathBuf> = listed.lines().map(PathBuf::from).collect();
    let files: BTreeSet<PathBuf> =
        root.all().difference(&before).filter(|path| !path.is_dir() || path.is_symlink()).cloned().collect();
    let record = root.at("/usr/local/share/loopengine/installed");
    assert_eq!(files.difference(&placed).collect::<Vec<_>>(), [&record]);
    assert_eq!(placed.difference(&files).count(), 0);
    for path in [
        "/usr/local/bin/loopengine",
        "/etc/systemd/system/loopengine.service",
        "/etc/systemd/system/loopengine.socket",
        "/etc/systemd/system/loopengine-private.socket",
        "/etc/systemd/system/loopengine-metrics.service",
        "/usr/local/share/loopengine/fuse.conf",
        "/usr/local/share/loopengine/apparmor",
        "/usr/local/share/loopengine/varlink/io.loopengine.varlink",
        "/usr/local/share/applications/loopengine-mount.desktop",
        "/etc/udev/rules.d/59-loopengine.rules",
        "/etc/modules-load.d/loopengine.conf",
        "/etc/modprobe.d/loopengine.conf",
        "/usr/local/share/man/man1/loopengine-attach.1",
        "/usr/local/share/man/man7/loopengine-loopfs.7",
        "/usr/local/share/man/man8/mount.loop.8",
        "/usr/local/share/bash-completion/completions/loopengine",
        "/usr/local/share/zsh/site-functions/_loopengine",
        "/usr/local/share/fish/vendor_completions.d/loopengine.fish",
    ] {
        assert!(placed.contains(&root.at(path)), "{path}");
    }
    let program = root.at("/usr/local/bin/loopengine");
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);
    assert!(Command::new(&program).arg("--version").output().unwrap().status.success());
    let unit = fs::read_to_string(root.at("/etc/systemd/system/loopengine.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/local/bin/loopengine serve"), "{unit}");
    let helper = fs::read_link(root.at(sbin()).join("mount.loop")).unwrap();
    assert_eq!(helper, Path::new("/usr/local/bin/loopengine"));
    root.ok(&[]);
    assert_eq!(root.ok(&["--uninstall", "--dry-run"]).lines().count(), placed.len());
    assert!(program.exists());
    let taken: BTreeSet<PathBuf> = root.ok(&["--uninstall"]).lines().map(PathBuf::from).collect();
    assert_eq!(taken, placed);
    assert_eq!(root.all(), before);
    root.fails(&["--uninstall"], 3, "nothing was installed");
}

/// Settings of the unit that give the service a mount namespace, from systemd.exec(5).
#[test]
fn drop_in_disables_options_that_hide_files() {
    const HIDES: [&str; 18] = [
        "PrivateMounts",
        "PrivateTmp",
        "PrivateDevices",
        "ProtectSystem",
        "ProtectHome",
        "ProtectHostname",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "ProtectProc",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "InaccessiblePaths",
        "BindPaths",
        "TemporaryFileSystem",
        "RootDirectory",
        "MountFlags",
    ];
    let share = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/systemd");
    let unit = fs::read_to_string(share.join("loopengine.service")).unwrap();
    let drop_in = fs::read_to_string(share.join("fuse.conf")).unwrap();
    let set = unit.lines().filter_map(|line| line.split_once('=')).map(|(setting, _)| setting);
    let hiding: Vec<&str> = set.filter(|setting| HIDES.contains(setting)).collect();
    assert!(!hiding.is_empty());
    for setting in hiding {
        assert!(drop_in.lines().any(|line| line == format!("{setting}=no")), "{setting}");
    }
}

/// With this setting systemd has openat2(2) return ENOSYS: no private pool can be opened.
#[test]
fn the_unit_does_not_refuse_openat2() {
    let share = Path::new(env!("CARGO_MANIFEST_DIR")).join("share/systemd");
    let unit = fs::read_to_string(share.join("loopengine.service")).unwrap();
    assert!(!unit.lines().any(|line| line.starts_with("RestrictSUIDSGID=")), "{unit}");
}

#[test]
fn systemd_accepts_the_units() {
    let root = Root::new();
    root.ok(&["--prefix", "/usr"]);
    let at = root.at("/usr/lib/systemd/system");
    let drop_ins = at.join("loopengine.service.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::copy(root.at("/usr/share/loopengine/fuse.conf"), drop_ins.join("fuse.conf")).unwrap();
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    verify.args(
        [
            "loopengine.service",
            "loopengine.socket",
            "loopengine-private.socket",
            "loopengine-metrics.service",
        ]
        .map(|unit| at.join(unit)),
    );
    let Ok(ran) = verify.env("SYSTEMD_UNIT_PATH", format!("{}:", at.display())).output() else {
        eprintln!("skipped: needs systemd-analyze");
        return;
    };
    let said = String::from_utf8_lossy(&ran.stderr);
    // Ignores messages on the machine's own units, and on the program, which is not in /usr here.
    let ours = |line: &&str| line.contains("loopengine") && !line.contains("is not executable");
    let complaints: Vec<&str> = said.lines().filter(ours).collect();
    assert!(complaints.is_empty(), "{said}");
}

/// Older versions cannot parse the profile.
#[test]
fn installs_the_profile_where_apparmor_is_new_enough() {
    let root = Root::new();
    let profile = root.at("/etc/apparmor.d/loopengine");
    root.ok(&[]);
    assert!(!profile.exists());
    fs::create_dir_all(root.at("/etc/apparmor.d/abi")).unwrap();
    fs::write(root.at("/etc/apparmor.d/abi/4.0"), "").unwrap();
    root.ok(&[]);
    let text = fs::read_to_string(&profile).unwrap();
    assert!(text.contains("profile loopengine /usr/local/bin/loopengine "), "{text}");
    root.ok(&["--uninstall"]);
    assert!(!profile.exists());
}

#[test]
fn keeps_foreign_files() {
    let root = Root::new();
    let foreign = root.at("/etc/modprobe.d/loopengine.conf");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    let before = root.all();
    // A link too: its target is not written.
    let victim = root.at("/victim");
    for link in [false, true] {
        let _ = fs::remove_file(&foreign);
        match link {
            true => symlink(&victim, &foreign).unwrap(),
            false => fs::write(&foreign, "theirs").unwrap(),
        }
        root.fails(&[], 4, "does not belong to loopengine");
        root.fails(&["--dry-run"], 4, "does not belong to loopengine");
        assert_eq!(root.all().difference(&before).collect::<Vec<_>>(), [&foreign], "nothing else was placed");
    }
}

#[test]
fn names_a_link_to_itself() {
    let root = Root::new();
    let program = root.at("/usr/local/bin/loopengine");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    symlink(PROGRAM, &program).unwrap();
    root.fails(&[], 4, "is a link to the program that runs; remove it ('rm ");
    fs::remove_file(&program).unwrap();
    root.ok(&[]);
}

/// As makefiles pass it.
#[test]
fn accepts_an_empty_destdir() {
    let ran = Command::new(PROGRAM).args(["install", "--dry-run"]).env("DESTDIR", "").output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    assert!(ran.stdout.starts_with(b"/"), "{ran:?}");
}

#[test]
fn keeps_changed_files() {
    let root = Root::new();
    root.ok(&[]);
    let unit = root.at("/etc/systemd/system/loopengine.service");
    fs::write(&unit, "[Unit]\n").unwrap();
    root.fails(&[], 4, "was changed since it was installed");
    let ran = root.run(&["--uninstall"]);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.code() == Some(4) && said.contains("did not remove a changed file"), "{ran:?}");
    let left: Vec<PathBuf> = root.all().into_iter().filter(|path| path.is_file()).collect();
    assert_eq!(left, [unit]);
}

#[test]
fn replaces_an_older_version() {
    let root = Root::new();
    root.ok(&[]);
    // As after an older version that installed another page, and one that no longer exists.
    let record = root.at("/usr/local/share/loopengine/installed");
    let page = root.at("/usr/local/share/man/man1/loopengine-list.1");
    let text = fs::read_to_string(&record).unwrap();
    let line = text.lines().find(|line| line.ends_with("/loopengine-list.1")).unwrap();
    let old = line.replace("loopengine-list.1", "loopengine-old.1");
    fs::copy(&page, page.with_file_name("loopengine-old.1")).unwrap();
    fs::write(&record, format!("{text}{old}\n")).unwrap();
    root.ok(&[]);
    assert!(!page.with_file_name("loopengine-old.1").exists());
    fs::write(&record, "nonsense\n").unwrap();
    root.fails(&[], 2, "is damaged");
}

#[test]
fn supports_other_prefixes() {
    let root = Root::new();
    let listed = root.ok(&["--prefix", "/usr", "--dry-run"]);
    assert!(
        listed.contains("/usr/lib/systemd/system/loopengine.service") && !listed.contains("/etc/"),
        "{listed}"
    );
    let listed = root.ok(&["--prefix", "/opt/x", "--dry-run"]);
    assert!(listed.contains("/opt/x/bin/loopengine") && listed.contains("/etc/udev/rules.d/"), "{listed}");
    if sbin() == "/usr/sbin" {
        root.ok(&["--prefix", "/usr"]);
        assert!(root.at("/usr/sbin/mount.loop").exists(), "the link holds in a staging directory");
    }
    root.fails(&["--prefix", "usr"], 2, "not an absolute path");
}

/// Runs the helper as mount(8) does, without a daemon.
#[test]
fn installs_the_mount_helper() {
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("mount.loop");
    symlink(PROGRAM, &helper).unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new(&helper);
        let ran = command.args(words).env("LOOPENGINE_RUN_DIR", dir.path()).output().unwrap();
        (ran.status.code().unwrap(), String::from_utf8(ran.stderr).unwrap())
    };
    let target = dir.path().to_str().unwrap();
    for (words, code, says) in [
        (&["loop", target, "-o", "rw,nodev"][..], 1, "'nodev'"),
        (&["loop", target, "-o", "max=x"], 1, "'x' is not a number"),
        (&["loop", target, "-t", "ext4"], 1, "'ext4'"),
        (&["loop", target, "-o", "colour=red"], 1, "'colour=red'"),
        (&["loop"], 1, "required"),
        (&["loop", target, "-N", "/proc/1/ns/mnt"], 32, "nsenter"),
        (&["loop", target, "-o", "rw,max=8"], 32, "daemon"),
    ] {
        let (exit, said) = run(words);
        assert!(exit == code && said.contains(says), "{words:?}: {exit}, {said}");
    }
    for words in [&["loop", target, "-f"][..], &["loop", target, "-sfnv", "-o", "colour=red"], &["--version"]]
    {
        assert_eq!(run(words), (0, String::new()), "{words:?}");
    }
}
