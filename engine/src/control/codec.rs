// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encodes and decodes calls, for benches and tests.
//!
//! Decodes the server's own type, so a bench measures the server's own work.

use serde::Serialize;
use zlink::Call;
use zlink::service::Service;
use zlink::tokio::unix::Stream;

use super::ControlService;
use crate::error::{Error, Kind, Result};
use crate::instance::spec::AttachSpec;

#[derive(Debug, Serialize)]
#[serde(tag = "method", content = "parameters")]
enum Method<'a> {
    #[serde(rename = "io.loopengine.Attach")]
    Attach { spec: &'a AttachSpec },
}

/// The message of a call to attach `spec`, without the NUL that ends it.
pub fn encode_attach(spec: &AttachSpec) -> Result<Vec<u8>> {
    serde_json::to_vec(&Call::new(Method::Attach { spec }))
        .map_err(|error| Error::new(Kind::Internal, format!("cannot encode a call: {error}")))
}

/// Decodes any call as the server does, and drops it.
pub fn decode_call(message: &[u8]) -> Result<()> {
    type DecodedCall<'de> = <ControlService as Service<Stream>>::MethodCall<'de>;
    match serde_json::from_slice::<Call<DecodedCall<'_>>>(message) {
        Ok(call) => {
            std::hint::black_box(call);
            Ok(())
        }
        Err(error) => Err(Error::new(Kind::Invalid, format!("not a call: {error}"))),
    }
}
