package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// natView is a peer as `weft peers` and `weft encryption` show it, by its name.
type natView struct {
	Name, Host, State, LastErr string
	Way                        string
	Alive, Cut                 bool
	Via                        netip.Addr
	Endpoint                   netip.AddrPort
}

// TestNAT has two hosts behind one NAT and one outside, on an encrypted network.
func TestNAT(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 3, func(i int, o *hosts.HostOptions) {
		if i > 0 {
			o.NAT = "home"
		}
	})
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	n := &nat{lab: lab, network: "enc", router: lab.Router("home"), a: lab.Hosts[0], b: lab.Hosts[1], c: lab.Hosts[2]}
	createNetwork(t, lab, "enc", 90, "-o", "encrypted", "--gateway", "10.90.0.1")
	for _, h := range lab.Hosts {
		n.containers = append(n.containers, run(t, h, "web", "--network", "enc"))
	}
	t.Run("inside and outside", n.insideAndOutside)
	t.Run("another mapping", n.anotherMapping)
	t.Run("no way", n.noWay)
	for _, h := range lab.Hosts {
		clean(t, h)
	}
}

// nat is host a outside, and b and c behind the router.
type nat struct {
	lab        *hosts.Lab
	router     *hosts.Router
	a, b, c    *hosts.Host
	network    string
	containers []hosts.Container // on it, of all hosts
}

// allTalk lets every container reach every other one, and sends the marker.
func (n *nat) allTalk(t *testing.T) (ways int) {
	t.Helper()
	for _, from := range n.containers {
		for _, to := range n.containers {
			if from != to {
				address := addressOf(t, to, n.network).String()
				reachWithin(t, 30*time.Second, from, address)
				sendText(t, from, address, marker)
				ways++
			}
		}
	}
	return ways
}

// peer returns what a host's command shows of another host.
func (n *nat) peer(t *testing.T, at *hosts.Host, command string, of *hosts.Host) natView {
	t.Helper()
	var all []natView
	if command == "encryption" {
		all = view[struct{ Peers []natView }](t, at, command).Peers
	} else {
		all = view[[]natView](t, at, command)
	}
	for _, p := range all {
		if p.Name == of.Name || p.Host == of.Name {
			return p
		}
	}
	t.Fatalf("weft %s on host %s does not show host %s: %+v", command, at.Name, of.Name, all)
	return natView{}
}

// insideAndOutside looks at the cable on both sides of the router while all talk.
func (n *nat) insideAndOutside(t *testing.T) {
	const filter = "udp or icmp or tcp"
	outer, err := n.lab.Underlay.Capture(t.Context(), n.b, filter)
	if err != nil {
		t.Fatal(err)
	}
	inner, err := n.router.Capture(t.Context(), n.b, filter)
	if err != nil {
		t.Fatal(err)
	}
	ways := n.allTalk(t)
	for _, from := range n.lab.Hosts {
		for _, to := range n.lab.Hosts {
			if from == to {
				continue
			}
			want := to.Address
			if from == n.a {
				want = n.router.Public
			}
			if p := n.peer(t, from, "peers", to); p.Via != want || !p.Alive || p.Cut {
				t.Errorf("weft peers on host %s shows %+v; want host %s alive by %s", from.Name, p, to.Name, want)
			}
			if p := n.peer(t, from, "encryption", to); p.State != "on" || p.Endpoint != netip.AddrPortFrom(want, to.Port+2) {
				t.Errorf("weft encryption on host %s shows %+v; want host %s on at %s, port %d", from.Name, p, to.Name, want, to.Port+2)
			}
		}
	}
	for _, h := range n.lab.Hosts {
		says(t, h, nil)
	}
	time.Sleep(1200 * time.Millisecond) // tcpdump is told of packets after a second at most
	packets := func(in []string, from netip.Addr, of *hosts.Host, to netip.Addr, at *hosts.Host) (count int) {
		for _, l := range in {
			if strings.Contains(l, fmt.Sprintf(" %s.%d > %s.%d:", from, of.Port+2, to, at.Port+2)) {
				count++
			}
		}
		return count
	}
	in, rawIn := stopped(t, inner)
	out, rawOut := stopped(t, outer)
	inside, outside := packets(in, n.b.Address, n.b, n.c.Address, n.c), packets(out, n.a.Address, n.a, n.router.Public, n.b)
	plain := bytes.Count(append(rawIn, rawOut...), []byte(marker))
	for _, l := range out {
		if strings.Contains(l, " 10.") || strings.Contains(l, " 192.168.") || strings.Contains(l, n.router.Public.String()+".") && !strings.Contains(l, " "+n.a.Address.String()+".") {
			t.Errorf("outside of the NAT: %s", l)
		}
	}
	if inside == 0 || outside == 0 || plain > 0 {
		t.Errorf("%d packets of WireGuard between the hosts behind the NAT, %d through it, %d plain ones", inside, outside, plain)
	}
	figure(t, "two hosts behind one NAT, one outside", ways, "all ways talk; %d packets of WireGuard inside, %d through the NAT, %d plain (target 0)", inside, outside, plain)
}

