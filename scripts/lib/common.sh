# Shared by the scripts beside this folder. To be sourced, by bash with -euo pipefail.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# Commands for the end of the script, however it ends.
at_exit=()
trap 'for command in "${at_exit[@]}"; do eval "$command"; done' EXIT

need_root() { [ "$(id -u)" = 0 ] || die "it makes network namespaces, which only root can: run it with sudo"; }

# Runs a command as the user who called sudo, or as who we are: what is built belongs to whom the checkout belongs.
as_user() {
    local user run=()
    user=$(id -un)
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ]; then user=$SUDO_USER; fi
    [ "$user" = "$(id -un)" ] || run=(sudo -u "$user" -H)
    # rustup puts cargo where only the user's own profile finds it.
    "${run[@]}" env PATH="$(getent passwd "$user" | cut -d: -f6)/.cargo/bin:$PATH" "${passed_on[@]}" "$@"
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
    local log status=0
    log=$(mktemp)
    # A package that brings a service must not start it: the tests start their own.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        at_exit+=("rm -f $policy")
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    {
        apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    } >"$log" 2>&1 </dev/null || status=$?
    if [ $status -ne 0 ]; then
        tail -n 20 "$log" >&2
        die "the packages could not be installed, see $log"
    fi
    rm -f "$log"
}

# Makes a folder for what the labs write; it goes at the end, unless something in it is kept on purpose.
make_lab_folder() {
    lab_folder=$(mktemp -d -t polder-XXXXXX)
    at_exit+=('[ -n "${keep_lab:-}" ] || rm -rf "$lab_folder"')
}

# What building needs: protoc for etcd's client, a C compiler for SQLite.
build_packages=(protobuf-compiler libprotobuf-dev gcc libc6-dev)

# What the lab needs: nodes made of namespaces, a real etcd, tools to look with.
lab_packages=(etcd-server etcd-client iproute2 iputils-ping nftables util-linux procps)

# What the tests need besides: a container runtime, and what an image is made of.
test_packages=(containerd runc containernetworking-plugins busybox-static)

need_cargo() {
    as_user cargo --version >/dev/null 2>&1 || die "cargo does not run: install Rust with rustup, as the user who builds"
}

# The binaries are static: they run on every node, whatever its libc. Only with an explicit target does that not
# concern what runs while building.
use_static_target() {
    target=$(as_user rustc -vV | sed -n 's/^host: //p')
    local variable
    variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_RUSTFLAGS
    passed_on+=("$variable=-C target-feature=+crt-static")
}
