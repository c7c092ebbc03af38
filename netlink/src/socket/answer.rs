//! Decodes the kernel's answers and assigns each message to its request.

use std::time::Duration;

use netlink_packet_core::{
    Emitable, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, Parseable,
};

use super::Protocol;
use crate::Error;

/// Number of attempts for a dump that is interrupted by changes.
const DUMP_ATTEMPTS: u32 = 10;

/// Pause before the second attempt; it grows by this amount with each further one.
const DUMP_PAUSE: Duration = Duration::from_millis(2);

/// `NLM_F_DUMP_INTR` (`include/uapi/linux/netlink.h`).
const DUMP_INTERRUPTED: u16 = 0x10;

/// The answer to one request.
#[derive(Debug)]
pub(super) struct Answer<M> {
    /// The objects received so far.
    pub(super) messages: Vec<M>,
    /// The final status, once received.
    pub(super) end: Option<Result<(), Error>>,
    interrupted: bool,
}

impl<M> Default for Answer<M> {
    fn default() -> Self {
        Self { messages: Vec::new(), end: None, interrupted: false }
    }
}

impl<M> Answer<M> {
    fn take(&mut self, message: NetlinkMessage<M>) {
        self.interrupted |= message.header.flags & DUMP_INTERRUPTED != 0;
        let end = match message.payload {
            NetlinkPayload::InnerMessage(inner) => return self.messages.push(inner),
            NetlinkPayload::Done(done) if done.code == 0 => Ok(()),
            NetlinkPayload::Done(done) => Err(Error::refused(done.code, &done.extended_ack)),
            NetlinkPayload::Error(error) => match error.code {
                None => Ok(()),
                // With NETLINK_CAP_ACK the request's bare header comes first, then the attributes.
                Some(code) => Err(Error::refused(
                    code.get(),
                    error.header.get(NetlinkHeader::default().buffer_len()..).unwrap_or_default(),
                )),
            },
            _ => return,
        };
        self.end.get_or_insert(end);
    }

    /// Replaces the objects of the answer.
    pub(super) fn with<T>(self, messages: Vec<T>) -> Answer<T> {
        Answer { messages, end: self.end, interrupted: self.interrupted }
    }
}

/// Whether all answers are complete.
pub(super) fn all_ended<M>(answers: &[Answer<M>]) -> bool {
    answers.iter().all(|answer| answer.end.is_some())
}

/// Decodes one datagram into `answers`; `first` is the sequence number of the first one.
pub(super) fn take<M: Protocol>(datagram: &[u8], first: u32, answers: &mut [Answer<M>]) -> Result<(), Error> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let length = NetlinkBuffer::new_checked(rest)?.length() as usize;
        let header = NetlinkHeader::parse(&NetlinkBuffer::new(&rest))?;
        // Ignore late answers to earlier requests.
        if let Some(answer) = answers.get_mut(header.sequence_number.wrapping_sub(first) as usize) {
            let message = match M::decode(&rest[..length]) {
                Ok(message) => Some(message),
                Err(error) => {
                    M::undecodable(&rest[..length], error)?.and_then(|readable| M::decode(&readable).ok())
                }
            };
            message.into_iter().for_each(|message| answer.take(message));
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(())
}

/// Repeats a dump until it is not interrupted by changes, at most `DUMP_ATTEMPTS` times.
pub(super) fn whole<M>(mut read: impl FnMut() -> Result<Answer<M>, Error>) -> Result<Vec<M>, Error> {
    for attempt in 0..DUMP_ATTEMPTS {
        pause(attempt);
        let answer = read()?;
        answer.end.unwrap_or(Err(Error::NoAnswer))?;
        if !answer.interrupted {
            return Ok(answer.messages);
        }
    }
    Err(Error::Interrupted(DUMP_ATTEMPTS))
}

