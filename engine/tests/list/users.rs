// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What plain users see, and the hints they get.

use super::*;

#[test]
fn users_see_their_own_pools() {
    let Some(mut daemon) = Daemon::start() else { return };
    daemon.image("a.img");
    ok(&daemon.run(0, &["attach", "a.img"]));
    assert_eq!(daemon.json(PLAIN, &["list"]), serde_json::json!({ "devices": [], "pools": [] }));
    daemon.tenant(0, "ci");
    let pid = daemon.tenant(PLAIN, "p").to_string();
    for words in [&["list"][..], &["list", "--all"]] {
        let listed = daemon.run(PLAIN, words);
        let want = ["pool", "65534.p", "-", "-", "nobody", &pid, "sleep", "-", "-", "-"];
        assert_eq!(row(ok(&listed), "pool"), want);
        assert_eq!(listed.out.lines().count(), 2, "{listed:?}");
    }
    fails(&daemon.run(PLAIN, &["list", "--instance", "default"]), 6, "loopengine: ");
    // The output of a plain 'list' of root is unchanged.
    assert!(daemon.json(0, &["list"]).is_array());
}

#[test]
fn top_shows_users_their_own_pools() {
    let Some(mut daemon) = Daemon::start() else { return };
    daemon.image("a.img");
    ok(&daemon.run(0, &["attach", "a.img"]));
    daemon.tenant(0, "ci");
    daemon.tenant(PLAIN, "p");
    for (uid, want) in [
        (0, &["ci/loop0 root", "default/loop0 root", "65534.p/loop0 nobody"][..]),
        (PLAIN, &["65534.p/loop0 nobody"]),
        (PLAIN - 1, &[]),
    ] {
        let shown = daemon.json(uid, &["top", "-n", "1", "-d", "0.1", "-o", "user", "-r"]);
        let word = |device: &Value, key: &str| device[key].as_str().unwrap().to_owned();
        let devices = shown["devices"].as_array().unwrap().iter();
        let found: Vec<_> = devices.map(|one| word(one, "name") + " " + &word(one, "user")).collect();
        assert_eq!(found, want);
    }
}

/// With a daemon that offers pools, on any kernel.
#[test]
fn doctor_checks_what_users_can_do() {
    let Some(daemon) = Daemon::start() else { return };
    let checks = |uid, words: &[&str]| -> Vec<(String, String, String)> {
        let words: Vec<&str> = ["doctor", "--json"].iter().chain(words).copied().collect();
        let ran = daemon.run(uid, &words);
        let checks: Vec<Value> = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{ran:?}"));
        let problems = checks.iter().any(|check| check["verdict"] == "problem");
        assert_eq!(ran.code, i32::from(problems), "{ran:?}");
        let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
        let each = |check: &Value| (text(check, "name"), text(check, "verdict"), text(check, "advice"));
        checks.iter().map(each).collect()
    };
    let names = |checks: &[(String, String, String)]| {
        checks.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>().join(", ")
    };
    for (uid, goal, want) in [
        (0, "run", "private devices, pool"),
        (0, "mount", "private devices, pool"),
        (0, "podman", "private devices, pool, podman, runtime, runtime's socket"),
        (0, "kubernetes", "private devices, pool, runtime's socket, pods"),
        (PLAIN, "run", "private devices, pool, user namespaces, FUSE"),
        (PLAIN, "mount", "private devices, pool, FUSE"),
        (PLAIN, "podman", "private devices, pool, containers"),
    ] {
        let found = checks(uid, &["--for", goal]);
        assert_eq!(names(&found), want, "{uid} {goal}");
        assert!(found[..2].iter().all(|(_, verdict, _)| verdict == "ok"), "{found:?}");
    }
    let own = checks(PLAIN, &[]);
    assert_eq!(names(&own), "private devices, pool, user namespaces, FUSE");
    assert!(own.iter().all(|(.., advice)| !advice.contains("run this as root")), "{own:?}");
    let of_daemon = checks(0, &[]);
    for name in ["driver", "ublk devices", "private devices", "daemon"] {
        assert!(of_daemon.iter().any(|(found, ..)| found == name), "{name}: {of_daemon:?}");
    }
}

#[test]
fn refusals_have_hints_for_users() {
    let Some(daemon) = Daemon::start() else { return };
    daemon.image("a.img");
    fs::set_permissions(daemon.dir.path().join("a.img"), std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .unwrap();
    for words in [&["attach", "a.img"][..], &["detach", "--all"], &["stats"], &["resize", "loop0"]] {
        let ran = daemon.run(PLAIN, words);
        fails(&ran, 6, "; run this as root; ");
        let missing = loopengine::kernels::PRIVATE.missing();
        assert!(ran.err.contains(missing.as_deref().unwrap_or("'loopengine mount IMAGE DIR'")), "{ran:?}");
    }
}
