package kerneltest

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// Suite holds a kernel to the promises of dataplane.Kernel. newKernel is called
// once per subtest, on its goroutine, and returns a kernel that holds nothing of
// ours and has the link UnderlayLink with Underlay4 and Underlay6.
func Suite(t *testing.T, newKernel func(t *testing.T) dataplane.Kernel) {
	for i, e := range Examples() {
		t.Run("round trip/"+e.Name, func(t *testing.T) { roundTrip(t, newKernel(t), e) })
		// Else the host's objects hardly depend on the example, and each takes
		// programs to run.
		host := i == 0 || e.Underlay.Address.Is6() || e.Snapshot.Network.Encrypted
		t.Run("repair/"+e.Name, func(t *testing.T) { repair(t, newKernel(t), e, host) })
		t.Run("change/"+e.Name, func(t *testing.T) { changed(t, newKernel(t), e, host) })
	}
	t.Run("two networks", func(t *testing.T) { twoNetworks(t, newKernel(t)) })
	t.Run("joined", func(t *testing.T) { joined(t, newKernel(t)) })
	t.Run("goes on after failure", func(t *testing.T) { goesOn(t, newKernel(t)) })
	t.Run("repetition", func(t *testing.T) { repetition(t, newKernel(t)) })
	t.Run("underlay", func(t *testing.T) { underlay(t, newKernel(t)) })
}

// both returns the plans of an example by network.
func both(t *testing.T, e Example) map[store.VNI]dataplane.Plan {
	t.Helper()
	p, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	return map[store.VNI]dataplane.Plan{store.HostVNI: e.HostPlan(), e.Snapshot.VNI: p}
}

// order is the host first, as the loop does it when it adds.
func order(plans map[store.VNI]dataplane.Plan) []store.VNI {
	return slices.Sorted(maps.Keys(plans))
}

func read(t *testing.T, k dataplane.Kernel, v store.VNI) dataplane.Plan {
	t.Helper()
	p, err := k.Read(t.Context(), v)
	if err != nil {
		t.Fatalf("read %d: %v", v, err)
	}
	return p
}

// pass makes the kernel hold want and returns the operations it took.
func pass(t *testing.T, k dataplane.Kernel, v store.VNI, want dataplane.Plan) []dataplane.Op {
	t.Helper()
	ops := dataplane.Diff(want, read(t, k, v))
	for _, e := range k.Apply(t.Context(), ops) {
		t.Errorf("apply: %v", e)
	}
	return ops
}

// holds fails unless the kernel holds exactly want.
func holds(t *testing.T, k dataplane.Kernel, v store.VNI, want dataplane.Plan) {
	t.Helper()
	have := read(t, k, v)
	if ops := dataplane.Diff(want, have); len(ops) != 0 {
		t.Errorf("vni %d: not as wanted, still to do:\n%s\n(-want +have)\n%s", v, opLines(ops), cmp.Diff(lines(want), lines(have)))
	}
}

// lines is the plan as text without the rules, which are not read back.
func lines(p dataplane.Plan) []string {
	var out []string
	for _, o := range p.Sorted() {
		if c, ok := o.(dataplane.Chain); ok {
			c.Rules = ""
			out = append(out, c.String()+" "+c.Hash)
			continue
		}
		out = append(out, o.String())
	}
	return out
}

func opLines(ops []dataplane.Op) string {
	var b strings.Builder
	for _, op := range ops {
		b.WriteString(op.String() + "\n")
	}
	return b.String()
}

// roundTrip: what was written is read back equal, and removal leaves nothing.
func roundTrip(t *testing.T, k dataplane.Kernel, e Example) {
	plans := both(t, e)
	for _, v := range order(plans) {
		pass(t, k, v, plans[v])
		holds(t, k, v, plans[v])
	}
	nets, err := k.Networks(t.Context())
	if err != nil || !slices.Equal(nets, []store.VNI{e.Snapshot.VNI}) {
		t.Errorf("networks: %v, %v; want %d", nets, err, e.Snapshot.VNI)
	}
	for _, v := range slices.Backward(order(plans)) {
		pass(t, k, v, dataplane.Plan{})
		holds(t, k, v, dataplane.Plan{})
	}
	if nets, err := k.Networks(t.Context()); err != nil || len(nets) != 0 {
		t.Errorf("networks after removal: %v, %v", nets, err)
	}
}

