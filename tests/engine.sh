#!/usr/bin/env bash
# engine.sh: builds the newest Docker engine and Compose by package name, once, into
# $WEFT_ENGINE_DIR or the user's cache. It takes several minutes the first time.
set -euo pipefail
dir=${WEFT_ENGINE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/weft/engine/bin}
moby=v2.0.0-beta.24
containerd=v2.4.2
runc=v1.5.2
compose=v2.40.3
stamp="$moby $containerd $runc compose $compose"
[ "$(cat "$dir/versions" 2>/dev/null)" = "$stamp" ] && exit 0

echo "building the newest Docker engine ($stamp) into $dir; this takes some minutes, once"
mkdir -p "$dir"
# runc must have cgo (its init is C), containerd and dockerd need none of our tags.
export GOBIN=$dir CGO_ENABLED=1 GOFLAGS=
go install -tags "exclude_graphdriver_btrfs netgo osusergo" "github.com/moby/moby/v2/cmd/dockerd@$moby"
go install "github.com/containerd/containerd/v2/cmd/containerd@$containerd" "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$containerd"
go install "github.com/opencontainers/runc@$runc"
# Compose's go.mod excludes versions, which go install refuses.
make=$(mktemp -d)
trap 'rm -rf "$make"' EXIT
(cd "$make" && go mod init compose && go get "github.com/docker/compose/v2/cmd@$compose" &&
	CGO_ENABLED=0 go build -o "$dir/docker-compose" github.com/docker/compose/v2/cmd) >"$make/log" 2>&1 || { cat "$make/log"; exit 1; }
echo "$stamp" >"$dir/versions"
