#!/usr/bin/env bash
# Linux shows the routes of table main also as routes of table local.
#
# Version:   Linux 6.18.44; iproute2 6.1.0 (Debian 6.1.0-3) to make the routes and to list them.
# Expected:  /proc/net/fib_triestat has a section for each table, and "Prefixes" of section Main is the number of routes in table
#            main: `ip route show table main` and `table local` list the tables separately.
# Behaviour: until the first rule is added, both sections count the routes of both tables: with 50 routes in main and none added to
#            local, each shows all of them. A program that adds up the sections counts every route twice. The first `ip rule add`,
#            also one that never matches, makes the sections differ, and they stay different after the rule is deleted.
# Why:       fib_new_table of net/ipv4/fib_frontend.c gives table local the trie of table main as an alias, as long as there are no
#            rules of one's own (fib_has_custom_rules); fib_unmerge separates them and is never undone.
# Output:    no rules: Main 53, Local 53; listed in main: 50, in local: 3
#            after one rule: Main 50, Local 3; listed in main: 50, in local: 3
#            after the rule is deleted: Main 50, Local 3; listed in main: 50, in local: 3
set -euo pipefail
version=6.1.0-3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# As root, apt fetches as its own user, which has to be able to write here.
chmod 777 "$work"
apt-get download -q "iproute2=$version" >apt.log 2>&1 || { cat apt.log >&2; exit 1; }
for package in ./*.deb; do dpkg-deb -x "$package" unpacked; done
export PATH=$work/unpacked/bin:$work/unpacked/sbin:$PATH
uname -sr
ip -V

# The number of prefixes in a section.
count() { sed -n "/^$1:/,/Prefixes/s/.*Prefixes: *\([0-9]*\).*/\1/p" /proc/net/fib_triestat; }
# NAME: prints the numbers of the sections and of the listed routes.
show() {
    echo "$1: Main $(count Main), Local $(count Local); listed in main: $(ip route show table main | wc -l)," \
        "in local: $(ip route show table local | wc -l)"
}
export -f count show
unshare --net bash -euc '
    ip link set lo up
    for number in $(seq 50); do ip route add unreachable 10.1.$number.0/24; done
    show "no rules"
    [ "$(count Main)" = "$(count Local)" ] && [ "$(count Local)" -gt 50 ] || { echo "CHANGED: the tables are separate"; exit 1; }
    ip rule add from 192.0.2.1 table 77
    show "after one rule"
    [ "$(count Main)" = 50 ] && [ "$(count Local)" -lt 50 ] || { echo "CHANGED: a rule does not separate them"; exit 1; }
    ip rule delete from 192.0.2.1 table 77
    show "after the rule is deleted"
    [ "$(count Main)" = 50 ] || { echo "CHANGED: they are merged again"; exit 1; }
'
