package kerneltest_test

import (
	"testing"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

func newMemory() *kerneltest.Memory {
	return kerneltest.NewMemory(dataplane.Underlay{Address: kerneltest.Underlay4, Link: kerneltest.UnderlayLink, MTU: kerneltest.UnderlayMTU})
}

func TestMemory(t *testing.T) {
	kerneltest.Suite(t, func(*testing.T) dataplane.Kernel { return newMemory() })
}

// Stopped after any operation, one more pass converges.
func TestCutAnywhere(t *testing.T) {
	for _, e := range kerneltest.Examples() {
		want, err := e.Plan()
		if err != nil {
			t.Fatal(err)
		}
		for cut := range len(want) {
			k := newMemory()
			if e.Snapshot.Network.Encrypted { // its routes need the host's devices
				k.Apply(t.Context(), dataplane.Diff(e.HostPlan(), dataplane.Plan{}))
			}
			begun := k.Count()
			k.Before = func(n int, _ dataplane.Op) error {
				if n-begun == cut {
					return kerneltest.ErrStopped
				}
				return nil
			}
			k.Apply(t.Context(), dataplane.Diff(want, dataplane.Plan{}))
			for range 1 {
				have, err := k.Read(t.Context(), e.Snapshot.VNI)
				if err != nil {
					t.Fatal(err)
				}
				for _, err := range k.Apply(t.Context(), dataplane.Diff(want, have)) {
					t.Errorf("%s, cut at %d: %v", e.Name, cut, err)
				}
			}
			have, err := k.Read(t.Context(), e.Snapshot.VNI)
			if ops := dataplane.Diff(want, have); err != nil || len(ops) != 0 {
				t.Errorf("%s, cut at %d: still to do %v, %v", e.Name, cut, ops, err)
			}
		}
	}
}

func TestStrangersStay(t *testing.T) {
	k := newMemory()
	e := kerneltest.Examples()[0]
	want, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	planted := dataplane.Bridge{Name: dataplane.BridgeName(e.Snapshot.VNI), Alias: "somebody's", MTU: 1500}
	k.Plant(planted)
	errs := k.Apply(t.Context(), dataplane.Diff(want, dataplane.Plan{}))
	if len(errs) == 0 || errs[0].Op.Object.Key() != planted.Key() {
		t.Errorf("a stranger's bridge was taken: %v", errs)
	}
	k.Apply(t.Context(), dataplane.Diff(dataplane.Plan{}, want))
	if !k.Planted(planted) {
		t.Error("a stranger's bridge was deleted")
	}
}

func TestWatchTellsOfBreaks(t *testing.T) {
	k := newMemory()
	e := kerneltest.Examples()[0]
	want, err := e.Plan()
	if err != nil {
		t.Fatal(err)
	}
	k.Apply(t.Context(), dataplane.Diff(want, dataplane.Plan{}))
	events := k.Watch(t.Context())
	bridge := want[dataplane.Key{Kind: dataplane.KindBridge, Name: dataplane.BridgeName(e.Snapshot.VNI)}]
	if err := k.Break(dataplane.Op{Verb: dataplane.Delete, Object: bridge}); err != nil {
		t.Fatal(err)
	}
	k.SetUnderlay(dataplane.Underlay{})
	for _, want := range []store.VNI{e.Snapshot.VNI, store.HostVNI} {
		if got := <-events; got != want {
			t.Errorf("got %d, want %d", got, want)
		}
	}
}
