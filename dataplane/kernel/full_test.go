package kernel_test

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// TestFullMaps: with the port program's maps full, a new destination is reached by the slow
// path, of a new service it is said that it has no room, and nothing else fails; when there
// is room again, both are as others.
func TestFullMaps(t *testing.T) {
	t.Parallel()
	all := fastHosts(t, store.ModeVXLAN, [2]bool{true, true})
	a, b := all[0], all[1]
	var empty []func()
	for _, name := range []string{"weft_dests", "weft_services"} {
		empty = append(empty, a.k.FillMap(t, name))
	}
	a.filled, a.refused = true, map[dataplane.Key]bool{}
	b.endpoint(20)
	b.program(t, all...)
	b.start(t)
	late, container := b.endpoints[2], b.containers[2]
	vip := netip.MustParseAddr("10.9.0.100")
	a.services = []store.Service{{VIP: vip, Backends: []netip.Addr{late.IPv4.Addr()}}}
	a.program(t, all...)
	dest, service := dataplane.Dest{MAC: late.MAC}.Key(), dataplane.Service{VIP: vip}.Key()
	if len(a.refused) != 2 || !a.refused[dest] || !a.refused[service] {
		t.Errorf("no room for %v, want %v and %v", a.refused, dest, service)
	}
	slow := func(address netip.Addr) bool {
		t.Helper()
		before := counted(t, a.k)
		echo(t, a.containers[0], container, address)
		now := counted(t, a.k)
		return now.Slow-before.Slow > now.Fast-before.Fast
	}
	if !slow(late.IPv4.Addr()) {
		t.Error("what the full map does not know is not reached by the slow path")
	}
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())

	for _, fn := range empty {
		fn()
	}
	a.filled = false
	a.program(t, all...)
	if slow(late.IPv4.Addr()) {
		t.Error("with room in the map, the slow path is taken")
	}
	asks(t, a.containers[0], vip, container, late.IPv4.Addr())
}

func counted(t *testing.T, k *kernel.Kernel) kernel.Counters {
	t.Helper()
	sum, err := k.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return sum
}
