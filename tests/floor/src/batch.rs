//! Netlink messages as bytes: several in one buffer, and the answers to them.

/// Messages that are sent together. The sequence numbers are 1, 2, ...
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    last: usize,
    sequence: u32,
}

/// Length of `struct nlmsghdr`, in bytes.
const HEADER: usize = 16;

/// `NLM_F_REQUEST` and `NLM_F_ACK`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;

impl Batch {
    /// Appends a message with the fixed part `body` and further flags.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, body: &[u8]) -> &mut Self {
        self.last = self.bytes.len();
        self.sequence += 1;
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend(body);
        self.close()
    }

    /// Appends an attribute to the last message.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        append(&mut self.bytes, kind, value);
        self.close()
    }

    /// Sets the length of the last message.
    fn close(&mut self) -> &mut Self {
        let length = u32::try_from(self.bytes.len() - self.last).expect("a short message");
        self.bytes[self.last..self.last + 4].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Requests an acknowledgement of the last message.
    pub(crate) fn acknowledged(mut self) -> Self {
        self.bytes[self.last + 6] |= ACK.to_ne_bytes()[0];
        self.bytes[self.last + 7] |= ACK.to_ne_bytes()[1];
        self
    }

    /// The sequence number of the last message.
    pub(crate) fn last_sequence(&self) -> u32 {
        self.sequence
    }

    /// All messages.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// An attribute that contains others, or a fixed part and others.
#[derive(Debug, Default)]
pub(crate) struct Nest(Vec<u8>);

impl Nest {
    /// Begins with a fixed part.
    pub(crate) fn with(body: &[u8]) -> Self {
        Self(body.to_vec())
    }

    /// Appends an attribute.
    pub(crate) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        append(&mut self.0, kind, value);
        self
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A message from the kernel.
#[derive(Debug)]
pub(crate) struct Reply<'a> {
    pub(crate) kind: u16,
    pub(crate) sequence: u32,
    body: &'a [u8],
}

impl Reply<'_> {
    /// The error number, if this reports an error.
    pub(crate) fn error(&self) -> Option<i32> {
        let code = i32::from_ne_bytes(self.body.get(..4)?.try_into().ok()?);
        (self.kind == super::objects::ERROR && code != 0).then_some(-code)
    }

    /// The index of the interface, if this is a message about an interface. A bridge reports its ports with its own
    /// address family, in other messages.
    pub(crate) fn link(&self) -> Option<u32> {
        let index = self.body.get(4..8)?.try_into().ok()?;
        (self.body[0] == 0).then_some(u32::from_ne_bytes(index))
    }
}

/// The messages in one datagram.
pub(crate) fn replies(mut datagram: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
        let message = datagram.get(..length).filter(|message| message.len() >= HEADER)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Reply {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            sequence: u32::from_ne_bytes(message[8..12].try_into().ok()?),
            body: &message[HEADER..],
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_lengths_and_numbers_and_only_the_last_is_acknowledged() {
        let mut batch = Batch::default();
        batch.message(16, 0x400, &[1; 16]).attribute(3, b"eth0\0");
        batch.message(20, 0, &[2; 8]);
        let batch = batch.acknowledged();
        let (first, second) = batch.bytes().split_at(HEADER + 16 + 12);
        assert_eq!(first[..4], 44_u32.to_ne_bytes());
        assert_eq!(first[6..8], (REQUEST | 0x400).to_ne_bytes());
        assert_eq!(first[32..36], [&9_u16.to_ne_bytes()[..], &3_u16.to_ne_bytes()].concat());
        assert_eq!(second.len(), 24);
        assert_eq!(second[6..8], (REQUEST | ACK).to_ne_bytes());
        let numbers: Vec<u32> = replies(batch.bytes()).map(|message| message.sequence).collect();
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn an_error_and_a_deleted_interface_are_recognized() {
        let mut batch = Batch::default();
        batch.message(super::super::objects::ERROR, 0, &(-19_i32).to_ne_bytes());
        batch.message(17, 0, &[&[0; 4][..], &7_u32.to_ne_bytes(), &[0; 8]].concat());
        batch.message(17, 0, &[&[7, 0, 0, 0][..], &7_u32.to_ne_bytes(), &[0; 8]].concat());
        let found: Vec<_> = replies(batch.bytes()).map(|reply| (reply.error(), reply.link())).collect();
        assert_eq!(found, [(Some(19), None), (None, Some(7)), (None, None)]);
        assert_eq!(replies(&[9; 10]).count(), 0);
    }
}
