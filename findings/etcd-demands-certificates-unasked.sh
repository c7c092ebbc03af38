#!/usr/bin/env bash
# etcd demands client certificates although --client-cert-auth is false.
#
# Version:   etcd 3.4.23 (Debian etcd-server and etcd-client 3.4.23-4+b4).
# Expected:  --client-cert-auth ("Enable client cert authentication", false unless given) decides whether a client has to show a
#            certificate; --trusted-ca-file only says which authority is believed where one is shown.
# Behaviour: with --trusted-ca-file, a client without a certificate is refused in either case, also with
#            --client-cert-auth=false. As long as an authority is named, the option changes nothing.
# Why:       ServerConfig of pkg/transport/listener.go sets RequireAndVerifyClientCert when there is an authority OR the option.
# Output:    --trusted-ca-file, --client-cert-auth=false: without a certificate refused, with one let in
#            --trusted-ca-file, --client-cert-auth=true: without a certificate refused, with one let in
#            neither: without a certificate let in, with one let in
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

# An authority, and a certificate of it for both ends.
{
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt
    openssl req -newkey rsa:2048 -nodes -subj /CN=both -keyout both.key -out both.csr
    openssl x509 -req -in both.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out both.crt \
        -extfile <(printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n')
} >openssl.log 2>&1 || { cat openssl.log >&2; exit 1; }

url=https://127.0.0.1:23791
with_certificate=(--cert both.crt --key both.key)
ask() { etcdctl --endpoints $url --cacert ca.crt --command-timeout 5s "$@" get key >/dev/null 2>&1; }
# What becomes of a client with these options of etcdctl.
verdict() { if ask "$@"; then echo "let in"; else echo refused; fi; }

# NAME EXPECTED OPTION...: starts an etcd with these options, and compares what becomes of a client without a certificate.
try_with() {
    local name=$1 expected=$2 without
    shift 2
    rm -rf data
    etcd --data-dir data --cert-file both.crt --key-file both.key "$@" --listen-client-urls $url --advertise-client-urls $url \
        --listen-peer-urls http://127.0.0.1:23801 --initial-advertise-peer-urls http://127.0.0.1:23801 \
        --initial-cluster default=http://127.0.0.1:23801 >etcd.log 2>&1 &
    server=$!
    for _ in $(seq 100); do ask "${with_certificate[@]}" && break; sleep 0.1; done
    without=$(verdict)
    echo "$name: without a certificate $without, with one $(verdict "${with_certificate[@]}")"
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
    [ "$without" = "$expected" ] || { echo "CHANGED: without a certificate it was $expected"; exit 1; }
}

try_with "--trusted-ca-file, --client-cert-auth=false" refused --trusted-ca-file ca.crt --client-cert-auth=false
try_with "--trusted-ca-file, --client-cert-auth=true" refused --trusted-ca-file ca.crt --client-cert-auth=true
try_with "neither" "let in"
