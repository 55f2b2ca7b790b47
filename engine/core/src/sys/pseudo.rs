// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pseudo file systems: file systems whose files are interfaces of the kernel, not data on a disk.
//!
//! One list for all who ask: such a file is never an image (some check who opened it at every read, so
//! opening it again would lend our rights to the caller), and nothing of a tenant is mounted on such a
//! directory (whoever enters a container believes what it reads there). Does not know who asks.

/// Magic numbers as in linux/magic.h, and those that a driver keeps to itself.
const PSEUDO: &[(u32, &str)] = &[
    (0x0904_1934, "anon_inodefs"),
    (0x5a3c_69f0, "apparmorfs"),
    (0x0000_0187, "autofs"),
    (0x6264_6576, "bdev"),
    (0x6c6f_6f70, "binder"),
    (0x4249_4e4d, "binfmt_misc"),
    (0xcafe_4a11, "bpf"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x6265_6570, "configfs"),
    (0x6462_6720, "debugfs"),
    (0x6461_7864, "dax"),
    (0x454d_444d, "devmem"),
    (0x0000_1cd1, "devpts"),
    (0x444d_4142, "dmabuf"),
    (0xde5e_81e4, "efivarfs"),
    (0x0a64_7361, "functionfs"),
    (0x6573_5543, "fusectl"),
    (0xaee7_1ee7, "gadgetfs"),
    (0x474d_454d, "guest_memfd"),
    (0x1980_0202, "mqueue"),
    (0x6e66_7364, "nfsd"),
    (0x6e73_6673, "nsfs"),
    (0x0000_9fa1, "openpromfs"),
    (0x6f70_726f, "oprofilefs"),
    (0x5049_4446, "pidfs"),
    (0x5049_5045, "pipefs"),
    (0x0000_9fa0, "proc"),
    (0x6165_676c, "pstore"),
    (0x0765_5821, "resctrl"),
    (0x6759_6969, "rpc_pipefs"),
    (0x5345_434d, "secretmem"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x4341_5d53, "smackfs"),
    (0x534f_434b, "sockfs"),
    (0x23c9_b64e, "spufs"),
    (0x6265_6572, "sysfs"),
    (0x7472_6163, "tracefs"),
    (0x0000_9fa2, "usbdevfs"),
    (0xabba_1974, "xenfs"),
];

/// The name of the pseudo file system with this `f_type`, if it is one. Fields of statfs(2) are of
/// different widths on different machines; magic numbers have 32 bits.
pub fn name(f_type: impl Into<i64>) -> Option<&'static str> {
    let number = f_type.into() as u32;
    PSEUDO.iter().find(|known| known.0 == number).map(|known| known.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{mntns, packet};
    use std::os::fd::{AsFd, BorrowedFd};

    fn at(path: &str) -> Option<&'static str> {
        name(rustix::fs::statfs(path).ok()?.f_type)
    }

    #[test]
    fn every_number_and_name_is_listed_once() {
        let mut numbers: Vec<_> = PSEUDO.iter().map(|known| known.0).collect();
        let mut names: Vec<_> = PSEUDO.iter().map(|known| known.1).collect();
        numbers.sort_unstable();
        names.sort_unstable();
        numbers.dedup();
        names.dedup();
        assert_eq!((numbers.len(), names.len()), (PSEUDO.len(), PSEUDO.len()));
    }

    /// Every mount here that the kernel calls by a listed name has a listed number, and the other way round.
    #[test]
    fn names_what_is_mounted_here() {
        let mut seen = 0;
        for target in mntns::targets() {
            let kind = mntns::kind_at(&target);
            let listed = PSEUDO.iter().map(|known| known.1).find(|name| Some(*name) == kind.as_deref());
            // What another mount covers, or nobody may look at, says nothing.
            let Some(is) = listed.and_then(|_| at(target.to_str()?)) else { continue };
            assert_eq!(Some(is), listed, "{}", target.display());
            seen += 1;
        }
        assert!(seen > 0, "not even proc is mounted");
        assert_eq!(at("/proc/self/ns/user"), Some("nsfs"));
        assert_eq!(at("/proc"), Some("proc"));
    }

    #[test]
    fn names_descriptors_without_a_mount() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let (socket, _other) = packet::pair().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let of = |fd: BorrowedFd<'_>| name(rustix::fs::fstatfs(fd).unwrap().f_type);
        assert_eq!(of(reader.as_fd()), Some("pipefs"));
        assert_eq!(of(socket.as_fd()), Some("sockfs"));
        assert_eq!(of(event.as_fd()), Some("anon_inodefs"));
        let file = tempfile::tempfile().unwrap();
        assert_eq!(of(file.as_fd()), None, "a file system with data");
    }
}
