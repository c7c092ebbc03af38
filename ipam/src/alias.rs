//! The interface alias (`ifalias`) of a pod: names its attachment and pod. Shown by `ip link`; used to rebuild a lost
//! ledger.

use polder_api::{Attachment, Pod};

/// The maximum length of an alias, in bytes. The kernel's buffer has 256 (`IFALIASZ`,
/// `include/uapi/linux/if_link.h`), and the attribute is sent with its NUL: Linux 6.18 rejects 255 bytes.
pub const MAX_LENGTH: usize = 254;

/// The alias of an attachment: the attachment, then a space and the pod if it is known, cut to [`MAX_LENGTH`] bytes.
pub fn write(attachment: &Attachment, pod: Option<&Pod>) -> String {
    let mut alias = attachment.to_string();
    if let Some(pod) = pod {
        alias.push(' ');
        alias.push_str(&pod.to_string());
    }
    alias.truncate(alias.floor_char_boundary(MAX_LENGTH));
    alias
}

/// The attachment in an alias, and its pod. The pod is `None` if the alias has no pod or may be cut: the pod's name
/// selects its reserved address, so it must be complete.
pub fn read(alias: &str) -> Option<(Attachment, Option<Pod>)> {
    let (attachment, pod) =
        alias.split_once(' ').map_or((alias, None), |(attachment, pod)| (attachment, Some(pod)));
    let is_whole = alias.len() < MAX_LENGTH;
    let pod = pod.filter(|_| is_whole).and_then(|pod| pod.split_once('/'));
    let pod = pod.map(|(namespace, name)| Pod {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: None,
    });
    Some((attachment.parse().ok()?, pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_names_the_attachment_and_its_pod() {
        let attachment: Attachment = "net/c1/eth0".parse().unwrap();
        let pod = |name: &str| Pod { namespace: "default".into(), name: name.into(), uid: None };
        assert_eq!(read(&write(&attachment, None)), Some((attachment.clone(), None)));
        let db = Some(pod("db-0"));
        assert_eq!(read(&write(&attachment, db.as_ref())), Some((attachment.clone(), db)));
        let long = pod(&"x".repeat(300));
        assert_eq!(read(&write(&attachment, Some(&long))), Some((attachment, None)), "the name is not whole");
        assert_eq!(read("uplink of somebody"), None);
    }
}
