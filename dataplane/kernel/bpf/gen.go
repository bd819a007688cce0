// Package bpf holds the port program, compiled, and the Go types of its maps. Sources
// are port.c and its headers; a test compiles them and compares.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -cflags "-O2 -g -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu" -target bpfel,bpfeb -no-global-types -type settings -type port -type dest_key -type dest -type counters -type addr -type service -type backend -type flow -type flow_to -type part -type pair -type tally -type total Program port.c
