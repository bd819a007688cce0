#!/usr/bin/env bash
# run.sh demo|demo-swarm|demo-encrypted|test|soak|bench|sim: installs what is missing, by package name, and
# runs one of make's targets as root. It leaves nothing behind but the packages,
# Go's caches and the built newest engine in the user's cache.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?demo, demo-swarm, demo-encrypted, test, soak, bench or sim}
only=${2:-} # of soak: a pattern of tests

if [ "$(id -u)" != 0 ]; then
	echo "run.sh: network namespaces and dockerd need root; asking sudo" >&2
	exec sudo env PATH="$PATH" HOME="$HOME" CI="${CI:-}" "$0" "$@"
fi
# A plain root shell has no /usr/sbin on some machines, and Go's usual place.
export PATH=$PATH:/usr/local/go/bin:/usr/sbin:/sbin
command -v go >/dev/null || { echo "run.sh: Go is not installed; see https://go.dev/doc/install" >&2; exit 1; }

# need PROGRAM PACKAGE ...: the packages whose program is missing.
missing=()
# Ubuntu has bpftool in a package with its kernel, whose modules are compressed.
ubuntu() { grep -q '^ID=ubuntu' /etc/os-release; }
need() { [ -e "$1" ] || command -v "$1" >/dev/null || missing+=("$2"); }
need dockerd docker.io
need docker docker.io
need /bin/busybox busybox-static
need iptables iptables
need ip iproute2
need nsenter util-linux
need pgrep procps
need tcpdump tcpdump
need ipset ipset
if [ "$what" = test ] || [ "$what" = soak ]; then
	need gcc gcc
	need nft nftables
	need qemu-system-x86_64 qemu-system-x86
	need mke2fs e2fsprogs
	need /usr/include/stdlib.h libc6-dev
	if ubuntu; then
		need /usr/lib/linux-tools linux-tools-generic
		need zstd zstd
	else
		need bpftool bpftool
	fi
	need tc iproute2
	need /usr/include/bpf/bpf_helpers.h libbpf-dev
fi
# busybox without -static would not run in an empty container.
dpkg -s busybox-static >/dev/null 2>&1 || missing+=(busybox-static)
install() {
	echo "installing $*"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
if [ ${#missing[@]} -gt 0 ]; then
	install "${missing[@]}"
fi

if ubuntu; then # what it has at bpftool's usual place looks for the running kernel's
	PATH=$(dirname "$(printf '%s\n' /usr/lib/linux-tools/*/bpftool | sort -V | tail -1)"):$PATH
fi

# compiler: the port program is compiled again by the compiler of which the committed
# objects are, and compared. Another one makes others, and not every release has it.
compiler() {
	local want name
	want=$(sed -n 's/^const compiler = "\(.*\)"$/\1/p' dataplane/kernel/bpf/bpf_test.go)
	name=clang-$(sed 's/.* \([0-9]*\)\..*/\1/' <<<"$want")
	if ! command -v "$name" >/dev/null || ! command -v "llvm-strip${name#clang}" >/dev/null; then
		install "$name" "llvm${name#clang}" || true
	fi
	if "$name" --version 2>/dev/null | grep -qF "$want"; then
		WEFT_TEST_MUST+=,clang
	elif [ -n "${CI:-}" ]; then
		echo "run.sh: this release has no $want (Debian 12 has), so it cannot be proved that the port program's objects come from their source" >&2
		exit 1
	else
		echo "run.sh: this release has no $want (Debian 12 has): whether the port program's objects come from their source is not looked at" >&2
	fi
}

export CGO_ENABLED=0
case $what in
demo | demo-swarm | demo-encrypted)
	# Not go run: it would die of SIGTERM alone and leave the demo running.
	go build -o "build/$what" "./tests/${what/-/}"
	exec "build/$what"
	;;
test | soak)
	tests/engine.sh
	tests/guest.sh
	tests/firewall.sh
	export WEFT_TEST_MUST=root,docker,engine,guest,firewall
	compiler
	limit=60m
	if [ "$what" = soak ]; then
		export WEFT_SOAK=1
		limit=24h
	fi
	[ -z "$(gofmt -l .)" ] || { echo "run.sh: not formatted by gofmt:"; gofmt -l .; exit 1; }
	go vet ./...
	# The scenarios start dockerds and would disturb each other's times; the rest
	# runs first, two packages at a time.
	if [ -z "$only" ]; then
		mapfile -t packages < <(go list ./... | grep -v '/tests$')
		go test -timeout "$limit" "${packages[@]}"
	fi
	# Not from Go's cache, which does not see that the plugin was changed. Four at
	# a time: they wait more than they work. Ten minutes of random operations, and
	# scenarios in a guest, which take a processor for some minutes, are for the
	# soak alone.
	skip='^(TestSwarmRandom|TestGuestScenarios)$'
	if [ "$what" = soak ]; then
		skip='^$'
	fi
	exec go test -count 1 -timeout "$limit" -parallel 4 -run "$only" -skip "$skip" -v ./tests
	;;
bench)
	exec go run ./tests/bench
	;;
sim)
	# The figures of the simulated clusters are what the model is checked with.
	export WEFT_SIM=$PWD/build/sim WEFT_TEST_MUST=root
	mkdir -p "$WEFT_SIM"
	go test -count 1 -timeout 6h -v -run 'TestScale' ./store/gossip
	exec go test -count 1 -timeout 2h -v ./tests/sim
	;;
*)
	echo "run.sh: $what is not one of demo, demo-swarm, demo-encrypted, test, soak, bench, sim" >&2
	exit 2
	;;
esac
