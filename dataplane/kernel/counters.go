package kernel

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
)

// Reasons are the reasons for which the guard drops a frame, in the order of enum reason.
var Reasons = []string{"", "short", "mac", "ipv4", "ipv6", "arp", "nd", "ra", "dhcp", "bridge", "vlan", "ethertype", "headers"}

// Counters are what the port program has counted of endpoints since they were made.
type Counters struct {
	Dropped map[string]uint64 `json:"dropped,omitempty"` // frames that the guard dropped, by reason
	Fast    uint64            `json:"fast"`              // frames that went past the host's stack
	Slow    uint64            `json:"slow"`              // frames that were left to it
}

func (c *Counters) add(each []bpf.ProgramCounters) {
	for _, cpu := range each {
		for i, why := range Reasons {
			if cpu.Dropped[i] > 0 {
				c.Dropped[why] += cpu.Dropped[i]
			}
		}
		c.Fast, c.Slow = c.Fast+cpu.Fast, c.Slow+cpu.Slow
	}
}

// makeCounters lets the program count for an endpoint. It has no place of its own for that:
// what it does not find it does not count.
func makeCounters(m *ebpf.Map, index uint32) error {
	zero := make([]bpf.ProgramCounters, ebpf.MustPossibleCPU())
	if err := m.Update(index, zero, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("counters of the port program: %w", err)
	}
	return nil
}

func hasCounters(m *ebpf.Map, index uint32) bool {
	var each []bpf.ProgramCounters
	return m.Lookup(index, &each) == nil
}

// Counters returns the sum over all endpoints of this host.
func (k *Kernel) Counters() (sum Counters, err error) {
	sum.Dropped = map[string]uint64{}
	if k.program.err != nil {
		return sum, k.program.err
	}
	var index uint32
	var each []bpf.ProgramCounters
	all := k.program.objects.WeftCounters.Iterate()
	for all.Next(&index, &each) {
		sum.add(each)
	}
	return sum, all.Err()
}

// CountersOf returns those of one endpoint, by the host's side of its link.
func (k *Kernel) CountersOf(veth string) (c Counters, err error) {
	c.Dropped = map[string]uint64{}
	if k.program.err != nil {
		return c, k.program.err
	}
	l, err := k.link(veth)
	if err != nil {
		return c, err
	}
	var each []bpf.ProgramCounters
	if err := k.program.objects.WeftCounters.Lookup(uint32(l.index), &each); err != nil {
		return c, err
	}
	c.add(each)
	return c, nil
}
