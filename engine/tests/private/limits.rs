// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of users and of connections.

use super::*;

#[test]
fn enforces_limits_that_root_changes() {
    let Some(daemon) = Daemon::start() else { return };
    let run = |max: &str| daemon.program(PLAIN).args(["run", "--max", max, "--", "true"]).output().unwrap();
    assert_eq!(run("12").status.code(), Some(0));
    eventually("the pool has ended", || {
        daemon.registry.limits(loopengine::private::Caller { uid: 0, gid: 0, pid: None }).len() == 1
    });
    let refused = run("13");
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    let user = PLAIN.to_string();
    let by_user = daemon.program(PLAIN).args(["limit", &user, "100"]).output().unwrap();
    assert_eq!(by_user.status.code(), Some(6), "{by_user:?}");
    out(&daemon.program(0).args(["limit", &user, "100"]).output().unwrap());
    assert_eq!(run("13").status.code(), Some(0));
    let shown = daemon.program(0).args(["limit", "--json"]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_str(&out(&shown)).unwrap();
    assert_eq!((&shown[0]["maxDevices"], &shown[1]["maxDevices"]), (&12.into(), &100.into()));
    out(&daemon.program(0).args(["limit", &user, "default"]).output().unwrap());
    assert_eq!(run("13").status.code(), Some(125));
}

/// The output of 'loopengine limit', by name and number.
#[test]
fn applies_limits_of_the_configuration() {
    let Some(daemon) = Daemon::start() else { return };
    let limit = |uid, words: &[&str]| daemon.program(uid).arg("limit").args(words).output().unwrap();
    let row = |user: &str| {
        let shown = out(&limit(0, &[user]));
        shown.lines().nth(1).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    assert_eq!((row("65534"), row("root")), ("nobody 12 0 0 3".to_owned(), "root none 0 0 none".to_owned()));
    let text = "[[private.user]]\nuser = 'nobody'\nmax_devices = 20\nmax_pools = 1\n";
    let (users, unknown) = loopengine::config::Config::parse(text, "x.toml").unwrap().users();
    assert!(unknown.is_empty());
    daemon.registry.configure(&users);
    assert_eq!((row("nobody"), row("65534")), ("nobody 20 0 0 1".to_owned(), "nobody 20 0 0 1".to_owned()));
    out(&limit(0, &["nobody", "30"]));
    assert_eq!(row("nobody"), "nobody 30 0 0 1");
    out(&limit(0, &["nobody", "default"]));
    assert_eq!(row("nobody"), "nobody 20 0 0 1");
    assert_eq!(out(&limit(PLAIN, &["nobody"])), out(&limit(0, &["nobody"])));
    assert_eq!(limit(PLAIN, &["root"]).status.code(), Some(6));
    let unknown = limit(0, &["no-such-user"]);
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(unknown.status.code() == Some(2) && said.contains("is in /etc/passwd"), "{unknown:?}");
}

#[test]
fn limits_hostile_clients() {
    let Some(daemon) = Daemon::start() else { return };
    let socket = daemon.run_dir().join("private");
    let mut flood = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    flood.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let chunk = [b'x'; 4096];
    assert!((0..1000).any(|_| flood.write_all(&chunk).is_err()), "4 MB without an end were accepted");
    block_on(async {
        let mut client = PrivateClient::connect(&daemon.run_dir()).await.unwrap();
        assert!(client.list().await.unwrap().is_empty(), "others are served");
    });
}
