//! Connections of the socket: authorisation by user id, sequential requests, and cleanup at the end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use polder_api::credentials::EtcdCredentials;
use polder_api::frame::{self, FrameError, HEADER};
use polder_api::message::{Question, Refusal, RefusalKind, Refuse, Reply, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{Instrument, Span, debug, info_span, warn};

use crate::caller::Caller;

/// Maximum number of concurrent connections: more than the number of pods that start at once on a node.
const CONNECTIONS: usize = 512;

/// Idle timeout of a connection. A plugin that takes longer to wire a pod has hung.
const SILENCE: Duration = Duration::from_secs(60);

/// The replies to a request.
pub(super) enum Answer {
    /// None.
    Nothing,
    /// One.
    Reply(Box<Reply>),
    /// One now, and one when the future ends. The next request is read after that.
    Replies(Box<Reply>, Pin<Box<dyn Future<Output = Reply> + Send>>),
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self::Reply(Box::new(reply))
    }
}

/// Serves the requests of connections.
pub(super) trait RequestHandler: Send + Sync + 'static {
    /// Lock on an attachment that the plugin of the connection is wiring.
    type AttachmentLock: Send;

    /// Answers a request. `wiring` is the lock of the connection, from its ADD until the
    /// plugin reports that the interface is ready, its DEL, or the end of the connection.
    fn answer(
        &self,
        request: Request,
        credentials: Option<EtcdCredentials>,
        caller: &Caller<'_>,
        wiring: &mut Option<Self::AttachmentLock>,
    ) -> impl Future<Output = Result<Answer, Refusal>> + Send;

    /// Handles the end of a connection with an attachment that is still being wired.
    fn abandoned(&self, wired: Self::AttachmentLock) -> impl Future<Output = ()> + Send;
}

/// Serves all connections of that user, for ever.
pub(super) async fn serve_all<A: RequestHandler>(answers: Arc<A>, listener: &UnixListener, user: u32) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answers = Arc::clone(&answers);
                tokio::spawn(async move {
                    serve(&*answers, stream, user).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The message has another protocol version, or is too long or invalid, or the connection broke in the middle of it.
///
/// Remedy: install the plugins and `polderctl` of the same release as polder-agent.
#[derive(Debug, thiserror::Error)]
#[error("cannot parse the request: {0}")]
struct NoRequest(#[source] FrameError);

impl Refuse for NoRequest {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

/// Serves one connection until it ends.
async fn serve<A: RequestHandler>(answers: &A, mut stream: UnixStream, user: u32) {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == user => {}
        _ => return debug!("connection refused: the caller is not user {user}"),
    }
    let mut wiring = None;
    loop {
        let question = match timeout(SILENCE, read(&mut stream)).await {
            Ok(Ok(Some(question))) => question,
            Ok(Ok(None)) | Err(_) => break,
            Ok(Err(error)) => {
                let _ = write(&mut stream, &Reply::Refused(NoRequest(error).into())).await;
                break;
            }
        };
        let span = match &question.trace {
            Some(trace) => info_span!("call", trace),
            None => Span::none(),
        };
        let Question { credentials, request, .. } = question;
        let caller = Caller::new(&stream);
        let answer = answers.answer(request, credentials, &caller, &mut wiring).instrument(span).await;
        let sent = match answer.unwrap_or_else(|refusal| Reply::Refused(refusal).into()) {
            Answer::Nothing => Ok(()),
            Answer::Reply(reply) => write(&mut stream, &reply).await,
            Answer::Replies(first, second) => match write(&mut stream, &first).await {
                Ok(()) => write(&mut stream, &second.await).await,
                failed => failed,
            },
        };
        if let Err(error) = sent {
            debug!(%error, "the caller closed the connection");
            break;
        }
    }
    if let Some(wired) = wiring {
        answers.abandoned(wired).await;
    }
}

/// Reads one request; `None` at the end of the stream.
async fn read(stream: &mut UnixStream) -> Result<Option<Question>, FrameError> {
    let mut header = [0; HEADER];
    match stream.read_exact(&mut header).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => drop(other?),
    }
    let mut body = vec![0; frame::body_length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(Some(serde_json::from_slice(&body)?))
}

async fn write(stream: &mut UnixStream, reply: &Reply) -> Result<(), FrameError> {
    Ok(stream.write_all(&frame::encode(reply)?).await?)
}

#[cfg(test)]
mod tests;
