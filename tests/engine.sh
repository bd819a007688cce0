#!/usr/bin/env bash
# engine.sh: builds the newest Docker engine by package name, once, into
# $WEFT_ENGINE_DIR or the user's cache. It takes several minutes the first time.
set -euo pipefail
dir=${WEFT_ENGINE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/weft/engine/bin}
moby=v2.0.0-beta.24
containerd=v2.4.2
runc=v1.5.2
stamp="$moby $containerd $runc"
[ "$(cat "$dir/versions" 2>/dev/null)" = "$stamp" ] && exit 0

echo "building the newest Docker engine ($stamp) into $dir; this takes some minutes, once"
mkdir -p "$dir"
# runc must have cgo (its init is C), containerd and dockerd need none of our tags.
export GOBIN=$dir CGO_ENABLED=1 GOFLAGS=
go install -tags "exclude_graphdriver_btrfs netgo osusergo" "github.com/moby/moby/v2/cmd/dockerd@$moby"
go install "github.com/containerd/containerd/v2/cmd/containerd@$containerd" "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@$containerd"
go install "github.com/opencontainers/runc@$runc"
echo "$stamp" >"$dir/versions"
