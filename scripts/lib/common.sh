# Shared by the scripts beside this folder. To be sourced, by bash with -euo pipefail.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# Runs a command as the user who called sudo, or as who we are: what is built belongs to whom the checkout belongs.
as_user() {
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        local home
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
        # rustup puts cargo where only the user's own profile finds it.
        sudo -u "$SUDO_USER" -H env PATH="$home/.cargo/bin:$PATH" "${passed_on[@]}" "$@"
    else
        env "${passed_on[@]}" "$@"
    fi
}
passed_on=()

# Installs what is missing of these Debian packages; only root can.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "Debian packages are missing: sudo apt-get install --no-install-recommends ${missing[*]}"
    say "installing ${missing[*]}"
    local log
    log=$(mktemp)
    # A package that brings a service must not start it: the tests start their own.
    local policy=/usr/sbin/policy-rc.d made_policy=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made_policy=1
    fi
    local status=0
    {
        apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    } >"$log" 2>&1 </dev/null || status=$?
    [ -z "$made_policy" ] || rm -f "$policy"
    if [ $status -ne 0 ]; then
        tail -n 20 "$log" >&2
        die "the packages could not be installed, see $log"
    fi
    rm -f "$log"
}

# What building needs: protoc for etcd's client, a C compiler for SQLite.
build_packages=(protobuf-compiler libprotobuf-dev gcc libc6-dev)

# What the lab needs: nodes made of namespaces, a real etcd, tools to look with.
lab_packages=(etcd-server etcd-client iproute2 iputils-ping nftables util-linux procps)

need_cargo() {
    as_user cargo --version >/dev/null 2>&1 || die "cargo is not found: install Rust (rustup.rs), as the user who builds"
}

# The binaries are static: they run on every node, whatever its libc. Only with an explicit target does that not
# concern what runs while building.
use_static_target() {
    target=$(as_user rustc -vV | sed -n 's/^host: //p')
    local variable
    variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_RUSTFLAGS
    passed_on+=("$variable=-C target-feature=+crt-static")
}