// repair: each object that somebody deletes comes back, in at most two passes.
func repair(t *testing.T, k dataplane.Kernel, e Example, host bool) {
	plans := both(t, e)
	if !host {
		delete(plans, store.HostVNI)
	}
	for _, v := range order(plans) {
		pass(t, k, v, plans[v])
	}
	for _, v := range order(plans) {
		for _, o := range plans[v].Sorted() {
			if o.Key().Kind == dataplane.KindSet {
				continue // cannot be deleted while a rule names it
			}
			if errs := k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Delete, Object: o}}); len(errs) != 0 {
				t.Fatalf("delete: %v", errs[0])
			}
			if len(dataplane.Diff(plans[v], read(t, k, v))) == 0 {
				t.Fatalf("deletion is not seen: %s", o)
			}
			pass(t, k, v, plans[v])
			holds(t, k, v, plans[v])
			if t.Failed() {
				t.Fatalf("after deletion of %s", o)
			}
		}
	}
}

// changed: each object that somebody changes is set right in one pass.
func changed(t *testing.T, k dataplane.Kernel, e Example, host bool) {
	plans := both(t, e)
	if !host {
		delete(plans, store.HostVNI)
	}
	for _, v := range order(plans) {
		pass(t, k, v, plans[v])
	}
	for _, v := range order(plans) {
		for _, o := range plans[v].Sorted() {
			for _, other := range variants(o) {
				if errs := k.Apply(t.Context(), []dataplane.Op{{Verb: dataplane.Put, Object: other, Old: o}}); len(errs) != 0 {
					t.Fatalf("change: %v", errs[0])
				}
				if len(dataplane.Diff(plans[v], read(t, k, v))) == 0 {
					t.Fatalf("change is not seen: %s", other)
				}
				pass(t, k, v, plans[v])
				holds(t, k, v, plans[v])
				if t.Failed() {
					t.Fatalf("after change to %s", other)
				}
			}
		}
	}
}

// variants returns objects of the same key that differ in one thing each.
func variants(o dataplane.Object) []dataplane.Object {
	mac := store.MAC{2, 0xba, 0xd, 0, 0, 1}
	var out []dataplane.Object
	switch o := o.(type) {
	case dataplane.Bridge:
		a, b, c, d := o, o, o, o
		a.MTU, b.Up, c.MAC, d.Alias = 1300, !o.Up, mac, o.Alias+"x"
		out = append(out, a, b, c, d)
		if e := o; o.Router.On {
			e.Router = dataplane.NewRouter(!o.Router.Local, netip.MustParseAddr("203.0.113.1"))
			out = append(out, e)
		}
	case dataplane.VXLAN:
		a, b, c, d, e, f := o, o, o, o, o, o
		a.MTU, b.Up, c.MAC, d.Port, e.Suppress, f.NoChecksum = 1300, false, mac, o.Port+1, false, !o.NoChecksum
		out = append(out, a, b, c, d, f)
		if o.Suppress {
			out = append(out, e)
		}
	case dataplane.Veth:
		a, b, c := o, o, o
		a.MTU, b.Up, c.MAC = 1300, false, mac
		out = append(out, a, b, c)
		if e := o; o.Bridge != "" {
			e.Hairpin = !o.Hairpin
			out = append(out, e)
		}
		if f := o; o.Program.MTU != 0 {
			f.Program.MTU = 1300
			out = append(out, f)
		}
		if d := o; o.Router.On {
			d.Router = dataplane.NewRouter(o.Router.Local, netip.MustParseAddr("203.0.113.1"))
			out = append(out, d)
		}
	case dataplane.Route:
		if a := o; !o.Peers[0].IsZero() {
			a.Peers[0] = TunnelOf("peer2", 1).Keys[0]
			out = append(out, a)
		}
		if b := o; !o.Peers[1].IsZero() {
			b.Peers[1], b.Link = store.WGKey{}, dataplane.TunnelNames[1]
			out = append(out, b)
		}
		if o.Via.IsValid() && o.Via.Is4() {
			o.Via = netip.MustParseAddr("203.0.113.9")
			out = append(out, o)
		}
	case dataplane.WireGuard:
		a, b, c := o, o, o
		a.MTU, b.Port, c.Public = 1300, o.Port+7, TunnelOf("peer2", 1).Keys[0]
		out = append(out, a, b, c)
	case dataplane.TunnelPeer:
		o.Endpoints = "203.0.113.9:4798"
		out = append(out, o)
	case dataplane.Neigh:
		o.MAC = mac
		out = append(out, o)
	case dataplane.FDB:
		if !o.MAC.IsZero() && !o.Master {
			if o.Dst = netip4or6(o.Dst.Is4()); o.Dst.IsValid() {
				out = append(out, o)
			}
		}
	case dataplane.Set:
		a := o
		o.Members = map[bool]string{false: "203.0.113.9", true: "2001:db8:9::9"}[o.V6]
		out = append(out, o)
		if a.Members != "" {
			a.Members = ""
			out = append(out, a)
		}
	case dataplane.Chain:
		out = append(out, dataplane.NewChain(o.Table, o.V6, o.Name), dataplane.NewChain(o.Table, o.V6, o.Name, "-j RETURN"))
	}
	return out
}
