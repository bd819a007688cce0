package kernel_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// The backend is the one in which Docker has its chains, legacy tables are not made
// by looking, and what was left in the other backend is swept.
func TestBackendFollowsDocker(t *testing.T) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	want := kerneltest.Examples()[0].HostPlan()
	start := func(backend string) *kernel.Kernel {
		t.Helper()
		k := open(t, kernel.Config{})
		passHost(t, k, want)
		if k.Backend() != backend {
			t.Errorf("backend %q, want %q", k.Backend(), backend)
		}
		if ops := passHost(t, k, want); len(ops) != 0 {
			t.Errorf("still to do: %v", ops)
		}
		return k
	}
	ours := func(backend string) bool {
		return strings.Contains(kerneltest.Run(t, "iptables-"+backend+"-save")+kerneltest.Run(t, "ip6tables-"+backend+"-save"), "WEFT-")
	}
	start("nft")
	if out := kerneltest.Run(t, "iptables-legacy-save"); out != "" {
		t.Errorf("legacy tables were made: %s", out)
	}
	kerneltest.Run(t, "iptables-legacy", "-N", "DOCKER-USER")
	k := start("legacy")
	if ours("nft") || !ours("legacy") {
		t.Error("after the switch to legacy, nft is not swept")
	}
	kerneltest.Run(t, "iptables-legacy", "-X", "DOCKER-USER")
	kerneltest.Run(t, "iptables-nft", "-N", "DOCKER-FORWARD")
	start("nft")
	if ours("legacy") || !ours("nft") {
		t.Error("after the switch to nft, legacy is not swept")
	}
	if err := k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Put, Object: dataplane.Chain{Table: "filter@legacy", Name: "WEFT-X"}}}); len(err) != 1 {
		t.Error("a chain was made in a backend that is not in use")
	}
}

