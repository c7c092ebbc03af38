//! Token bucket filters in the real kernel. Each test runs in its own network namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use common::{in_a_new_namespace, run};
use nix::errno::Errno;
use polder_netlink::qdisc::TokenBucket;
use polder_netlink::{IfIndex, RouteSocket};

/// Creates a veth pair and returns the index of `pod0`.
fn pair(socket: &mut RouteSocket) -> IfIndex {
    run("ip", &["link", "add", "pod0", "type", "veth", "peer", "name", "other0"]);
    socket.link("pod0").unwrap().unwrap().index
}

/// The queueing discipline as `tc` shows it: rates and sizes in bytes.
fn shown() -> String {
    run("tc", &["-j", "-r", "qdisc", "show", "dev", "pod0"])
}

/// Whether the text has the key with that number.
fn has(text: &str, key: &str, number: u64) -> bool {
    [",", "}"].iter().any(|end| text.contains(&format!("\"{key}\":{number}{end}")))
}

#[test]
fn a_token_bucket_filter_is_read_back_as_it_was_set() {
    in_a_new_namespace(|socket| {
        let index = pair(socket);
        assert_eq!(socket.token_bucket_rate(index).unwrap(), None, "before it is up");
        // The second one changes the first; the last rate does not fit in 32 bits.
        for (rate, limit) in [(2_500_000, 193_572), (1_250_000, 162_322), (12_500_000_000, 375_000_000)] {
            let bucket = TokenBucket { rate, burst: 131_072, limit };
            socket.execute_all([bucket.replace(index)]).unwrap();
            assert_eq!(socket.token_bucket_rate(index).unwrap(), Some(rate));
            let text = shown();
            assert!(text.contains(r#""kind":"tbf""#) && text.contains(r#""root":true"#), "{text}");
            assert!(has(&text, "rate", rate) && has(&text, "limit", u64::from(limit)), "{text}");
        }
        run("ip", &["link", "set", "pod0", "up"]);
        assert_eq!(socket.token_bucket_rate(index).unwrap(), Some(12_500_000_000), "after it is up");
    });
}

#[test]
fn the_bucket_has_the_given_size_in_bytes() {
    in_a_new_namespace(|socket| {
        let index = pair(socket);
        // `tc` computes the size from the time in whole microseconds, so a few bytes are lost.
        for (rate, burst) in
            [(2_500_000, 131_072), (125_000_000, 625_000), (125, 34_250), (12_500_000_000, 62_500_000)]
        {
            socket.execute_all([TokenBucket { rate, burst, limit: 2 * burst }.replace(index)]).unwrap();
            let text = shown();
            let is_near = |found: u64| has(&text, "burst", found);
            let lost = rate / 1_000_000 + 2;
            assert!((u64::from(burst) - lost..=u64::from(burst)).any(is_near), "{burst}: {text}");
        }
    });
}

#[test]
fn another_root_queueing_discipline_is_replaced_and_is_not_read_as_a_token_bucket() {
    in_a_new_namespace(|socket| {
        let index = pair(socket);
        run("ip", &["link", "set", "pod0", "up"]);
        assert_eq!(socket.token_bucket_rate(index).unwrap(), None, "the default of a veth");
        run("tc", &["qdisc", "add", "dev", "pod0", "root", "handle", "1:", "bfifo", "limit", "10000"]);
        assert_eq!(socket.token_bucket_rate(index).unwrap(), None);
        let bucket = TokenBucket { rate: 1_000_000, burst: 131_072, limit: 156_072 };
        socket.execute_all([bucket.replace(index)]).unwrap();
        assert_eq!(socket.token_bucket_rate(index).unwrap(), Some(1_000_000));
    });
}

#[test]
fn an_interface_that_is_gone_has_no_rate_and_gets_none() {
    in_a_new_namespace(|socket| {
        let index = pair(socket);
        run("ip", &["link", "del", "pod0"]);
        assert_eq!(socket.token_bucket_rate(index).unwrap(), None);
        let bucket = TokenBucket { rate: 1_000_000, burst: 131_072, limit: 156_072 };
        let refused = socket.execute_all([bucket.replace(index)]).unwrap_err();
        assert_eq!(refused.errno(), Some(Errno::ENODEV), "{refused}");
    });
}
