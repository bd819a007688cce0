package tests

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// marker is what containers send on an encrypted network; nobody on the underlay may
// ever see it.
const marker = "WEFT-PLANTED-MARKER"

// clusterKey is a cluster key for tests.
const clusterKey = "WEFT_KEY=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

// TestEncrypted has encrypted networks on three hosts of either engine, the third of
// which is behind a NAT.
func TestEncrypted(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t, 3, func(i int, o *hosts.HostOptions) {
				if o.Engine = engine; i == 2 {
					o.NAT = "home"
				}
			})
			install(t, lab, pluginDir(t, "", "test"), clusterKey)
			e := &encrypted{name: name, lab: lab, first: inventories(t, lab.Hosts...)}
			e.watch(t)
			t.Run("across hosts", e.acrossHosts)
			if soak() || name == "debian" { // what they break has nothing to do with the engine
				t.Run("faults", e.faults)
			}
			t.Run("nothing plain", e.nothingPlain)
			t.Run("nothing plain taken", e.nothingPlainTaken)
			t.Run("nothing left", e.nothingLeft)
		})
	}
}

type encrypted struct {
	name     string
	lab      *hosts.Lab
	first    []hosts.Inventory
	captures []*hosts.Capture
	sent     int   // packets with the marker, one by one
	flooded  int64 // and as a flood
}

// watch captures all that the hosts send, from before the first network to after the
// last one.
func (e *encrypted) watch(t *testing.T) {
	for _, h := range e.lab.Hosts {
		c, err := e.lab.Underlay.Capture(t.Context(), h, "udp or icmp or icmp6 or tcp port 80")
		if err != nil {
			t.Fatal(err)
		}
		e.captures = append(e.captures, c)
	}
}

// encryptedNetworks are those of the test; second is the byte of the subnet. All packets
// of the slow one take the host's stack, those of the others if their destination is not
// known.
var encryptedNetworks = []struct {
	name   string
	second int
	six    bool // has IPv6 too
	args   []string
}{
	{"enc", 90, false, nil},
	{"encr", 91, true, []string{"-o", "mode=routed"}},
	{"slow", 94, true, []string{"-o", "fastpath=false"}},
	{"come", 93, false, nil}, // of comeAndGo
}

func (e *encrypted) acrossHosts(t *testing.T) {
	for _, n := range encryptedNetworks {
		args := append([]string{"-o", "encrypted", "--gateway", fmt.Sprintf("10.%d.0.1", n.second)}, n.args...)
		if n.six {
			args = append(args, "--ipv6", "--subnet", fmt.Sprintf("fd00:%d::/64", n.second))
		}
		createNetwork(t, e.lab, n.name, n.second, args...)
	}
	// Beside it a plain one, to see that the captures see what is plain.
	createNetwork(t, e.lab, "plain", 92)
	for i, h := range e.lab.Hosts {
		run(t, h, "enc", "--network", "enc")
		run(t, h, "encr", "--network", "encr", "--ip6", fmt.Sprintf("fd00:91::a%d", i+1))
		run(t, h, "encr2", "--network", "encr", "--ip6", fmt.Sprintf("fd00:91::b%d", i+1))
		run(t, h, "slow", "--network", "slow", "--ip6", fmt.Sprintf("fd00:94::a%d", i+1))
	}
	e.allTalk(t)
}

// allTalk lets every container reach every other one of its networks.
func (e *encrypted) allTalk(t *testing.T) {
	t.Helper()
	for i, h := range e.lab.Hosts {
		for j, o := range e.lab.Hosts {
			for _, n := range encryptedNetworks {
				if n.name == "come" {
					continue
				}
				from, to := hosts.Container{Host: h, Name: n.name}, hosts.Container{Host: o, Name: n.name}
				e.send(t, from, addressOf(t, to, n.name).String())
				if n.six {
					e.send(t, from, fmt.Sprintf("fd00:%d::a%d", n.second, j+1))
				}
			}
			if i == j {
				e.send(t, hosts.Container{Host: h, Name: "encr"}, fmt.Sprintf("fd00:91::b%d", j+1))
			}
		}
	}
}

