package kernel_test

import (
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
// or by Docker, nor a process of the host; from others everybody does.
func TestPublishedPortsAreOutside(t *testing.T) {
	led := func(s store.Snapshot) store.Snapshot { s.Network.GatewayWeft = true; return s }
	internal := func(s store.Snapshot) store.Snapshot { s.Network.Internal = true; return s }
	networks := map[string]store.Snapshot{}
	for i, kind := range []func(store.Snapshot) store.Snapshot{led, kerneltest.Routed} {
		name := []string{"led", "routed"}[i]
		vni, pool := store.VNI(4201+10*i), [2]string{"10.201.0.0/24", "10.211.0.0/24"}[i]
		pool6 := [2]string{"fd00:201::/64", "fd00:211::/64"}[i]
		networks[name] = kind(kerneltest.Network(vni, 2, 0, 0, dataplane.Underlay{}, pool, pool6))
		networks[name].Endpoints[0].Ports = []store.Port{{Proto: "tcp", Port: 80, HostPort: uint16(8080 + i)}}
	}
	networks["internal led"] = internal(led(kerneltest.Network(4202, 1, 0, 0, dataplane.Underlay{}, "10.202.0.0/24", "fd00:202::/64")))
	networks["internal routed"] = internal(kerneltest.Routed(kerneltest.Network(4203, 1, 0, 0, dataplane.Underlay{}, "10.203.0.0/24", "fd00:203::/64")))
	networks["encrypted"] = kerneltest.Encrypted(kerneltest.Network(4204, 1, 0, 0, dataplane.Underlay{}, "10.204.0.0/24", "fd00:204::/64"), 1)

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
		records := store.HostSnapshot{Self: networks["encrypted"].Self}
		plans := map[store.VNI]dataplane.Plan{}
		for _, s := range networks {
			records.Networks = append(records.Networks, *s.Network)
			if len(s.Endpoints) > 1 {
				records.Published = append(records.Published, s.Endpoints[0])
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
		}
		if len(s.Endpoints) > 1 {
			c := containers[s.Endpoints[0].ID]
			for _, sub := range s.Network.Subnets { // also to the rest of a routed network
				for _, to := range []string{"default", netip.PrefixFrom(sub.Pool.Addr(), sub.Pool.Bits()+1).String()} {
					c.Run(t, "ip route add "+to+" via "+sub.Gateway.String())
				}
			}
			listens(t, c, 80)
		}
	}
	program() // they have joined

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
