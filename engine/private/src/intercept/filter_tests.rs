// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the filter program in a small interpreter of classic BPF.

use super::*;

const OFF: FilterOptions = FilterOptions { mounts: false, names: false, caches: false };
const ON: FilterOptions = FilterOptions { mounts: true, names: false, caches: true };
const ROOT: FilterOptions = FilterOptions { mounts: false, names: true, caches: false };

/// The result of the program for a call, and the number of instructions.
fn run(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> (u32, usize) {
    let mut data = [nr.to_le_bytes(), arch.to_le_bytes(), [0; 4], [0; 4]].concat();
    data.extend(args.into_iter().flat_map(u64::to_le_bytes));
    let (mut at, mut a, mut count) = (0, 0_u32, 0);
    loop {
        let step = program[at];
        let code = u32::from(step.code);
        count += 1;
        at += 1;
        let skip = |yes| usize::from(if yes { step.jt } else { step.jf });
        match (code & 7, code & 0xf0) {
            (libc::BPF_LD, _) => {
                let offset = step.k as usize;
                a = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            (libc::BPF_ALU, libc::BPF_AND) => a &= step.k,
            (libc::BPF_JMP, libc::BPF_JEQ) => at += skip(a == step.k),
            (libc::BPF_JMP, libc::BPF_JGE) => at += skip(a >= step.k),
            (libc::BPF_RET, _) => return (step.k, count),
            other => panic!("{other:?}"),
        }
    }
}

fn end(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> FilterAction {
    let (action, _) = run(program, arch, nr, args);
    FILTER_ACTIONS.into_iter().find(|end| end.action() == action).unwrap()
}

const PAIRS: [[&AbiNumbers; 2]; 2] = [[&X86_64, &I386], [&AARCH64, &ARM]];

#[test]
fn intercepts_ioctls_of_loop_only() {
    for abis in PAIRS {
        for options in [OFF, ON] {
            let program = assemble(&abis, options);
            for n in abis {
                let ioctl = |cmd| end(&program, n.arch, n.ioctl, [3, cmd, 0, 0, 0, 0]);
                let loops = [0x4c00, 0x4c0a, 0x4c0b, 0x4c82, 0x4cff, 0xffff_ffff_0000_4c05, 1 << 63 | 0x4c01];
                for cmd in loops.into_iter().chain([0x125f, 0x1269, 0x8008_1280, 1 << 32 | 0x125f]) {
                    assert_eq!(ioctl(cmd), Notify, "{cmd:x}");
                }
                for cmd in [0x1200, 0x125e, 0x1260, 0x1268, 0x126a, 0x8008_1272] {
                    assert_eq!(ioctl(cmd), Allow, "{cmd:x}");
                }
                for cmd in [0, 0x4bff, 0x4d00, 0x5401, 0x1_4c00, 0x8000_4c00, 0x4c, 0x4c00_0000, 0x4c00 << 32]
                {
                    assert_eq!(ioctl(cmd), Allow, "{cmd:x}");
                }
                for cmd in [0x4008_1271, 0x4004_1271, 0x1261] {
                    assert_eq!(ioctl(cmd), if options.caches { Notify } else { Allow }, "{cmd:x}");
                }
                // The same number as an argument of another call.
                assert_eq!(end(&program, n.arch, n.ioctl + 1, [3, 0x4c00, 0, 0, 0, 0]), Allow);
            }
        }
    }
}

#[test]
fn intercepts_block_nodes_only() {
    let modes = [
        (libc::S_IFBLK | 0o600, Notify),
        (libc::S_IFBLK, Notify),
        // The kernel's umode_t has 16 bits.
        (0xffff_0000 | libc::S_IFBLK, Notify),
        (libc::S_IFCHR | 0o600, Allow),
        (libc::S_IFREG | 0o777, Allow),
        (libc::S_IFIFO, Allow),
        (libc::S_IFSOCK, Allow),
        (0o644, Allow),
    ];
    for abis in PAIRS {
        for options in [OFF, ON] {
            let program = assemble(&abis, options);
            for n in abis {
                for (mode, expected) in modes {
                    for mode in [u64::from(mode), 0xdead_beef_0000_0000 | u64::from(mode)] {
                        let at = end(&program, n.arch, n.mknodat, [0, 0x6000, mode, 0x6000, 0x6000, 0x6000]);
                        assert_eq!(at, expected, "{:?} {mode:o}", n.abi);
                        if let Some(mknod) = n.mknod {
                            let plain = end(&program, n.arch, mknod, [0x6000, mode, 0x6000, 0x6000, 0, 0]);
                            assert_eq!(plain, expected, "{:?} {mode:o}", n.abi);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn intercepts_mounts_on_request() {
    for abis in PAIRS {
        let (off, on) = (assemble(&abis, OFF), assemble(&abis, ON));
        for n in abis {
            assert_eq!(end(&off, n.arch, n.mount, [0; 6]), Allow);
            assert_eq!(end(&on, n.arch, n.mount, [0; 6]), Notify);
            for nr in 430..434 {
                assert_eq!(end(&off, n.arch, nr, [0; 6]), Allow);
                assert_eq!(end(&on, n.arch, nr, [0; 6]), NotImplemented, "{nr}");
            }
            // open_tree, move_mount, pidfd_open.
            for nr in [428, 429, 434] {
                assert_eq!(end(&on, n.arch, nr, [0; 6]), Allow, "{nr}");
            }
        }
    }
}

#[test]
fn intercepts_names_of_devices_on_request() {
    for abis in PAIRS {
        let program = assemble(&abis, ROOT);
        for n in abis {
            assert_eq!(end(&program, n.arch, n.mount, [0; 6]), Notify);
            for (command, expected) in
                [(0, Allow), (1, Notify), (1 << 32 | 1, Notify), (6, Allow), (7, Allow)]
            {
                assert_eq!(
                    end(&program, n.arch, FSCONFIG, [3, command, 0, 0, 0, 0]),
                    expected,
                    "{command:x}"
                );
            }
            assert_eq!(end(&program, n.arch, FSOPEN, [1; 6]), Notify);
            for nr in [428, 429, 432, 433, 434] {
                assert_eq!(end(&program, n.arch, nr, [1; 6]), Allow, "{nr}");
            }
        }
    }
}

#[test]
fn allows_all_other_numbers() {
    for abis in PAIRS {
        for options in [OFF, ON, ROOT] {
            let program = assemble(&abis, options);
            for n in abis {
                let mut special = vec![n.ioctl, n.mknodat];
                special.extend(n.mknod);
                if options.mounts {
                    special.extend([n.mount, 430, 431, 432, 433]);
                }
                if options.names {
                    special.extend([n.mount, FSOPEN]);
                }
                for nr in (0..1000).filter(|nr| !special.contains(nr)) {
                    for arg in [0x4c00, 0x6000] {
                        assert_eq!(end(&program, n.arch, nr, [arg; 6]), Allow, "{:?} {nr}", n.abi);
                    }
                }
            }
        }
    }
}

#[test]
fn refuses_unknown_numbers_and_abis() {
    let program = assemble(&PAIRS[0], OFF);
    for nr in [X32, X32 | 514, X32 | 133, X32 | 259, 0x7fff_ffff, u32::MAX] {
        assert_eq!(end(&program, X86_64.arch, nr, [0; 6]), NotImplemented, "{nr:x}");
    }
    for arch in [0, u32::MAX, AARCH64.arch, ARM.arch, 0xc000_0015] {
        assert_eq!(end(&program, arch, 0, [0; 6]), Kill, "{arch:x}");
    }
    assert_eq!(end(&assemble(&[], OFF), X86_64.arch, 0, [0; 6]), Kill);
}

#[test]
fn runs_as_many_instructions_as_documented() {
    let [off, on, root] = [OFF, ON, ROOT].map(|options| assemble(&PAIRS[0], options));
    let count =
        |program: &[sock_filter], n: &AbiNumbers, nr, cmd| run(program, n.arch, nr, [0, cmd, 0, 0, 0, 0]).1;
    let longest = |program: &[sock_filter], n: &AbiNumbers, from| {
        (from..450).map(|nr| count(program, n, nr, 0x4c00)).max().unwrap()
    };
    for program in [&off, &on, &root] {
        for nr in (0..133).filter(|&nr| nr != X86_64.ioctl) {
            assert_eq!(count(program, &X86_64, nr, 0), 6, "{nr}");
        }
        for (cmd, expected) in [(0x8008_1280, 9), (0x1269, 8), (0x125f, 7)] {
            assert_eq!(count(program, &X86_64, X86_64.ioctl, cmd), expected, "{cmd:x}");
        }
    }
    for cmd in [0x5401, 0x4c05] {
        let counts = [&root, &on].map(|program| count(program, &X86_64, X86_64.ioctl, cmd));
        assert_eq!(counts, [11, 14], "{cmd:x}");
    }
    // futex, openat
    assert_eq!((count(&root, &X86_64, 202, 0), count(&root, &X86_64, 257, 0)), (12, 12));
    assert_eq!((count(&on, &X86_64, 202, 0), count(&on, &X86_64, 257, 0)), (10, 10));
    assert_eq!((longest(&off, &X86_64, 0), longest(&on, &X86_64, 0)), (11, 14));
    assert_eq!((longest(&root, &X86_64, 0), longest(&root, &I386, 0)), (13, 14));
    assert_eq!(longest(&on, &I386, 0), 15);
    assert!(on.len() < 64, "{}", on.len());
}

/// The kernel refuses programs with other jumps, or without a return at the end.
#[test]
fn jumps_stay_inside_the_program() {
    for abis in [&PAIRS[0][..], &PAIRS[1], &[]] {
        for program in [OFF, ON, ROOT].map(|options| assemble(abis, options)) {
            for (at, step) in program.iter().enumerate() {
                let farthest = at + 1 + usize::from(step.jt.max(step.jf));
                let is_end = u32::from(step.code) & 7 == libc::BPF_RET;
                assert!(is_end || farthest < program.len(), "{at}");
            }
        }
    }
}

#[test]
fn decodes_notifications() {
    assert_eq!(decode(X86_64.arch, 16), Some((Abi::X86_64, Call::Ioctl)));
    assert_eq!(decode(I386.arch, 54), Some((Abi::I386, Call::Ioctl)));
    assert_eq!(decode(X86_64.arch, 165), Some((Abi::X86_64, Call::Mount)));
    assert_eq!(decode(AARCH64.arch, 29), Some((Abi::Aarch64, Call::Ioctl)));
    for (arch, nr) in [(0, 16), (X86_64.arch, 54), (X86_64.arch, -1), (X86_64.arch, 16 | 0x4000_0000)] {
        assert_eq!(decode(arch, nr), None);
    }
}
