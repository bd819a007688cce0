package kernel_test

import (
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// Whoever clears a map of the port program is noticed before the next audit, and a pass
// brings back what was in it.
func TestClearedMapsAreRepaired(t *testing.T) {
	t.Parallel()
	all := kerneltest.Examples()
	e := all[slices.IndexFunc(all, func(e kerneltest.Example) bool { return e.Name == "program, services" })]
	k := newKernel(t, kernel.Config{})
	if _, err := k.Underlay(t.Context(), kerneltest.Underlay4); err != nil {
		t.Fatal(err)
	}
	passHost(t, k, e.HostPlan())
	pass(t, k, e)
	events := k.Watch(t.Context())
	for _, name := range []string{"weft_settings", "weft_ports", "weft_dests", "weft_peers", "weft_counters", "weft_services"} {
		quiet(t, events)
		k.ClearMap(t, name)
		for told := map[store.VNI]bool{}; !told[store.HostVNI] || !told[e.Snapshot.VNI]; {
			v, ok := next(events, 5*time.Second)
			if !ok {
				t.Fatalf("%s was cleared, and of networks %v alone is told", name, told)
			}
			told[v] = true
		}
		if ops := passHost(t, k, e.HostPlan()); len(ops) == 0 {
			t.Errorf("%s was cleared, and the host's pass repairs nothing", name)
		}
		pass(t, k, e)
		settled(t, k, e)
		for _, endpoint := range e.Snapshot.Endpoints {
			if _, err := k.CountersOf(dataplane.VethName(endpoint.ID)); err != nil {
				t.Errorf("after %s was cleared, endpoint %.12s has no counters: %v", name, endpoint.ID, err)
			}
		}
	}
}
