// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The error type of this program: kind, context, optional hint, optional source.
//!
//! Imports no other module. The kind selects exit codes and varlink error names (see `control`).
//! The context says in one line which operation failed on which object. The hint names the next
//! step.

use std::fmt;

/// The kind of failure. Stable: scripts see it as an exit code, varlink clients as a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request can never succeed: fix the arguments.
    Invalid,
    /// The named image, instance or device does not exist.
    NotFound,
    /// The name is in use, or the image is already attached.
    Exists,
    /// The device or instance is still open.
    Busy,
    /// A limit (devices of an instance, buffers, memory) is reached.
    Quota,
    /// The caller lacks permission.
    Denied,
    /// The kernel, file system or device does not support this.
    Unsupported,
    /// The daemon or the driver is unreachable.
    Unavailable,
    /// The kernel or a worker did not answer in time. The device's state is unknown.
    Deadline,
    /// Input or output failed.
    Io,
    /// A bug in this program.
    Internal,
}

/// Kind, context, optional next step, optional source.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a source.
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), hint: None, source: None }
    }

    /// An error of the operating system, with its kind derived from the errno.
    pub fn os(error: impl Into<std::io::Error>, context: impl Into<String>) -> Self {
        let error = error.into();
        let kind = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Kind::NotFound,
            Some(libc::EEXIST) => Kind::Exists,
            Some(libc::EBUSY) => Kind::Busy,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM) => Kind::Quota,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => Kind::Denied,
            Some(libc::EINVAL | libc::ENAMETOOLONG | libc::ENOTDIR | libc::EISDIR) => Kind::Invalid,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Kind::Unsupported,
            Some(libc::ETIME | libc::ETIMEDOUT) => Kind::Deadline,
            _ => Kind::Io,
        };
        Self { kind, context: context.into(), hint: None, source: Some(Box::new(error)) }
    }

    /// The next step for the user, as a sentence without a full stop ("run 'modprobe ublk_drv'").
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Replaces the kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The next step, where one is known.
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Context and sources, without the next step, in one line.
    pub fn message(&self) -> String {
        let mut text = self.context.clone();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            let said = error.to_string();
            // std adds the errno, which the words before it name.
            text.push_str(said.split(" (os error ").next().unwrap_or_default());
            source = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    /// One line: context, sources, next step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
