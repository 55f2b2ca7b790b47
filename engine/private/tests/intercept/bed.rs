// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A test bed: a client with a filter, its supervisor, and a directory with their files.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use loopengine_private::intercept::devtmpfs::DevtmpfsOnly;
use loopengine_private::intercept::{
    Administrators, CALLS_AT_ONCE, Counts, Namespace, Supervisor, SupervisorOptions,
};

use crate::fake::{Fake, Pretend};

/// Files of a bed: two devices, a replacement of a device, loop-control, and an image.
pub const FILES: [&str; 5] = ["loop0", "loop1", "spare", "control", "image"];

pub struct Bed {
    _dir: tempfile::TempDir,
    pub fake: Arc<Fake>,
    pub supervisor: Option<Supervisor>,
    pub client: Child,
    pub ended: Receiver<()>,
}

impl Bed {
    /// Starts this program again as a client, in this role.
    pub fn new(role: &str) -> Bed {
        Bed::with(role, Duration::from_secs(30), false)
    }

    /// The same; LOOP_SET_CAPACITY blocks.
    pub fn shut(role: &str, deadline: Duration) -> Bed {
        Bed::with(role, deadline, true)
    }

    fn with(role: &str, deadline: Duration, shut: bool) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        for file in FILES {
            std::fs::write(dir.path().join(file), file).unwrap();
        }
        let fake = Arc::new(Fake::default());
        fake.shut(shut);
        fake.add_node(&dir.path().join("loop0"), 0);
        fake.add_node(&dir.path().join("loop1"), 1);
        *fake.spare.lock().unwrap() = Some(dir.path().join("spare"));
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let client = Command::new(std::env::current_exe().unwrap())
            .args(["client", role])
            .current_dir(dir.path())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let listener = receive(&ours);
        let control =
            std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(dir.path().join("control")).unwrap());
        let (tell, ended) = channel();
        let options = SupervisorOptions {
            name: role.to_owned(),
            is_control: Box::new(move |_, inode, _| inode == control),
            administrators: Administrators::capable(Namespace::of(rustix::process::getpid()).unwrap()),
            device_limit: None,
            mounts: (role == "devtmpfs").then(|| Arc::new(DevtmpfsOnly(Arc::clone(&fake))) as _),
            refuse_foreign_nodes: true,
            concurrency: CALLS_AT_ONCE,
            deadline,
            on_end: Box::new(move || _ = tell.send(())),
        };
        let supervisor = Supervisor::start(listener, Pretend(Arc::clone(&fake)), options).unwrap();
        Bed { _dir: dir, fake, supervisor: Some(supervisor), client, ended }
    }

    /// Waits for the client, which must succeed.
    pub fn finish(&mut self) -> Counts {
        let status = self.wait();
        assert!(status.success(), "the client: {status}; the log: {:?}", self.fake.log.lock().unwrap());
        self.ended.recv_timeout(Duration::from_secs(10)).expect("the end was noticed");
        // The last reply is counted after the client receives it.
        std::thread::sleep(Duration::from_millis(20));
        let counts = self.supervisor.as_ref().unwrap().counts();
        assert!(self.stop(Duration::from_secs(10)), "threads are left");
        counts
    }

    pub fn stop(&mut self, within: Duration) -> bool {
        self.supervisor.take().unwrap().stop(within)
    }

    pub fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.client.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the client hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
        self.fake.shut(false);
    }
}

fn receive(from: impl AsFd) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [std::io::IoSliceMut::new(&mut byte)];
    let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(from, &mut data, &mut control, flags).unwrap();
    let message = control.drain().next().expect("the client sends its listener");
    let rustix::net::RecvAncillaryMessage::ScmRights(mut fds) = message else { panic!("something else") };
    fds.next().unwrap()
}
