package kernel_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

var counters = regexp.MustCompile(`\[\d+:\d+\]|(?m)^#.*$`)

// state is all that the namespace holds, as text.
func state(t *testing.T, backend string) string {
	t.Helper()
	s := kerneltest.Run(t, "ip", "-o", "-d", "link") + kerneltest.Run(t, "bridge", "fdb") + kerneltest.Run(t, "ip", "neigh") + kerneltest.Run(t, "ipset", "save")
	for _, family := range []string{"iptables", "ip6tables"} {
		s += counters.ReplaceAllString(kerneltest.Run(t, family+"-"+backend+"-save"), "")
	}
	return s
}

// What is not ours stays as it is, through making, repair and removal.
func TestStrangersStay(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			k := newKernel(t, kernel.Config{Backend: backend})
			e := kerneltest.Examples()[2]
			kerneltest.Script(t, `
				ip link add br0 type bridge
				ip link add vx0 type vxlan id 77 local 192.0.2.1 dev under0 dstport 4789
				ip link add weftother type bridge
				ip link set vx0 master br0
				bridge fdb append 00:00:00:00:00:00 dev vx0 dst 198.18.9.9
				bridge fdb add 02:00:00:00:00:77 dev vx0 master static
				ip neigh add 10.200.0.1 lladdr 02:00:00:00:00:77 dev br0 nud permanent
				ipset create blocked hash:ip
				ipset add blocked 203.0.113.66
				ipset create weft hash:net
				ipset create weft-admins hash:ip
				ipset add weft-admins 203.0.113.67
				`+strings.ReplaceAll(`
				iptables-B -N DOCKER-USER
				iptables-B -N DOCKER-FORWARD
				iptables-B -A FORWARD -j DOCKER-USER
				iptables-B -A FORWARD -j DOCKER-FORWARD
				iptables-B -A FORWARD -i eth7 -m comment --comment WEFT-FORWARD -j ACCEPT
				iptables-B -A INPUT -p tcp --dport 22 -m set --match-set weft-admins src -j ACCEPT
				iptables-B -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE
				iptables-B -t raw -A PREROUTING -s 10.0.0.0/8 -j CT --notrack
				ip6tables-B -A INPUT -p tcp --dport 22 -j ACCEPT`, "-B", "-"+backend))
			passHost(t, k, dataplane.Plan{}) // makes the tables that it looks at
			before := state(t, backend)
			for range 2 {
				passHost(t, k, e.HostPlan())
				pass(t, k, e)
			}
			settled(t, k, e)
			gone := e
			gone.Snapshot.Network = nil
			pass(t, k, gone)
			passHost(t, k, dataplane.Plan{})
			// iptables leaves tables and their built-in chains behind.
			for _, line := range lines(before) {
				if !strings.Contains(state(t, backend), line) {
					t.Errorf("gone: %s", line)
				}
			}
			for _, line := range lines(state(t, backend)) {
				if strings.Contains(strings.ToLower(line), "weft") && !strings.Contains(before, line) {
					t.Errorf("left: %s", line)
				}
			}
		})
	}
}

// A link with a name of ours that is not ours is neither taken nor deleted, and the
// error names it.
func TestForeignLinkWithOurName(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	e := kerneltest.Examples()[0]
	want, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	bridge, vx, veth := dataplane.BridgeName(e.Snapshot.VNI), dataplane.VXLANName(e.Snapshot.VNI), dataplane.VethName(e.Snapshot.Endpoints[0].ID)
	for _, name := range []string{bridge, vx, veth} {
		kerneltest.Run(t, "ip", "link", "add", name, "type", "bridge")
		before := kerneltest.Run(t, "ip", "-o", "-d", "link", "show", name)
		have, err := k.Read(t.Context(), e.Snapshot.VNI)
		if err != nil {
			t.Fatal(err)
		}
		named := false
		for _, err := range k.Apply(t.Context(), dataplane.Diff(want, have)) {
			named = named || strings.Contains(err.Error(), "link "+name+" exists but is not Weft's")
		}
		if !named {
			t.Errorf("%s: no error names the link", name)
		}
		k.Apply(t.Context(), dataplane.Diff(dataplane.Plan{}, want))
		if after := kerneltest.Run(t, "ip", "-o", "-d", "link", "show", name); after != before {
			t.Errorf("before: %s\nafter: %s", before, after)
		}
		kerneltest.Run(t, "ip", "link", "del", name)
	}
	pass(t, k, e)
	if ops := pass(t, k, e); len(ops) != 0 {
		t.Errorf("still to do: %v", ops)
	}
}

