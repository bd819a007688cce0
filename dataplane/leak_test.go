package dataplane

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestNoWayToPeersPorts: what is forwarded from elsewhere than the underlay's link does not
// come to any port at which a peer takes VXLAN, be it not this host's own; that one is closed
// at no other peer.
func TestNoWayToPeersPorts(t *testing.T) {
	u := Underlay{Link: "eth0", Address: netip.MustParseAddr("192.0.2.1"), Prefix: netip.MustParsePrefix("192.0.2.0/24")}
	s := store.HostSnapshot{Self: store.Host{ID: "self", Address: u.Address, DataPort: 4797}, Networks: []store.Network{{ID: "net", VNI: 4096, Mode: store.ModeVXLAN}}}
	for i, port := range []uint16{4797, 5000, 0, 5000} {
		s.Peers = append(s.Peers, store.Peer{Host: store.Host{ID: store.HostID(rune('a' + i)), Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)}), DataPort: port}})
	}
	p := PlanHost(s, u)
	for v6, set := range map[bool]string{false: setPeers4, true: setPeers6} {
		const udp = "! -i eth0 -p udp -m udp --dport "
		want := []string{udp + "4797 -m set --match-set " + set + " dst -j DROP"}
		if !v6 {
			want = append(want, udp+"5000 -d 192.0.2.11 -j DROP", udp+"5000 -d 192.0.2.13 -j DROP")
		}
		for table, chain := range map[string]string{"raw": chainPrerout, "filter": chainForward} {
			c, _ := p[Chain{Table: table, V6: v6, Name: chain}.Key()].(Chain)
			var got []string
			for _, rule := range c.RuleLines() {
				if strings.HasPrefix(rule, udp) {
					got = append(got, rule)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s %s %s has %q, want %q", family(v6), table, chain, got, want)
			}
		}
	}
}
