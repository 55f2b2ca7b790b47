// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that check the results of single calls.

use super::*;

pub(super) fn values() {
    let (device, control, image) = (open("loop0"), open("control"), open("image"));
    let (fd, image_fd) = (device.as_raw_fd(), image.as_raw_fd());
    let path_only = open_flags("image", libc::O_PATH);

    let control = control.as_raw_fd();
    assert_eq!(ioctl(control, CTL_GET_FREE, 0), Ok(7));
    assert_eq!(ioctl(control, CTL_ADD, 0), Err(EEXIST));
    assert_eq!(ioctl(control, CTL_ADD, 11), Ok(11));
    // An int: the high half is ignored.
    assert_eq!(ioctl(control, CTL_ADD, 0xffff_ffff_0000_000b), Ok(11));
    assert_eq!(ioctl(control, CTL_ADD, u64::MAX), Ok(5));
    assert_eq!(ioctl(control, CTL_REMOVE, u64::MAX), Err(EINVAL));
    assert_eq!(ioctl(control, CTL_REMOVE, 3), Ok(0));
    assert_eq!(ioctl(control, SET_FD, 3), Err(ENOSYS));
    assert_eq!(ioctl(open_flags("control", 0).as_raw_fd(), CTL_GET_FREE, 0), Ok(7));

    // Unbound.
    let mut status = [0xff_u8; 240];
    let at = address(&status);
    assert_eq!(ioctl(fd, GET_STATUS64, at), Err(ENXIO));
    assert_eq!(ioctl(fd, GET_STATUS, 0), Err(EINVAL), "before it is found to be unbound");
    assert_eq!(ioctl(fd, GET_STATUS64, 0), Err(EINVAL));
    assert_eq!(ioctl(fd, GET_STATUS64, 8), Err(ENXIO), "before the address is found to be bad");
    assert_eq!(ioctl(fd, SET_STATUS64, 8), Err(EFAULT), "before it is found to be unbound");
    assert_eq!(ioctl(fd, CLR_FD, 0), Err(ENXIO));
    for number in [0x4c0b, 0x4c7f, CTL_ADD, CTL_GET_FREE, 0x4cff] {
        assert_eq!(ioctl(fd, number, 0), Err(EINVAL), "{number:x}");
    }
    for bad in [9999, u64::from(u32::MAX), path_only.as_raw_fd() as u64] {
        assert_eq!(ioctl(fd, SET_FD, bad), Err(EBADF), "{bad}");
        assert_eq!(ioctl(fd, CHANGE_FD, bad), Err(EBADF), "{bad}");
        assert_eq!(ioctl(fd, CONFIGURE, address(&config(bad as i32, 0, 0))), Err(EBADF), "{bad}");
    }
    assert_eq!(ioctl(fd, CHANGE_FD, image_fd as u64), Err(ENXIO));
    assert_eq!(ioctl(fd, CONFIGURE, 0), Err(EFAULT));
    assert_eq!(ioctl(fd, CONFIGURE, u64::MAX - 8), Err(EFAULT));
    assert_eq!(ioctl(fd, CONFIGURE, address(&config(image_fd, 1 << 63, 0))), Err(EOVERFLOW));

    // The high half of an int is ignored.
    assert_eq!(ioctl(fd, 0xabcd_0000_0000 | SET_FD, 1 << 40 | image_fd as u64), Ok(0));
    assert_eq!(ioctl(fd, SET_FD, image_fd as u64), Err(EBUSY));
    assert_eq!(ioctl(fd, CLR_FD, 0), Ok(0));
    let wanted = config(image_fd, 1024, b'n');
    assert_eq!(ioctl(fd, CONFIGURE, address(&wanted)), Ok(0));

    // Exactly the expected bytes are written.
    let meta = File::from(image).metadata().unwrap();
    assert_eq!(ioctl(fd, GET_STATUS64, at), Ok(0));
    assert_eq!((u64_at(&status, 8), u64_at(&status, 24)), (meta.ino(), 1024));
    assert_eq!((&status[56..120], &status[232..]), (&[b'n'; 64][..], &[0xff; 8][..]));
    status.fill(0xff);
    assert_eq!(ioctl(fd, GET_STATUS, at), Ok(0));
    assert_eq!((u64_at(&status, 16), &status[32..36]), (meta.ino(), &[0, 4, 0, 0][..]));
    assert_eq!(status[168..], [0xff; 72]);

    assert_eq!(ioctl(fd, SET_STATUS, at), Ok(0));
    let info = &config(0, 1 << 40, b'o')[8..];
    assert_eq!(ioctl(fd, SET_STATUS64, address(info)), Ok(0));
    assert_eq!(ioctl(fd, GET_STATUS, at), Err(EOVERFLOW));

    // Half of it in unmapped or read-only memory.
    let edge = raw::low_memory(1).addr() as u64 + 4096 - 100;
    let constant = raw::read_only_memory().addr() as u64;
    for bad in [8, edge, constant, u64::MAX, u64::MAX - 231, 1 << 63, 0xffff_8000_0000_0000] {
        assert_eq!(ioctl(fd, GET_STATUS64, bad), Err(EFAULT), "{bad:x}");
    }
    assert_eq!(ioctl(fd, SET_STATUS64, edge), Err(EFAULT));
    assert_eq!(ioctl(fd, CONFIGURE, edge), Err(EFAULT));

    assert_eq!(ioctl(fd, SET_CAPACITY, 0), Ok(0));
    assert_eq!(ioctl(fd, SET_DIRECT_IO, 1 << 40), Ok(0));
    assert_eq!(ioctl(fd, CLR_FD, 0), Ok(0));
    assert_eq!(ioctl(fd, CLR_FD, 0), Err(ENXIO));
}