#[expect(clippy::disallowed_methods, reason = "there is no event for the end of changes by others")]
fn pause(attempt: u32) {
    if attempt > 0 {
        std::thread::sleep(DUMP_PAUSE * attempt);
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::link::LinkAttribute;
    use nix::errno::Errno;

    use super::*;

    /// `NLMSG_ERROR`, `NLMSG_DONE`, `RTM_NEWLINK` and `IFLA_IFNAME`.
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    const NEW_LINK: u16 = 16;
    const NAME: u16 = 3;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            &flags.to_ne_bytes(),
            &sequence.to_ne_bytes(),
            &[0; 4],
            payload,
        ]
        .concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(flags: u16, sequence: u32, name: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + name.len()).unwrap();
        let attribute = [&length.to_ne_bytes()[..], &NAME.to_ne_bytes(), name].concat();
        message(NEW_LINK, flags, sequence, &[&[0; 16][..], &attribute].concat())
    }

    fn done(sequence: u32, code: i32) -> Vec<u8> {
        message(DONE, 0, sequence, &code.to_ne_bytes())
    }

    /// The answers to `requests` requests from sequence number 7 on, decoded from these datagrams.
    fn answers(requests: usize, datagrams: &[Vec<u8>]) -> Vec<Answer<RouteNetlinkMessage>> {
        let mut answers: Vec<_> = (0..requests).map(|_| Answer::default()).collect();
        datagrams.iter().for_each(|datagram| take(datagram, 7, &mut answers).unwrap());
        answers
    }

    fn names(messages: &[RouteNetlinkMessage]) -> Vec<&str> {
        messages
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => {
                    link.attributes.iter().find_map(|attribute| match attribute {
                        LinkAttribute::IfName(name) => Some(name.as_str()),
                        _ => None,
                    })
                }
                _ => None,
            })
            .collect()
    }

    #[test]
    fn each_message_goes_to_its_request_and_late_ones_are_dropped() {
        let late = [link(0, 6, b"late\0"), done(6, 0), link(0, 9, b"early\0")].concat();
        let ours = [link(0, 7, b"one\0"), link(0, 8, b"two\0"), done(8, 0)].concat();
        let [one, two] = <[_; 2]>::try_from(answers(2, &[late, ours])).unwrap();
        assert_eq!((names(&one.messages), names(&two.messages)), (vec!["one"], vec!["two"]));
        assert!(one.end.is_none(), "the end of another request was assigned to this one");
        assert!(matches!(two.end, Some(Ok(()))));
    }

    #[test]
    fn an_error_ends_only_its_own_request() {
        let refused = message(ERROR, 0, 7, &[&(-17_i32).to_ne_bytes()[..], &[0; 16]].concat());
        let fine = message(ERROR, 0, 8, &[0; 20]);
        let [one, two] = <[_; 2]>::try_from(answers(2, &[[refused, fine].concat(), done(7, 0)])).unwrap();
        assert!(matches!(one.end, Some(Err(error)) if error.is_exists()));
        assert!(matches!(two.end, Some(Ok(()))));
    }

    #[test]
    fn an_error_at_the_end_of_a_dump_fails_the_dump() {
        let mut read = || Ok(answers(1, &[link(0, 7, b"one\0"), done(7, -12)]).pop().unwrap());
        assert_eq!(whole(&mut read).unwrap_err().errno(), Some(Errno::ENOMEM));
        let mut read = || Ok(answers(1, &[link(0, 7, b"one\0")]).pop().unwrap());
        assert!(matches!(whole(&mut read), Err(Error::NoAnswer)), "a dump without an end was accepted");
    }

    #[test]
    fn a_dump_that_changed_while_it_was_read_is_read_again() {
        let mut attempts = 0;
        let messages = whole(|| {
            attempts += 1;
            let flags = if attempts < 3 { DUMP_INTERRUPTED } else { 0 };
            let name = format!("attempt{attempts}\0");
            Ok(answers(1, &[link(flags, 7, name.as_bytes()), done(7, 0)]).pop().unwrap())
        });
        assert_eq!(names(&messages.unwrap()), ["attempt3"]);

        let never = || Ok(answers(1, &[link(DUMP_INTERRUPTED, 7, b"one\0"), done(7, 0)]).pop().unwrap());
        assert!(matches!(whole(never), Err(Error::Interrupted(DUMP_ATTEMPTS))));
    }

    #[test]
    fn an_unreadable_interface_is_an_error_only_if_its_name_is_ours() {
        // An `IFLA_MTU` of one byte.
        let broken = |name: &[u8]| {
            let mut bytes = link(0, 7, name);
            bytes.extend([5, 0, 4, 0, 9, 0, 0, 0]);
            let length = u32::try_from(bytes.len()).unwrap();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            bytes
        };
        let answer = answers(1, &[broken(b"one\0"), link(0, 7, b"two\0")]).pop().unwrap();
        assert_eq!(names(&answer.messages), ["two"]);
        for ours in ["polder0", "pld0123456789ab"] {
            let mut answers = [Answer::<RouteNetlinkMessage>::default()];
            let error = take(&broken(ours.as_bytes()), 7, &mut answers).unwrap_err();
            assert!(matches!(&error, Error::Interface { name, .. } if name == ours), "{error}");
        }
    }

    #[test]
    fn a_truncated_or_unreadable_message_is_an_error() {
        let whole = link(0, 7, b"one\0");
        let mut answers = [Answer::<RouteNetlinkMessage>::default()];
        for cut in 1..whole.len() {
            assert!(take(&whole[..cut], 7, &mut answers).is_err(), "{cut} bytes were enough");
        }
        let error = take(&message(NEW_LINK, 0, 7, &[0; 3]), 7, &mut answers).unwrap_err();
        assert!(error.to_string().contains("caused by"), "{error}");
    }
}
