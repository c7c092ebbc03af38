//! The socket: who may ask, and what becomes of what he asks.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use polder_api::NodeName;
use polder_api::credentials::EtcdCredentials;
use polder_api::frame::{self, FrameError, HEADER};
use polder_api::ipam::{Release, Repairs};
use polder_api::message::{Question, Refusal, RefusalKind, Removal, Reply, Request};
use polder_api::pool::PoolChange;
use polder_ipam::record::Alive;
use polder_ipam::tasks::operator::{self, Adoption};
use polder_ipam::tasks::{collect, teardown};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{Instrument, Span, debug, info, info_span, warn};

use crate::caller::Caller;
use crate::in_flight::Wired;
use crate::node::Node;
use crate::reporter::Reporter;
use crate::requests::PlanRequest;
use crate::{engine, health, inspection, pools, service, show, status};

/// Connections at once: more than a node has pods that come at once.
const CONNECTIONS: usize = 512;

/// How long a connection may say nothing. A plugin that takes longer to wire a pod has hung.
const SILENCE: Duration = Duration::from_secs(60);

/// Fails if an agent answers there.
pub fn refuse_if_answered(path: &Path) -> anyhow::Result<()> {
    if BlockingStream::connect(path).is_ok() {
        bail!("socket {}: another polder-agent answers there", path.display());
    }
    Ok(())
}

/// Makes the socket. One that an agent left behind is replaced, one that an agent answers on is not.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    refuse_if_answered(path)?;
    let writable = || format!("socket {}: can the agent write there?", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(writable)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).with_context(writable)?,
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(writable)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(writable)?;
    Ok(listener)
}

/// What requests are answered with.
#[derive(Debug)]
pub struct Task {
    /// Pods come and go there.
    pub node: Arc<Node>,
    /// What is known of the node and the cluster.
    pub reporter: Reporter,
    /// Where it is asked what the next pass would change.
    pub plans: mpsc::Sender<PlanRequest>,
    /// The machine that an operator says this one is in place of.
    pub adopted: watch::Sender<Option<Alive>>,
}

