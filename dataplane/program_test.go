package dataplane_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// TestTasksOfAService: all tasks of which the endpoint is known are behind the virtual
// address, up to the limit, and then those with the lowest addresses.
func TestTasksOfAService(t *testing.T) {
	u := underlay
	u.Program = true
	for tasks, want := range map[int]int{0: 0, 1: 1, 500: 500, dataplane.MaxBackends: dataplane.MaxBackends, 600: dataplane.MaxBackends} {
		n := network(1)
		vip := netip.MustParseAddr("10.1.255.1")
		s := store.Snapshot{VNI: 1, Self: store.Host{ID: "self"}, Network: &n, Served: true, Services: []store.Service{{VNI: 1, VIP: vip}}}
		var all []string
		for i := range tasks {
			e := endpoint(1, 2+i)
			if i%2 == 0 {
				s.Endpoints = append(s.Endpoints, e)
			} else {
				s.Remote = append(s.Remote, store.RemoteEndpoint{Owner: "peer", SharedEndpoint: e.Shared()})
			}
			s.Services[0].Backends = append(s.Services[0].Backends, e.IPv4.Addr())
			all = append(all, e.IPv4.Addr().String()+" "+e.MAC.String())
		}
		p, err := dataplane.PlanNetwork(s, u)
		if err != nil {
			t.Fatal(err)
		}
		o, _ := p[dataplane.Service{VIP: vip}.Key()].(dataplane.Service)
		got := strings.FieldsFunc(o.Backends, func(c rune) bool { return c == ',' })
		if !slices.Equal(got, all[:want]) {
			t.Errorf("of %d tasks %d are behind the address, want the first %d", tasks, len(got), want)
		}
	}
}
