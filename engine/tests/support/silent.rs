// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A FUSE file system with one file, whose server answers only its mounter's FLUSH.
#![allow(dead_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;

/// Mounted until it is dropped.
pub struct FileSystem {
    at: PathBuf,
    unanswered: Arc<AtomicUsize>,
}

impl FileSystem {
    /// Mounts it as user `uid`.
    pub fn mount(at: &Path, uid: u32) -> FileSystem {
        std::fs::create_dir(at).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options =
            format!("fd={},rootmode=40000,user_id={uid},group_id={uid},allow_other", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("silent", at, "fuse", rustix::mount::MountFlags::empty(), Some(&*options))
            .unwrap();
        let unanswered = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&unanswered);
        std::thread::spawn(move || serve(device, &counter));
        FileSystem { at: at.to_owned(), unanswered }
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.at.join("file")
    }

    /// Waits until a FLUSH is pending.
    pub fn waits_for_flush(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        while self.unanswered.load(SeqCst) == 0 {
            assert!(Instant::now() < until, "no FLUSH has arrived");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}

fn serve(mut device: File, unanswered: &AtomicUsize) {
    let mut request = vec![0; 1 << 20];
    while let Ok(len) = device.read(&mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (opcode, unique, process) = (word(4), &request[8..16], word(32));
        assert!(len >= 40);
        let directory = request[16] == 1 && opcode == GETATTR;
        let mut attributes = [0_u64; 11];
        attributes[0] = if directory { 1 } else { 2 };
        attributes[1] = 4096;
        let mut attributes: Vec<u8> = attributes.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mode: u32 = if directory { 0o40755 } else { 0o100_666 };
        attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
        attributes[64..68].copy_from_slice(&1_u32.to_ne_bytes());
        let body = match opcode {
            INIT => {
                let mut body = vec![0; 64];
                body[..4].copy_from_slice(&7_u32.to_ne_bytes());
                body[4..8].copy_from_slice(&31_u32.to_ne_bytes());
                body[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
                Ok(body)
            }
            LOOKUP => {
                let mut body = vec![0; 40];
                body[0] = 2;
                Ok([body, attributes].concat())
            }
            GETATTR => Ok([vec![0; 16], attributes].concat()),
            OPEN => Ok(vec![0; 16]),
            FLUSH if process != std::process::id() && !is_own_thread(process) => {
                unanswered.fetch_add(1, SeqCst);
                continue;
            }
            FLUSH | RELEASE => Ok(Vec::new()),
            FORGET => continue,
            _ => Err(-libc::ENOSYS),
        };
        let error = body.as_ref().err().copied().unwrap_or(0);
        let body = body.unwrap_or_default();
        let length = u32::try_from(16 + body.len()).unwrap();
        let answer = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &body].concat();
        if device.write_all(&answer).is_err() {
            return;
        }
    }
}

fn is_own_thread(thread: u32) -> bool {
    Path::new(&format!("/proc/self/task/{thread}")).exists()
}
