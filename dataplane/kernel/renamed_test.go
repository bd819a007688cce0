package kernel_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// The link of a running container to which somebody gave an alias, as tools do for SNMP,
// is still its: it does not count as lost, and gets its alias back. One that only has such
// a name is a stranger's.
func TestRenamedLinkIsNotLost(t *testing.T) {
	for _, name := range []string{"program", "routed", "routed dual stack", "encrypted"} {
		t.Run(name, func(t *testing.T) {
			examples := kerneltest.Examples()
			at := slices.IndexFunc(examples, func(e kerneltest.Example) bool { return e.Name == name })
			if at < 0 {
				t.Fatal("there is no such example")
			}
			e := examples[at]
			e.Snapshot.Endpoints = slices.Clone(e.Snapshot.Endpoints)
			k := newKernel(t, kernel.Config{})
			kerneltest.Script(t, "ip link add weftvaaaaaaaaaa type veth peer name other\nip link set weftvaaaaaaaaaa alias uplink-1")
			passHost(t, k, e.HostPlan())
			pass(t, k, e)
			e.Snapshot.Endpoints[0].Sandbox = "/run/docker/netns/1"
			pass(t, k, e)
			veth := dataplane.VethName(e.Snapshot.Endpoints[0].ID)
			for _, alias := range []string{"uplink-42", ""} {
				kerneltest.Run(t, "ip", "link", "set", veth, "alias", alias)
				have, err := k.Read(t.Context(), e.Snapshot.VNI)
				if _, there := have[dataplane.Key{Kind: dataplane.KindVeth, Name: veth}]; err != nil || !there {
					t.Errorf("alias %q: the link is not the endpoint's any more, %v", alias, err)
				}
				pass(t, k, e)
				if out := kerneltest.Run(t, "ip", "-d", "link", "show", veth); !strings.Contains(out, "weft:ep ") {
					t.Errorf("alias %q: it did not get its own back: %s", alias, out)
				}
				if ops := pass(t, k, e); len(ops) != 0 {
					t.Errorf("alias %q: still to do: %v", alias, ops)
				}
			}
			kerneltest.Run(t, "ip", "link", "show", "weftvaaaaaaaaaa")
		})
	}
}
