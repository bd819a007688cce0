package kernel_test

import (
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// From a network without a way out nobody reaches what is published on his host, by Weft
// or by Docker, nor a process of the host; from others everybody does. Docker's networks
// are alike.
func TestPublishedPortsAreOutside(t *testing.T) {
	t.Parallel()
	led := func(s store.Snapshot) store.Snapshot { s.Network.GatewayWeft = true; return s }
	internal := func(s store.Snapshot) store.Snapshot { s.Network.Internal = true; return s }
	networks := map[string]store.Snapshot{}
	networks["led"] = led(kerneltest.Network(4200, 2, 0, 0, dataplane.Underlay{}, "10.200.0.0/24", "fd00:200::/64"))
	networks["routed"] = kerneltest.Routed(kerneltest.Network(4201, 2, 0, 0, dataplane.Underlay{}, "10.201.0.0/24", "fd00:201::/64"))
	networks["led"].Endpoints[0].Ports = []store.Port{{Proto: "tcp", Port: 80, HostPort: 8080}}
	networks["routed"].Endpoints[0].Ports = []store.Port{{Proto: "tcp", Port: 80, HostPort: 8081}}
	networks["internal led"] = internal(led(kerneltest.Network(4202, 1, 0, 0, dataplane.Underlay{}, "10.202.0.0/24", "fd00:202::/64")))
	networks["internal routed"] = internal(kerneltest.Routed(kerneltest.Network(4203, 1, 0, 0, dataplane.Underlay{}, "10.203.0.0/24", "fd00:203::/64")))
	networks["encrypted"] = kerneltest.Encrypted(kerneltest.Network(4204, 1, 0, 0, dataplane.Underlay{}, "10.204.0.0/24", "fd00:204::/64"), 1)

	host, containers := hostWith(t, networks)
	for _, name := range []string{"led", "routed"} {
		listens(t, containers[networks[name].Endpoints[0].ID], 80)
	}

	// A port that Docker publishes, by a rule and by a process, and one of the host's own.
	dockers := kerneltest.NewPlace(t)
	kerneltest.Wire(t, host, "docker0", []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")}, dockers, "eth0", []netip.Prefix{netip.MustParsePrefix("172.17.0.2/16")})
	dockers.Run(t, "ip route add default via 172.17.0.1")
	host.Run(t, "iptables -t nat -A PREROUTING -p tcp --dport 8090 -m addrtype --dst-type LOCAL -j DNAT --to-destination 172.17.0.2:80")
	listens(t, dockers, 80)
	listens(t, host, 8091)
	dial := func(from *kerneltest.Place, at netip.AddrPort, wait time.Duration) (err error) {
		from.Do(func() {
			var c net.Conn
			if c, err = net.DialTimeout("tcp", at.String(), wait); err == nil {
				_ = c.Close()
			}
		})
		return err
	}
	for name, s := range networks {
		from, closed := containers[s.Endpoints[len(s.Endpoints)-1].ID], name != "led" && name != "routed"
		for _, sub := range s.Network.Subnets {
			for _, port := range []uint16{8080, 8081, 8090, 8091} {
				at := netip.AddrPortFrom(sub.Gateway, port)
				if port == 8090 && at.Addr().Is6() {
					continue
				}
				wait := 5 * time.Second
				if closed {
					wait = 300 * time.Millisecond
				}
				if err := dial(from, at, wait); (err == nil) == closed {
					t.Errorf("network %s, %s: %v", name, at, err)
				}
			}
		}
	}
	// Docker's networks have what its rules, behind ours, accept: not its internal ones.
	inner := kerneltest.NewPlace(t)
	kerneltest.Wire(t, host, "br-inner", []netip.Prefix{netip.MustParsePrefix("172.18.0.1/16")}, inner, "eth0", []netip.Prefix{netip.MustParsePrefix("172.18.0.2/16")})
	host.Run(t, "iptables -A FORWARD -i docker0 -j ACCEPT")
	for _, port := range []uint16{8080, 8081} {
		if err := dial(dockers, netip.AddrPortFrom(netip.MustParseAddr("172.17.0.1"), port), 5*time.Second); err != nil {
			t.Errorf("Docker's network, port %d: %v", port, err)
		}
		if dial(inner, netip.AddrPortFrom(netip.MustParseAddr("172.18.0.1"), port), 300*time.Millisecond) == nil {
			t.Errorf("Docker's internal network reaches port %d", port)
		}
	}
	// The host itself is answered, where it has a way.
	for _, name := range []string{"internal routed", "encrypted"} {
		e := networks[name].Endpoints[0]
		listens(t, containers[e.ID], 80)
		for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
			if err := dial(host, netip.AddrPortFrom(a, 80), 5*time.Second); err != nil {
				t.Errorf("from the host to network %s, %s: %v", name, a, err)
			}
		}
	}
}

// hostWith has a host of those networks, with a container for each endpoint.
func hostWith(t *testing.T, networks map[string]store.Snapshot) (*kerneltest.Place, map[store.EndpointID]*kerneltest.Place) {
	t.Helper()
	host, containers := kerneltest.NewPlace(t), map[store.EndpointID]*kerneltest.Place{}
	host.Run(t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\niptables -P FORWARD DROP\nip6tables -P FORWARD DROP")
	var k *kernel.Kernel
	var err error
	host.Do(func() {
		k, err = kernel.New(kernel.Config{WireGuardKey: kerneltest.WireGuardKey, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	program := func() {
		var records store.HostSnapshot
		plans := map[store.VNI]dataplane.Plan{}
		for _, s := range networks {
			if records.Networks = append(records.Networks, *s.Network); s.Network.Encrypted {
				records.Self = s.Self
			}
			for _, e := range s.Endpoints {
				if len(e.Ports) > 0 {
					records.Published = append(records.Published, e)
				}
			}
			if plans[s.VNI], err = dataplane.PlanNetwork(s, dataplane.Underlay{}); err != nil {
				t.Fatal(err)
			}
		}
		plans[store.HostVNI] = dataplane.PlanHost(records, dataplane.Underlay{})
		host.Do(func() {
			for _, v := range slices.Sorted(maps.Keys(plans)) { // the host's first
				have, err := k.Read(t.Context(), v)
				if err != nil {
					t.Error(err)
				}
				for _, err := range k.Apply(t.Context(), dataplane.Diff(plans[v], have)) {
					t.Error(err)
				}
			}
		})
	}
	program()
	for _, s := range networks {
		for i, e := range s.Endpoints {
			c := kerneltest.NewPlace(t)
			c.Take(t, host, dataplane.PeerName(dataplane.VethName(e.ID)), "eth0", e.IPv4, e.IPv6)
			s.Endpoints[i].Sandbox, containers[e.ID] = "/there", c
			if s.Network.Internal || !s.Network.OwnGateway() {
				continue
			}
			for _, sub := range s.Network.Subnets { // also to the rest of a routed network
				for _, to := range []string{"default", netip.PrefixFrom(sub.Pool.Addr(), sub.Pool.Bits()+1).String()} {
					c.Run(t, "ip route add "+to+" via "+sub.Gateway.String())
				}
			}
		}
	}
	program() // they have joined
	return host, containers
}

// listens takes connections at a port of the place.
func listens(t *testing.T, p *kerneltest.Place, port int) {
	t.Helper()
	var l net.Listener
	var err error
	p.Do(func() { l, err = net.ListenTCP("tcp", &net.TCPAddr{Port: port}) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
}

// What leaves a network has the host's address, and its own where the network says so.
func TestMasquerade(t *testing.T) {
	networks := map[string]store.Snapshot{}
	for i := range 4 {
		s := kerneltest.Network(store.VNI(4301+i), 1, 0, 0, dataplane.Underlay{}, fmt.Sprintf("10.%d.0.0/24", 101+i), fmt.Sprintf("fd00:%d::/64", 101+i))
		if s.Network.GatewayWeft = i < 2; i >= 2 {
			s = kerneltest.Routed(s)
		}
		s.Network.NoMasquerade = i%2 == 1
		networks[s.Network.Mode+fmt.Sprint(s.Network.NoMasquerade)] = s
	}
	host, containers := hostWith(t, networks)
	outside := kerneltest.NewPlace(t)
	here := []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}
	there := []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}
	kerneltest.Wire(t, host, "under0", here, outside, "eth0", there)
	outside.Run(t, "ip route add default via 192.0.2.1\nip route add default via 2001:db8::1")
	for _, s := range networks {
		e := s.Endpoints[0]
		for i, own := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
			want, at := here[i].Addr(), net.UDPAddrFromAddrPort(netip.AddrPortFrom(there[i].Addr(), 9000))
			if s.Network.NoMasquerade {
				want = own
			}
			var in *net.UDPConn
			var err error
			outside.Do(func() { in, err = net.ListenUDP("udp", at) })
			if err != nil {
				t.Fatal(err)
			}
			containers[e.ID].Do(func() {
				var out *net.UDPConn
				if out, err = net.DialUDP("udp", nil, at); err == nil {
					_, err = out.Write([]byte("hello"))
					_ = out.Close()
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			_ = in.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, from, err := in.ReadFromUDPAddrPort(make([]byte, 10)); err != nil || from.Addr() != want {
				t.Errorf("%s: seen as %s, %v; want %s", s.Network.Mode, from, err, want)
			}
			_ = in.Close()
		}
	}
}
