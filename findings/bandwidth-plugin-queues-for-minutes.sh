#!/usr/bin/env bash
# The CNI plugin bandwidth, with what containerd passes for a limit of 10 Mbit/s, makes a queue of more than four minutes.
#
# Version:   containernetworking-plugins 1.1.1 (Debian 1.1.1+ds1-3+b5), iproute2 6.1.0. containerd passes the rates of the annotations
#            kubernetes.io/ingress-bandwidth and egress-bandwidth, and for each the burst 4294967295, because the annotations have none.
# Expected:  a limit of 10 Mbit/s queues packets for some 25 ms, the latency that the plugin's source names.
# Behaviour: the plugin takes that number for a burst in bits. So 193 MB pass without any limit, and then the queue takes packets for
#            275 s: the round trip of a connection that fills it grows to minutes, as if the network hung.
# Why:       plugins/meta/bandwidth/ifb_creator.go: the limit of the queue is 25 ms of the rate and the whole burst, 429 s of this rate.
#            The bucket is a time in units of 64 ns with 32 bits, which wraps around at 275 s: 429 s become 155 s. containerd sets the
#            burst to MaxUint32 (WithCapabilityBandWidth in its CRI plugin).
# Output:    burst of the runtime: 193 MB pass at once, then a packet waits up to 274 s
#            burst of 1 Mbit:      0 MB pass at once, then a packet waits up to 0 s
set -euo pipefail
version=1.1.1+ds1-3+b5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# As root, apt fetches as its own user, which has to be able to write here.
chmod 777 "$work"
apt-get download -q "containernetworking-plugins=$version" iproute2=6.1.0-3 >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
export PATH=$work/unpacked/bin:$work/unpacked/sbin:$PATH work
uname -sr

# The MAC address of an interface.
mac() { ip -br link show "$1" | tr -s " " | cut -d " " -f 3; }
# NAME BURST: limits a pair of interfaces, and prints what passes at once, and the time that a full queue takes after that.
limit() {
    local conf shown burst
    conf=$(printf '{"cniVersion":"0.4.0","name":"lab","type":"bandwidth","runtimeConfig":{"bandwidth":{"ingressRate":10000000,
        "ingressBurst":%s}},"prevResult":{"cniVersion":"0.4.0","interfaces":[{"name":"host0","mac":"%s"},
        {"name":"eth0","mac":"%s","sandbox":"/proc/%s/ns/net"}],"ips":[]}}' "$2" \
        "$(mac host0)" "$peer_mac" "$pod")
    CNI_COMMAND=ADD CNI_CONTAINERID=lab CNI_NETNS=/proc/$pod/ns/net CNI_IFNAME=eth0 CNI_PATH=$work/unpacked/usr/lib/cni \
        "$work/unpacked/usr/lib/cni/bandwidth" <<<"$conf" >"$work/result" || { cat "$work/result" >&2; exit 1; }
    # In bytes and microseconds. The latency is the time that a full queue needs beyond what the bucket holds (tc-tbf(8)).
    shown=$(tc -j qdisc show dev host0 root)
    burst=$(sed 's/.*"burst":\([0-9]*\).*/\1/' <<<"$shown")
    seconds=$(($(sed 's/.*"lat":\([0-9]*\).*/\1/' <<<"$shown") / 1000000))
    printf '%-21s %s MB pass at once, then a packet waits up to %s s\n' "$1:" $((burst / 1000000)) $seconds
    tc qdisc del dev host0 root
}
export -f limit mac
unshare --net bash -euc '
    unshare --net sleep 60 & pod=$!
    while [ "$(readlink /proc/$pod/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    export pod
    ip link add host0 type veth peer name eth0 netns $pod
    ip link set host0 up
    export peer_mac=$(nsenter --target $pod --net bash -c "mac eth0")
    limit "burst of the runtime" 4294967295
    [ $seconds -ge 60 ] || { echo "CHANGED: the queue is short"; exit 1; }
    limit "burst of 1 Mbit" 1000000
    [ $seconds -lt 2 ] || { echo "CHANGED: this queue is long, too"; exit 1; }
    kill $pod
'
