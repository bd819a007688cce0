package tests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
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

// networks are the encrypted networks of the test: name, second byte of the subnet.
var encryptedNetworks = map[string]int{"enc": 90, "encr": 91, "come": 93}

func (e *encrypted) acrossHosts(t *testing.T) {
	for name, second := range encryptedNetworks {
		args := []string{"-o", "encrypted", "--gateway", fmt.Sprintf("10.%d.0.1", second)}
		if name == "encr" {
			args = append(args, "-o", "mode=routed", "--ipv6", "--subnet", "fd00:91::/64")
		}
		createNetwork(t, e.lab, name, second, args...)
	}
	// Beside it a plain one, to see that the captures see what is plain.
	createNetwork(t, e.lab, "plain", 92)
	for i, h := range e.lab.Hosts {
		run(t, h, "enc", "--network", "enc")
		run(t, h, "encr", "--network", "encr", "--ip6", fmt.Sprintf("fd00:91::a%d", i+1))
		run(t, h, "encr2", "--network", "encr", "--ip6", fmt.Sprintf("fd00:91::b%d", i+1))
	}
	e.allTalk(t)
}

// allTalk lets every container reach every other one of its networks.
func (e *encrypted) allTalk(t *testing.T) {
	t.Helper()
	for i, h := range e.lab.Hosts {
		for j, o := range e.lab.Hosts {
			for _, name := range []string{"enc", "encr"} {
				from, to := hosts.Container{Host: h, Name: name}, hosts.Container{Host: o, Name: name}
				e.send(t, from, addressOf(t, to, name).String())
			}
			e.send(t, hosts.Container{Host: h, Name: "encr"}, fmt.Sprintf("fd00:91::a%d", j+1))
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

// flood sends the marker from every container to every other one.
func (e *encrypted) flood(t *testing.T) (sent func() int64) {
	var from []hosts.Container
	var to []netip.Addr
	for i, h := range e.lab.Hosts {
		for _, name := range []string{"enc", "encr"} {
			c := hosts.Container{Host: h, Name: name}
			from, to = append(from, c), append(to, addressOf(t, c, name))
		}
		to = append(to, netip.MustParseAddr(fmt.Sprintf("fd00:91::a%d", i+1)))
	}
	return flood(t, from, to)
}

// flood sends the marker from containers to addresses, a hundred times a second, until
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
			for tick := time.NewTicker(30 * time.Millisecond); ctx.Err() == nil; <-tick.C {
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
	figure(t, "encrypted: plugin killed on "+e.name, kills, "%d of %d packets lost, longest gap %s (userspace WireGuard: target 2 s)", report.Lost, report.Sent, report.Gap.Round(time.Millisecond))

	faults := []string{
		"ip link del weftw0", "ip link set weftw0 down", "ip link set weftw0 mtu 1300",
		"iptables -t raw -F; iptables -t filter -F; iptables -t nat -F", "ip6tables -t raw -F; ip6tables -t filter -F",
		"ip route flush table 4796; ip -6 route flush table 4796", "ip rule del pref 4796; ip -6 rule del pref 4796",
		"ip rule del pref 4796; iptables -t filter -F; iptables -t raw -F",
		"ip link del weftw0; ip route flush table 4796; iptables -t filter -F; iptables -t raw -F",
	}
	for _, fault := range faults {
		repaired(t, a, "rules rules6 links routes encryption", fault)
		reach(t, from, address.String())
		reach(t, from, "fd00:91::a2")
		reach(t, to, addressOf(t, from, "encr").String())
	}
	e.revoke(t)
	e.often(t)
	e.comeAndGo(t)
	e.moves(t)
	// Without a plugin nothing is encrypted, and nothing leaves.
	docker(t, a, "plugin", "disable", "--force", hosts.PluginName)
	time.Sleep(2 * time.Second)
	silent(t, from, address.String())
	docker(t, a, "plugin", "enable", hosts.PluginName)
	e.allTalk(t)
	figure(t, "encrypted: faults on "+e.name, len(faults)+1, "repaired; %d packets with the marker sent meanwhile", sent())
	e.flooded = sent()
}

// rotations changes the keys of all hosts, of one after the other and of several at
// once, while a probe counts.
func (e *encrypted) rotations(t *testing.T, probe *hosts.Probe) {
	before := map[string]bool{}
	turns := 1
	if soak() {
		turns = 20
	}
	done := 0
	for range turns {
		for _, group := range [][]*hosts.Host{e.lab.Hosts[:1], e.lab.Hosts[1:2], e.lab.Hosts} {
			for _, h := range group {
				before[e.key(t, h)] = true
				if out, err := h.Exec(t.Context(), "weft", "encryption", "rotate"); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				done++
			}
			for _, h := range group {
				eventually(t, 60*time.Second, "host "+h.Name+" has another key", func(ctx context.Context) error {
					v := view[encryptionView](t, h, "encryption")
					if v.Changes || len(v.Devices) != 1 || before[v.Devices[0].Key] {
						return fmt.Errorf("it has %+v", v)
					}
					return nil
				})
			}
		}
	}
	report := lossless(t, probe)
	figure(t, "encrypted: key changed on "+e.name, done, "%d of %d packets lost (target 0)", report.Lost, report.Sent)
}

// often asks for another key each second, whether the last change is over or not.
func (e *encrypted) often(t *testing.T) {
	a, b := e.lab.Hosts[0], e.lab.Hosts[1]
	from, to := hosts.Container{Host: a, Name: "encr"}, hosts.Container{Host: b, Name: "encr"}
	probe := startProbe(t, from, to, addressOf(t, to, "encr"))
	seconds, begun := 10, 0
	if soak() {
		seconds = 60
	}
	for range seconds {
		if _, err := a.Exec(t.Context(), "weft", "encryption", "rotate"); err == nil {
			begun++
		}
		time.Sleep(time.Second)
	}
	eventually(t, 60*time.Second, "the last change is over", func(context.Context) error {
		if v := view[encryptionView](t, a, "encryption"); v.Changes {
			return errors.New("it is not")
		}
		return nil
	})
	report := lossless(t, probe)
	figure(t, "encrypted: another key asked for each second on "+e.name, seconds, "%d changes, %d of %d packets lost (target 0)", begun, report.Lost, report.Sent)
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

// revoke takes the third host out and back.
func (e *encrypted) revoke(t *testing.T) {
	a, b, c := e.lab.Hosts[0], e.lab.Hosts[1], e.lab.Hosts[2]
	from, out := hosts.Container{Host: b, Name: "encr"}, hosts.Container{Host: c, Name: "encr"}
	address := addressOf(t, out, "encr").String()
	reach(t, from, address)
	sees := func(h *hosts.Host) bool {
		for _, p := range view[encryptionView](t, h, "encryption").Peers {
			if p.Host == c.Name {
				return true
			}
		}
		return false
	}
	if text, err := a.Exec(t.Context(), "weft", "encryption", "revoke", c.Name); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	took := eventually(t, 20*time.Second, "host b has dropped host c", func(context.Context) error {
		if sees(b) {
			return errors.New("it has not")
		}
		return nil
	})
	silent(t, from, address)
	silent(t, out, addressOf(t, from, "encr").String())
	tells(t, c, "this host is revoked")
	if text, err := a.Exec(t.Context(), "weft", "encryption", "revoke", "nobody"); err == nil || !strings.Contains(text+err.Error(), "nobody") {
		t.Errorf("a host that is not there is revoked: %s", text)
	}
	if text, err := a.Exec(t.Context(), "weft", "encryption", "restore", c.Name); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	reach(t, from, address)
	figure(t, "encrypted: host revoked on "+e.name, 1, "dropped by the others after %s", took.Round(100*time.Millisecond))
}

func (e *encrypted) key(t *testing.T, h *hosts.Host) string {
	t.Helper()
	return view[encryptionView](t, h, "encryption").Devices[0].Key
}

type encryptionView struct {
	Devices []struct {
		Name string
		Key  string
	}
	Peers []struct {
		Host, State string
	}
	Changes bool
}

// control sends another marker on a plain network.
const control = "WEFT-CONTROL-MARKER"

func (e *encrypted) sendControl(t *testing.T) {
	a, b := run(t, e.lab.Hosts[0], "plain", "--network", "plain"), run(t, e.lab.Hosts[1], "plain", "--network", "plain")
	reach(t, a, addressOf(t, b, "plain").String())
	for range 10 {
		sendText(t, a, addressOf(t, b, "plain").String(), control)
		time.Sleep(200 * time.Millisecond) // tcpdump is told of packets after a second at most
	}
}

// sendText sends a datagram from a container; nobody need hear it.
func sendText(t *testing.T, from hosts.Container, to, text string) {
	t.Helper()
	if err := inside(t, from, func() error {
		c, err := net.Dial("udp", net.JoinHostPort(to, "7777"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// nothingPlain looks for the marker, and for addresses of the networks, in what the
// hosts sent.
func (e *encrypted) nothingPlain(t *testing.T) {
	e.sendControl(t)
	plain, wireguard, controls := 0, 0, 0
	for i, c := range e.captures {
		lines, raw := stopped(t, c)
		plain += bytes.Count(raw, []byte(marker))
		controls += bytes.Count(raw, []byte(control))
		for _, l := range lines {
			if strings.Contains(l, ".4798") {
				wireguard++
			}
			for _, second := range encryptedNetworks {
				if strings.Contains(l, fmt.Sprintf(" 10.%d.", second)) || strings.Contains(l, "fd00:91::") {
					plain++
					t.Errorf("on the cable of host %s: %s", e.lab.Hosts[i].Name, l)
				}
			}
		}
	}
	if wireguard == 0 || controls == 0 {
		t.Errorf("%d packets of WireGuard on the underlay, %d of a plain network: the captures see nothing", wireguard, controls)
	}
	figure(t, "encrypted: plain packets on the underlay on "+e.name, e.sent+int(e.flooded), "%d, beside %d of WireGuard (target 0)", plain, wireguard)
	if plain > 0 {
		t.Errorf("%d packets on the underlay are plain", plain)
	}
}

// stopped ends a capture and returns its packets, a line each, and all that is in them.
func stopped(t *testing.T, c *hosts.Capture) (lines []string, raw []byte) {
	t.Helper()
	lines, err := c.Stop(t.Context())
	if err == nil {
		raw, err = os.ReadFile(c.File)
	}
	if err != nil {
		t.Fatal(err)
	}
	return lines, raw
}

func (e *encrypted) nothingLeft(t *testing.T) {
	for i, h := range e.lab.Hosts {
		removeOthers(t, h)
		docker(t, h, "network", "rm", "enc", "encr", "come", "plain")
		clean(t, h)
		unleaked(t, h, e.first[i], "plugin file", "mount", "route", "route6", "link")
	}
}
