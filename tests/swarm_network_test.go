package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// networks makes networks of each kind and looks at what Docker tells of them.
func (s *swarm) networks(t *testing.T) {
	a, b, c := s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
	s.network(t, "app", 32, "-o", "mtu=1400")
	s.network(t, "own", 33, "--ipam-driver", hosts.PluginName)
	s.network(t, "closed", 34, "--internal")
	all := []*hosts.Host{a, b, c}

	var attached, own, closed []hosts.Container
	for i, h := range all {
		attached = append(attached, run(t, h, "app"+h.Name, "--network", "app", "--ip", fmt.Sprintf("10.32.0.%d", 200+i)))
		own = append(own, run(t, h, "own"+h.Name, "--network", "own"))
		closed = append(closed, run(t, h, "closed"+h.Name, "--network", "closed"))
	}
	seen := map[netip.Addr]bool{}
	for i := range all {
		if got, want := addressOf(t, attached[i], "app").String(), fmt.Sprintf("10.32.0.%d", 200+i); got != want {
			t.Errorf("--ip %s became %s", want, got)
		}
		seen[addressOf(t, own[i], "own")] = true
		for j, to := range all {
			named(t, attached[i], "app"+to.Name)
			reach(t, own[i], addressOf(t, own[j], "own").String())
			reach(t, closed[i], addressOf(t, closed[j], "closed").String())
		}
		if out := command(t, closed[i], "ip", "route"); strings.Contains(out, "default") {
			t.Errorf("an internal network has a way out: %s", out)
		}
	}
	if len(seen) != len(all) {
		t.Errorf("Weft's IPAM gave %v to %d containers", seen, len(all))
	}
	silent(t, closed[0], attached[0].Name)
	s.inspect(t, all)
	vni := 0
	for _, h := range all {
		n := networkOf(t, h, "app")
		if vni == 0 {
			vni = n.VNI
		}
		if n.VNI != vni || n.EffectiveMTU != 1400 || n.Peers == nil || len(n.Peers) != 2 {
			t.Errorf("host %s: VNI %d (elsewhere %d), MTU %d, peers %v", h.Name, n.VNI, vni, n.EffectiveMTU, n.Peers)
		}
	}
	s.duplicates(t, all...)
	t.Run("encrypted", s.encrypted)
	for _, h := range all {
		clean(t, h)
		docker(t, h, "rm", "--force", "app"+h.Name, "own"+h.Name, "closed"+h.Name)
	}
	s.removeNetworks(t, "app", "own", "closed")
	s.forgotten(t)
}

// inspect compares docker network inspect of every host with what was asked for.
func (s *swarm) inspect(t *testing.T, all []*hosts.Host) {
	var addresses []string
	for _, h := range all {
		addresses = append(addresses, h.Address.String())
	}
	slices.Sort(addresses)
	for i, h := range all {
		var shown []struct {
			Driver, Scope string
			Attachable    bool
			Options       map[string]string
			IPAM          struct{ Config []struct{ Subnet string } }
			Containers    map[string]struct{ Name, IPv4Address string }
			Peers         []struct{ IP string }
		}
		eventually(t, 20*time.Second, "network inspect on "+h.Name+" names the peers", func(ctx context.Context) error {
			out, err := h.Docker(ctx, "network", "inspect", "app")
			if err == nil {
				err = json.Unmarshal([]byte(out), &shown)
			}
			if err != nil {
				return err
			}
			var peers []string
			for _, p := range shown[0].Peers {
				peers = append(peers, p.IP)
			}
			slices.Sort(peers)
			if !slices.Equal(peers, addresses) {
				return fmt.Errorf("peers are %v, want %v", peers, addresses)
			}
			return nil
		})
		n := shown[0]
		if n.Driver != hosts.PluginName || n.Scope != "swarm" || !n.Attachable || len(n.IPAM.Config) != 1 || n.IPAM.Config[0].Subnet != "10.32.0.0/16" {
			t.Errorf("host %s: network inspect shows %+v", h.Name, n)
		}
		if n.Options["mtu"] != "1400" || n.Options["weft.vni"] == "" {
			t.Errorf("host %s: network inspect shows the options %v", h.Name, n.Options)
		}
		for _, c := range n.Containers {
			if want := fmt.Sprintf("10.32.0.%d/16", 200+i); c.Name != "app"+h.Name || c.IPv4Address != want {
				t.Errorf("host %s: network inspect shows %+v, want app%[1]s at %s", h.Name, c, want)
			}
		}
		if len(n.Containers) != 1 {
			t.Errorf("host %s: network inspect shows %d containers, want the host's own", h.Name, len(n.Containers))
		}
	}
}

// encrypted runs a service on an encrypted network of the Swarm, and looks for its
// packets on the cable.
func (s *swarm) encrypted(t *testing.T) {
	var captures []*hosts.Capture
	for _, h := range s.lab.Hosts {
		c, err := s.lab.Underlay.Capture(t.Context(), h, "net 10.35.0.0/16")
		if err != nil {
			t.Fatal(err)
		}
		captures = append(captures, c)
	}
	s.network(t, "secret", 35, "-o", "encrypted")
	tasks := s.service(t, "secret", 3, "--network", "secret")
	s.mesh(t, "secret", tasks)
	resolves(t, s.lab.Container(tasks[0]), "secret", "secret", tasks)
	s.removeServices(t, "secret")
	s.removeNetworks(t, "secret")
	plain := 0
	for _, c := range captures {
		lines, err := c.Stop(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		plain += len(lines)
		for _, l := range lines {
			t.Errorf("plain on the cable: %s", l)
		}
	}
	figure(t, "swarm: service on an encrypted network on "+s.name, 1, "%d tasks reach each other, %d plain packets (target 0)", len(tasks), plain)
}

// forgotten waits until no host knows a network or endpoint any more.
func (s *swarm) forgotten(t *testing.T) {
	t.Helper()
	for _, h := range s.lab.Hosts {
		eventually(t, 30*time.Second, "host "+h.Name+" has forgotten all networks", func(context.Context) error {
			if n := view[[]networkView](t, h, "networks"); len(n) > 0 {
				return fmt.Errorf("it knows %+v", n)
			}
			if len(view[[]endpointView](t, h, "endpoints")) > 0 {
				return errors.New("it knows endpoints")
			}
			return nil
		})
	}
}
