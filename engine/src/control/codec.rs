//! An attach call as it crosses the socket, for benches and tests.
//!
//! What decodes here is the very type that the server decodes, so a bench of it measures the
//! server's own work.

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

/// Decodes any call as the server does. The call is dropped: only its validity is answered.
pub fn decode_call(message: &[u8]) -> Result<()> {
    type Known<'de> = <ControlService as Service<Stream>>::MethodCall<'de>;
    match serde_json::from_slice::<Call<Known<'_>>>(message) {
        Ok(call) => {
            std::hint::black_box(call);
            Ok(())
        }
        Err(error) => Err(Error::new(Kind::Invalid, format!("not a call: {error}"))),
    }
}
