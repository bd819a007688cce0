package kerneltest

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

func netip4or6(v4 bool) netip.Addr {
	if v4 {
		return netip.MustParseAddr("203.0.113.9")
	}
	return netip.MustParseAddr("2001:db8:9::9")
}

// twoNetworks: networks do not see each other, and go one by one.
func twoNetworks(t *testing.T, k dataplane.Kernel) {
	a, b := Examples()[0], Examples()[1]
	pa, errA := a.Plan()
	pb, errB := b.Plan()
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	pass(t, k, a.Snapshot.VNI, pa)
	pass(t, k, b.Snapshot.VNI, pb)
	holds(t, k, a.Snapshot.VNI, pa)
	holds(t, k, b.Snapshot.VNI, pb)
	if nets, err := k.Networks(t.Context()); err != nil || !slices.Equal(nets, []store.VNI{a.Snapshot.VNI, b.Snapshot.VNI}) {
		t.Errorf("networks: %v, %v", nets, err)
	}
	pass(t, k, a.Snapshot.VNI, dataplane.Plan{})
	holds(t, k, a.Snapshot.VNI, dataplane.Plan{})
	holds(t, k, b.Snapshot.VNI, pb)
}

// joined: an endpoint's link is told as joined, is repaired, and is not made again.
func joined(t *testing.T, k dataplane.Kernel) {
	e := Examples()[0]
	before, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	v := e.Snapshot.VNI
	pass(t, k, v, before)
	e.Snapshot.Endpoints = slices.Clone(e.Snapshot.Endpoints)
	e.Snapshot.Endpoints[0].Sandbox = "/run/docker/netns/1"
	want, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	if ops := pass(t, k, v, want); len(ops) != 1 {
		t.Errorf("join takes %d operations:\n%s", len(ops), opLines(ops))
	}
	holds(t, k, v, want)
	veth := want[dataplane.Key{Kind: dataplane.KindVeth, Name: dataplane.VethName(e.Snapshot.Endpoints[0].ID)}].(dataplane.Veth)
	down := veth
	down.Up = false
	k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Put, Object: down, Old: veth}})
	pass(t, k, v, want)
	holds(t, k, v, want)
	k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Delete, Object: veth}})
	if ops := pass(t, k, v, want); len(ops) != 0 {
		t.Errorf("without a joined link there is still to do:\n%s", opLines(ops))
	}
	if errs := k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Put, Object: veth}}); len(errs) != 1 {
		t.Errorf("a joined link was made again")
	}
}

// goesOn: operations that cannot succeed fail alone.
func goesOn(t *testing.T, k dataplane.Kernel) {
	e := Examples()[0]
	plans := both(t, e)
	bridge := plans[e.Snapshot.VNI][dataplane.Key{Kind: dataplane.KindBridge, Name: dataplane.BridgeName(e.Snapshot.VNI)}]
	good := dataplane.NewChain("filter", false, "WEFT-GOOD", "-j RETURN")
	bad := []dataplane.Object{
		dataplane.NewChain("filter", false, "WEFT-BAD", "-p udp -m set --match-set weft-missing src -j DROP"),
		dataplane.Veth{Name: "weftv0000000000", Alias: "weft:ep 4096 e n 02:00:00:00:00:01 - -", Bridge: "weftb9", MAC: store.MAC{2}, MTU: 1400, Up: true},
		dataplane.FDB{Link: "weftx9", MAC: store.MAC{2}, Dst: netip4or6(true)},
		dataplane.Neigh{Link: "weftb9", IP: netip4or6(true), MAC: store.MAC{2}},
		dataplane.Jump{Table: "filter", From: "FORWARD", To: "WEFT-MISSING"},
	}
	var ops []dataplane.Op
	for _, o := range append([]dataplane.Object{good, bridge}, bad...) {
		ops = append(ops, dataplane.Op{Verb: dataplane.Put, Object: o})
	}
	slices.SortStableFunc(ops, func(a, b dataplane.Op) int { return int(a.Object.Key().Kind) - int(b.Object.Key().Kind) })
	failed := map[dataplane.Key]bool{}
	for _, err := range k.Apply(t.Context(), ops) {
		failed[err.Op.Object.Key()] = true
	}
	for _, o := range bad {
		if !failed[o.Key()] {
			t.Errorf("succeeded: %s", o)
		}
	}
	if len(failed) != len(bad) {
		t.Errorf("%d operations failed, want %d: %v", len(failed), len(bad), failed)
	}
	holds(t, k, store.HostVNI, dataplane.Plan{good.Key(): good})
	holds(t, k, e.Snapshot.VNI, dataplane.Plan{bridge.Key(): bridge})
}

// repetition: everything may be done twice, also what nobody can see was done.
func repetition(t *testing.T, k dataplane.Kernel) {
	plans := both(t, Examples()[2])
	for range 2 {
		for _, v := range order(plans) {
			for _, e := range k.Apply(t.Context(), dataplane.Diff(plans[v], dataplane.Plan{})) {
				t.Errorf("apply: %v", e)
			}
			holds(t, k, v, plans[v])
		}
	}
	for range 2 {
		for _, v := range slices.Backward(order(plans)) {
			for _, e := range k.Apply(t.Context(), dataplane.Diff(dataplane.Plan{}, plans[v])) {
				t.Errorf("apply: %v", e)
			}
			holds(t, k, v, dataplane.Plan{})
		}
	}
}

// underlay: the wanted address is found, and one that is not there is no error.
func underlay(t *testing.T, k dataplane.Kernel) {
	u, err := k.Underlay(t.Context(), Underlay4)
	if err != nil || u.Address != Underlay4 || u.Link != UnderlayLink || u.MTU != UnderlayMTU {
		t.Errorf("underlay %s: %+v, %v", Underlay4, u, err)
	}
	u, err = k.Underlay(t.Context(), netip.MustParseAddr("203.0.113.77"))
	if err != nil || u.Address.IsValid() {
		t.Errorf("underlay of a foreign address: %+v, %v", u, err)
	}
}
