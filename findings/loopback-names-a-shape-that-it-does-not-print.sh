#!/usr/bin/env bash
# The reference CNI plugin loopback prints results in a shape that their version does not have.
#
# Version:   containernetworking-plugins 1.1.1 (Debian 1.1.1+ds1-3+b5).
# Expected:  A plugin answers an ADD in the shape of the cniVersion that it was called with: until 0.2.0 one address of a family in
#            "ip4" and "ip6", without "interfaces"; from 0.3.0 to 0.4.0 a list "ips", each with its IP "version", which these
#            specifications require; from 1.0.0 the same without "version".
# Behaviour: loopback always prints the shape of 1.0.0, and writes the version that it was called with beside it. Who reads its
#            results by their version finds no address (0.2.0), or addresses without a required key (0.3.0 to 0.4.0).
# Output:    0.2.0: cniVersion 0.2.0, keys cniVersion dns interfaces ips, keys of an address: address interface
#            0.4.0: cniVersion 0.4.0, keys cniVersion dns interfaces ips, keys of an address: address interface
#            1.0.0: cniVersion 1.0.0, keys cniVersion dns interfaces ips, keys of an address: address interface
set -euo pipefail
version=1.1.1+ds1-3+b5
work=$(mktemp -d)
pod=
cleanup() {
    [ -z "$pod" ] || kill "$pod" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
# As root, apt fetches as its own user, which has to be able to write here.
chmod 777 "$work"
apt-get download -q "containernetworking-plugins=$version" >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
dpkg-deb -x ./*.deb unpacked

# A process in a network namespace of its own stands for the pod.
unshare --net sleep 60 &
pod=$!
until [ "$(cat /proc/$pod/comm)" = sleep ]; do sleep 0.1; done
expected="keys cniVersion dns interfaces ips, keys of an address: address interface"
for spoken in 0.2.0 0.4.0 1.0.0; do
    CNI_COMMAND=ADD CNI_CONTAINERID=c1 CNI_IFNAME=lo CNI_NETNS=/proc/$pod/ns/net CNI_PATH=$work/unpacked/usr/lib/cni \
        unpacked/usr/lib/cni/loopback <<<"{ \"cniVersion\": \"$spoken\", \"name\": \"n\", \"type\": \"loopback\" }" >result
    said=$(jq -r '"cniVersion \(.cniVersion), keys \(keys | join(" ")), keys of an address: \(.ips[0] | keys | join(" "))"' result)
    echo "$spoken: $said"
    [ "$said" = "cniVersion $spoken, $expected" ] || { echo "CHANGED: it was cniVersion $spoken, $expected"; exit 1; }
done
