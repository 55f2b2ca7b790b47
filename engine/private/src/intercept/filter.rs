// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The seccomp filter: which system calls are intercepted, refused or allowed.
//!
//! Knows classic BPF and system call numbers. Does not know what happens to an intercepted call,
//! nor how the filter is installed ([`crate::sys::seccomp`]).
//!
//! Its cost, in instructions (x86_64; a test counts them):
//!
//! | call | for root: with names | for root of a user namespace: with mounts and caches |
//! |---|---|---|
//! | number below 133 (read, write, mmap, …) | 6 | 6 |
//! | other ioctls | 11 | 14 |
//! | intercepted ioctls | 7 to 11 | 7 to 14 |
//! | number from 133 (futex, openat, …) | 12 | 10 |
//! | mknod | 11 | 11 |
//! | fsopen | 10 | refused |
//! | fsconfig | 13 | refused |
//!
//! Calls of an i386 program take one more.
//!
//! Since Linux 5.11 the kernel runs the filter only for calls whose result depends on arguments: it
//! caches which numbers are always allowed.

use libc::sock_filter;

/// Options of the filter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterOptions {
    /// Intercept mount(2) too, and refuse the newer calls that create file systems, so that
    /// libmount uses mount(2). open_tree(2) and move_mount(2) stay: they move existing mounts.
    pub mounts: bool,
    /// Intercept mount(2), fsopen(2) and the strings of fsconfig(2): they may name a device of the
    /// pool, or devtmpfs.
    pub names: bool,
    /// Intercept BLKBSZSET and BLKFLSBUF too, which the kernel allows only root of the machine.
    pub caches: bool,
}

/// An ABI of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// 64 bits on x86_64; x32 is not allowed.
    X86_64,
    /// i386 on x86_64.
    I386,
    /// 64 bits on aarch64.
    Aarch64,
    /// 32 bits on aarch64.
    Arm,
}

/// An intercepted system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// ioctl(2).
    Ioctl,
    /// mount(2).
    Mount,
    /// umount2(2): in the profile of a container, not in this filter.
    Umount,
    /// fsopen(2).
    Fsopen,
    /// fsconfig(2) with a string.
    Fsconfig,
    /// mknod(2) of a block node.
    Mknod,
    /// The same with mknodat(2).
    Mknodat,
}

/// BLKRRPART and BLKPG: the kernel would add partitions to the disk of a device, visible to all.
/// BLKGETDISKSEQ: a partition of a device is a disk of its own, with another sequence number.
const BLOCK: [u32; 3] = [0x125f, 0x1269, 0x8008_1280];

/// BLKBSZSET of 64 and of 32 bits, BLKFLSBUF.
const CACHES: [u32; 3] = [0x4008_1271, 0x4004_1271, 0x1261];

/// ioctl numbers 0x4C00 to 0x4CFF: those of loop(4). The kernel uses 32 bits of the argument.
const IOCTL_MASK: u32 = 0xffff_ff00;
const IOCTL_LOOP: u32 = 0x4c00;

/// fsopen(2), fsconfig(2), fsmount(2), fspick(2): the same numbers in every ABI.
const FSOPEN: u32 = 430;
const FSCONFIG: u32 = 431;
const AFTER_FSPICK: u32 = 434;
/// FSCONFIG_SET_STRING.
const SET_STRING: u32 = 1;