// anotherMapping makes the router forget where the traffic of host c went, forward
// nothing to its WireGuard any more, and send what comes from there from another address
// and other ports.
func (n *nat) anotherMapping(t *testing.T) {
	other := netip.MustParseAddr("192.0.2.99")
	first, last := n.c.Port+2, n.c.Port+3
	cable := fmt.Sprintf("PREROUTING -p udp -m multiport --ports %d,%d -j DROP", first, last)
	forward := fmt.Sprintf("PREROUTING -i outer -d %s -p udp --dport %d:%d -j DNAT --to-destination %s", n.router.Public, first, last, n.c.Address)
	hide := fmt.Sprintf("POSTROUTING -o outer -s %s -p udp --sport %d:%d -j SNAT --to-source %s:31000-31099", n.c.Address, first, last, other)
	from, to := n.containers[2], n.containers[0]
	probe := startProbe(t, from, to, addressOf(t, to, "enc"))
	n.onRouter(t, "sysctl -q -w net.netfilter.nf_conntrack_udp_timeout=1 net.netfilter.nf_conntrack_udp_timeout_stream=1")
	time.Sleep(100 * time.Millisecond) // packets pass, and what is known of them ends in a second from now on
	n.onRouter(t, "iptables -w -t raw -I "+cable)
	time.Sleep(3 * time.Second)
	n.onRouter(t, "ip address add "+other.String()+"/24 dev outer", "iptables -w -t nat -D "+forward, "iptables -w -t nat -I "+hide,
		"sysctl -q -w net.netfilter.nf_conntrack_udp_timeout=120 net.netfilter.nf_conntrack_udp_timeout_stream=120", "iptables -w -t raw -D "+cable)
	elsewhere := func() error {
		if p := n.peer(t, n.a, "encryption", n.c); p.State != "on" || p.Endpoint.Addr() != other || p.Endpoint.Port() < 31000 {
			return fmt.Errorf("host a seeks it at %+v", p)
		}
		return nil
	}
	took := eventually(t, 40*time.Second, "host a has learned where host c is", func(context.Context) error { return elsewhere() })
	reach(t, to, addressOf(t, from, "enc").String())
	report, err := probe.Stop()
	if err != nil && report.TCPErr != nil {
		t.Errorf("a connection through the NAT broke: %v", report.TCPErr)
	}
	// A repair on host a, while host c has nothing to say.
	if _, err := n.a.Exec(t.Context(), "ip", "route", "flush", "table", "4796"); err != nil {
		t.Fatal(err)
	}
	clean(t, n.a)
	if err := elsewhere(); err != nil {
		t.Errorf("after a repair %v", err)
	}
	n.allTalk(t)
	figure(t, "the NAT's mapping changes in mid-traffic", 1, "followed %s after the way was free; longest gap %s, of which 3 s are the test's", took.Round(100*time.Millisecond), report.Gap.Round(100*time.Millisecond))
	n.onRouter(t, "iptables -w -t nat -D "+hide, "iptables -w -t nat -A "+forward)
}

func (n *nat) onRouter(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if _, err := n.router.Exec(t.Context(), strings.Fields(line)...); err != nil {
			t.Fatal(err)
		}
	}
}