// Damage that Apply itself cannot do is seen and repaired in one pass.
func TestRepairOfStrangersDamage(t *testing.T) {
	t.Parallel()
	e := kerneltest.Examples()[2]
	vni := e.Snapshot.VNI
	local, remote := e.Snapshot.Endpoints[0], e.Snapshot.Remote[0]
	names := strings.NewReplacer("BRIDGE", dataplane.BridgeName(vni), "VXLAN", dataplane.VXLANName(vni), "VETH", dataplane.VethName(local.ID),
		"PEER", dataplane.PeerName(dataplane.VethName(local.ID)), "REMOTEMAC", remote.MAC.String(), "REMOTEIP", remote.IPv4.String(),
		"LOCALMAC", local.MAC.String(), "VTEP", e.Snapshot.Peers[0].Address.String(), "VNI", fmt.Sprint(vni))
	for _, damage := range []string{
		"bridge link set dev VETH learning on",
		"bridge link set dev VXLAN learning on",
		"bridge link set dev VXLAN neigh_suppress off",
		"bridge link set dev VETH isolated on",
		"bridge link set dev VETH flood off",
		"bridge link set dev VETH locked on",
		"bridge link set dev VXLAN mcast_flood off",
		"bridge link set dev VXLAN bcast_flood off",
		"ip link set VXLAN type bridge_slave proxy_arp on",
		"bridge link set dev VXLAN state 0",
		"ip link set PEER up\nsleep 0.5\nbridge link set dev VETH state 0",
		"ip link set BRIDGE type bridge stp_state 1",
		"ip link set BRIDGE type bridge mcast_snooping 1",
		"ip link set VXLAN type vxlan learning",
		"ip link set VETH nomaster",
		"ip link set VXLAN nomaster",
		"ip link set VETH down",
		"ip link set PEER address 02:00:00:00:00:99",
		"ip link set VETH mtu 1200",
		"sysctl -qw net.ipv4.conf.BRIDGE.rp_filter=2",
		"sysctl -qw net.ipv4.conf.BRIDGE.arp_ignore=0",
		"sysctl -qw net.ipv6.conf.BRIDGE.disable_ipv6=0",
		"bridge fdb replace REMOTEMAC dev VXLAN dst 198.18.66.6 self",
		"bridge fdb add 02:66:66:66:66:66 dev VXLAN dst 198.18.66.6 self dynamic",
		"bridge fdb add 02:66:66:66:66:66 dev VXLAN dst 198.18.66.6 port 9999 self",
		"bridge fdb replace REMOTEMAC dev VXLAN dst VTEP port 9999 self",
		"bridge fdb replace REMOTEMAC dev VXLAN dst VTEP self dynamic",
		"bridge fdb append 00:00:00:00:00:00 dev VXLAN dst 198.18.66.6 self",
		"bridge fdb append 00:00:00:00:00:00 dev VXLAN dst VTEP port 9999 self",
		"bridge fdb replace REMOTEMAC dev VETH master static",
		"bridge fdb replace REMOTEMAC dev VXLAN master dynamic",
		"bridge fdb replace REMOTEMAC dev VXLAN master extern_learn",
		"bridge fdb replace LOCALMAC dev VXLAN master static",
		"bridge fdb replace LOCALMAC dev VETH master local",
		"bridge fdb add 02:66:66:66:66:66 dev VXLAN master dynamic",
		"bridge fdb add 02:66:66:66:66:66 dev VETH master extern_learn",
		"bridge fdb add 02:66:66:66:66:66 dev VXLAN master static",
		"ip neigh replace REMOTEIP lladdr 02:66:66:66:66:66 dev BRIDGE nud permanent",
		"ip neigh replace REMOTEIP lladdr 02:66:66:66:66:66 dev BRIDGE nud reachable",
		"ip neigh add 10.66.66.66 lladdr 02:66:66:66:66:66 dev BRIDGE nud reachable",
		"ip neigh add 10.66.66.66 lladdr 02:66:66:66:66:66 dev BRIDGE nud permanent",
		"ip link set VXLAN alias weft:vxlan\\ VNI",
		"ethtool -K VXLAN tx-checksum-ip-generic off",
	} {
		damage = strings.ReplaceAll(names.Replace(damage), `\ `, " ")
		t.Run(damage, func(t *testing.T) {
			k := newKernel(t, kernel.Config{})
			pass(t, k, e)
			settle := func() []dataplane.Op { return pass(t, k, e) }
			if ops := settle(); len(ops) != 0 {
				t.Fatalf("not settled: %v", ops)
			}
			if strings.HasPrefix(damage, "ethtool") {
				want, _ := e.Plan()
				vx := want[dataplane.Key{Kind: dataplane.KindVXLAN, Name: dataplane.VXLANName(vni)}].(dataplane.VXLAN)
				vx.NoChecksum = true
				k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Put, Object: vx}})
			} else if strings.Contains(damage, " alias ") {
				kerneltest.Run(t, "ip", "link", "set", dataplane.VXLANName(vni), "alias", "weft:vxlan 77")
				if have, err := k.Read(t.Context(), 77); err != nil || len(have) == 0 {
					t.Errorf("a link with another network's alias: %v, %v", have, err)
				}
			} else {
				kerneltest.Script(t, damage)
			}
			if ops := settle(); len(ops) == 0 {
				t.Error("the damage is not seen")
			}
			if ops := settle(); len(ops) != 0 {
				t.Errorf("still to do after one pass: %v", ops)
			}
		})
	}
}

