//! ioctl(2) on loopN and loop-control, stopped by a seccomp filter and served by a pool.
//!
//! This room knows how such a call is recognised, decoded and answered: which system calls are
//! stopped ([`filter`]), what is safe to look at in a hostile caller ([`caller`]), what its arguments
//! say ([`codec`], [`calls`], [`mounts`]), and who serves whom when ([`supervisor`]). It does not know what the
//! operations do ([`crate::loops`]), nor where the nodes come from (`loopfs`).
//!
//! # What a hostile caller may try
//! - *Change arguments while they are judged.* Registers are those of the notification. Memory is
//!   copied once and judged as copied; a backing file is taken once, and judged and used as taken.
//! - *Have a call pass that was found good.* The kernel reads everything anew when a call is let
//!   through, so nothing is ever let through that was found to be ours: it is answered. What passes
//!   is what would have happened without a filter, and is refused by the kernel on our devices
//!   (ENOTTY). This room is a driver, not a guard: the guards are the modes of the nodes, and the
//!   one thing that the filter itself refuses, to make block nodes.
//! - *Die, and have another process or thread get its number.* See [`caller`]: what was found by the
//!   number counts if the call still waits afterwards, and memory is written through a descriptor
//!   of the address space. Side effects begin only while the caller waits ([`Caller::waits`]).
//! - *Open with O_PATH*, which asks for no permission: EBADF, as the kernel says, for the device and
//!   for the backing file.
//! - *Share or change the table of descriptors* (threads, CLONE_FILES, vfork): all that is looked up
//!   is one entry of that thread's table at one time. A descriptor that is replaced
//!   ([`Caller::replace`]) is replaced for all who share the table, and for nobody else. A vfork
//!   child has its parent's memory, and a table and thread id of its own.
//! - *Install more filters.* All filters are asked, and the strictest answer counts: another can
//!   refuse what this would stop. It cannot have a listener (EBUSY, one in a chain), nor undo this one.
//! - *Send a listener of a filter of his own*, or keep a duplicate of ours. Calls that are not known
//!   pass. He may answer calls himself: then nobody waits any more. He may receive calls himself: then
//!   a thread of this listener may block in the kernel until the last of his processes is gone.
//! - *Have us wait*: memory behind userfaultfd, a backing file on his own FUSE. That is one of
//!   the few calls of his listener; its deadline fails it, and other listeners have threads of their own.
//! - *Send signals all the time.* A call that has been received is interrupted by death only.
//!
//! [`Caller::waits`]: crate::loops::Caller::waits
//! [`Caller::replace`]: crate::loops::Caller::replace

pub mod caller;
pub mod calls;
pub mod codec;
pub mod filter;
pub mod mknod;
pub mod mounts;
pub mod supervisor;

pub use caller::{Administrators, Namespace, Node};
pub use calls::{IsControl, Loops};
pub use mounts::{Mounter, Mounts};
pub use supervisor::{AT_ONCE, Counts, DEADLINE, Options, Supervisor};