// noWay drops everything between hosts a and c; b reaches both.
func (n *nat) noWay(t *testing.T) {
	rules := []string{fmt.Sprintf("FORWARD -s %s -d %s -j DROP", n.a.Address, n.c.Address), fmt.Sprintf("FORWARD -s %s -d %s -j DROP", n.c.Address, n.a.Address)}
	for _, r := range rules {
		n.onRouter(t, "iptables -w -I "+r)
	}
	pairs := [][2]*hosts.Host{{n.a, n.c}, {n.c, n.a}}
	for _, pair := range pairs {
		took := eventually(t, 2*time.Minute, "host "+pair[0].Name+" shows that it does not reach host "+pair[1].Name, func(ctx context.Context) error {
			if p := n.peer(t, pair[0], "peers", pair[1]); !p.Alive || !p.Cut || p.LastErr == "" {
				return fmt.Errorf("weft peers shows %+v", p)
			}
			out, err := pair[0].Exec(ctx, "weft", "peers")
			if err == nil && strings.Count(out, "alive, not reached from here") != 1 {
				err = errors.New(out)
			}
			return err
		})
		tells(t, pair[0], "host "+pair[1].Name+" (", "is alive, as others tell, but this host does not reach it")
		figure(t, "two hosts that do not reach each other, while a third reaches both", 1, "host %s tells after %s", pair[0].Name, took.Round(time.Second))
	}
	silent(t, n.containers[0], addressOf(t, n.containers[2], "enc").String())
	for _, far := range []hosts.Container{n.containers[0], n.containers[2]} {
		address := addressOf(t, far, "enc").String()
		reach(t, n.containers[1], address)
		if p := n.peer(t, n.b, "peers", far.Host); !p.Alive || p.Cut {
			t.Errorf("host b shows %+v", p)
		}
	}
	for _, r := range rules {
		n.onRouter(t, "iptables -w -D "+r)
	}
	took := eventually(t, time.Minute, "hosts a and c reach each other", func(context.Context) error {
		for _, pair := range pairs {
			if p := n.peer(t, pair[0], "peers", pair[1]); !p.Alive || p.Cut {
				return fmt.Errorf("weft peers on host %s shows %+v", pair[0].Name, p)
			}
		}
		return nil
	})
	untold(t, n.a, "does not reach it")
	n.allTalk(t)
	figure(t, "the way between the two is free again", 1, "weft peers shows it after %s", took.Round(100*time.Millisecond))
}

// TestNATsAlike has two NATs with the same private addresses behind them, and so two hosts
// with one address, and a neighbour of one of them that seems to be that of the other.
func TestNATsAlike(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 4, func(i int, o *hosts.HostOptions) {
		o.NAT = []string{"", "home", "office", "office"}[i]
	})
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	n := &nat{lab: lab}
	createNetwork(t, lab, "enc", 97, "-o", "encrypted", "--gateway", "10.97.0.1")
	createNetwork(t, lab, "flat", 98, "-o", "mode=routed", "--gateway", "10.98.0.1")
	ways := 0
	for _, n.network = range []string{"enc", "flat"} {
		n.containers = nil
		for _, h := range lab.Hosts {
			n.containers = append(n.containers, run(t, h, "c"+n.network, "--network", n.network))
		}
		ways += n.allTalk(t)
	}
	seen := func(context.Context) (err error) {
		for _, from := range lab.Hosts {
			for _, to := range lab.Hosts {
				want, way := to.Address, "wireguard"
				if office := lab.Router("office").Public; to.Public.IsValid() && from.Public != to.Public {
					want = to.Public
				} else if from.Public == office && to.Public == office {
					way = "direct"
				}
				if from == to {
					continue
				}
				if p := n.peer(t, from, "peers", to); p.Via != want || !p.Alive || p.Cut || !strings.HasPrefix(p.Way, way) {
					err = errors.Join(err, fmt.Errorf("weft peers on host %s shows %+v; want host %s alive by %s, %s", from.Name, p, to.Name, want, way))
				}
			}
		}
		return err
	}
	if err := seen(t.Context()); err != nil {
		t.Error(err)
	}
	// What is encrypted only because a NAT lies between follows keys as well.
	from, to := n.containers[0], n.containers[1]
	probe := startProbe(t, from, to, addressOf(t, to, n.network))
	changeKeys(t, lab.Hosts, lab.Hosts[:2])
	report := lossless(t, probe)
	// The next process knows it from the start.
	for _, h := range lab.Hosts {
		killPlugin(t, h)
	}
	took := eventually(t, 30*time.Second, "the hosts know each other after their plugins were killed", seen)
	for _, h := range lab.Hosts {
		says(t, h, nil) // of different ports, which no network needs
		clean(t, h)
	}
	createNetwork(t, lab, "bridged", 99)
	for _, h := range lab.Hosts {
		if h.Public == lab.Router("office").Public {
			tells(t, h, "WEFT_DATA_PORT differs", "no VXLAN passes between them")
		} else {
			says(t, h, nil)
		}
	}
	figure(t, "four hosts, three of them behind two NATs with the same addresses", ways, "all ways talk, by the right addresses; %d of %d packets of a routed network lost while two keys changed; after kill -9 of all plugins again after %s",
		report.Lost, report.Sent, took.Round(100*time.Millisecond))
}