impl Task {
    /// Serves for ever.
    pub async fn run(self, listener: UnixListener) {
        let task = Arc::new(self);
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let task = Arc::clone(&task);
                    tokio::spawn(async move {
                        task.serve(stream).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(%error, "a connection cannot be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Serves one connection to its end.
    async fn serve(&self, mut stream: UnixStream) {
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 => {}
            _ => return debug!("a caller that is not root is not served"),
        }
        let mut wiring: Option<Wired> = None;
        loop {
            let question = match timeout(SILENCE, read(&mut stream)).await {
                Ok(Ok(Some(question))) => question,
                Ok(Ok(None)) | Err(_) => break,
                Ok(Err(error)) => {
                    let refusal =
                        Refusal::new(RefusalKind::Invalid, format!("the request is not understood: {error}"));
                    let _ = write(&mut stream, &Reply::Refused(refusal)).await;
                    break;
                }
            };
            let span = match &question.trace {
                Some(trace) => info_span!("call", trace),
                None => Span::none(),
            };
            let Question { credentials, request, .. } = question;
            let caller = Caller::new(&stream);
            let answer = self.answer(request, credentials, &caller, &mut wiring).instrument(span).await;
            let reply = answer.unwrap_or_else(Reply::Refused);
            if let Err(error) = write(&mut stream, &reply).await {
                debug!(%error, "the caller is gone");
                break;
            }
        }
        if let Some(wired) = wiring {
            teardown::abandoned(&*self.node, wired.attachment()).await;
        }
    }

    /// Answers. What an operator wants changed is asked of the store in the operator's name.
    async fn answer(
        &self,
        request: Request,
        credentials: Option<EtcdCredentials>,
        caller: &Caller<'_>,
        wiring: &mut Option<Wired>,
    ) -> Result<Reply, Refusal> {
        if let Some(wish) = wish(&request) {
            let by = credentials.as_ref().map(|shown| format!(", who shows {shown}")).unwrap_or_default();
            info!("{wish} is asked for by {}{by}", caller.name());
        }
        let Self { node, reporter, plans, .. } = self;
        let records = &reporter.board().records;
        let operators = async || {
            let opened = reporter.store.for_operator(credentials.as_ref()).await;
            opened.map_err(|error| Refusal::new(RefusalKind::Invalid, error.to_string()))
        };
        let is_in_clear =
            credentials.as_ref().is_some_and(|shown| shown.user.is_some()) && !reporter.store.is_encrypted();
        let reply = match request {
            Request::Add(request) => {
                let (reply, wired) = service::add(node, request, caller).await?;
                *wiring = Some(wired);
                Reply::Wiring(reply)
            }
            Request::Del(attachment) => {
                // The plugin that is wiring it gives it up.
                if wiring.as_ref().is_some_and(|wired| *wired.attachment() == attachment) {
                    *wiring = None;
                }
                teardown::del(&**node, &attachment).await?;
                Reply::Deleted
            }
            Request::Check(attachment) => Reply::Wiring(service::check(node, attachment).await?),
            Request::Lease(request) => Reply::Leased(service::lease(node, request, caller).await?),
            Request::Leased(attachment) => Reply::Leased(service::leased(node, attachment).await?),
            Request::Collect(collection) => {
                collect::collect(&**node, collection).await?;
                Reply::Deleted
            }
            Request::Health(request) => Reply::Health(health::health(reporter, &request).await),
            Request::Status => Reply::Status(Box::new(status::status(reporter).await)),
            Request::Plan => Reply::Planned(engine::ask(plans).await?),
            Request::Nodes => Reply::Nodes(status::nodes(reporter).await?),
            Request::Pools => Reply::Pools(pools::list(records, &reporter.store).await?),
            Request::Blocks => {
                Reply::Blocks(pools::blocks(&reporter.config.node, records, &reporter.store).await?)
            }
            Request::Show(subject) => Reply::Shown(Box::new(show::show(reporter, subject).await?)),
            Request::Inspect(repairs) => Reply::Checked(Box::new(
                inspection::check(&node.board.membership, &operators().await?, repairs).await?,
            )),
            Request::Release(release) => {
                let me = node.board.membership.me();
                Reply::Done(operator::release(&**node, me, &operators().await?, release).await?)
            }
            Request::ChangePool(change) => {
                Reply::Done(operator::change_pools(&operators().await?, &records.view(), change).await?)
            }
            Request::ChangeBackend(backend) => {
                Reply::Done(operator::change_backend(&operators().await?, backend).await?)
            }
            Request::RemoveNode(removal) => {
                let (me, store) = (node.board.membership.me(), operators().await?);
                match operator::allow_removal(&**node, me, &store, &removal).await {
                    Ok(()) => Reply::Done(operator::remove_node(&**node, &store, removal).await?),
                    Err(reply) => reply,
                }
            }
            Request::AdoptNode(name) => Reply::Done(self.adopt(&name).await?),
        };
        Ok(match reply {
            Reply::Done(what) if is_in_clear => Reply::Done(format!("{what}{IN_CLEAR}")),
            reply => reply,
        })
    }

    /// Takes an operator's word down that this machine is the node in place of another. The registrar acts by it, as the node.
    ///
    /// The word is about the machine that the record names at this moment. It ends with the agent, and with any other
    /// machine's taking the node over.
    async fn adopt(&self, wanted: &NodeName) -> Result<String, Refusal> {
        let node = &self.node;
        Ok(match operator::adopt(&**node, node.board.membership.me(), wanted).await? {
            Adoption::Already(words) => words,
            Adoption::InPlaceOf(other, words) => {
                self.adopted.send_replace(Some(other));
                node.calls.registrar.ring();
                words
            }
        })
    }
}

/// What an operator wants changed, in words for the log.
fn wish(request: &Request) -> Option<String> {
    match request {
        Request::RemoveNode(Removal { node, dead, disconnect_pods, earlier }) => {
            let dead = if *dead { " --dead" } else { "" };
            let earlier = if *earlier { " --earlier" } else { "" };
            let pods = disconnect_pods.map(|pods| format!(" --disconnect-pods {pods}")).unwrap_or_default();
            Some(format!("node remove {node}{dead}{earlier}{pods}"))
        }
        Request::ChangePool(PoolChange::Add(pool)) => Some(format!("pool add {} {}", pool.name, pool.cidr)),
        Request::AdoptNode(node) => Some(format!("node adopt {node}")),
        Request::ChangePool(PoolChange::Drain(name)) => Some(format!("pool drain {name}")),
        Request::ChangePool(PoolChange::Remove(name)) => Some(format!("pool remove {name}")),
        Request::ChangeBackend(backend) => Some(format!("cluster set --backend {backend}")),
        Request::Release(Release { address, dead }) => {
            Some(format!("ipam release {address}{}", if *dead { " --dead" } else { "" }))
        }
        Request::Inspect(Repairs::Safe) => Some("ipam check --repair".to_owned()),
        _ => None,
    }
}

/// What a careful operator wants to know of the password.
const IN_CLEAR: &str =
    ". The password was sent to etcd without encryption: let etcd speak TLS, and write https:// endpoints";

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
