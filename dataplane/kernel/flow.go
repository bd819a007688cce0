package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// Flow is what an endpoint of this host has sent: to an address, by a protocol, with one
// fate. Answers are another flow, of their sender's host.
type Flow struct {
	VNI         store.VNI
	Link        string // host's side of the sender's, "" when it is gone
	Source      netip.Addr
	Destination netip.Addr // behind a virtual address: the task's
	Service     netip.Addr // the virtual address that was asked, if any
	Protocol    uint8
	Port        uint16 // of TCP, UDP and SCTP: the lower one of both; 0: none, or not in the packet
	Verdict     Verdict
	Packets     uint64 // as on the wire
	Bytes       uint64 // with Ethernet header
	First, Last time.Time
}

// Verdict is what the port program did with a packet: "fast" (took it to its
// destination), "slow" (left it to the host's stack) or "dropped: " and why.
type Verdict string

const droppedVerdict = "dropped: "

// verdictOf returns the verdict that a number stands for, as dataplane/kernel/bpf/flow.h
// has them.
func verdictOf(v uint8) Verdict {
	const first = len(bpf.ProgramCounters{}.Dropped)
	behind := []Verdict{"fast", "slow", droppedVerdict + "service", droppedVerdict + "mtu"}
	switch i := int(v); {
	case i > 0 && i < len(Reasons):
		return droppedVerdict + Verdict(Reasons[i])
	case i >= first && i < first+len(behind):
		return behind[i-first]
	}
	return Verdict(fmt.Sprintf("unknown: %d", v))
}

// ErrNoFlows is the answer where Config asked for none.
var ErrNoFlows = errors.New("flows are not counted")

// readFlows reads the program's map.
func (k *Kernel) readFlows() (map[bpf.ProgramPair]bpf.ProgramTally, error) {
	if k.program.err != nil {
		return nil, k.program.err
	}
	if !k.cfg.Flows {
		return nil, ErrNoFlows
	}
	all, err := entries[bpf.ProgramPair, bpf.ProgramTally](k.program.objects.WeftPairs)
	if err != nil {
		return nil, fmt.Errorf("read the program's flows: %w", err)
	}
	return all, nil
}

// Flows returns what the port program knows of flows, in no order: at most 65,536, of which
// those that were not used for the longest go first.
func (k *Kernel) Flows() ([]Flow, error) {
	all, err := k.readFlows()
	if err != nil {
		return nil, err
	}
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	names := map[uint32]string{}
	for _, l := range links {
		names[uint32(l.index)] = l.name
	}
	booted, err := monotonicZero()
	if err != nil {
		return nil, err
	}
	out := make([]Flow, 0, len(all))
	for key, value := range all {
		f := flowObject(key, value, booted)
		f.Link = names[key.Link]
		out = append(out, f)
	}
	return out, nil
}

// flowObject lacks the name of the link. zero is when CLOCK_MONOTONIC was 0.
func flowObject(key bpf.ProgramPair, v bpf.ProgramTally, zero time.Time) Flow {
	f := Flow{VNI: store.VNI(v.Vni), Source: toAddr(key.Src), Destination: toAddr(key.Dst), Protocol: key.Protocol, Port: swap(key.Port),
		Verdict: verdictOf(key.Verdict), Packets: v.Packets, Bytes: v.Bytes, First: zero.Add(time.Duration(v.First)), Last: zero.Add(time.Duration(v.Last))}
	if key.Vip != 0 {
		f.Service = toAddr4(key.Vip)
	}
	return f
}

// monotonicZero returns when CLOCK_MONOTONIC was 0, by today's clock.
func monotonicZero() (time.Time, error) {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &since); err != nil {
		return time.Time{}, fmt.Errorf("read the clock: %w", err)
	}
	return time.Now().Add(-time.Duration(since.Nano())), nil
}

// FlowTotal is the sum over all packets with one verdict, since the program was loaded
// for the first time.
type FlowTotal struct{ Packets, Bytes uint64 }

// FlowTotals returns how many flows are known, and the sums by verdict, also of flows
// that are no longer.
func (k *Kernel) FlowTotals() (known int, sums map[Verdict]FlowTotal, err error) {
	all, err := k.readFlows()
	if err != nil {
		return 0, nil, err
	}
	sums = map[Verdict]FlowTotal{}
	var verdict uint32
	var each []bpf.ProgramTotal
	totals := k.program.objects.WeftTotals.Iterate()
	for totals.Next(&verdict, &each) {
		var sum FlowTotal
		for _, cpu := range each {
			sum.Packets, sum.Bytes = sum.Packets+cpu.Packets, sum.Bytes+cpu.Bytes
		}
		if sum != (FlowTotal{}) {
			sums[verdictOf(uint8(verdict))] = sum
		}
	}
	return len(all), sums, totals.Err()
}
