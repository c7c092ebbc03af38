#!/usr/bin/env bash
# nft deletes an element of a map although it leads elsewhere than the command says.
#
# Version:   nftables 1.0.6 (Debian 1.0.6-2+deb12u2), Linux 6.18.44.
# Expected:  `nft delete element inet t m { 8080 : 10.0.0.1 }` fails if 8080 leads to 10.0.0.2, as `add element` does: it answers "File
#            exists" for a key with other data, and accepts the same data again.
# Behaviour: the element is deleted, and the command succeeds: only the key is compared. A program that removes what it added once, late,
#            removes what another one has put there since: the port of a stopped container, when its successor has it already.
# Why:       nft_del_setelem of net/netfilter/nf_tables_api.c reads the key of the message only; its data are ignored.
# Output:    add other data:    refused, 8080 : 10.0.0.1
#            add the same data: done, 8080 : 10.0.0.1
#            delete other data: done, none
set -euo pipefail
version=1.0.6-2+deb12u2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# As root, apt fetches as its own user, which has to be able to write here.
chmod 777 "$work"
apt-get download -q "nftables=$version" "libnftables1=$version" libnftnl11=1.2.4-2 libjansson4=2.14-2 libmnl0=1.0.4-3 >apt.log 2>&1 ||
    { cat apt.log >&2; exit 1; }
for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
export PATH=$work/unpacked/usr/sbin:$PATH LD_LIBRARY_PATH=$work/unpacked/usr/lib/$(uname -m)-linux-gnu
uname -sr
nft --version

# NAME COMMAND...: runs a command on the map, and prints its outcome and the elements of the map.
try() {
    local outcome=refused elements
    ! nft "${@:2}" 2>/dev/null || outcome=done
    elements=$(nft list map inet t m | sed -n 's/.*elements = { \(.*\) }/\1/p')
    answer="$outcome, ${elements:-none}"
    printf '%-18s %s\n' "$1:" "$answer"
}
# ANSWER: what the last command must have answered.
must() { [ "$answer" = "$1" ] || { echo "CHANGED: it was '$1'"; exit 1; }; }
export -f try must
unshare --net bash -euc '
    nft "add table inet t; add map inet t m { type inet_service : ipv4_addr; }; add element inet t m { 8080 : 10.0.0.1 }"
    try "add other data" "add element inet t m { 8080 : 10.0.0.2 }"
    must "refused, 8080 : 10.0.0.1"
    try "add the same data" "add element inet t m { 8080 : 10.0.0.1 }"
    must "done, 8080 : 10.0.0.1"
    try "delete other data" "delete element inet t m { 8080 : 10.0.0.2 }"
    must "done, none"
'
