//! The seccomp filter: which system calls are stopped, refused, or none of our business.
//!
//! Knows classic BPF and the numbers of system calls. Does not know what becomes of a call that it
//! stops, nor how it is installed ([`crate::sys::seccomp`]).
//!
//! What it costs, in instructions (x86_64; a test counts them):
//!
//! | call | for root | for root of a user namespace: with mounts and caches |
//! |---|---|---|
//! | number below 133 (read, write, mmap, …) | 6 | 6 |
//! | ioctl of others | 11 | 14 |
//! | ioctl of ours | 7 to 11 | 7 to 14 |
//! | number from 133 (futex, openat, …) | 9 | 10 |
//! | mknod | 11 | 11 |
//!
//! An i386 program's calls take one more.
//!
//! Since Linux 5.11 the kernel runs it only for calls whose answer depends on arguments: it knows by
//! heart which numbers are always allowed.

use libc::sock_filter;

/// What is asked of the filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Stop mount(2) too, and refuse the newer calls that make file systems, so that libmount takes
    /// mount(2). open_tree(2) and move_mount(2) stay: they move what is mounted already.
    pub mounts: bool,
    /// Stop BLKBSZSET and BLKFLSBUF too, which the kernel allows root of the machine only.
    pub caches: bool,
}

/// An ABI of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    X86_64,
    /// i386 on x86_64.
    I386,
    Aarch64,
    /// 32 bits on aarch64.
    Arm,
}

/// A stopped system call, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Ioctl,
    Mount,
    /// umount2(2): of the profile of a container, not of this filter.
    Umount,
    /// mknod(2) of a block node.
    Mknod,
    /// The same with mknodat(2).
    Mknodat,
}

/// BLKRRPART and BLKPG: the kernel would make partitions of the disk behind a device, for everybody to see.
/// BLKGETDISKSEQ: a partition of a device is a disk of its own, and would tell its own number.
const BLOCK: [u32; 3] = [0x125f, 0x1269, 0x8008_1280];

/// BLKBSZSET of 64 and of 32 bits, BLKFLSBUF.
const CACHES: [u32; 3] = [0x4008_1271, 0x4004_1271, 0x1261];

/// ioctl numbers 0x4C00 to 0x4CFF: those of loop(4). The kernel takes 32 bits of the argument.
const IOCTL_MASK: u32 = 0xffff_ff00;
const IOCTL_LOOP: u32 = 0x4c00;

/// fsopen(2), fsconfig(2), fsmount(2), fspick(2): these numbers in every ABI.
const FSOPEN: u32 = 430;
const AFTER_FSPICK: u32 = 434;

