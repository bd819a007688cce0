package tests

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestRouter has two hosts in two subnets, with a router between that does no NAT. What
// goes between their containers on a routed network takes the network's VXLAN device, of
// IPv4 too, and on an encrypted one WireGuard.
func TestRouter(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 2, func(i int, o *hosts.HostOptions) {
		if i == 1 {
			o.Router = "between"
		}
	})
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	a, b := lab.Hosts[0], lab.Hosts[1]
	cable, err := lab.Router("between").Capture(t.Context(), b, "udp or icmp or icmp6 or tcp")
	if err != nil {
		t.Fatal(err)
	}
	arrived, ran := 0, map[string]bool{}
	for i, n := range []struct {
		name, way string
		mtu       int
		args      []string
	}{
		{"flat", "vxlan", 1450, []string{"-o", "mode=routed"}},
		{"enc", "wireguard", 1440, []string{"-o", "encrypted"}},
	} {
		t.Run(n.name, func(t *testing.T) {
			ran[n.name] = true
			if n.name == "enc" && ran["flat"] {
				n.way = "vxlan," + n.way
			}
			second := 96 + i
			six := func(at string) string { return fmt.Sprintf("fd00:%d::%s", second, at) }
			createNetwork(t, lab, n.name, second, append(n.args, "--gateway", fmt.Sprintf("10.%d.0.1", second), "--ipv6", "--subnet", six("/64"))...)
			onA, onB := run(t, a, n.name, "--network", n.name, "--ip6", six("a")), run(t, b, n.name, "--network", n.name, "--ip6", six("b"))
			for _, pair := range [][2]hosts.Container{{onA, onB}, {onB, onA}} {
				from, to := pair[0], pair[1]
				for _, at := range []netip.Addr{addressOf(t, to, n.name), netip.MustParseAddr(six(to.Host.Name))} {
					reach(t, from, at.String())
					arrived += largest(t, from, to, at, n.mtu)
				}
			}
			for _, h := range lab.Hosts {
				if got := networkOf(t, h, n.name).EffectiveMTU; got != n.mtu {
					t.Errorf("host %s: network %s has MTU %d, want %d", h.Name, n.name, got, n.mtu)
				}
				eventually(t, 20*time.Second, "weft peers on host "+h.Name+" says "+n.way, func(context.Context) error {
					if p := view[[]natView](t, h, "peers"); len(p) != 1 || p[0].Way != n.way || !p[0].Alive || p[0].Cut {
						return fmt.Errorf("it says %+v", p)
					}
					return nil
				})
			}
		})
	}
	time.Sleep(1200 * time.Millisecond) // tcpdump is told of packets after a second at most
	lines, _ := stopped(t, cable)
	vxlan, wireguard := 0, 0
	for _, l := range lines {
		switch {
		case strings.Contains(l, fmt.Sprintf(" > %s.4797: ", b.Address)) && strings.Contains(l, " "+a.Address.String()+"."):
			vxlan++
		case strings.Contains(l, fmt.Sprintf(" %s.4798 > %s.4798: ", a.Address, b.Address)):
			wireguard++
		case strings.Contains(l, " 10.9") || strings.Contains(l, "fd00:9"):
			t.Errorf("on the cable behind the router: %s", l)
		}
	}
	if vxlan == 0 && ran["flat"] || wireguard == 0 && ran["enc"] {
		t.Errorf("behind the router are %d packets of VXLAN from host a, %d of WireGuard", vxlan, wireguard)
	}
	for _, h := range lab.Hosts {
		says(t, h, nil)
		clean(t, h)
	}
	figure(t, "two hosts with a plain router between, a routed and an encrypted network", arrived, "packets of full size with DF arrived, both ways, both families; %d packets of VXLAN, %d of WireGuard", vxlan, wireguard)
}
