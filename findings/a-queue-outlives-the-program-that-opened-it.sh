#!/usr/bin/env bash
# A netfilter queue that is opened with the Rust crate nfq stays in the hands of the program's children, after the program has ended.
#
# Version:   nfq 0.2.5, Linux 6.18.44.
# Expected:  when the program ends, its queue is gone: rules with `bypass` accept the packets from then on, and the next start of the
#            program can open the queue. The Rust standard library opens everything of its own with close-on-exec, so that a child gets
#            nothing that it is not given.
# Behaviour: a child that the program has started and that goes on (here: sleep) has the socket, too. The queue stays, and nobody reads
#            it. The next start of the program is refused the queue.
# Why:       Queue::open calls socket() without SOCK_CLOEXEC, and sets no FD_CLOEXEC. The kernel takes a queue back when the last
#            descriptor of its socket is closed (nfqnl_rcv_nl_event of net/netfilter/nfnetlink_queue.c).
# Output:    program runs:       queue 7 is open
#            program has ended:  queue 7 is open
#            second start:       refused (Operation not permitted (os error 1))
#            child has ended:    queue 7 is not open
#            third start:        opened
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "open-queue"
version = "0.0.0"
edition = "2021"
[dependencies]
nfq = "=0.2.5"
TOML
# Opens queue 7, and starts a child that is given nothing. Ends when its input does.
cat >src/main.rs <<'RUST'
use std::process::{Command, Stdio};
fn main() {
    let bound = nfq::Queue::open().and_then(|mut queue| queue.bind(7).map(|()| queue));
    let _queue = match bound {
        Ok(queue) => queue,
        Err(error) => return println!("refused ({error})"),
    };
    let nothing = Stdio::null;
    let child = Command::new("sleep").arg("60").stdin(nothing()).stdout(nothing()).stderr(nothing()).spawn().unwrap();
    println!("opened {}", child.id());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}
RUST
cargo build --quiet 2>build.log || { cat build.log >&2; exit 1; }
uname -sr

# LABEL: prints and keeps whether the kernel has the queue.
look() {
    answer='queue 7 is not open'
    ! grep -q '^ *7 ' /proc/net/netfilter/nfnetlink_queue || answer='queue 7 is open'
    printf '%-19s %s\n' "$1:" "$answer"
}
must() { [ "$answer" = "$1" ] || { echo "CHANGED: it was '$1'"; exit 1; }; }
export -f look must
export work
unshare --net bash -euc '
    mkfifo input output
    run() {
        "$work/target/debug/open-queue" <input >output &
        program=$!
        exec 3>input 4<output
        read -r answer child <&4
        [ "$answer" = opened ] || answer="$answer $child"
    }
    end() { exec 3>&- 4<&-; wait "$program"; }
    run
    first=$child
    look "program runs"
    must "queue 7 is open"
    end
    look "program has ended"
    must "queue 7 is open"
    run
    printf "%-19s %s\n" "second start:" "$answer"
    end
    must "refused (Operation not permitted (os error 1))"
    kill "$first"
    for _ in $(seq 100); do grep -q "^ *7 " /proc/net/netfilter/nfnetlink_queue || break; sleep 0.1; done
    look "child has ended"
    must "queue 7 is not open"
    run
    printf "%-19s %s\n" "third start:" "$answer"
    kill "$child"
    end
    must opened
'