// send sends packets until one is answered, and then the marker.
func (e *encrypted) send(t *testing.T, from hosts.Container, to string) {
	t.Helper()
	eventually(t, 30*time.Second, "container "+from.Name+" on host "+from.Host.Name+" reaches "+to, func(ctx context.Context) error {
		e.sent++
		_, err := from.Exec(ctx, "ping", "-c", "1", "-W", "1", "-s", "64", "-p", "57", to)
		return err
	})
	sendText(t, from, to, marker)
}

// flood sends the marker from every container to every other one, and to addresses that
// nobody has; on the slow network, whose packets cost more, among its own.
func (e *encrypted) flood(t *testing.T) (sent func() int64) {
	var from, slow []hosts.Container
	to := []netip.Addr{netip.MustParseAddr("10.91.9.9"), netip.MustParseAddr("fd00:91::99")}
	slowTo := []netip.Addr{netip.MustParseAddr("10.94.9.9"), netip.MustParseAddr("fd00:94::99")}
	for i, h := range e.lab.Hosts {
		for _, name := range []string{"enc", "encr"} {
			c := hosts.Container{Host: h, Name: name}
			from, to = append(from, c), append(to, addressOf(t, c, name))
		}
		to = append(to, netip.MustParseAddr(fmt.Sprintf("fd00:91::a%d", i+1)))
		c := hosts.Container{Host: h, Name: "slow"}
		slow, slowTo = append(slow, c), append(slowTo, addressOf(t, c, "slow"), netip.MustParseAddr(fmt.Sprintf("fd00:94::a%d", i+1)))
	}
	sentFast, sentSlow := flood(t, from, to), flood(t, slow, slowTo)
	return func() int64 { return sentFast() + sentSlow() }
}

