# Thin: each target calls one program. PLUGIN is where the plugin's folder goes,
# TAGS are Go build tags, VERSION is what the plugin says of itself.
PLUGIN ?= build/plugin
TAGS ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
export CGO_ENABLED = 0

.PHONY: help build plugin demo demo-swarm demo-encrypted test soak bench sim lint

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

build: ## compile the plugin and command to build/weft
	go build -trimpath -tags '$(TAGS)' -ldflags '-X main.version=$(VERSION)' -o build/weft ./plugin

plugin: ## make the managed plugin's folder, for docker plugin create
	rm -rf '$(PLUGIN)'
	mkdir -p '$(PLUGIN)'
	go build -trimpath -tags '$(TAGS)' -ldflags '-X main.version=$(VERSION)' -o '$(PLUGIN)/weft.tmp' ./plugin
	cp config.json '$(PLUGIN)/config.json'
	sh plugin/rootfs.sh '$(PLUGIN)/rootfs' '$(PLUGIN)/weft.tmp'
	rm '$(PLUGIN)/weft.tmp'

demo: ## two Docker hosts on this machine, the plugin on both, containers that talk
	tests/run.sh demo

demo-swarm: ## three Docker hosts in a Swarm, a stack, the leader killed, a host drained
	tests/run.sh demo-swarm

demo-encrypted: ## three Docker hosts, one behind a NAT, an encrypted network, and a capture on each cable
	tests/run.sh demo-encrypted

test: ## every test, on real dockerds
	tests/run.sh test

soak: ## the full numbers of the scorecard; takes hours (RUN=TestSwarm: of that test alone)
	tests/run.sh soak $(if $(RUN),'$(RUN)')

bench: ## speed against Docker's own networks, as ratios
	tests/run.sh bench

sim: ## the control plane of 25 to 5,000 hosts, simulated; takes most of an hour
	tests/run.sh sim

lint: ## golangci-lint with .golangci.yml
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run
