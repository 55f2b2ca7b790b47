// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control socket, through its own client and through raw messages.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use loopengine::Kind;
use loopengine::control::server::CONNECTIONS_MAX;
use loopengine::control::{Client, SOCKET, codec};
use loopengine::instance::Selector;
use loopengine::instance::spec::*;
use support::{Daemon, KINDS, attach, block_on, instance};

fn open(path: &std::path::Path) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

#[test]
fn every_call_makes_a_round_trip() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 1 << 20);
    block_on(async {
        let mut client = Client::connect(&daemon.run_dir()).await.unwrap();
        assert_eq!(client.daemon_pid(), Some(std::process::id().cast_signed()));
        assert_eq!(client.features().await.unwrap().kernel, "0.0-fake");

        let spec = InstanceSpec { cpus: Some("0-1".into()), ..instance("build", 7) };
        let made = client.create_instance(&spec).await.unwrap();
        assert_eq!((made.max_devices, made.cpus.as_deref()), (7, Some("0-1")));
        assert_eq!(client.instances().await.unwrap().len(), 2);

        let spec = AttachSpec {
            offset: 512,
            size_limit: 4096,
            block_size: 4096,
            queues: 3,
            depth: 5,
            io_mode: Some(IoMode::Copy),
            ..attach("build", &image)
        };
        let device = client.attach(&spec, false, open(&image)).await.unwrap();
        assert_eq!(device.path, "/run/fake/build/loop0");
        assert_eq!((device.offset, device.size_limit, device.block_size), (512, 4096, 4096));
        assert_eq!((device.queues, device.depth), (3, 5));
        assert_eq!((device.io_mode, device.state), (IoMode::Copy, DeviceState::Live));
        assert_eq!(daemon.fake.received(&image), Some(true));

        let of_build = Selector::Instance("build".into());
        let this = Selector::Device("build/loop0".into());
        let devices = client.devices(&Selector::All).await.unwrap();
        assert_eq!(devices, std::slice::from_ref(&device));
        let devices = client.devices(&of_build).await.unwrap();
        assert_eq!(devices, std::slice::from_ref(&device));
        assert_eq!(client.devices(&Selector::Instance("x".into())).await.unwrap(), []);
        let stats = client.stats(&this).await.unwrap();
        assert_eq!((stats[0].in_flight, stats[0].latency.p999_ns), (3, 40_000));

        File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
        let grow = ResizeSpec { device: "build/loop0".into(), size: None, shrink: false, force: false };
        assert_eq!(client.resize(&grow).await.unwrap().size, 2 << 20);
        assert_eq!(client.detach(&this, false).await.unwrap(), [device.path]);
        assert_eq!(client.detach(&Selector::All, false).await.unwrap(), [""; 0]);
        client.remove_instance("build", false).await.unwrap();
        assert_eq!(client.instances().await.unwrap().len(), 1);
    });
}

#[test]
fn errors_keep_kind_message_and_hint() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 4096);
    block_on(async {
        let mut client = Client::connect(&daemon.run_dir()).await.unwrap();
        for kind in KINDS {
            let spec = attach(&format!("error-{kind:?}"), &image);
            let error = client.attach(&spec, false, open(&image)).await.unwrap_err();
            assert_eq!(error.kind(), kind);
            assert_eq!(error.message(), format!("{kind:?} happened"));
            assert_eq!(error.next_step(), Some("do something else"));
        }
        // A panic of the engine fails one call, and does not end the daemon.
        let error = client.attach(&attach("panic", &image), false, open(&image)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal);
        client.instances().await.unwrap();
    });
}

/// The call does not end soon.
async fn assert_hangs(call: impl Future) {
    assert!(tokio::time::timeout(Duration::from_millis(100), call).await.is_err(), "the call has ended");
}

#[test]
fn serves_others_during_a_slow_call() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 4096);
    block_on(async {
        let mut slow = Client::connect(&daemon.run_dir()).await.unwrap();
        let mut other = Client::connect(&daemon.run_dir()).await.unwrap();
        other.create_instance(&instance("slow", 1)).await.unwrap();
        let spec = attach("slow", &image);
        let attaching = slow.attach(&spec, false, open(&image));
        tokio::pin!(attaching);
        assert_hangs(attaching.as_mut()).await;
        for _ in 0..10 {
            other.instances().await.unwrap();
        }
        daemon.fake.release();
        attaching.await.unwrap();
    });
}

#[test]
fn finishes_running_calls_at_a_stop() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 4096);
    block_on(async {
        let mut slow = Client::connect(&daemon.run_dir()).await.unwrap();
        let mut idle = Client::connect(&daemon.run_dir()).await.unwrap();
        idle.create_instance(&instance("slow", 1)).await.unwrap();
        let spec = attach("slow", &image);
        let attaching = slow.attach(&spec, false, open(&image));
        tokio::pin!(attaching);
        assert_hangs(attaching.as_mut()).await;
        daemon.stop();
        let error = idle.instances().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        daemon.fake.release();
        attaching.await.unwrap();
    });
}

#[test]
fn limits_connections() {
    let daemon = Daemon::start();
    block_on(async {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut client = Client::connect(&daemon.run_dir()).await.unwrap();
            client.instances().await.unwrap();
            clients.push(client);
        }
        let mut next = Client::connect(&daemon.run_dir()).await.unwrap();
        let asking = next.instances();
        tokio::pin!(asking);
        assert_hangs(asking.as_mut()).await;
        clients.pop();
        asking.await.unwrap();
        clients[0].instances().await.unwrap();
    });
}