// flood sends the marker from containers to addresses, twenty times a second, until
// the test ends. It returns how many were sent.
func flood(t *testing.T, from []hosts.Container, to []netip.Addr) (sent func() int64) {
	t.Helper()
	var count atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	t.Cleanup(func() { stop(); wait.Wait() })
	for _, f := range from {
		var c *net.UDPConn
		if err := inside(t, f, func() (err error) {
			c, err = net.ListenUDP("udp", nil)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		wait.Go(func() {
			defer c.Close()
			for tick := time.NewTicker(50 * time.Millisecond); ctx.Err() == nil; <-tick.C {
				for _, a := range to {
					if _, err := c.WriteToUDPAddrPort([]byte(marker), netip.AddrPortFrom(a, 7777)); err == nil {
						count.Add(1)
					}
				}
			}
		})
	}
	return count.Load
}

// faults takes away what encrypts, piece by piece and all at once, while containers
// send.
func (e *encrypted) faults(t *testing.T) {
	sent := e.flood(t)
	a, b := e.lab.Hosts[0], e.lab.Hosts[1]
	from, to := hosts.Container{Host: a, Name: "encr"}, hosts.Container{Host: b, Name: "encr"}
	address := addressOf(t, to, "encr")
	e.rotations(t, startProbe(t, from, to, address))

	probe := startProbe(t, from, to, address)
	kills := 2
	if soak() {
		kills = 50
	}
	for i := range kills {
		kill := a.KillPlugin
		if i%2 == 1 {
			kill = a.KillPluginParent
		}
		pid, err := kill(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.WaitPlugin(t.Context(), pid); err != nil {
			t.Fatal(err)
		}
		reach(t, from, address.String())
		time.Sleep(2 * time.Second)
	}
	report, _ := probe.Stop()
	if report.TCPErr != nil || report.TCPReceived != report.TCPSent {
		t.Errorf("a connection did not outlive kills of the plugin: %s", report)
	}
	figure(t, "encrypted: plugin killed on "+e.name, kills, "%d of %d packets lost, longest gap %s (userspace WireGuard: target 2 s)", report.Lost, report.Sent, report.Gap.Round(time.Millisecond))

	// Docker's policy is a layer more, which is not Weft's.
	if out, err := a.Exec(t.Context(), "sh", "-c", "iptables -P FORWARD ACCEPT; ip6tables -P FORWARD ACCEPT"); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	const (
		noRules  = "iptables -t raw -F; iptables -t filter -F; iptables -t nat -F; ip6tables -t raw -F; ip6tables -t filter -F"
		noRoutes = "ip route flush table 4796; ip -6 route flush table 4796"
		noLookup = "ip rule del pref 4796; ip -6 rule del pref 4796"
		noDrops  = "for f in -4 -6; do while ip $f rule del pref 4797 2>/dev/null; do :; done; done"
	)
	faults := []string{
		"ip link del weftw0", "ip link set weftw0 down", "ip link set weftw0 mtu 1300",
		noRules, noRoutes, noLookup, noDrops,
		noLookup + "; " + noRules, noRoutes + "; " + noRules, noDrops + "; " + noRoutes,
		"ip link del weftw0; " + noRoutes + "; " + noRules,
	}
	slow := hosts.Container{Host: a, Name: "slow"}
	for _, fault := range faults {
		repaired(t, a, "rules rules6 links routes encryption", fault)
		reach(t, from, address.String())
		reach(t, from, "fd00:91::a2")
		reach(t, slow, "fd00:94::a2")
		reach(t, to, addressOf(t, from, "encr").String())
	}
	e.revoke(t)
	e.often(t)
	e.comeAndGo(t)
	e.moves(t)
	// Without a plugin the kernel's device goes on. Weft's own is gone with it: nothing is
	// encrypted, and nothing leaves.
	goesOn := view[encryptionView](t, a, "encryption").Devices[0].Module
	docker(t, a, "plugin", "disable", "--force", hosts.PluginName)
	time.Sleep(2 * time.Second)
	if goesOn {
		reach(t, from, address.String())
	} else {
		silent(t, from, address.String())
	}
	docker(t, a, "plugin", "enable", hosts.PluginName)
	e.allTalk(t)
	figure(t, "encrypted: faults on "+e.name, len(faults)+1, "repaired; %d packets with the marker sent meanwhile", sent())
	e.flooded = sent()
}

// comeAndGo removes a network from the third host and makes it again, while the first
// goes on sending there. The flood does not: on a host without the network its
// addresses are somebody else's, to which other networks' containers may send.
func (e *encrypted) comeAndGo(t *testing.T) {
	a, c := e.lab.Hosts[0], e.lab.Hosts[2]
	from, to := run(t, a, "come", "--network", "come"), run(t, c, "come", "--network", "come")
	for range 3 {
		address := addressOf(t, to, "come").String()
		e.send(t, from, address)
		docker(t, c, "rm", "--force", "come")
		sendText(t, from, address, marker)
		docker(t, c, "network", "rm", "come")
		sendText(t, from, address, marker)
		docker(t, c, "network", "create", "-d", hosts.PluginName, "--subnet", "10.93.0.0/16", "--ip-range", "10.93.3.0/24", "-o", "encrypted", "--gateway", "10.93.0.1", "come")
		to = run(t, c, "come", "--network", "come")
		e.send(t, from, addressOf(t, to, "come").String())
	}
}

// moves gives the second host another address.
func (e *encrypted) moves(t *testing.T) {
	a, b := e.lab.Hosts[0], e.lab.Hosts[1]
	to := addressOf(t, hosts.Container{Host: b, Name: "encr"}, "encr").String()
	if err := b.Renumber(t.Context(), netip.MustParseAddr("192.0.2.77")); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, 40*time.Second, "the host is reached at its new address", func(ctx context.Context) error {
		_, err := hosts.Container{Host: a, Name: "encr"}.Exec(ctx, "ping", "-c", "1", "-W", "1", to)
		return err
	})
	figure(t, "encrypted: host with another address on "+e.name, 1, "reached again after %s", took.Round(100*time.Millisecond))
}

func (e *encrypted) nothingLeft(t *testing.T) {
	for i, h := range e.lab.Hosts {
		removeOthers(t, h)
		docker(t, h, "network", "rm", "enc", "encr", "slow", "come", "plain", "flat")
		clean(t, h)
		unleaked(t, h, e.first[i], "plugin file", "mount", "route", "route6", "link")
	}
}
