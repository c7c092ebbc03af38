//! The agent's Unix socket, and the handling of requests.

mod connection;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polder_api::NodeName;
use polder_api::credentials::EtcdCredentials;
use polder_api::ipam::{Release, RepairMode};
use polder_api::message::{Refusal, RefusalKind, Refuse, Removal, Reply, Request};
use polder_api::pool::PoolChange;
use polder_ipam::record::LeaseRecord;
use polder_ipam::settings::{InvalidSettings, ValidatedSettings};
use polder_ipam::store::StoreError;
use polder_ipam::tasks::operator::{self, Adoption};
use polder_ipam::tasks::{collect, teardown};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{info, warn};

use self::connection::{Answer, RequestHandler};
use crate::caller::Caller;
use crate::in_flight::AttachmentLock;
use crate::liveness::Threads;
use crate::node::Node;
use crate::node_state::set_if_changed;
use crate::reporter::Reporter;
use crate::requests::PlanRequest;
use crate::wake::next_tick;
use crate::{engine, health, inspection, pools, service, show, status};

/// Why the agent's socket is not created.
#[derive(Debug, thiserror::Error)]
pub enum NotBound {
    /// Another agent runs on this node, with the same socket.
    ///
    /// Remedy: stop the other agent, or set another socket with `--socket`.
    #[error("socket {}: another polder-agent answers there", path.display())]
    Answered {
        /// The socket.
        path: PathBuf,
    },
    /// The directory or the file of the socket cannot be written.
    ///
    /// Remedy: make the directory of the socket writable for polder-agent, or set another socket with `--socket`.
    #[error("socket {}: cannot be created", path.display())]
    NotCreated {
        /// The socket.
        path: PathBuf,
        /// Error of the file system.
        #[source]
        source: io::Error,
    },
    /// Another program deleted the file of the socket immediately after its creation.
    ///
    /// Remedy: find the program that deletes files in the directory of the socket, and exclude this file from it.
    #[error("socket {}: it was deleted right after its creation", path.display())]
    Deleted {
        /// The socket.
        path: PathBuf,
    },
}

/// Why a request of an operator is invalid.
#[derive(Debug, thiserror::Error)]
enum InvalidRequest {
    /// The operator's etcd credentials cannot be used.
    #[error(transparent)]
    Credentials(StoreError),
    /// The requested settings of the cluster are invalid.
    #[error(transparent)]
    Settings(InvalidSettings),
}

impl Refuse for InvalidRequest {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

/// Fails if a running agent answers on that socket.
pub fn refuse_if_answered(path: &Path) -> Result<(), NotBound> {
    if BlockingStream::connect(path).is_ok() {
        return Err(NotBound::Answered { path: path.to_owned() });
    }
    Ok(())
}

/// The listening socket. Its file is deleted when the agent ends.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    file: (u64, u64),
}

impl Socket {
    /// Creates the socket. Replaces a stale file, but not the socket of a running agent.
    pub fn bind(path: &Path) -> Result<Self, NotBound> {
        let listener = bind(path)?;
        let file = id(path).ok_or_else(|| NotBound::Deleted { path: path.to_owned() })?;
        Ok(Self { listener, path: path.to_owned(), file })
    }