#[cfg(target_arch = "x86_64")]
pub(super) fn i386() {
    let (device, image) = (open("loop0"), open("image"));
    let (fd, image_fd) = (device.as_raw_fd(), image.as_raw_fd());
    let memory = raw::low_memory(1);
    let at = memory.addr() as u32;
    let bytes = |len| {
        let mut bytes = vec![0_u8; len];
        loopengine_core::sys::remote::read(rustix::thread::gettid(), at.into(), &mut bytes).unwrap();
        bytes
    };
    assert_eq!(raw::ioctl32(fd, GET_STATUS as u32, 0), Err(EINVAL));
    assert_eq!(raw::ioctl32(open("control").as_raw_fd(), CTL_ADD as u32, u32::MAX), Ok(5));
    raw::poke(memory, &config(image_fd, 512, b'c'));
    assert_eq!(raw::ioctl32(fd, CONFIGURE as u32, at), Ok(0));
    assert_eq!(raw::ioctl32(fd, GET_STATUS64 as u32, at), Ok(0));
    let meta = File::from(image).metadata().unwrap();
    let new = bytes(232);
    assert_eq!((u64_at(&new, 8), u64_at(&new, 24), new[56]), (meta.ino(), 512, b'c'));

    raw::poke(memory, &[0xee; 256]);
    let old = raw::ioctl32(fd, GET_STATUS as u32, at);
    if meta.ino() <= u32::MAX.into() && meta.dev() <= u16::MAX.into() {
        assert_eq!(old, Ok(0));
        let old = bytes(144);
        assert_eq!(&old[8..12], &(meta.ino() as u32).to_ne_bytes());
        assert_eq!((&old[16..20], old[32], &old[140..]), (&[0, 2, 0, 0][..], b'c', &[0xee; 4][..]));
        // The returned status can be set.
        assert_eq!(raw::ioctl32(fd, SET_STATUS as u32, at), Ok(0));
    } else {
        assert_eq!(old, Err(EOVERFLOW));
    }
    assert_eq!(raw::ioctl32(fd, GET_STATUS64 as u32, at + 4096 - 8), Err(EFAULT));
    assert_eq!(raw::ioctl32(fd, SET_STATUS as u32, u32::MAX - 4), Err(EFAULT));
    assert_eq!(raw::ioctl32(fd, CLR_FD as u32, 0), Ok(0));
    assert_eq!(raw::ioctl32(File::open("/dev/null").unwrap().as_raw_fd(), CLR_FD as u32, 0), Err(ENOTTY));
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn i386() {}

/// A caller without write access and capabilities may read the status, and clear.
pub(super) fn nobody() {
    let (reads, writes, image) = (open_flags("loop0", 0), open("loop0"), open("image"));
    let only_ioctl = open_flags("loop0", libc::O_ACCMODE);
    assert_eq!(ioctl(reads.as_raw_fd(), SET_STATUS64, 0), Err(EFAULT), "the administrator may");
    raw::become_nobody();
    let info = config(0, 0, 0);
    assert_eq!(ioctl(reads.as_raw_fd(), SET_FD, image.as_raw_fd() as u64), Ok(0));
    for fd in [reads.as_raw_fd(), only_ioctl.as_raw_fd()] {
        for number in [SET_STATUS, SET_STATUS64, SET_CAPACITY, SET_DIRECT_IO, SET_BLOCK_SIZE] {
            assert_eq!(ioctl(fd, number, 8), Err(EPERM), "{number:x}");
        }
    }
    let info = address(&info[8..]);
    assert_eq!(ioctl(writes.as_raw_fd(), SET_STATUS64, info), Ok(0));
    assert_eq!(ioctl(writes.as_raw_fd(), SET_CAPACITY, 0), Ok(0));
    assert_eq!(ioctl(reads.as_raw_fd(), GET_STATUS64, info), Ok(0));
    assert_eq!(ioctl(reads.as_raw_fd(), CLR_FD, 0), Ok(0));
}

/// The kernel serves all other calls.
pub(super) fn others() {
    let null = File::open("/dev/null").unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let dir = open_flags(".", 0);
    for fd in [null.as_raw_fd(), pipe.as_raw_fd(), dir.as_raw_fd(), open("image").as_raw_fd()] {
        for number in [SET_FD, GET_STATUS64, CTL_GET_FREE] {
            assert_eq!(ioctl(fd, number, 0), Err(ENOTTY));
        }
    }
    for fd in [-1, 999, i32::MAX] {
        assert_eq!(ioctl(fd, GET_STATUS64, 0), Err(EBADF));
    }
    for name in ["loop0", "control"] {
        let fd = open_flags(name, libc::O_PATH);
        for number in [CTL_GET_FREE, CLR_FD, GET_STATUS64] {
            assert_eq!(ioctl(fd.as_raw_fd(), number, 0), Err(EBADF));
        }
    }
    // A second listener in the chain.
    let again = loopengine_core::sys::seccomp::install_with_listener(&filter::program(
        filter::FilterOptions::default(),
    ));
    assert_eq!(again.unwrap_err().raw_os_error(), Some(EBUSY));
}

pub(super) fn nodes() {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let make = |name, kind, device| mknodat(CWD, name, kind, Mode::RUSR, device);
    assert_eq!(make("block", FileType::BlockDevice, makedev(259, 7)), Err(rustix::io::Errno::PERM));
    assert!(!std::path::Path::new("block").exists());
    // Nodes of the kernel's loop devices are not made, but the pool's device of this name is added.
    assert_eq!(make("/dev/loop3", FileType::BlockDevice, makedev(7, 3)), Ok(()));
    assert_eq!(make("/dev/loop0", FileType::BlockDevice, makedev(7, 0)), Ok(()), "it is there already");
    assert_eq!(make("/dev/loop4", FileType::BlockDevice, makedev(7, 3)), Err(rustix::io::Errno::PERM));
    assert_eq!(make("loop3", FileType::BlockDevice, makedev(7, 3)), Err(rustix::io::Errno::PERM));
    // A stacked disk: the kernel decides.
    let own = make("own", FileType::BlockDevice, makedev(OWN_MAJOR, 300));
    let kernel = if rustix::process::geteuid().is_root() { Ok(()) } else { Err(rustix::io::Errno::PERM) };
    assert_eq!(own, kernel);
    make("fifo", FileType::Fifo, 0).unwrap();
    make("whiteout", FileType::CharacterDevice, 0).unwrap();
    #[cfg(target_arch = "x86_64")]
    assert_eq!(raw::mknod(c"block", libc::S_IFBLK | 0o600), Err(EPERM));
}
