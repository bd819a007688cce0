# The plugin's root file system, for machines with a registry:
#
#     docker build -o type=local,dest=build/plugin/rootfs .
#     cp config.json build/plugin/
#     docker plugin create weft:latest build/plugin
#
# `make plugin` makes the same without one. What is in it: plugin/rootfs.sh.
FROM golang:1.26-bookworm AS weft
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-X main.version=$VERSION" -o /weft ./plugin

FROM debian:bookworm-slim AS rootfs
RUN apt-get update && apt-get install -y --no-install-recommends iptables
COPY plugin/rootfs.sh /
COPY --from=weft /weft /
RUN /rootfs.sh /rootfs /weft

FROM scratch
COPY --from=rootfs /rootfs/ /