// Each rule that goes, comes in between, or moves is seen, and one pass repairs it.
func TestRepairOfRules(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			k := newKernel(t, kernel.Config{Backend: backend})
			want := kerneltest.Examples()[0].HostPlan()
			passHost(t, k, want)
			damage := func(words ...string) {
				t.Helper()
				kerneltest.Run(t, words[0]+"-"+backend, words[1:]...)
				if ops := passHost(t, k, want); len(ops) == 0 {
					t.Errorf("not seen: %v", words)
				}
				if ops := passHost(t, k, want); len(ops) != 0 {
					t.Errorf("%v: still to do: %v", words, ops)
				}
			}
			for _, o := range want.Sorted() {
				if backend == "legacy" && strings.HasPrefix(o.Key().Name, "ip6tables") {
					continue // the same programs, and slow
				}
				switch o := o.(type) {
				case dataplane.Chain:
					program := map[bool]string{false: "iptables", true: "ip6tables"}[o.V6]
					n := len(o.RuleLines())
					for i := range n {
						damage(program, "-t", o.Table, "-D", o.Name, fmt.Sprint(i+1))
					}
					damage(program, "-t", o.Table, "-I", o.Name, "-j", "ACCEPT")
					damage(program, "-t", o.Table, "-A", o.Name, "-j", "ACCEPT")
					damage(program, "-t", o.Table, "-F", o.Name)
				case dataplane.Jump:
					program := map[bool]string{false: "iptables", true: "ip6tables"}[o.V6]
					damage(program, "-t", o.Table, "-D", o.From, "1")
					damage(program, "-t", o.Table, "-I", o.From, "-p", "tcp", "-j", "ACCEPT")
					damage(program, "-t", o.Table, "-A", o.From, "-j", o.To)
					damage(program, "-t", o.Table, "-I", o.From, "-p", "udp", "-j", o.To)
					damage(program, "-t", o.Table, "-F", o.From)
				}
			}
			for _, program := range []string{"iptables", "ip6tables"} {
				damage(program, "-F")
				damage(program, "-t", "raw", "-F")
			}
			// Docker's jumps may stand before ours.
			kerneltest.Run(t, "iptables-"+backend, "-N", "DOCKER-USER")
			kerneltest.Run(t, "iptables-"+backend, "-I", "FORWARD", "-j", "DOCKER-USER")
			if ops := passHost(t, k, want); len(ops) != 0 {
				t.Errorf("Docker's jump is not tolerated: %v", ops)
			}
			// But not those that accept what ours drop.
			for _, accepts := range []string{"DOCKER-FORWARD", "DOCKER-INGRESS"} {
				kerneltest.Run(t, "iptables-"+backend, "-N", accepts)
				damage("iptables", "-I", "FORWARD", "2", "-j", accepts)
				if out := kerneltest.Run(t, "iptables-"+backend, "-S", "FORWARD", "1"); !strings.Contains(out, "DOCKER-USER") {
					t.Errorf("before the user's chain stands %s", out)
				}
			}
			damage("iptables", "-I", "FORWARD", "-j", "DOCKER-FORWARD")
			if backend == "legacy" {
				return
			}
			kerneltest.Run(t, "iptables-nft", "-F")
			kerneltest.Run(t, "iptables-nft", "-X")
			if ops := passHost(t, k, want); len(ops) == 0 {
				t.Error("removal of all chains is not seen")
			}
			if ops := passHost(t, k, want); len(ops) != 0 {
				t.Errorf("still to do: %v", ops)
			}
		})
	}
}

