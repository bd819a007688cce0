package dataplane

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestNoWayToPeersPorts: what is forwarded from elsewhere than the underlay's link does not
// come to any port at which a peer takes VXLAN, be it not this host's own.
func TestNoWayToPeersPorts(t *testing.T) {
	u := Underlay{Link: "eth0", Address: netip.MustParseAddr("192.0.2.1"), Prefix: netip.MustParsePrefix("192.0.2.0/24")}
	s := store.HostSnapshot{Self: store.Host{ID: "self", Address: u.Address, DataPort: 4797}, Networks: []store.Network{{ID: "net", VNI: 4096, Mode: store.ModeVXLAN}}}
	for i, port := range []uint16{4797, 5000, 0, 5000} {
		s.Peers = append(s.Peers, store.Peer{Host: store.Host{ID: store.HostID(rune('a' + i)), Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)}), DataPort: port}})
	}
	p := PlanHost(s, u)
	for v6, set := range map[bool]string{false: setPeers4, true: setPeers6} {
		var want []string
		for _, port := range []string{"4797", "5000"} {
			want = append(want, "! -i eth0 -p udp -m udp --dport "+port+" -m set --match-set "+set+" dst -j DROP")
		}
		for table, chain := range map[string]string{"raw": chainPrerout, "filter": chainForward} {
			c, _ := p[Chain{Table: table, V6: v6, Name: chain}.Key()].(Chain)
			if rules := c.RuleLines(); len(rules) < 2 || !slices.Equal(rules[:2], want) || strings.Contains(strings.Join(rules, "\n"), "--dport 0 ") {
				t.Errorf("%s %s %s begins with %q, want %q", family(v6), table, chain, rules[:min(2, len(rules))], want)
			}
		}
	}
}
