#!/usr/bin/env bash
# firewalld with its nftables backend empties all iptables chains of others, but keeps their policies.
#
# Version:   firewalld 1.3.3 (Debian 1.3.3-1~deb12u2), iptables 1.8.9 (nf_tables).
# Expected:  with FirewallBackend=nftables, the default, firewalld changes its own table "inet firewalld" only.
# Behaviour: at its start and at each reload it deletes all rules and all user chains of every iptables table, whoever made them.
#            The policies of the built-in chains stay. Tables of nft are left alone. So a program that sets "-P FORWARD DROP" and
#            then permits what it needs, as Docker does, leaves a host that forwards nothing.
# Why:       flush() of firewall/core/fw.py clears every backend, also one that is not in use, for the sake of "direct" rules;
#            build_flush_rules() of firewall/core/ipXtables.py is -F, -X and -Z for each table.
# Output:    before: -P FORWARD DROP; -N OTHER; -A FORWARD -j OTHER; -A OTHER -j ACCEPT; nat: 1 rules; nft table of others: 1 rule
#            backend: nftables
#            start:  -P FORWARD DROP; nat: 0 rules; nft table of others: 1 rule
#            reload: -P FORWARD DROP; nat: 0 rules; nft table of others: 1 rule
set -euo pipefail
version=1.3.3-1~deb12u2
self=$(realpath "${BASH_SOURCE[0]}")
if [ "${1:-}" != inside ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    # As root, apt fetches as its own user, which has to be able to write here.
    chmod 777 "$work"
    apt-get download -q "firewalld=$version" "python3-firewall=$version" python3-nftables=1.0.6-2+deb12u2 nftables=1.0.6-2+deb12u2 \
        libnftables1=1.0.6-2+deb12u2 iptables=1.8.9-2 python3-dbus=1.3.2-4+b1 python3-gi=3.42.2-3+b1 gir1.2-glib-2.0=1.74.0-3 \
        libgirepository-1.0-1=1.74.0-3 dbus-daemon=1.14.10-1~deb12u1 dbus-bin=1.14.10-1~deb12u1 \
        dbus-system-bus-common=1.14.10-1~deb12u1 dbus-session-bus-common=1.14.10-1~deb12u1 \
        >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
    for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
    # Namespaces of its own: what is mounted, and what is changed in the network, ends with them.
    unshare --mount --net --pid --fork --kill-child "$self" inside "$work"
    exit
fi
work=$2
mount -t proc proc /proc
mount -t tmpfs none /run
mkdir "$work/over" && mount -t tmpfs none "$work/over"
for folder in etc usr; do
    mkdir "$work/over/$folder" "$work/over/$folder.work"
    mount -t overlay -o "lowerdir=$work/unpacked/$folder:/$folder,upperdir=$work/over/$folder,workdir=$work/over/$folder.work" none "/$folder"
done
mkdir /run/dbus /run/firewalld
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ip link set lo up
dbus-daemon --system --fork --nopidfile

state() {
    local rules
    rules=$(iptables -S | grep -E '^-P FORWARD|OTHER' | paste -sd ';' | sed 's/;/; /g')
    echo "$rules; nat: $(iptables -t nat -S | grep -c '^-A' || true) rules; nft table of others:" \
        "$(nft list table ip others | grep -c 'accept$') rule"
}
iptables -P FORWARD DROP
iptables -N OTHER
iptables -A FORWARD -j OTHER
iptables -A OTHER -j ACCEPT
iptables -t nat -A POSTROUTING -o lo -j MASQUERADE
nft 'table ip others { chain forward { type filter hook forward priority 10; accept; }; }'
echo "before: $(state)"
firewalld --nofork --nopid >/run/firewalld.log 2>&1 &
firewalld=$!
# Waits until the command succeeds.
wait_until() {
    for _ in $(seq 100); do ! eval "$1" >/dev/null 2>&1 || return 0; sleep 0.2; done
    cat /run/firewalld.log >&2
    return 1
}
wait_until 'nft list chain inet firewalld filter_FORWARD'
wait_until '! iptables -t nat -S | grep -q MASQUERADE'
echo "backend: $(sed -n 's/^FirewallBackend=//p' /etc/firewalld/firewalld.conf)"
started=$(state)
echo "start:  $started"
iptables -t nat -A POSTROUTING -o lo -j MASQUERADE
# SIGHUP is a reload, see firewalld(1).
kill -HUP $firewalld
wait_until '! iptables -t nat -S | grep -q MASQUERADE'
reloaded=$(state)
echo "reload: $reloaded"
expected='-P FORWARD DROP; nat: 0 rules; nft table of others: 1 rule'
[[ $started = "$expected" && $reloaded = "$expected" ]] || { echo "CHANGED: it was '$expected'"; exit 1; }
