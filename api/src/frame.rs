//! One message on the socket: a version byte, the length as a little-endian `u32`, then that many bytes of JSON.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Protocol version. Agent and plugin refuse a different version with an error that states both.
pub const VERSION: u8 = 1;

/// Length of the header in bytes: version and length.
pub const HEADER: usize = 5;

/// Maximum length of the JSON of a message, in bytes: enough to list the nodes of a cluster of 5,000.
const MAX_BODY_LENGTH: usize = 16 << 20;

/// A message that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer uses another protocol version.
    /// Remedy: install the plugin and the agent of the same release.
    #[error("protocol version {0}, expected {VERSION}: plugin and agent are of different releases")]
    Version(u8),
    /// The message exceeds the maximum length.
    /// Remedy: none, it is an internal error or a program that is not of Polder.
    #[error("message of {0} bytes exceeds the limit of {MAX_BODY_LENGTH}")]
    Length(usize),
    /// The message is not valid JSON of the expected type.
    #[error("unreadable message: check that both programs are of the same release")]
    Json(#[from] serde_json::Error),
    /// I/O error or timeout of the socket.
    /// Remedy: check that polder-agent runs; see its log.
    #[error("socket")]
    Io(#[from] io::Error),
}

/// Encodes `message` with its header.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - HEADER;
    let announced = u32::try_from(length).ok().filter(|_| length <= MAX_BODY_LENGTH);
    frame[0] = VERSION;
    frame[1..HEADER].copy_from_slice(&announced.ok_or(FrameError::Length(length))?.to_le_bytes());
    Ok(frame)
}

/// Number of bytes that follow this header.
pub fn body_length(header: [u8; HEADER]) -> Result<usize, FrameError> {
    let [version, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    match version {
        VERSION if length <= MAX_BODY_LENGTH => Ok(length),
        VERSION => Err(FrameError::Length(length)),
        other => Err(FrameError::Version(other)),
    }
}

/// Writes `message` and flushes.
pub fn write(to: &mut impl Write, message: &impl Serialize) -> Result<(), FrameError> {
    to.write_all(&encode(message)?)?;
    Ok(to.flush()?)
}

/// Reads one message; the end of the stream before its first byte is `UnexpectedEof`.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let mut body = vec![0; body_length(header)?];
    from.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Request;

    #[test]
    fn a_message_is_decoded_as_it_was_encoded() {
        let request = Request::Del("net/c1/eth0".parse().unwrap());
        let mut wire = Vec::new();
        write(&mut wire, &request).unwrap();
        assert_eq!(read::<Request>(&mut wire.as_slice()).unwrap(), request);
    }

    #[test]
    fn another_version_or_a_huge_length_is_refused() {
        assert!(matches!(body_length([9, 1, 0, 0, 0]), Err(FrameError::Version(9))));
        assert!(matches!(body_length([VERSION, 255, 255, 255, 255]), Err(FrameError::Length(_))));
    }

    #[test]
    fn a_truncated_message_is_an_error() {
        let wire = encode(&Request::Status).unwrap();
        for cut in 0..wire.len() {
            assert!(read::<Request>(&mut &wire[..cut]).is_err(), "{cut} of {} bytes were enough", wire.len());
        }
    }
}
