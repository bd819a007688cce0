package dataplane

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestWrongChecksumsTakeTheVXLANDevice: where the underlay's link computes those inside of
// VXLAN wrong, the program puts no packets into VXLAN. What it does without VXLAN it goes
// on doing.
func TestWrongChecksumsTakeTheVXLANDevice(t *testing.T) {
	for _, c := range []struct {
		mode       string
		noChecksum bool
		known      bool
	}{{store.ModeVXLAN, false, true}, {store.ModeVXLAN, true, false}, {store.ModeRouted, true, true}} {
		u := Underlay{Link: "eth0", Address: netip.MustParseAddr("192.0.2.1"), Prefix: netip.MustParsePrefix("192.0.2.0/24"), Ethernet: true, Program: true, NoChecksum: c.noChecksum}
		peer := store.Host{ID: "peer", Address: netip.MustParseAddr("192.0.2.2"), DataPort: 4797}
		here := store.Endpoint{ID: "e", Network: "net", VNI: 4096, MAC: store.MAC{2, 0, 0, 0, 0, 1}, IPv4: netip.MustParsePrefix("10.1.0.2/16")}
		there := store.SharedEndpoint{MAC: store.MAC{2, 0, 0, 0, 0, 2}, IPv4: netip.MustParseAddr("10.1.0.3")}
		p, err := PlanNetwork(store.Snapshot{VNI: 4096, Self: store.Host{ID: "self", Address: u.Address, DataPort: 4797},
			Network:   &store.Network{ID: "net", VNI: 4096, Mode: c.mode, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/16")}}},
			Endpoints: []store.Endpoint{here}, Peers: []store.Peer{{Host: peer}}, Remote: []store.RemoteEndpoint{{Owner: peer.ID, SharedEndpoint: there}}}, u)
		if err != nil {
			t.Fatal(err)
		}
		known := map[bool]bool{} // of this host, of the peer
		for _, o := range p {
			if d, ok := o.(Dest); ok {
				known[d.Link != ""] = true
			}
		}
		if !known[true] || known[false] != c.known {
			t.Errorf("%s, wrong checksums %t: the program knows the peer's endpoint: %t, its own: %t", c.mode, c.noChecksum, known[false], known[true])
		}
	}
}
