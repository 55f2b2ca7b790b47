// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile and careless clients must not affect root and a neighbour: the real `loopengine serve`,
//! with files instead of block devices. Needs root and FUSE; is skipped elsewhere.

#[path = "support/silent.rs"]
mod silent;

use std::fs::{self, File};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use loopengine::control::{Client, PrivateClient};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
use rustix::process::{Pid, Signal, kill_process};

const HOSTILE: u32 = 65_501;
const NEIGHBOUR: u32 = 65_502;
/// Maximum latency of a call of other clients.
const SOON: Duration = Duration::from_secs(2);
const LIST: &[u8] = b"{\"method\":\"io.loopengine.Private.List\",\"parameters\":{}}\0";

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Option<Daemon> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("config.toml"), "").unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_loopengine"))
            .args(["serve", "--backend", "fuse", "--run-dir"])
            .arg(dir.path().join("run"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Daemon { child, dir };
        let until = Instant::now() + Duration::from_secs(20);
        while !daemon.run_dir().join("oci").exists() {
            assert!(Instant::now() < until, "the daemon did not start: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(daemon)
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn connect(&self) -> UnixStream {
        let socket = UnixStream::connect(self.run_dir().join("private")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }

    /// Checks that root, on the control socket, and a neighbour, on the private one, get replies
    /// soon.
    fn serves_others(&self, why: &str) {
        let root = timed(|| block_on(async { Client::connect(&self.run_dir()).await?.instances().await }));
        assert!(root < SOON, "{why}: root waited for {root:?}: {}", self.log());
        let neighbour = as_user(NEIGHBOUR, || {
            timed(|| block_on(async { PrivateClient::connect(&self.run_dir()).await?.list().await }))
        });
        assert!(neighbour < SOON, "{why}: a neighbour waited for {neighbour:?}: {}", self.log());
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Checks that the daemon exits within this time after SIGTERM.
    fn ends(mut self, within: Duration) {
        self.signal(Signal::TERM);
        let started = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < within, "the daemon still runs after SIGTERM: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        // A killed daemon leaves its mount.
        let _ = rustix::mount::unmount(self.run_dir().join("default"), rustix::mount::UnmountFlags::DETACH);
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn timed<T>(work: impl FnOnce() -> loopengine::Result<T>) -> Duration {
    let started = Instant::now();
    work().unwrap_or_else(|error| panic!("{error} after {:?}", started.elapsed()));
    started.elapsed()
}

/// Runs `work` on a thread with the credentials of another user. The real user stays, so that the
/// thread can signal the daemon.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    let work = move || {
        // SAFETY: takes integers, and changes the calling thread only, which ends with this.
        let done = unsafe { libc::syscall(libc::SYS_setresgid, u32::MAX, uid, u32::MAX) };
        assert_eq!(done, 0);
        // SAFETY: as above.
        let done = unsafe { libc::syscall(libc::SYS_setresuid, u32::MAX, uid, u32::MAX) };
        assert_eq!(done, 0);
        work()
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

fn send(to: &UnixStream, text: &[u8], files: &[impl AsFd]) -> rustix::io::Result<usize> {
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(to, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)
}

/// Sockets whose last close blocks on a peer that reads nothing.
struct Slow(TcpListener);

impl Slow {
    fn new() -> Slow {
        Slow(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    /// A socket to send, and the peer that blocks its close.
    fn file(&self) -> (OwnedFd, TcpStream) {
        let mut socket = TcpStream::connect(self.0.local_addr().unwrap()).unwrap();
        let (peer, _) = self.0.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        sockopt::set_socket_linger(&socket, Some(Duration::from_secs(300))).unwrap();
        (socket.into(), peer)
    }
}

/// All kinds of unexpected descriptors.
#[test]
fn serves_others_while_a_descriptor_does_not_close() {
    let Some(daemon) = Daemon::start() else { return };
    let slow = Slow::new();
    let cut = &LIST[..20];
    let cases: [(&str, &[u8], usize, bool); 7] = [
        ("not consumed", LIST, 1, true),
        ("unknown method", b"{\"method\":\"io.loopengine.Private.Nonsense\"}\0", 1, true),
        ("wrong parameters", b"{\"method\":\"io.loopengine.Private.Operate\",\"parameters\":{}}\0", 1, true),
        ("no call", b"nonsense\0", 1, true),
        ("too many", LIST, 5, true),
        ("cut", cut, 1, false),
        ("a neighbour's call follows", b"{\"method\":1}\0{\"method\":2}\0", 2, false),
    ];
    let mut kept = Vec::new();
    for (name, text, count, reads) in cases {
        as_user(HOSTILE, || {
            let mut socket = daemon.connect();
            let mut files = Vec::new();
            for _ in 0..count {
                let (file, peer) = slow.file();
                files.push(file);
                kept.push(peer);
            }
            // The daemon has the last reference.
            daemon.signal(Signal::STOP);
            send(&socket, text, &files).unwrap();
            drop(files);
            daemon.signal(Signal::CONT);
            if reads {
                socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                let _ = socket.read(&mut [0; 4096]);
            }
        });
        daemon.serves_others(name);
    }
    daemon.ends(Duration::from_secs(20));
}

/// The exit of the daemon does not wait, either: even after SIGKILL, the kernel would wait for the
/// reply forever.
#[test]
fn ends_while_a_file_system_answers_no_flush() {
    let Some(daemon) = Daemon::start() else { return };
    let silent = silent::FileSystem::mount(&daemon.dir.path().join("silent"), HOSTILE);
    as_user(HOSTILE, || {
        for _ in 0..2 {
            let socket = daemon.connect();
            let file = File::open(silent.file()).unwrap();
            send(&socket, LIST, &[&file]).unwrap();
        }
    });
    daemon.serves_others("FUSE");
    silent.waits_for_flush();
    daemon.ends(Duration::from_secs(15));
}

/// Descriptors that are unread in a socket are closed with the socket.
#[test]
fn serves_others_despite_descriptors_after_a_call() {
    let Some(daemon) = Daemon::start() else { return };
    let slow = Slow::new();
    let mut kept = Vec::new();
    as_user(HOSTILE, || {
        let socket = daemon.connect();
        daemon.signal(Signal::STOP);
        send(&socket, b"nonsense\0", &[] as &[OwnedFd]).unwrap();
        for _ in 0..8 {
            let (file, peer) = slow.file();
            kept.push(peer);
            send(&socket, b"x", &[file]).unwrap();
        }
        daemon.signal(Signal::CONT);
    });
    daemon.serves_others("unread");
    daemon.ends(Duration::from_secs(20));
}

#[test]
fn counts_descriptors_per_message() {
    let Some(daemon) = Daemon::start() else { return };
    let before = daemon.descriptors();
    let held = as_user(HOSTILE, || {
        let file = File::open("/dev/null").unwrap();
        let mut sockets = Vec::new();
        for _ in 0..4 {
            let socket = daemon.connect();
            let mut sent = 0;
            while sent < 2000 && send(&socket, b" ", &[&file, &file, &file]).is_ok() {
                sent += 1;
                if sent % 50 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            sockets.push(socket);
        }
        sockets
    });
    std::thread::sleep(Duration::from_millis(300));
    let more = daemon.descriptors().saturating_sub(before);
    assert!(more < 40, "{more} descriptors by four connections");
    drop(held);
    daemon.serves_others("after that");
}

#[test]
fn refuses_at_once_whatever_was_sent() {
    let Some(daemon) = Daemon::start() else { return };
    as_user(HOSTILE, || {
        let held: Vec<_> = (0..16).map(|_| daemon.connect()).collect();
        std::thread::sleep(Duration::from_millis(200));
        for sends in [false, true] {
            let mut next = daemon.connect();
            let started = Instant::now();
            if sends {
                std::thread::sleep(Duration::from_millis(100));
                next.write_all(LIST).expect("the call finds the connection open");
            }
            let mut answer = [0; 4096];
            let read = next.read(&mut answer).unwrap();
            let answer = String::from_utf8_lossy(&answer[..read]);
            assert!(answer.contains("io.loopengine.TooManyConnections"), "{answer:?}");
            assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        }
        drop(held);
    });
    // Refused clients delay nobody, however many there are.
    let flood = as_user(HOSTILE, || (0..300).map(|_| daemon.connect()).collect::<Vec<_>>());
    daemon.serves_others("300 connections of one user");
    drop(flood);
}

#[test]
fn keeps_connections_for_other_users() {
    let Some(daemon) = Daemon::start() else { return };
    let held: Vec<_> = (0..20)
        .map(|user| {
            as_user(65_510 + user, || {
                let sockets = (0..16).map(|_| daemon.connect()).collect::<Vec<_>>();
                // A message that never ends.
                sockets.iter().for_each(|mut socket| drop(socket.write_all(b"{")));
                sockets
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    daemon.serves_others("20 users with 16 connections each");
    drop(held);
}

#[test]
fn enforces_a_deadline_per_message() {
    let Some(daemon) = Daemon::start() else { return };
    as_user(HOSTILE, || {
        let mut socket = daemon.connect();
        let started = Instant::now();
        while socket.write_all(b" ").is_ok() {
            assert!(started.elapsed() < Duration::from_secs(14), "no deadline for a message");
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

#[test]
fn serves_idle_clients_again() {
    let Some(daemon) = Daemon::start() else { return };
    as_user(NEIGHBOUR, || {
        block_on(async {
            let mut client = PrivateClient::connect(&daemon.run_dir()).await.unwrap();
            client.list().await.unwrap();
            tokio::time::sleep(Duration::from_secs(21)).await;
            client.list().await.unwrap();
        });
    });
}

#[test]
fn limits_concurrent_calls_per_user() {
    let Some(daemon) = Daemon::start() else { return };
    as_user(NEIGHBOUR, || {
        let held: Vec<_> = (0..16).map(|_| daemon.connect()).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(700));
                drop(held);
            });
            block_on(async {
                PrivateClient::connect(&daemon.run_dir()).await.unwrap().list().await.unwrap();
            });
        });
    });
}

#[test]
fn logs_no_early_disconnects() {
    let Some(daemon) = Daemon::start() else { return };
    for _ in 0..20 {
        as_user(HOSTILE, || daemon.connect().write_all(LIST).unwrap());
    }
    daemon.serves_others("early disconnects");
    let log = daemon.log();
    assert!(!log.contains("Error writing") && !log.contains("BrokenPipe"), "{log}");
}

#[test]
fn survives_a_pipe_as_configuration() {
    let Some(daemon) = Daemon::start() else { return };
    let config = daemon.dir.path().join("config.toml");
    fs::remove_file(&config).unwrap();
    assert!(Command::new("mkfifo").arg(&config).status().unwrap().success());
    for _ in 0..3 {
        daemon.signal(Signal::HUP);
        std::thread::sleep(Duration::from_millis(100));
        daemon.serves_others("a FIFO");
    }
    assert!(daemon.log().contains("not a regular file"), "{}", daemon.log());
    daemon.ends(Duration::from_secs(10));
}