// A VXLAN device that must be made anew keeps its entries.
func TestReplacedVXLANKeepsEntries(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	e := kerneltest.Examples()[0]
	pass(t, k, e)
	kerneltest.Script(t, "ip addr add 192.0.2.2/24 dev under0")
	e.Underlay.Address = netip.MustParseAddr("192.0.2.2")
	e.Snapshot.Self.DataPort = 5797
	if ops := pass(t, k, e); len(ops) != 1 {
		t.Errorf("operations: %v", ops)
	}
	if ops := pass(t, k, e); len(ops) != 0 {
		t.Errorf("still to do: %v", ops)
	}
}

// Without a writable /proc/sys/net networks work, and Read tells the truth.
func TestReadOnlySysctl(t *testing.T) {
	k := newKernel(t, kernel.Config{SysNet: "/nowhere"})
	e := kerneltest.Examples()[0]
	pass(t, k, e)
	for range 2 {
		if ops := pass(t, k, e); len(ops) != 1 || ops[0].Object.Key().Kind != dataplane.KindBridge {
			t.Errorf("operations: %v", ops)
		}
	}
	if out := kerneltest.Run(t, "ip", "-6", "addr", "show", "dev", dataplane.BridgeName(e.Snapshot.VNI)); out != "" {
		t.Errorf("the bridge has an IPv6 address: %s", out)
	}
}

func TestRecover(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	a, b := kerneltest.Examples()[2], kerneltest.Examples()[6]
	pass(t, k, a)
	pass(t, k, b)
	networks, endpoints, err := k.Recover(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(networks) != 2 || networks[0].VNI != a.Snapshot.VNI || networks[1].MTU != b.Snapshot.Network.MTU {
		t.Errorf("networks: %+v", networks)
	}
	var want []store.EndpointID
	for _, e := range append(slices.Clone(a.Snapshot.Endpoints), b.Snapshot.Endpoints...) {
		want = append(want, e.ID)
	}
	var got []store.EndpointID
	for _, e := range endpoints {
		got = append(got, e.ID)
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("endpoints: %v, want %v", got, want)
	}
}

// The group in which links are deleted takes no other link.
func TestManyDeletions(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	e := kerneltest.Examples()[0]
	e.Snapshot = kerneltest.Network(4096, 30, 1, 1, e.Underlay, "10.1.0.0/24")
	pass(t, k, e)
	kerneltest.Script(t, "ip link add other type bridge\nip link set other group 2003133044") // "weft"
	e.Snapshot.Endpoints = e.Snapshot.Endpoints[:5]
	if ops := pass(t, k, e); len(ops) != 50 {
		t.Errorf("%d operations", len(ops))
	}
	if ops := pass(t, k, e); len(ops) != 0 {
		t.Errorf("still to do: %v", ops)
	}
	kerneltest.Run(t, "ip", "link", "show", "other")
}