func TestUnknownSettings(t *testing.T) {
	for _, cfg := range []kernel.Config{{Backend: "ipchains"}, {Checksum: "perhaps"}} {
		if _, err := kernel.New(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

func TestUnderlayOfDefaultRoute(t *testing.T) {
	k := newKernel(t, kernel.Config{Checksum: "off"})
	u, err := k.Underlay(t.Context(), netip.Addr{})
	if err != nil || u.Address.IsValid() || u.Reason == "" {
		t.Errorf("without a default route: %+v, %v", u, err)
	}
	kerneltest.Script(t, `
		ip link add other0 type veth peer name other1
		ip addr add 10.77.0.1/24 dev other0
		ip addr add 10.77.0.2/24 dev other0
		ip link set other0 mtu 1400 up
		ip link set other1 up
		ip route add default via 10.77.0.254 dev other0 src 10.77.0.2`)
	u, err = k.Underlay(t.Context(), netip.Addr{})
	want := dataplane.Underlay{Program: true, Ethernet: true, Address: netip.MustParseAddr("10.77.0.2"), Prefix: netip.MustParsePrefix("10.77.0.0/24"), Link: "other0", MTU: 1400, NoChecksum: true, Reason: "switched off by setting"}
	if err != nil || u != want {
		t.Errorf("got %+v, %v; want %+v", u, err, want)
	}
	kerneltest.Script(t, "ip link set other0 down")
	if u, err = k.Underlay(t.Context(), netip.MustParseAddr("10.77.0.2")); err != nil || u.Address.IsValid() || !strings.Contains(u.Reason, "down") {
		t.Errorf("link down: %+v, %v", u, err)
	}
	kerneltest.Script(t, "ip -6 route add default via 2001:db8::99 dev under0")
	if u, err = k.Underlay(t.Context(), netip.Addr{}); err != nil || u.Address != kerneltest.Underlay6 {
		t.Errorf("IPv6 default route: %+v, %v", u, err)
	}
}

// On a link with several IPv6 addresses the host keeps its address whatever others come:
// the oldest, if it is of a subnet, and neither deprecated nor temporary.
func TestUnderlayKeepsItsIPv6Address(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	kerneltest.Script(t, `
		ip -6 addr flush dev under0 scope global
		ip -6 addr add 2001:db8::128/128 dev under0 nodad
		ip -6 addr add 2001:db8::dead/64 dev under0 nodad preferred_lft 0
		ip -6 route add default via fe80::1 dev under0`)
	for _, step := range []struct{ do, want string }{
		{"", "2001:db8::128"},
		{"ip -6 addr add 2001:db8::7/64 dev under0 nodad", "2001:db8::7"},
		{"ip -6 addr add fd00:1::7/64 dev under0 nodad", "2001:db8::7"},
		{"ip -6 addr add 2001:db8::129/128 dev under0 nodad", "2001:db8::7"},
		{"ip -6 addr change 2001:db8::7/64 dev under0 preferred_lft 0", "fd00:1::7"},
		{"ip -6 addr change 2001:db8::7/64 dev under0 preferred_lft forever valid_lft forever", "2001:db8::7"},
		{"ip -6 addr del 2001:db8::7/64 dev under0", "fd00:1::7"},
	} {
		if step.do != "" {
			kerneltest.Script(t, step.do)
		}
		if u, err := k.Underlay(t.Context(), netip.Addr{}); err != nil || u.Address.String() != step.want {
			t.Errorf("after %q: %s, %v; want %s", step.do, u.Address, err, step.want)
		}
	}
}

func TestRoutesAndForeignVXLANs(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	kerneltest.Script(t, `
		ip route add 10.50.0.0/16 via 192.0.2.9
		ip route add blackhole 10.60.0.0/16
		ip route add default via 192.0.2.9
		ip route add multicast 239.0.0.0/8 dev under0
		ip route add 10.70.0.0/16 table 77 via 192.0.2.9
		ip route add 10.80.0.0/16 nexthop via 192.0.2.9 dev under0 nexthop via 192.0.2.10 dev under0
		ip link add vx0 type vxlan id 77 local 192.0.2.1 dev under0 dstport 4789`)
	got, err := k.Routes(t.Context())
	want := []kernel.Route{
		{Prefix: netip.MustParsePrefix("10.50.0.0/16"), Link: "under0"},
		{Prefix: netip.MustParsePrefix("10.60.0.0/16")},
		{Prefix: netip.MustParsePrefix("10.80.0.0/16"), Link: "under0"},
		{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Link: "under0"},
		{Prefix: netip.MustParsePrefix("2001:db8::/64"), Link: "under0"},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || d != "" {
		t.Errorf("routes: %v\n%s", err, d)
	}
	e := kerneltest.Examples()[0]
	pass(t, k, e)
	vx, err := k.VXLANs(t.Context())
	if d := cmp.Diff([]kernel.ForeignVXLAN{{Name: "vx0", VNI: 77, Port: 4789}}, vx); err != nil || d != "" {
		t.Errorf("vxlans: %v\n%s", err, d)
	}
	kerneltest.Script(t, "ip link add vx1 type vxlan id 4097 local 192.0.2.1 dev under0 dstport 4797")
	want6, err := kerneltest.Examples()[1].Plan()
	if err != nil {
		t.Fatal(err)
	}
	named := slices.ContainsFunc(k.Apply(t.Context(), dataplane.Diff(want6, dataplane.Plan{})), func(e *dataplane.OpError) bool {
		return strings.Contains(e.Error(), "is used by link vx1")
	})
	if !named {
		t.Error("no error names the link that has the VNI")
	}
}

// Outside changes of each kind are told, with the network that they touch.
func TestWatch(t *testing.T) {
	t.Parallel()
	e := kerneltest.Examples()[0]
	vni := e.Snapshot.VNI
	bridge, vx, veth := dataplane.BridgeName(vni), dataplane.VXLANName(vni), dataplane.VethName(e.Snapshot.Endpoints[0].ID)
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			k := newKernel(t, kernel.Config{Backend: backend})
			passHost(t, k, e.HostPlan())
			pass(t, k, e)
			if _, err := k.Underlay(t.Context(), kerneltest.Underlay4); err != nil {
				t.Fatal(err)
			}
			events := k.Watch(t.Context())
			expect := func(want store.VNI, line string) {
				t.Helper()
				if want == store.HostVNI { // as the loop: repair, and look at what was done
					passHost(t, k, e.HostPlan())
					passHost(t, k, e.HostPlan())
				}
				quiet(t, events)
				kerneltest.Script(t, line)
				start, deadline := time.Now(), time.After(5*time.Second)
				for {
					select {
					case v := <-events:
						if v == want {
							t.Logf("%s: after %v", line, time.Since(start).Round(time.Millisecond))
							return
						}
					case <-deadline:
						t.Fatalf("%s: not told", line)
					}
				}
			}
			expect(store.HostVNI, "iptables-"+backend+" -F WEFT-FORWARD")
			expect(store.HostVNI, "iptables-"+backend+" -D FORWARD 1")
			expect(store.HostVNI, "ip6tables-"+backend+" -t raw -F")
			if backend == "legacy" {
				return
			}
			expect(vni, "ip link set "+veth+" down")
			expect(vni, "bridge link set dev "+veth+" learning on")
			expect(vni, "bridge fdb add 02:66:66:66:66:66 dev "+vx+" dst 198.18.66.6 self")
			expect(vni, "bridge fdb del "+e.Snapshot.Endpoints[0].MAC.String()+" dev "+veth+" master")
			expect(vni, "ip neigh del "+e.Snapshot.Remote[0].IPv4.String()+" dev "+bridge)
			expect(vni, "sysctl -qw net.ipv4.conf."+bridge+".rp_filter=2")
			expect(vni, "ip link del "+veth)
			expect(vni, "ip link del "+vx)
			expect(vni, "ip link del "+bridge)
			expect(store.HostVNI, "ip addr add 192.0.2.5/24 dev under0")
			expect(store.HostVNI, "ip route add default via 192.0.2.9")
			expect(store.HostVNI, "ip link set under0 mtu 1400")
			expect(store.HostVNI, "iptables-nft -F\niptables-nft -X WEFT-FORWARD")
			// Docker's daily work is none of our business.
			quiet(t, events)
			kerneltest.Script(t, `iptables-nft -N DOCKER
				iptables-nft -A DOCKER -p tcp --dport 80 -j ACCEPT
				ip link add br7 type bridge
				ip link set br7 up`)
			if v, ok := next(events, 300*time.Millisecond); ok {
				t.Errorf("told of Docker's work: %d", v)
			}
		})
	}
}

// The kernel takes IPv4 routes from a link that loses its last address, and tells nobody.
func TestWatchTellsOfRoutesThatGoUntold(t *testing.T) {
	for _, c := range []struct{ example, before, line string }{
		{"routed", "", "ip addr del 192.0.2.1/24 dev under0"},
		{"routed", "ip link add br7 type bridge", "ip link set under0 master br7"},
		{"encrypted", "ip addr add 10.9.9.9/32 dev weftw0", "ip addr del 10.9.9.9/32 dev weftw0"},
	} {
		t.Run(c.line, func(t *testing.T) {
			all := kerneltest.Examples()
			e := all[slices.IndexFunc(all, func(e kerneltest.Example) bool { return e.Name == c.example })]
			k := newKernel(t, kernel.Config{})
			if _, err := k.Underlay(t.Context(), kerneltest.Underlay4); err != nil {
				t.Fatal(err)
			}
			passHost(t, k, e.HostPlan())
			pass(t, k, e)
			events := k.Watch(t.Context())
			kerneltest.Script(t, c.before)
			quiet(t, events)
			kerneltest.Script(t, c.line)
			for v, ok := next(events, 5*time.Second); v != e.Snapshot.VNI; v, ok = next(events, 5*time.Second) {
				if !ok {
					t.Fatal("the network is not told")
				}
			}
		})
	}
}

func next(events <-chan store.VNI, wait time.Duration) (store.VNI, bool) {
	select {
	case v := <-events:
		return v, true
	case <-time.After(wait):
		return 0, false
	}
}

// quiet takes what still comes of earlier changes.
func quiet(t *testing.T, events <-chan store.VNI) {
	t.Helper()
	for range 100 {
		if _, ok := next(events, 250*time.Millisecond); !ok {
			return
		}
	}
	t.Fatal("events without end")
}

// While links come and go, a Read never lacks one that is there the whole time.
func TestReadDuringChurn(t *testing.T) {
	host := kerneltest.NewPlace(t)
	var k *kernel.Kernel
	host.Do(func() {
		kerneltest.MakeUnderlay(t)
		k = open(t, kernel.Config{})
		pass(t, k, kerneltest.Examples()[0])
	})
	want, err := kerneltest.Examples()[0].Plan()
	if err != nil {
		t.Fatal(err)
	}
	stop, churned := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(churned)
		for {
			select {
			case <-stop:
				return
			default:
				host.Run(t, "ip link add churn type veth peer name churn1\nip link del churn")
			}
		}
	}()
	for range 300 {
		have, err := k.Read(t.Context(), kerneltest.Examples()[0].Snapshot.VNI)
		if ops := dataplane.Diff(want, have); err == nil && len(ops) != 0 {
			t.Errorf("read during churn lacks: %v", ops)
			break
		}
	}
	close(stop)
	<-churned
}
