// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls to the private socket.

use super::*;

#[test]
fn completes_pool_names() {
    let Some(daemon) = Daemon::start() else { return };
    let root = loopengine::private::Caller { uid: 0, gid: 0, pid: None };
    let _pool =
        daemon.registry.open(&OpenSpec { name: Some("ci".into()), ..OpenSpec::default() }, root).unwrap();
    let mut asking = daemon.program(0);
    asking.envs([("LOOPENGINE_COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", "3"), ("_CLAP_IFS", "\u{b}")]);
    let offered = asking.args(["--", "loopengine", "losetup", "--pool", ""]).output().unwrap();
    assert_eq!(out(&offered).split('\u{b}').next(), Some("ci"));
}

#[test]
fn users_access_only_their_own_pools() {
    let Some(daemon) = Daemon::start() else { return };
    let (root, plain) = (
        loopengine::private::Caller { uid: 0, gid: 0, pid: None },
        loopengine::private::Caller { uid: PLAIN, gid: PLAIN, pid: None },
    );
    let named = |name: &str| OpenSpec { name: Some(name.into()), ..OpenSpec::default() };
    let registry = &daemon.registry;
    assert_eq!(registry.open(&named("a"), root).unwrap().name, "a");
    assert_eq!(registry.open(&named("a"), plain).unwrap().name, "65534.a");
    assert_eq!(registry.open(&named("a"), root).unwrap_err().kind(), Kind::Exists);
    assert_eq!(registry.open(&named("../a"), plain).unwrap_err().kind(), Kind::Invalid);
    let for_others = OpenSpec { uid: Some(0), ..named("b") };
    assert_eq!(registry.open(&for_others, plain).unwrap_err().kind(), Kind::Denied);
    let for_plain = OpenSpec { uid: Some(PLAIN), gid: Some(PLAIN), ..named("c") };
    registry.open(&for_plain, root).unwrap();
    let names = |caller| registry.list(caller).into_iter().map(|pool| pool.name).collect::<Vec<_>>();
    assert_eq!(names(root), ["a", "65534.a", "c"]);
    assert_eq!(names(plain), ["65534.a", "c"]);
    assert_eq!(registry.close("a", true, plain).unwrap_err().kind(), Kind::NotFound);
    // A file that is not a listener never reaches a supervisor.
    let file: OwnedFd = File::open("/dev/null").unwrap().into();
    let namespace: OwnedFd = File::open("/proc/self/ns/user").unwrap().into();
    let refused = registry.supervise("a", file, namespace, None, root).unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
    // Only pools for containers have hooks, and only root owns such pools: users cannot write to
    // the daemon's log.
    let report = |name, caller| registry.report_container(name, "c1", "no disk", caller);
    assert_eq!(report("65534.a", plain).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(report("a", plain).unwrap_err().kind(), Kind::NotFound);
    let dev = || OwnedFd::from(File::open("/dev/null").unwrap());
    let set_dev = |name, caller| registry.set_container_dev(name, "c1", dev(), caller);
    assert!(set_dev("65534.a", plain).unwrap_err().message().contains("not for containers"));
    registry.close("65534.a", false, plain).unwrap();
    eventually("the pool is gone", || names(plain) == ["c"]);
    registry.shutdown();
    assert!(names(root).is_empty());
    assert_eq!(registry.open(&named("d"), root).unwrap_err().kind(), Kind::Unavailable);
}

#[test]
fn losetup_works_over_the_socket() {
    let Some(daemon) = Daemon::start() else { return };
    let image = daemon.dir.path().join("a.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let image = image.to_str().unwrap();
    let losetup = |uid, words: &[&str]| daemon.program(uid).arg("losetup").args(words).output().unwrap();
    let fails = |output: Output, code, says: &str| {
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(err.contains(says) && err.matches('\n').count() == 1, "{err}");
    };
    fails(losetup(PLAIN, &["-a"]), 3, "run -- CMD'");
    fails(losetup(0, &["-a"]), 3, "instance mount DIR'");
    let open = |uid, name: &str| {
        let spec = OpenSpec { name: Some(name.into()), ..OpenSpec::default() };
        daemon.registry.open(&spec, loopengine::private::Caller { uid, gid: uid, pid: None }).unwrap()
    };
    let _root = open(0, "r");
    fails(losetup(PLAIN, &["-a"]), 3, "run -- CMD'");
    let _plain = open(PLAIN, "p");
    let bound = losetup(PLAIN, &["-f", "--show", "-b", "4096", "-o", "512", image]);
    assert_eq!(out(&bound), "65534.p/loop0\n");
    assert_eq!(out(&losetup(PLAIN, &["-f"])), "65534.p/loop1\n");
    let line = format!("65534.p/loop0: []: ({image}), offset 512\n");
    assert_eq!(out(&losetup(PLAIN, &["-a"])), line);
    assert_eq!(out(&losetup(0, &["-a"])), "", "root's own pool is used");
    assert_eq!(out(&losetup(0, &["--pool", "65534.p", "-a"])), line);
    let table = losetup(PLAIN, &["-n", "-O", "NAME,LOG-SEC,BACK-FILE"]);
    assert_eq!(out(&table), format!("65534.p/loop0    4096 {image}\n"));
    // Errnos and wrong options are reported as by losetup.
    let says = "losetup: 65534.p/loop0: detach failed: Device or resource busy";
    fails(losetup(PLAIN, &["-d", "loop0"]), 1, says);
    let wrong = losetup(PLAIN, &["--nothing"]);
    assert_eq!(wrong.status.code(), Some(1));
    let text = "losetup: unrecognized option '--nothing'\nTry 'losetup --help' for more information.\n";
    assert_eq!(String::from_utf8_lossy(&wrong.stderr), text);
    // Pools of others are invisible.
    for name in ["r", "none"] {
        fails(losetup(PLAIN, &["--pool", name, "-a"]), 3, &format!("no private pool \"{name}\""));
    }
    let _second = open(PLAIN, "q");
    fails(losetup(PLAIN, &["-a"]), 2, "65534.p, 65534.q");
    let chosen = daemon.program(PLAIN).args(["losetup", "-a"]).env("LOOPENGINE_POOL", "65534.p").output();
    assert_eq!(out(&chosen.unwrap()), line);
    // At most one descriptor.
    block_on(async {
        let mut client = PrivateClient::connect(&daemon.run_dir()).await.unwrap();
        let list = OperationRequest::of(Operation::List);
        let devices = client.operate("r", &list, None).await.unwrap().devices;
        assert_eq!(devices, Some(Vec::new()));
    });
}
