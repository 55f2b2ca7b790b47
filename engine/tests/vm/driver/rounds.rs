// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Binds, unbinds, closes and opens one device after the other, as test suites do, and counts
//! failures.
//!
//! Does not know which driver serves the devices: on the kernel's driver, no round may fail.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::abi::{self, Info};
use super::raw::{self, Done, Memory};

/// First word of a plan: `rounds,THREADS,COUNT,SECONDS,PACE_MS,LATE_MS,HOW`. The client closes the
/// device `LATE_MS` after LOOP_CLR_FD. `HOW` is `configure` or `set`, for LOOP_SET_FD and
/// LOOP_SET_STATUS64.
pub(crate) const WORD: &str = "rounds";

#[derive(Clone, Copy)]
struct Plan {
    threads: u64,
    count: u64,
    limit: Duration,
    pace: Duration,
    late: Duration,
    configures: bool,
}

/// Runs the rounds; prints their number and the failures.
pub(super) fn run(words: &str) {
    let words: Vec<&str> = words.split(',').collect();
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let plan = Plan {
        threads: number(1),
        count: number(2),
        limit: Duration::from_secs(number(3)),
        pace: Duration::from_millis(number(4)),
        late: Duration::from_millis(number(5)),
        configures: words[6] == "configure",
    };
    let lanes: Vec<_> =
        (0..plan.threads).map(|lane| std::thread::spawn(move || Lane::new(lane, plan).run())).collect();
    let mut done = 0;
    for lane in lanes {
        let (rounds, misses) = lane.join().expect("a thread of rounds");
        done += rounds;
        misses.iter().for_each(|miss| println!("miss: {miss}"));
    }
    println!("rounds: {done}");
}

struct Lane {
    number: u64,
    plan: Plan,
    memory: Memory,
    files: [File; 2],
}

impl Lane {
    fn new(number: u64, plan: Plan) -> Lane {
        let files = [0, 1].map(|turn| {
            let mut file = File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(format!("lane{number}.{turn}"))
                .expect("a new file");
            file.write_all(&header(number, turn)).expect("bytes of a new file");
            file.set_len(1 << 20).expect("size of a new file");
            file
        });
        Lane { number, plan, memory: Memory::new(true), files }
    }

    fn run(&self) -> (u64, Vec<String>) {
        let control =
            rustix::fs::open("/dev/loop-control", OFlags::RDWR, Mode::empty()).expect("loop-control");
        // It may exist already.
        let _ = raw::ioctl(control.as_raw_fd(), abi::CTL_ADD, self.number);
        let end = Instant::now() + self.plan.limit;
        let (mut done, mut misses) = (0, Vec::new());
        while done < self.plan.count && Instant::now() < end {
            if let Err((what, errno)) = self.round(done) {
                misses.push(format!("lane {}, round {done}: {what}: errno {errno}", self.number));
                if misses.len() >= 5 {
                    break;
                }
            }
            done += 1;
            std::thread::sleep(self.plan.pace);
        }
        (done, misses)
    }

    fn round(&self, round: u64) -> Result<(), (&'static str, i32)> {
        let turn = (round % 2) as usize;
        let path = format!("/dev/loop{}", self.number);
        let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let device = opened.map_err(|error| ("open", error.raw_os_error()))?;
        self.bind(&device, &self.files[turn])?;
        let mut bytes = [0; 16];
        let read = rustix::io::pread(&device, &mut bytes, 0);
        read.map_err(|error| ("read", error.raw_os_error()))?;
        let right = bytes == header(self.number, turn);
        let cleared = self.call(&device, abi::CLR_FD, 0);
        cleared.map_err(|errno| ("LOOP_CLR_FD", errno))?;
        std::thread::sleep(self.plan.late);
        if right { Ok(()) } else { Err(("bytes of another file", 0)) }
    }

    fn bind(&self, device: &OwnedFd, file: &File) -> Result<(), (&'static str, i32)> {
        let fd = file.as_raw_fd();
        if self.plan.configures {
            self.memory.put(&abi::config(fd, 0, &Info::default()));
            let bound = self.call(device, abi::CONFIGURE, self.memory.address());
            return bound.map(drop).map_err(|errno| ("LOOP_CONFIGURE", errno));
        }
        self.call(device, abi::SET_FD, fd as u64).map_err(|errno| ("LOOP_SET_FD", errno))?;
        self.memory.put(&Info::default().bytes());
        let set = self.call(device, abi::SET_STATUS64, self.memory.address());
        set.map(drop).map_err(|errno| ("LOOP_SET_STATUS64", errno))
    }

    fn call(&self, device: impl AsFd, command: u64, argument: u64) -> Done {
        raw::ioctl(device.as_fd().as_raw_fd(), command, argument)
    }
}

/// The first bytes of a file of a lane.
fn header(lane: u64, turn: usize) -> [u8; 16] {
    let mut header = [b'.'; 16];
    let text = format!("lane {lane} file {turn}");
    header[..text.len()].copy_from_slice(text.as_bytes());
    header
}
