#!/usr/bin/env bash
# etcd answers "database space exceeded" to a put and has carried it out.
#
# Version:   etcd 3.4.23 (Debian etcd-server and etcd-client 3.4.23-4+b4).
# Expected:  an error of this kind, code 8 (ResourceExhausted), means that nothing was written: a client may treat it as a known
#            outcome.
# Behaviour: of puts that are under way while the quota is reached, some are refused with that error and are there
#            afterwards, with the value that the client was told was refused. A compare-and-put that is "refused" so has
#            taken the key. From the moment on that the NOSPACE alarm is raised, a refused put is not there.
# Why:       the quota is looked at twice. Before the proposal, a put that has no room is refused and nothing happens. But those
#            that were proposed together are applied one after the other, and the applier (quotaApplierV3 in
#            etcdserver/apply.go) writes first and then turns the answer into ErrNoSpace.
# Output:    40 puts of 1,000,000 bytes at once, quota 8 MiB, six tries: refused 12, 32, 28, 30, 23 and 0; of the refused there 12, 32,
#            28, 29, 23 and 0.
set -euo pipefail
version=3.4.23-4+b4
work=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
# As root, apt fetches as its own user, which has to be able to write here.
chmod 777 "$work"
apt-get download -q "etcd-server=$version" "etcd-client=$version" >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
export PATH=$work/unpacked/usr/bin:$PATH ETCDCTL_API=3
etcd --version | sed -n 1p

head -c 750000 /dev/urandom | base64 -w 0 | head -c 1000000 >value
url=http://127.0.0.1:23790

# Starts an etcd with nothing in it, sends it 40 puts at once, and ends it. Leaves the number of those that were refused and
# are there in $there, or nothing if it was too quick to refuse any.
try_once() {
    local number answer accepted refused writers=()
    rm -rf data answer-*
    etcd --data-dir data --quota-backend-bytes $((8 << 20)) --listen-client-urls $url --advertise-client-urls $url \
        --listen-peer-urls http://127.0.0.1:23800 --initial-advertise-peer-urls http://127.0.0.1:23800 \
        --initial-cluster default=http://127.0.0.1:23800 >etcd.log 2>&1 &
    server=$!
    for _ in $(seq 100); do etcdctl --endpoints $url endpoint health >/dev/null 2>&1 && break; sleep 0.1; done
    for number in $(seq 40); do
        etcdctl --endpoints $url --command-timeout 60s put "key-$number" <value >"answer-$number" 2>&1 &
        writers+=($!)
    done
    for number in "${writers[@]}"; do wait "$number" || true; done

    accepted=$( (grep -lx OK answer-* || true) | wc -l)
    mapfile -t refused < <(grep -l 'database space exceeded' answer-* || true)
    there=0
    for answer in "${refused[@]}"; do
        [ -z "$(etcdctl --endpoints $url get --keys-only "key-${answer#answer-}")" ] || there=$((there + 1))
    done
    echo "accepted $accepted, refused ${#refused[@]}, of the refused there $there"
    if [ ${#refused[@]} -gt 0 ]; then
        # With the alarm raised nothing of that kind happens any more.
        if etcdctl --endpoints $url put late x >late 2>&1 || ! grep -q 'database space exceeded' late; then
            echo "CHANGED: a put after the alarm says: $(cat late)"
            exit 1
        fi
        if [ -n "$(etcdctl --endpoints $url get --keys-only late)" ]; then
            echo "CHANGED: a put after the alarm was carried out, too"
            exit 1
        fi
    fi
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
}

# Whether puts meet the quota when they are proposed or when they are applied is a matter of luck.
for _ in $(seq 10); do
    try_once
    [ "$there" -eq 0 ] || exit 0
done
echo "CHANGED: nothing that was refused is there"
exit 1