/// Numbers from here on are x32's, on x86_64.
const X32: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data`, little-endian.
const NR: u32 = 0;
const ARCH: u32 = 4;
const fn low(argument: u32) -> u32 {
    16 + 8 * argument
}

/// System call numbers of an ABI.
struct Numbers {
    abi: Abi,
    /// AUDIT_ARCH_*.
    arch: u32,
    ioctl: u32,
    mknod: Option<u32>,
    mknodat: u32,
    mount: u32,
    umount: u32,
}

const X86_64: Numbers = Numbers {
    abi: Abi::X86_64,
    arch: 0xc000_003e,
    ioctl: 16,
    mknod: Some(133),
    mknodat: 259,
    mount: 165,
    umount: 166,
};
const I386: Numbers = Numbers {
    abi: Abi::I386,
    arch: 0x4000_0003,
    ioctl: 54,
    mknod: Some(14),
    mknodat: 297,
    mount: 21,
    umount: 52,
};
const AARCH64: Numbers = Numbers {
    abi: Abi::Aarch64,
    arch: 0xc000_00b7,
    ioctl: 29,
    mknod: None,
    mknodat: 33,
    mount: 40,
    umount: 39,
};
const ARM: Numbers = Numbers {
    abi: Abi::Arm,
    arch: 0x4000_0028,
    ioctl: 54,
    mknod: Some(14),
    mknodat: 324,
    mount: 21,
    umount: 52,
};

const ALL: [&Numbers; 4] = [&X86_64, &I386, &AARCH64, &ARM];

/// ABIs of this machine, the ordinary one first. On a machine that is none of these the program
/// allows nothing: better no container than one without the filter.
const HERE: &[&Numbers] = if cfg!(target_arch = "x86_64") {
    &[&X86_64, &I386]
} else if cfg!(target_arch = "aarch64") {
    &[&AARCH64, &ARM]
} else {
    &[]
};

impl Abi {
    /// Addresses have 32 bits.
    pub fn is_compat(self) -> bool {
        matches!(self, Abi::I386 | Abi::Arm)
    }
}

/// Which call a notification is about. None: one of no interest; a listener may come with a filter by
/// somebody else.
pub fn decode(arch: u32, nr: i32) -> Option<(Abi, Call)> {
    let numbers = ALL.into_iter().find(|numbers| numbers.arch == arch)?;
    match u32::try_from(nr).ok()? {
        nr if nr == numbers.ioctl => Some((numbers.abi, Call::Ioctl)),
        nr if nr == numbers.mount => Some((numbers.abi, Call::Mount)),
        nr if nr == numbers.umount => Some((numbers.abi, Call::Umount)),
        nr if nr == numbers.mknodat => Some((numbers.abi, Call::Mknodat)),
        nr if Some(nr) == numbers.mknod => Some((numbers.abi, Call::Mknod)),
        _ => None,
    }
}

/// The program for this machine, to be installed with
/// [`install_with_listener`](crate::sys::seccomp::install_with_listener).
pub fn program(options: Options) -> Vec<sock_filter> {
    assemble(HERE, options)
}

/// How a program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Allow,
    Notify,
    /// ENOSYS.
    Lack,
    Kill,
}

const ENDS: [End; 4] = [End::Allow, End::Notify, End::Lack, End::Kill];

impl End {
    fn action(self) -> u32 {
        match self {
            End::Allow => libc::SECCOMP_RET_ALLOW,
            End::Notify => libc::SECCOMP_RET_USER_NOTIF,
            End::Lack => libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
            End::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum To {
    Next,
    /// The next mark of this name.
    Mark(Mark),
    End(End),
}

/// A place in the program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    Ioctl,
    Mknod,
    Mknodat,
    OtherAbi,
}

/// One instruction; the accumulator is all that it has. A mark is none.
#[derive(Clone, Copy)]
enum Step {
    /// Load the 32 bits at this offset of `struct seccomp_data`.
    Load(u32),
    /// Keep these bits.
    And(u32),
    /// Is it this?
    Is(u32, To, To),
    /// Is it this or more?
    AtLeast(u32, To, To),
    Return(End),
    Here(Mark),
}

use self::{End::*, Step::*};

fn assemble(abis: &[&Numbers], options: Options) -> Vec<sock_filter> {
    // Every ABI has numbers of its own; each section but the last leads to the next.
    let mut steps = vec![Load(ARCH)];
    for numbers in abis {
        section(&mut steps, numbers, options);
    }
    // No other ABI exists in these kernels. If one does, it knows calls that we do not.
    steps.push(Return(Kill));
    link(&steps)
}

fn section(steps: &mut Vec<Step>, numbers: &Numbers, options: Options) {
    const ALLOW: To = To::End(Allow);
    let nodes = numbers.mknod.into_iter().chain([numbers.mknodat]);
    let lowest = nodes.chain(options.mounts.then_some(numbers.mount)).min().unwrap_or(0);

    steps.extend([
        Is(numbers.arch, To::Next, To::Mark(Mark::OtherAbi)),
        Load(NR),
        // The only one of ours that is frequent.
        Is(numbers.ioctl, To::Mark(Mark::Ioctl), To::Next),
        // Most calls leave here.
        AtLeast(lowest, To::Next, ALLOW),
        Is(numbers.mknodat, To::Mark(Mark::Mknodat), To::Next),
    ]);
    // aarch64 has mknodat(2) only.
    steps.extend(numbers.mknod.map(|mknod| Is(mknod, To::Mark(Mark::Mknod), To::Next)));
    if options.mounts {
        steps.extend([
            Is(numbers.mount, To::End(Notify), To::Next),
            // Everything before fsopen(2) leaves, and those up to fspick(2) do not exist.
            AtLeast(FSOPEN, To::Next, ALLOW),
            AtLeast(AFTER_FSPICK, To::Next, To::End(Lack)),
        ]);
    }
    if numbers.abi == Abi::X86_64 {
        // x32 has numbers and structures of its own, and hardly a program: it does not exist.
        steps.push(AtLeast(X32, To::End(Lack), To::Next));
    }
    steps.extend([
        Return(Allow),
        Here(Mark::Ioctl),
        Load(low(1)),
        Is(BLOCK[0], To::End(Notify), To::Next),
        Is(BLOCK[1], To::End(Notify), To::Next),
        Is(BLOCK[2], To::End(Notify), To::Next),
    ]);
    if options.caches {
        steps.extend(CACHES.map(|command| Is(command, To::End(Notify), To::Next)));
    }
    steps.extend([
        And(IOCTL_MASK),
        Is(IOCTL_LOOP, To::End(Notify), ALLOW),
        // The mode of mknodat(2) is its third argument, that of mknod(2) the second. Character nodes
        // (overlayfs's whiteouts), pipes and sockets may be made, block nodes are stopped.
        Here(Mark::Mknodat),
        Load(low(2)),
        And(libc::S_IFMT),
        Is(libc::S_IFBLK, To::End(Notify), ALLOW),
        Here(Mark::Mknod),
        Load(low(1)),
        And(libc::S_IFMT),
        Is(libc::S_IFBLK, To::End(Notify), ALLOW),
        Here(Mark::OtherAbi),
    ]);
}

/// Turns steps into instructions, with the ends behind them.
fn link(steps: &[Step]) -> Vec<sock_filter> {
    let instructions = |steps: &[Step]| steps.iter().filter(|step| !matches!(step, Here(_))).count();
    let mut program = Vec::with_capacity(steps.len() + ENDS.len());
    for (at, step) in steps.iter().enumerate() {
        let rest = &steps[at + 1..];
        // Distances are counted from the next instruction. One that does not fit would lead out of
        // the program, which the kernel refuses; a test says that all fit.
        let to = |to| {
            let distance = match to {
                To::Next => Some(0),
                To::Mark(mark) => rest
                    .iter()
                    .position(|step| matches!(step, Here(here) if *here == mark))
                    .map(|there| instructions(&rest[..there])),
                To::End(end) => ENDS.iter().position(|&e| e == end).map(|there| instructions(rest) + there),
            };
            distance.and_then(|distance| u8::try_from(distance).ok()).unwrap_or(u8::MAX)
        };
        program.push(match *step {
            Load(offset) => plain(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset),
            And(bits) => plain(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits),
            Is(k, yes, no) => jump(libc::BPF_JEQ, k, to(yes), to(no)),
            AtLeast(k, yes, no) => jump(libc::BPF_JGE, k, to(yes), to(no)),
            Return(end) => plain(libc::BPF_RET | libc::BPF_K, end.action()),
            Here(_) => continue,
        });
    }
    program.extend(ENDS.map(|end| plain(libc::BPF_RET | libc::BPF_K, end.action())));
    program
}

fn plain(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(compare: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | compare | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
