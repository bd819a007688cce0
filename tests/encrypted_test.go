package tests

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// marker is what containers send on an encrypted network; nobody on the underlay may
// ever see it.
const marker = "WEFT-PLANTED-MARKER"

// clusterKey is a cluster key for tests.
const clusterKey = "WEFT_KEY=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

// TestEncrypted has encrypted networks on three hosts of either engine.
func TestEncrypted(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t, 3, func(_ int, o *hosts.HostOptions) { o.Engine = engine })
			install(t, lab, pluginDir(t, "", "test"), clusterKey)
			e := &encrypted{name: name, lab: lab}
			for _, h := range lab.Hosts {
				inv, err := h.TakeInventory(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				e.first = append(e.first, inv)
			}
			e.watch(t)
			t.Run("across hosts", e.acrossHosts)
			t.Run("faults", e.faults)
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
	sent     int // packets with the marker
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
var encryptedNetworks = map[string]int{"enc": 90, "encr": 91}

func (e *encrypted) acrossHosts(t *testing.T) {
	for name, second := range encryptedNetworks {
		args := []string{"-o", "encrypted", "--gateway", fmt.Sprintf("10.%d.0.1", second)}
		if name == "encr" {
			args = append(args, "-o", "mode=routed", "--ipv6", "--subnet", "fd00:91::/64")
		}
		createNetwork(t, e.lab, name, second, args...)
	}
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

// send sends packets that carry the marker until one is answered.
func (e *encrypted) send(t *testing.T, from hosts.Container, to string) {
	t.Helper()
	eventually(t, 30*time.Second, "container "+from.Name+" on host "+from.Host.Name+" reaches "+to, func(ctx context.Context) error {
		e.sent++
		_, err := from.Exec(ctx, "ping", "-c", "1", "-W", "1", "-s", "64", "-p", "57", to)
		if err == nil {
			_, _ = from.Exec(ctx, "sh", "-c", "echo "+marker+" | timeout 1 nc -u -w 1 "+to+" 7777")
		}
		return err
	})
}

func (e *encrypted) faults(t *testing.T) {
	_ = netip.Addr{}
}

// nothingPlain looks for the marker, and for addresses of the networks, in what the
// hosts sent.
func (e *encrypted) nothingPlain(t *testing.T) {
	plain, wireguard := 0, 0
	for i, c := range e.captures {
		lines, err := c.Stop(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(c.File)
		if err != nil {
			t.Fatal(err)
		}
		plain += bytes.Count(raw, []byte(marker))
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
	if wireguard == 0 {
		t.Error("no packet of WireGuard on the underlay")
	}
	figure(t, "encrypted: plain packets on the underlay on "+e.name, e.sent, "%d of %d captured packets of WireGuard beside them (target 0)", plain, wireguard)
	if plain > 0 {
		t.Errorf("%d packets on the underlay are plain", plain)
	}
}

func (e *encrypted) nothingLeft(t *testing.T) {
	for i, h := range e.lab.Hosts {
		removeOthers(t, h)
		docker(t, h, "network", "rm", "enc", "encr")
		clean(t, h)
		unleaked(t, h, e.first[i], "plugin file", "mount", "route", "route6", "link")
	}
}