/// Numbers from here on belong to x32, on x86_64.
const X32: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data`, little-endian.
const NR: u32 = 0;
const ARCH: u32 = 4;
const fn low(argument: u32) -> u32 {
    16 + 8 * argument
}

/// System call numbers of an ABI.
struct AbiNumbers {
    abi: Abi,
    /// AUDIT_ARCH_*.
    arch: u32,
    ioctl: u32,
    mknod: Option<u32>,
    mknodat: u32,
    mount: u32,
    umount: u32,
}

const X86_64: AbiNumbers = AbiNumbers {
    abi: Abi::X86_64,
    arch: 0xc000_003e,
    ioctl: 16,
    mknod: Some(133),
    mknodat: 259,
    mount: 165,
    umount: 166,
};
const I386: AbiNumbers = AbiNumbers {
    abi: Abi::I386,
    arch: 0x4000_0003,
    ioctl: 54,
    mknod: Some(14),
    mknodat: 297,
    mount: 21,
    umount: 52,
};
const AARCH64: AbiNumbers = AbiNumbers {
    abi: Abi::Aarch64,
    arch: 0xc000_00b7,
    ioctl: 29,
    mknod: None,
    mknodat: 33,
    mount: 40,
    umount: 39,
};
const ARM: AbiNumbers = AbiNumbers {
    abi: Abi::Arm,
    arch: 0x4000_0028,
    ioctl: 54,
    mknod: Some(14),
    mknodat: 324,
    mount: 21,
    umount: 52,
};

const ALL: [&AbiNumbers; 4] = [&X86_64, &I386, &AARCH64, &ARM];

/// ABIs of this machine, the native one first. On other machines the program allows nothing: a
/// container must not start without the filter.
const HERE: &[&AbiNumbers] = if cfg!(target_arch = "x86_64") {
    &[&X86_64, &I386]
} else if cfg!(target_arch = "aarch64") {
    &[&AARCH64, &ARM]
} else {
    &[]
};

impl Abi {
    /// Whether addresses have 32 bits.
    pub fn is_compat(self) -> bool {
        matches!(self, Abi::I386 | Abi::Arm)
    }
}

/// The call of a notification. None: another call; a listener may belong to a foreign filter.
pub fn decode(arch: u32, nr: i32) -> Option<(Abi, Call)> {
    let numbers = ALL.into_iter().find(|numbers| numbers.arch == arch)?;
    match u32::try_from(nr).ok()? {
        nr if nr == numbers.ioctl => Some((numbers.abi, Call::Ioctl)),
        nr if nr == numbers.mount => Some((numbers.abi, Call::Mount)),
        FSOPEN => Some((numbers.abi, Call::Fsopen)),
        FSCONFIG => Some((numbers.abi, Call::Fsconfig)),
        nr if nr == numbers.umount => Some((numbers.abi, Call::Umount)),
        nr if nr == numbers.mknodat => Some((numbers.abi, Call::Mknodat)),
        nr if Some(nr) == numbers.mknod => Some((numbers.abi, Call::Mknod)),
        _ => None,
    }
}

/// The filter program for this machine, for
/// [`install_with_listener`](crate::sys::seccomp::install_with_listener).
pub fn program(options: FilterOptions) -> Vec<sock_filter> {
    assemble(HERE, options)
}

/// The result of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FilterAction {
    Allow,
    Notify,
    /// ENOSYS.
    NotImplemented,
    Kill,
}

const FILTER_ACTIONS: [FilterAction; 4] =
    [FilterAction::Allow, FilterAction::Notify, FilterAction::NotImplemented, FilterAction::Kill];

impl FilterAction {
    fn action(self) -> u32 {
        match self {
            FilterAction::Allow => libc::SECCOMP_RET_ALLOW,
            FilterAction::Notify => libc::SECCOMP_RET_USER_NOTIF,
            FilterAction::NotImplemented => libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
            FilterAction::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

/// The target of a comparison.
#[derive(Clone, Copy)]
enum JumpTarget {
    Next,
    /// The next label of this name.
    Label(Label),
    FilterAction(FilterAction),
}

/// A label in the program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Ioctl,
    Mknod,
    Mknodat,
    Fsconfig,
    OtherAbi,
}

/// An instruction on the accumulator, or a label.
#[derive(Clone, Copy)]
enum Instruction {
    /// Load the 32 bits at this offset of `struct seccomp_data`.
    Load(u32),
    /// Keep these bits.
    And(u32),
    /// Jump if equal, or else.
    Is(u32, JumpTarget, JumpTarget),
    /// Jump if equal or greater, or else.
    AtLeast(u32, JumpTarget, JumpTarget),
    Return(FilterAction),
    Define(Label),
}

use self::{FilterAction::*, Instruction::*};

fn assemble(abis: &[&AbiNumbers], options: FilterOptions) -> Vec<sock_filter> {
    // Every ABI has numbers of its own. A section jumps to the next one if the ABI differs.
    let mut code = vec![Load(ARCH)];
    for numbers in abis {
        section(&mut code, numbers, options);
    }
    // These kernels have no other ABI. If one has, its numbers are unknown.
    code.push(Return(Kill));
    link(&code)
}

fn section(code: &mut Vec<Instruction>, numbers: &AbiNumbers, options: FilterOptions) {
    const ALLOW: JumpTarget = JumpTarget::FilterAction(Allow);
    let nodes = numbers.mknod.into_iter().chain([numbers.mknodat]);
    let lowest = nodes.chain((options.mounts || options.names).then_some(numbers.mount)).min().unwrap_or(0);

    code.extend([
        Is(numbers.arch, JumpTarget::Next, JumpTarget::Label(Label::OtherAbi)),
        Load(NR),
        // The only frequent one of the intercepted calls.
        Is(numbers.ioctl, JumpTarget::Label(Label::Ioctl), JumpTarget::Next),
        // Most calls are allowed here.
        AtLeast(lowest, JumpTarget::Next, ALLOW),
        Is(numbers.mknodat, JumpTarget::Label(Label::Mknodat), JumpTarget::Next),
    ]);
    // aarch64 has mknodat(2) only.
    code.extend(numbers.mknod.map(|mknod| Is(mknod, JumpTarget::Label(Label::Mknod), JumpTarget::Next)));
    if options.mounts {
        code.extend([
            Is(numbers.mount, JumpTarget::FilterAction(Notify), JumpTarget::Next),
            // Numbers before fsopen(2) are allowed, those up to fspick(2) get ENOSYS.
            AtLeast(FSOPEN, JumpTarget::Next, ALLOW),
            AtLeast(AFTER_FSPICK, JumpTarget::Next, JumpTarget::FilterAction(NotImplemented)),
        ]);
    } else if options.names {
        code.extend([
            Is(numbers.mount, JumpTarget::FilterAction(Notify), JumpTarget::Next),
            Is(FSOPEN, JumpTarget::FilterAction(Notify), JumpTarget::Next),
            Is(FSCONFIG, JumpTarget::Label(Label::Fsconfig), JumpTarget::Next),
        ]);
    }
    if numbers.abi == Abi::X86_64 {
        // x32 has numbers and structures of its own, and hardly any program: ENOSYS.
        code.push(AtLeast(X32, JumpTarget::FilterAction(NotImplemented), JumpTarget::Next));
    }
    code.extend([
        Return(Allow),
        Define(Label::Ioctl),
        Load(low(1)),
        Is(BLOCK[0], JumpTarget::FilterAction(Notify), JumpTarget::Next),
        Is(BLOCK[1], JumpTarget::FilterAction(Notify), JumpTarget::Next),
        Is(BLOCK[2], JumpTarget::FilterAction(Notify), JumpTarget::Next),
    ]);
    if options.caches {
        code.extend(CACHES.map(|command| Is(command, JumpTarget::FilterAction(Notify), JumpTarget::Next)));
    }
    code.extend([
        And(IOCTL_MASK),
        Is(IOCTL_LOOP, JumpTarget::FilterAction(Notify), ALLOW),
        // The mode is the third argument of mknodat(2), and the second of mknod(2). Character nodes
        // (whiteouts of overlayfs), pipes and sockets are allowed, block nodes are intercepted.
        Define(Label::Mknodat),
        Load(low(2)),
        And(libc::S_IFMT),
        Is(libc::S_IFBLK, JumpTarget::FilterAction(Notify), ALLOW),
        Define(Label::Mknod),
        Load(low(1)),
        And(libc::S_IFMT),
        Is(libc::S_IFBLK, JumpTarget::FilterAction(Notify), ALLOW),
    ]);
    if options.names && !options.mounts {
        code.extend([
            Define(Label::Fsconfig),
            Load(low(1)),
            Is(SET_STRING, JumpTarget::FilterAction(Notify), ALLOW),
        ]);
    }
    code.push(Define(Label::OtherAbi));
}

/// Assembles the instructions, followed by the returns.
fn link(code: &[Instruction]) -> Vec<sock_filter> {
    let instructions =
        |code: &[Instruction]| code.iter().filter(|instruction| !matches!(instruction, Define(_))).count();
    let mut program = Vec::with_capacity(code.len() + FILTER_ACTIONS.len());
    for (at, instruction) in code.iter().enumerate() {
        let rest = &code[at + 1..];
        // Jump offsets count from the next instruction. One that does not fit points beyond the
        // program, which the kernel refuses; a test checks that all fit.
        let to = |to| {
            let distance = match to {
                JumpTarget::Next => Some(0),
                JumpTarget::Label(mark) => rest
                    .iter()
                    .position(|instruction| matches!(instruction, Define(here) if *here == mark))
                    .map(|there| instructions(&rest[..there])),
                JumpTarget::FilterAction(end) => {
                    FILTER_ACTIONS.iter().position(|&e| e == end).map(|there| instructions(rest) + there)
                }
            };
            distance.and_then(|distance| u8::try_from(distance).ok()).unwrap_or(u8::MAX)
        };
        program.push(match *instruction {
            Load(offset) => plain(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset),
            And(bits) => plain(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits),
            Is(k, yes, no) => jump(libc::BPF_JEQ, k, to(yes), to(no)),
            AtLeast(k, yes, no) => jump(libc::BPF_JGE, k, to(yes), to(no)),
            Return(end) => plain(libc::BPF_RET | libc::BPF_K, end.action()),
            Define(_) => continue,
        });
    }
    program.extend(FILTER_ACTIONS.map(|end| plain(libc::BPF_RET | libc::BPF_K, end.action())));
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