/// Sends `message`, and returns the reply.
fn raw(daemon: &Daemon, message: &str) -> String {
    let mut socket = UnixStream::connect(daemon.run_dir().join(SOCKET)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.write_all(message.as_bytes()).unwrap();
    socket.write_all(&[0]).unwrap();
    let mut answer = Vec::new();
    let mut buf = [0; 4096];
    loop {
        match socket.read(&mut buf).unwrap() {
            0 => break,
            read => answer.extend_from_slice(&buf[..read]),
        }
        if answer.last() == Some(&0) {
            break;
        }
    }
    String::from_utf8(answer).unwrap()
}

#[test]
fn supports_varlink_introspection() {
    let daemon = Daemon::start();
    let info = raw(&daemon, r#"{"method":"org.varlink.service.GetInfo"}"#);
    assert!(info.contains("\"io.loopengine\"") && info.contains("org.varlink.service"), "{info}");
    let unknown = raw(&daemon, r#"{"method":"io.loopengine.Nonsense"}"#);
    assert!(unknown.contains("org.varlink.service.MethodNotFound"), "{unknown}");
    let list = raw(&daemon, r#"{"method":"io.loopengine.ListInstances","parameters":{}}"#);
    assert!(list.contains("\"maxDevices\":4"), "{list}");
}

#[test]
fn refuses_invalid_calls() {
    let daemon = Daemon::start();
    // Without a file descriptor.
    let spec = attach("default", std::path::Path::new("/a.img"));
    let call = String::from_utf8(codec::encode_attach(&spec).unwrap()).unwrap();
    let answer = raw(&daemon, &call);
    assert!(answer.contains("io.loopengine.Invalid") && answer.contains("0 file"), "{answer}");
    // `Detach` needs exactly one of its parameters.
    for parameters in ["{}", r#"{"device":"loop0","all":true}"#, r#"{"device":"loop0","instance":"default"}"#]
    {
        let call = format!(r#"{{"method":"io.loopengine.Detach","parameters":{parameters}}}"#);
        let answer = raw(&daemon, &call);
        assert!(answer.contains("io.loopengine.Invalid"), "{answer}");
    }
    // An invalid message closes its own connection only.
    for message in ["", "nonsense", "{}", "[1]", "{\"method\":1}"] {
        raw(&daemon, message);
    }
    raw(&daemon, r#"{"method":"io.loopengine.ListInstances"}"#);
}

#[test]
fn refuses_other_users() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can call as somebody else");
        return;
    }
    let daemon = Daemon::start();
    let open = |path: std::path::PathBuf, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    // With an open mode of the socket, only the check of credentials refuses.
    open(daemon.run_dir(), 0o755);
    open(daemon.run_dir().parent().unwrap().to_owned(), 0o755);
    open(daemon.run_dir().join(SOCKET), 0o666);
    // Other users cannot search the program's directory, so they run a copy.
    let program = daemon.run_dir().join("loopengine");
    std::fs::copy(env!("CARGO_BIN_EXE_loopengine"), &program).unwrap();
    open(program.clone(), 0o755);
    let ran = Command::new(program)
        .args(["list", "--run-dir"])
        .arg(daemon.run_dir())
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let error = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(6), "{error}");
    assert!(error.contains("denies access to this user"), "{error}");
    block_on(async {
        let mut client = Client::connect(&daemon.run_dir()).await.unwrap();
        client.instances().await.unwrap();
    });
}

#[test]
fn reports_a_dead_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let connect = || block_on(async { Client::connect(dir.path()).await.unwrap_err() });
    let missing = connect();
    assert_eq!(missing.kind(), Kind::Unavailable);
    assert_eq!(missing.next_step(), Some("start it with 'loopengine serve'"));
    // A socket without a listener.
    drop(std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap());
    let refused = connect();
    assert_eq!(refused.kind(), Kind::Unavailable);
    assert!(refused.message().ends_with("connection refused"), "{refused}");
}

#[test]
fn survives_a_disconnect_during_a_call() {
    let daemon = Daemon::start();
    for message in ["{\"method\":\"io.loop", "{\"method\":\"io.loopengine.ListInstances\"}\0"] {
        let mut socket = UnixStream::connect(daemon.run_dir().join(SOCKET)).unwrap();
        socket.write_all(message.as_bytes()).unwrap();
    }
    let started = Instant::now();
    raw(&daemon, r#"{"method":"io.loopengine.ListInstances"}"#);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn client_and_server_share_a_codec() {
    let mut spec = attach("default", std::path::Path::new("/a \"b\"\n.img"));
    let message = codec::encode_attach(&spec).unwrap();
    codec::decode_call(&message).unwrap();
    spec.io_mode = Some(IoMode::Batch);
    let message = codec::encode_attach(&spec).unwrap();
    let text = String::from_utf8(message).unwrap();
    assert!(text.contains("\"ioMode\":\"batch\""), "{text}");
    codec::decode_call(text.replace("readOnly", "readonly").as_bytes()).unwrap_err();
    codec::decode_call(b"{}").unwrap_err();
}
