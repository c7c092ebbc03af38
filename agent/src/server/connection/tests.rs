//! Connections to a server that records its requests.

use std::sync::Mutex;

use polder_api::Attachment;
use polder_api::frame::encode;

use super::*;

/// Records the requests and their outcomes.
#[derive(Debug, Default)]
struct Fake(Mutex<Vec<String>>);

impl Fake {
    fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn noted(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl RequestHandler for Fake {
    type AttachmentLock = Attachment;

    async fn answer(
        &self,
        request: Request,
        _: Option<EtcdCredentials>,
        _: &Caller<'_>,
        wiring: &mut Option<Attachment>,
    ) -> Result<Answer, Refusal> {
        match request {
            // CHECK is used instead of ADD, because its message is shorter.
            Request::Check(attachment) => {
                self.note(format!("begin {attachment}"));
                *wiring = Some(attachment);
                Ok(Reply::Deleted.into())
            }
            Request::Del(attachment) => {
                self.note(format!("del {attachment}"));
                *wiring = None;
                Ok(Reply::Deleted.into())
            }
            Request::Attached => {
                self.note(format!("attached {}", wiring.take().unwrap()));
                Ok(Answer::Nothing)
            }
            Request::Live => {
                Ok(Answer::Replies(Box::new(Reply::Deleted), Box::pin(async { Reply::Permitted })))
            }
            _ => Err(Refusal { kind: RefusalKind::Missing, message: "there is none".to_owned() }),
        }
    }

    async fn abandoned(&self, wired: Attachment) {
        self.note(format!("abandoned {wired}"));
    }
}

fn attachment() -> Attachment {
    "net/c1/eth0".parse().unwrap()
}

fn myself() -> u32 {
    nix::unistd::getuid().as_raw()
}

fn question(request: Request) -> Vec<u8> {
    encode(&Question { trace: None, credentials: None, request }).unwrap()
}

/// Sends bytes. Returns the reply; `None` if the server closes the connection.
async fn ask(stream: &mut UnixStream, bytes: &[u8]) -> Option<Reply> {
    stream.write_all(bytes).await.unwrap();
    answer(stream).await
}

async fn answer(stream: &mut UnixStream) -> Option<Reply> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await.ok()?;
    let mut body = vec![0; frame::body_length(header).unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    Some(serde_json::from_slice(&body).unwrap())
}

/// A connection, and the task that serves it.
fn connection(user: u32) -> (Arc<Fake>, UnixStream, tokio::task::JoinHandle<()>) {
    let (near, far) = UnixStream::pair().unwrap();
    let fake = Arc::new(Fake::default());
    let server = Arc::clone(&fake);
    let serving = tokio::spawn(async move { serve(&*server, far, user).await });
    (fake, near, serving)
}

#[tokio::test]
async fn another_user_gets_no_answer() {
    let (fake, mut stream, serving) = connection(myself() + 1);
    // Fails if the server has already closed the connection.
    let _ = stream.write_all(&question(Request::Del(attachment()))).await;
    assert!(answer(&mut stream).await.is_none());
    serving.await.unwrap();
    assert!(fake.noted().is_empty());
}

#[tokio::test]
async fn a_connection_continues_after_a_refusal_and_a_del_unlocks_its_attachment() {
    let (fake, mut stream, serving) = connection(myself());
    assert!(ask(&mut stream, &question(Request::Check(attachment()))).await.is_some());
    let refused = ask(&mut stream, &question(Request::Status)).await;
    assert!(matches!(refused, Some(Reply::Refused(refusal)) if refusal.kind == RefusalKind::Missing));
    assert!(ask(&mut stream, &question(Request::Del(attachment()))).await.is_some());
    drop(stream);
    serving.await.unwrap();
    assert_eq!(fake.noted(), ["begin net/c1/eth0", "del net/c1/eth0"]);
}

#[tokio::test]
async fn a_request_with_two_replies_is_answered_before_the_next_one() {
    let (_fake, mut stream, _serving) = connection(myself());
    let both = [question(Request::Live), question(Request::Del(attachment()))].concat();
    let replies = [ask(&mut stream, &both).await, answer(&mut stream).await, answer(&mut stream).await];
    assert_eq!(replies.map(Option::unwrap), [Reply::Deleted, Reply::Permitted, Reply::Deleted]);
}

#[tokio::test]
async fn a_plugin_that_has_created_the_interface_ends_the_lock_without_a_reply() {
    let (fake, mut stream, serving) = connection(myself());
    ask(&mut stream, &question(Request::Check(attachment()))).await;
    stream.write_all(&question(Request::Attached)).await.unwrap();
    // The next reply is that of the next request.
    assert!(matches!(ask(&mut stream, &question(Request::Status)).await, Some(Reply::Refused(_))));
    drop(stream);
    serving.await.unwrap();
    assert_eq!(fake.noted(), ["begin net/c1/eth0", "attached net/c1/eth0"]);
}

#[tokio::test]
async fn the_attachment_of_a_plugin_that_ends_or_hangs_during_its_add_is_abandoned() {
    let (fake, mut stream, serving) = connection(myself());
    ask(&mut stream, &question(Request::Check(attachment()))).await;
    drop(stream);
    serving.await.unwrap();
    assert_eq!(fake.noted(), ["begin net/c1/eth0", "abandoned net/c1/eth0"]);

    let (fake, mut stream, serving) = connection(myself());
    ask(&mut stream, &question(Request::Check(attachment()))).await;
    tokio::time::pause();
    serving.await.unwrap();
    assert_eq!(fake.noted().last().unwrap(), "abandoned net/c1/eth0");
    assert!(answer(&mut stream).await.is_none());
}

#[tokio::test]
async fn an_invalid_request_is_refused_and_other_connections_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let fake = Arc::new(Fake::default());
    let (listener, served) = (UnixListener::bind(&path).unwrap(), Arc::clone(&fake));
    let serving = tokio::spawn(async move { serve_all(served, &listener, myself()).await });
    let mut bad = UnixStream::connect(&path).await.unwrap();
    let mut good = UnixStream::connect(&path).await.unwrap();
    let refused = ask(&mut bad, &encode(&"no question").unwrap()).await;
    let is_invalid = |reply: &Option<Reply>| matches!(reply, Some(Reply::Refused(refusal)) if refusal.kind == RefusalKind::Invalid);
    assert!(is_invalid(&refused), "{refused:?}");
    assert!(answer(&mut bad).await.is_none(), "nobody knows where the next request would begin");
    let done = ask(&mut good, &question(Request::Del(attachment()))).await;
    assert!(matches!(done, Some(Reply::Deleted)), "{done:?}");
    serving.abort();
}
