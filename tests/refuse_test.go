package tests

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// ownIPAM makes networks with Weft's IPAM driver, with and without a subnet.
func ownIPAM(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	for _, h := range lab.Hosts {
		docker(t, h, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName,
			"--subnet", "10.45.0.0/24", "--gateway", "10.45.0.1", "--aux-address", "x=10.45.0.2", "-o", "vni=5045", "given")
	}
	// No range per host is needed: hosts skip what lives elsewhere.
	one := run(t, a, "own1", "--network", "given")
	first := addressOf(t, one, "given")
	eventuallySeen(t, b, first)
	two := run(t, b, "own2", "--network", "given")
	second := addressOf(t, two, "given")
	for _, got := range []netip.Addr{first, second} {
		if !netip.MustParsePrefix("10.45.0.0/24").Contains(got) || got == netip.MustParseAddr("10.45.0.1") || got == netip.MustParseAddr("10.45.0.2") {
			t.Errorf("Weft's IPAM gave %s", got)
		}
	}
	if first == second {
		t.Errorf("both hosts gave %s", first)
	}
	reach(t, one, second.String())
	refused(t, b, []string{"on host a", first.String()}, "network", "connect", "--ip", first.String(), "given", "client")

	docker(t, a, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName, "--ipv6", "chosen")
	n := networkOf(t, a, "chosen")
	if len(n.Subnets) != 2 {
		t.Errorf("a network without --subnet has %+v", n.Subnets)
	}
	three, four := run(t, a, "own3", "--network", "chosen"), run(t, a, "own4", "--network", "chosen")
	reach(t, three, addressOf(t, four, "chosen").String())
	for _, h := range lab.Hosts {
		clean(t, h)
	}
	docker(t, a, "rm", "--force", "own1", "own3", "own4")
	docker(t, b, "rm", "--force", "own2")
	docker(t, a, "network", "rm", "given", "chosen")
	docker(t, b, "network", "rm", "given")
}

// eventuallySeen waits until the host knows the endpoint of another host.
func eventuallySeen(t *testing.T, h *hosts.Host, address netip.Addr) {
	t.Helper()
	until(t, h, "knows "+address.String(), func(all []endpointView) bool {
		for _, e := range all {
			if !e.Local && e.IPv4 == address {
				return true
			}
		}
		return false
	})
}

// configFrom makes a network from a configuration network.
func configFrom(t *testing.T, lab *hosts.Lab) {
	a := lab.Hosts[0]
	docker(t, a, "network", "create", "--config-only", "--subnet", "10.46.0.0/24", "-o", "vni=5046", "-o", "mtu=1350", "config")
	docker(t, a, "network", "create", "-d", hosts.PluginName, "--config-from", "config", "made")
	if n := networkOf(t, a, "made"); n.VNI != 5046 || n.EffectiveMTU != 1350 || n.Subnets[0].Pool != "10.46.0.0/24" {
		t.Errorf("weft networks: %+v", n)
	}
	docker(t, a, "network", "rm", "made", "config")
}

// refusals asks for what cannot be, and reads why.
func refusals(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	create := func(args ...string) []string {
		return append(append([]string{"network", "create", "-d", hosts.PluginName}, args...), "never")
	}
	onHosts := func(h *hosts.Host, args ...string) {
		t.Helper()
		if _, err := h.Exec(t.Context(), args...); err != nil {
			t.Fatal(err)
		}
	}
	before := view[[]networkView](t, a, "networks")
	app := networkOf(t, a, "app")

	// An address that lives elsewhere, on this host, or outside.
	refused(t, b, []string{"10.32.1.10", "lives on host a"}, "run", "-d", "--name", "thief", "--network", "app", "--ip", "10.32.1.10", hosts.Image, "true")
	refused(t, b, []string{"fd00:32::a", "lives on host a"}, "run", "-d", "--name", "thief6", "--network", "app", "--ip6", "fd00:32::a", hosts.Image, "true")

	// Subnets. Docker's own IPAM refuses doubles itself, ours does with the name.
	ours := []string{"--ipam-driver", hosts.PluginName}
	refused(t, a, []string{"10.32"}, create(append(ours, "--subnet", "10.32.5.0/24")...)...)
	onHosts(a, "ip", "route", "add", "10.77.0.0/16", "via", "192.0.2.1")
	refused(t, a, []string{"10.77.5.0/24", "10.77.0.0/16", "eth0"}, create("--subnet", "10.77.5.0/24")...)
	refused(t, a, []string{"10.77.5.0/24", "10.77.0.0/16"}, create(append(ours, "--subnet", "10.77.5.0/24")...)...)
	onHosts(a, "ip", "route", "del", "10.77.0.0/16", "via", "192.0.2.1")
	refused(t, a, []string{"192.0.2.0/24", "eth0"}, create("--subnet", "192.0.2.128/25")...)

	// VNIs: of a network here, of a network with another subnet there, of a link
	// that is not Weft's.
	vni := "vni=" + strconv.Itoa(app.VNI)
	refused(t, a, []string{strconv.Itoa(app.VNI), app.ID[:12]}, create("--subnet", "10.47.0.0/24", "-o", vni)...)
	docker(t, a, "network", "create", "-d", hosts.PluginName, "--subnet", "10.48.0.0/24", "-o", "vni=5048", "mine")
	eventually(t, 10*time.Second, "host b knows vni 5048 of host a", func(context.Context) error {
		for _, p := range view[[]struct{ Networks []int }](t, b, "peers") {
			if slices.Contains(p.Networks, 5048) {
				return nil
			}
		}
		return errors.New("weft peers does not show it")
	})
	refused(t, b, []string{"5048", "10.48.0.0/24", "host a"}, create("--subnet", "10.49.0.0/24", "-o", "vni=5048")...)
	docker(t, a, "network", "rm", "mine")
	onHosts(a, "ip", "link", "add", "strange0", "type", "vxlan", "id", "5050", "dstport", "4797", "dev", "eth0", "nolearning")
	refused(t, a, []string{"5050", "strange0"}, create("--subnet", "10.50.0.0/24", "-o", "vni=5050")...)
	onHosts(a, "ip", "link", "del", "strange0")

	// Options.
	for _, o := range []struct{ option, want string }{
		{"mtuu=1400", "did you mean mtu"}, {"vlan=7", "vlan"}, {"mtu=67", "67"}, {"mtu=big", "big"}, {"vni=0", "vni"},
		{"vni=16777216", "16777216"}, {"vni=1,2", "list"}, {"encrypted", "encrypt"}, {"mode=bgp", "vxlan"}, {"gateway=me", "docker"}, {"masquerade=no", "gateway=weft"},
		{"ifname=a/b", "a/b"}, {"internal=maybe", "maybe"}, {"mtu=$(reboot)", "reboot"},
	} {
		key, _, _ := strings.Cut(o.option, "=")
		refused(t, a, []string{o.want, key}, create("--subnet", "10.51.0.0/24", "-o", o.option)...)
	}
	refused(t, a, []string{"subnet"}, create("--ipam-driver", "null")...)

	if after := view[[]networkView](t, a, "networks"); len(after) != len(before) {
		t.Errorf("a refused network left something: %+v", after)
	}
	docker(t, b, "rm", "--force", "thief", "thief6")
	figure(t, "clashes and bad options refused with their name", 23, "0 went through")
}
