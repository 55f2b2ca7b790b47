// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection to one of the daemon's sockets, for complete and incomplete calls and descriptors.
//! Knows varlink's framing, not the meaning of calls.

use std::io::{IoSlice, IoSliceMut, Result as IoResult};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};

/// Maximum number of descriptors per message.
pub(super) const FDS_MAX: usize = 253;
const REPLY_BYTES_MAX: usize = 4 << 20;

/// A connection.
pub(super) struct Peer(pub(super) UnixStream);

impl Peer {
    /// Connects to `socket`; `patience` is the timeout of each read and write.
    pub(super) fn new(socket: &Path, patience: Duration) -> IoResult<Peer> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Peer(stream))
    }

    /// Sends bytes, with descriptors attached to the first byte.
    pub(super) fn send(&self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> IoResult<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        while !bytes.is_empty() {
            let sent = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
            bytes = &bytes[sent..];
            ancillary.clear();
        }
        Ok(())
    }

    /// Makes a call and returns the answer with its descriptors.
    pub(super) fn call(
        &self,
        method: &str,
        parameters: &Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Value, Vec<OwnedFd>)> {
        self.send(&call(method, parameters), fds)?;
        let (bytes, fds) = self.reply().with_context(|| format!("{method}: no answer"))?;
        let mut reply: Value = serde_json::from_slice(&bytes).context("the answer is not JSON")?;
        if let Some(error) = reply["error"].as_str() {
            bail!("{method}: {error}: {}", reply["parameters"]);
        }
        Ok((reply["parameters"].take(), fds))
    }

    /// Reads the next message, without the zero byte that ends it.
    pub(super) fn reply(&self) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        let mut piece = vec![0; 1 << 16];
        while bytes.last() != Some(&0) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut piece)];
            let length = recvmsg(&self.0, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if length == 0 || bytes.len() > REPLY_BYTES_MAX {
                bail!("the connection ended after {} bytes of an answer", bytes.len());
            }
            bytes.extend_from_slice(&piece[..length]);
        }
        bytes.pop();
        Ok((bytes, fds))
    }
}

/// The encoded call.
pub(super) fn call(method: &str, parameters: &Value) -> Vec<u8> {
    let mut message = json!({ "method": method, "parameters": parameters }).to_string().into_bytes();
    message.push(0);
    message
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let server = Peer(theirs);
        server.send(b"{\"parameters\":{\"n\":1}}\0", &[null.as_fd(); 3]).unwrap();
        let (reply, fds) = Peer(ours).call("a.B", &json!({}), &[]).unwrap();
        assert_eq!((reply["n"].as_u64(), fds.len()), (Some(1), 3));
    }
}