    /// Returns when the socket file was deleted or replaced.
    async fn gone(&self) {
        while id(&self.path) == Some(self.file) {
            sleep_until(next_tick()).await;
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if id(&self.path) == Some(self.file) {
            // A remaining file would look like the socket of an agent that has crashed.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of the file.
fn id(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

fn bind(path: &Path) -> Result<UnixListener, NotBound> {
    refuse_if_answered(path)?;
    let failed = |source| NotBound::NotCreated { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// State for answering requests.
#[derive(Debug)]
pub struct Task {
    /// The node, which attaches and detaches pods.
    pub node: Arc<Node>,
    /// Sources for reports about the node and the cluster.
    pub reporter: Reporter,
    /// Requests for the changes of the next pass, to the engine.
    pub plans: mpsc::Sender<PlanRequest>,
    /// Record of the machine that an operator has replaced by this one.
    pub adopted: watch::Sender<Option<LeaseRecord>>,
    /// The agent's threads.
    pub threads: Threads,
    /// Why no plugin can reach the agent.
    pub unreachable: watch::Sender<Option<String>>,
}

impl Task {
    /// Serves until the agent ends. Creates the socket again if its file was deleted: many programs clean up `/run`.
    pub async fn run(self, mut socket: Socket) {
        let task = Arc::new(self);
        loop {
            tokio::select! {
                () = connection::serve_all(Arc::clone(&task), &socket.listener, ROOT) => return,
                () = socket.gone() => {}
            }
            warn!(socket = %socket.path.display(), "the socket was deleted: creating it again");
            socket = task.bind_again(&socket.path).await;
        }
    }

    async fn bind_again(&self, path: &Path) -> Socket {
        loop {
            match Socket::bind(path) {
                Ok(socket) => {
                    self.unreachable.send_replace(None);
                    return socket;
                }
                Err(error) => {
                    let problem = format!("plugins cannot reach the agent: {:#}", anyhow::Error::from(error));
                    if set_if_changed(&self.unreachable, Some(problem.clone())) {
                        warn!("{problem}");
                    }
                }
            }
            sleep_until(next_tick()).await;
        }
    }
}

/// User id that may send requests.
const ROOT: u32 = 0;

impl RequestHandler for Task {
    type AttachmentLock = AttachmentLock;

    async fn abandoned(&self, wired: AttachmentLock) {
        teardown::abandoned(&*self.node, wired.attachment()).await;
    }

    /// An operator's changes are sent to the datastore with the operator's credentials.
    async fn answer(
        &self,
        request: Request,
        credentials: Option<EtcdCredentials>,
        caller: &Caller<'_>,
        wiring: &mut Option<AttachmentLock>,
    ) -> Result<Answer, Refusal> {
        if let Some(wish) = wish(&request) {
            let by = credentials.as_ref().map(|shown| format!(", with {shown}")).unwrap_or_default();
            info!("{wish}: requested by {}{by}", caller.name());
        }
        let Self { node, reporter, plans, .. } = self;
        let records = &reporter.node_state().records;
        let operators = async || {
            let opened = reporter.store.for_operator(credentials.as_ref()).await;
            opened.map_err(InvalidRequest::Credentials)
        };
        let is_in_clear =
            credentials.as_ref().is_some_and(|shown| shown.user.is_some()) && !reporter.store.is_encrypted();
        let reply = match request {
            Request::Add(request) => {
                let added = service::add(node, request, caller).await?;
                *wiring = Some(added.lock);
                let first = Box::new(Reply::Wiring(added.wiring));
                return Ok(Answer::Replies(first, Box::pin(added.permission.reply())));
            }
            Request::Attached => {
                if let Some(wired) = wiring.take() {
                    teardown::attached(&**node, wired.attachment()).await;
                }
                return Ok(Answer::Nothing);
            }
            Request::Del(attachment) => {
                // The plugin that was wiring the attachment requests its DEL: release the lock of that connection.
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
            Request::Live => Reply::Live(self.threads.stuck_threads().await),
            Request::Plan => Reply::Planned(engine::ask(plans).await?),
            Request::Nodes => Reply::Nodes(status::nodes(reporter).await?),
            Request::Pools => Reply::Pools(pools::list(records, &reporter.store).await?),
            Request::Blocks => Reply::Blocks(
                pools::blocks(&reporter.config.node, records, &reporter.store, &reporter.dead()).await?,
            ),
            Request::Show(subject) => Reply::Shown(Box::new(show::show(reporter, subject).await?)),
            Request::Inspect(repairs) => Reply::Checked(Box::new(
                inspection::check(&node.node_state.membership, &operators().await?, repairs).await?,
            )),
            Request::Release(release) => {
                let me = node.node_state.membership.me();
                Reply::Done(operator::release(&**node, me, &operators().await?, release).await?)
            }
            Request::ChangePool(change) => {
                Reply::Done(operator::change_pools(&operators().await?, &records.view(), change).await?)
            }
            Request::ChangeSettings(change) => {
                let wanted = ValidatedSettings::try_from(change);
                let wanted = wanted.map_err(InvalidRequest::Settings)?;
                Reply::Done(operator::change_settings(&operators().await?, &wanted).await?)
            }
            Request::RemoveNode(removal) => {
                let (me, store) = (node.node_state.membership.me(), operators().await?);
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
        }
        .into())
    }
}

impl Task {
    /// Records an operator's confirmation that this machine replaces another one as the node. The registrar acts on it
    /// with the node's credentials.
    ///
    /// The confirmation is valid only for the machine in the current record. It ends with the agent, and when any other
    /// machine takes over the node.
    async fn adopt(&self, wanted: &NodeName) -> Result<String, Refusal> {
        let node = &self.node;
        Ok(match operator::adopt(&**node, node.node_state.membership.me(), wanted).await? {
            Adoption::AlreadyAdopted(words) => words,
            Adoption::InPlaceOf(other, words) => {
                self.adopted.send_replace(Some(other));
                node.channels.registrar.wake();
                words
            }
        })
    }
}

/// The requested change as a `polderctl` command, for the log.
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
        Request::ChangeSettings(change) => {
            Some(format!("cluster set {}", serde_json::to_string(change).unwrap_or_default()))
        }
        Request::Release(Release { address, dead }) => {
            Some(format!("ipam release {address}{}", if *dead { " --dead" } else { "" }))
        }
        Request::Inspect(RepairMode::Safe) => Some("ipam check --repair".to_owned()),
        _ => None,
    }
}

/// Warning appended to a reply if a password was sent over an unencrypted connection.
const IN_CLEAR: &str =
    ". The password was sent to etcd without encryption: enable TLS in etcd and use https:// endpoints";
