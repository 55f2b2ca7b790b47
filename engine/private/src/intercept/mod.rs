// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ioctl(2) on loopN and loop-control: intercepted by a seccomp filter, and served by a pool.
//!
//! This module knows how such a call is recognised, decoded and answered: the intercepted system
//! calls ([`filter`]), safe access to a hostile caller ([`caller`]), the arguments ([`codec`],
//! [`calls`], [`mounts`]), names of devices in /proc/mounts (`source_names`), mounts of devtmpfs
//! ([`devtmpfs`]), and how calls are received and answered ([`supervisor`]). It does not know what the operations do ([`crate::loops`]), nor which file system
//! has the nodes (`loopfs`), nor which thread serves a call (`event_threads`).
//!
//! # Attacks of a hostile caller
//! - *Change arguments after the check.* Registers are those of the notification. Memory is copied
//!   once; a backing file is duplicated once. The copy is checked and used.
//! - *Have a checked call served by the kernel with other arguments.* The kernel reads all
//!   arguments again when a call continues. So a recognised call never continues: it is answered.
//!   Calls that continue behave as without a filter, and the kernel refuses them on the pool's
//!   devices (ENOTTY). Only the source of a mount is changed first (`source_names`), which decides
//!   nothing. This module is a driver, not a guard. The guards are the modes of the nodes,
//!   and the refusal to make block nodes.
//! - *End, so that another process or thread gets its id.* See [`caller`]: results by id count only
//!   if the call still waits afterwards, and memory is written through a descriptor of the address
//!   space. Side effects start only while the caller waits ([`LoopCaller::is_waiting`]).
//! - *Open with O_PATH*, which needs no permission: EBADF, as from the kernel, for the device and
//!   for the backing file.
//! - *Share or change the descriptor table* (threads, CLONE_FILES, vfork). Each check examines one
//!   entry of that thread's table at one time. A replaced descriptor
//!   ([`LoopCaller::replace_descriptor`]) is replaced for all threads that share the table, and for
//!   no others. A vfork child has its parent's memory, and a table and thread id of its own.
//! - *Install more filters.* The kernel runs all filters, and the strictest result counts: another
//!   filter can refuse what this one intercepts. It cannot have a listener (EBUSY: one per chain),
//!   nor remove this one.
//! - *Pass a listener of a foreign filter*, or keep a duplicate of this one. Unknown calls
//!   continue. A caller that answers calls itself has nobody waiting. If it receives calls itself,
//!   one call of this listener may block in the kernel until the last of its processes ends.
//! - *Block the daemon*: memory behind userfaultfd, or a backing file on its own FUSE. That takes
//!   one of the few concurrent calls of its listener, and fails at a deadline. Other threads serve the
//!   other listeners.
//! - *Send signals all the time.* Only SIGKILL interrupts a received call.
//!
//! [`LoopCaller::is_waiting`]: crate::loops::LoopCaller::is_waiting
//! [`LoopCaller::replace_descriptor`]: crate::loops::LoopCaller::replace_descriptor

pub mod caller;
pub mod calls;
pub mod codec;
pub mod devtmpfs;
pub mod filter;
pub mod mknod;
pub mod mounts;
mod source_names;
pub mod supervisor;

pub use caller::{Administrators, FdNode, Namespace};
pub use calls::{IsControl, PoolOps};
pub use mounts::{MountHandler, MounterSocket};
pub use supervisor::{CALLS_AT_ONCE, Counts, DEADLINE, Supervisor, SupervisorOptions};
