package dataplane

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestWays is about how packets of routed networks go to a peer, and where its WireGuard
// is sought.
func TestWays(t *testing.T) {
	u := Underlay{Address: netip.MustParseAddr("192.168.1.2"), Prefix: netip.MustParsePrefix("192.168.1.0/24")}
	for _, c := range []struct {
		name, public, peer, peerPublic string
		away                           bool
		way, sought                    string
	}{
		{"on the link", "", "192.168.1.3", "", false, "direct", "192.168.1.3:1"},
		{"behind a router", "", "192.168.2.3", "", false, "vxlan", "192.168.2.3:1"},
		{"on the link, each with a public address", "198.51.100.2", "192.168.1.3", "198.51.100.3", false, "direct", "192.168.1.3:1,198.51.100.3:1"},
		{"behind the same NAT, on another link", "198.51.100.2", "192.168.2.3", "198.51.100.2", false, "vxlan", "192.168.2.3:1,198.51.100.2:1"},
		{"behind another NAT", "198.51.100.2", "192.168.2.3", "198.51.100.3", false, "wireguard", "198.51.100.3:1,192.168.2.3:1"},
		{"outside of this host's NAT", "198.51.100.2", "203.0.113.3", "", false, "wireguard", "203.0.113.3:1"},
		{"behind another NAT with the same addresses", "198.51.100.2", "192.168.1.3", "198.51.100.3", true, "wireguard", "198.51.100.3:1,192.168.1.3:1"},
	} {
		address := func(text string) (a netip.Addr) {
			if text != "" {
				a = netip.MustParseAddr(text)
			}
			return a
		}
		self := store.Host{Address: u.Address, Public: address(c.public)}
		peer := store.Peer{Host: store.Host{Address: address(c.peer), Public: address(c.peerPublic), Tunnel: store.Tunnel{Port: 1}}, Away: c.away}
		if way, sought := Way(self, peer, u), candidates(self, peer, 0, u); way != c.way || sought != c.sought {
			t.Errorf("%s: by %s, at %s; want %s, %s", c.name, way, sought, c.way, c.sought)
		}
		four := []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/16")}}
		six := append(four[:1:1], store.Subnet{Pool: netip.MustParsePrefix("fd00::/64")})
		for _, n := range []struct {
			store.Network
			want bool
		}{
			{store.Network{Mode: store.ModeVXLAN, Subnets: four}, c.way != "wireguard"},
			{store.Network{Mode: store.ModeRouted, Subnets: four}, c.way == "vxlan"},
			{store.Network{Mode: store.ModeRouted, Subnets: six}, c.way != "wireguard"},
			{store.Network{Mode: store.ModeVXLAN, Subnets: four, Encrypted: true}, false},
			{store.Network{Mode: store.ModeRouted, Subnets: six, Encrypted: true}, false},
		} {
			if got := InVXLAN(n.Network, self, peer, u); got != n.want {
				t.Errorf("%s, network %+v: in VXLAN is %t", c.name, n.Network, got)
			}
		}
	}
}
