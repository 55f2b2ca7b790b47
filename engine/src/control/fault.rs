// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The encoding of an [`Error`]: a varlink error named after its kind, with its message and hint.

use zlink::introspect;

use crate::error::{Error, Kind};

macro_rules! faults {
    ($($(#[$doc:meta])* $kind:ident,)*) => {
        /// An [`Error`] on the wire. The names are those of [`Kind`].
        #[derive(Clone, Debug, PartialEq, Eq, zlink::ReplyError, introspect::ReplyError)]
        #[zlink(interface = "io.loopengine")]
        #[allow(missing_docs)]
        pub enum Fault {
            $($(#[$doc])* $kind {
                /// What failed, in one line.
                message: String,
                /// What to do next, where that is known.
                hint: Option<String>,
            },)*
        }

        impl From<Error> for Fault {
            fn from(error: Error) -> Fault {
                let message = error.message();
                let hint = error.next_step().map(str::to_owned);
                match error.kind() {
                    $(Kind::$kind => Fault::$kind { message, hint },)*
                }
            }
        }

        impl From<Fault> for Error {
            fn from(fault: Fault) -> Error {
                let (kind, message, hint) = match fault {
                    $(Fault::$kind { message, hint } => (Kind::$kind, message, hint),)*
                };
                let error = Error::new(kind, message);
                match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                }
            }
        }

        #[cfg(test)]
        const KINDS: &[Kind] = &[$(Kind::$kind),*];
    };
}

faults! {
    /// The request is invalid.
    Invalid,
    /// The named image, instance or device does not exist.
    NotFound,
    /// The name is taken, or the image is attached already.
    Exists,
    /// The device or instance is in use.
    Busy,
    /// A limit is reached.
    Quota,
    /// The caller may not do this.
    Denied,
    /// This kernel, file system or device cannot do this.
    Unsupported,
    /// The daemon or the driver cannot be reached.
    Unavailable,
    /// The kernel or a worker did not answer in time.
    Deadline,
    /// Input or output failed.
    Io,
    /// A bug in the daemon.
    Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for &kind in KINDS {
            for hint in [None, Some("do this")] {
                let mut error = Error::new(kind, "a message");
                if let Some(hint) = hint {
                    error = error.hint(hint);
                }
                let text = serde_json::to_string(&Fault::from(error)).unwrap();
                assert!(text.contains(&format!("\"io.loopengine.{kind:?}\"")), "{text}");
                let back = Error::from(serde_json::from_str::<Fault>(&text).unwrap());
                assert_eq!(back.kind(), kind);
                assert_eq!(back.message(), "a message");
                assert_eq!(back.next_step(), hint);
            }
        }
    }

    #[test]
    fn a_hint_may_be_left_out() {
        let text = r#"{"error":"io.loopengine.Busy","parameters":{"message":"in use"}}"#;
        let fault: Fault = serde_json::from_str(text).unwrap();
        assert_eq!(fault, Fault::Busy { message: "in use".into(), hint: None });
    }
}
