package dataplane

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestForeignAddresses: a peer draws nothing to itself but addresses of the network, and
// not its gateway: by endpoints and by services.
func TestForeignAddresses(t *testing.T) {
	for _, name := range []string{"routed", "encrypted", "program", "dualstack"} {
		_, s := readScene(t, "testdata/"+name+".txtar")
		s.Underlay.Program = true
		gateway := s.Snapshot.Network.Subnets[0].Gateway
		want := s.plan(t)
		told := len(s.Snapshot.Remote)
		for i, a := range []string{"8.8.8.8", "10.51.0.2", "192.0.2.1", gateway.String(), "2001:db8::8"} {
			e := store.RemoteEndpoint{Owner: s.Snapshot.Remote[0].Owner}
			e.ID, e.MAC = store.EndpointID(strings.Repeat("e", 63)+string(rune('0'+i))), store.MAC{2, 0, 0, 0, 1, byte(i)}
			if e.IPv4 = netip.MustParseAddr(a); e.IPv4.Is6() {
				e.IPv4, e.IPv6 = netip.Addr{}, e.IPv4
			}
			s.Snapshot.Remote = append(s.Snapshot.Remote, e)
			s.Snapshot.Services = append(s.Snapshot.Services, store.Service{VNI: s.Snapshot.VNI, VIP: netip.MustParseAddr(a)})
			for line := range strings.Lines(s.plan(t)) {
				if !strings.Contains(want, line) && strings.Contains(line, a) {
					t.Errorf("%s: a peer tells %s, and the plan has %s", name, a, line)
				}
			}
		}
		if e := s.Snapshot.Remote[told]; !e.IPv4.IsValid() {
			t.Errorf("%s: the snapshot, which others read too, was changed", name)
		}
	}
}
