package hosts

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestLabNameFindsOwner(t *testing.T) {
	for s, want := range map[string]struct {
		name string
		pid  int
	}{
		"wl-12-3":     {"wl-12-3", 12},
		"wl-12-3-a":   {"wl-12-3", 12},
		"wl-12-3-a-b": {"wl-12-3", 12},
		"wl-12":       {},
		"wl-x-3":      {},
		"wl-12-x":     {},
		"wlan-12-3":   {},
		"netns":       {},
	} {
		if name, pid := labName(s); name != want.name || pid != want.pid {
			t.Errorf("labName(%q) = %q, %d; want %q, %d", s, name, pid, want.name, want.pid)
		}
	}
}

func TestProbeCountsLossAndGaps(t *testing.T) {
	ms := int64(time.Millisecond)
	p := &Probe{sent: 10, arrivals: []arrival{{6, 6 * ms}, {1, 1 * ms}, {2, 2 * ms}, {2, 2 * ms}, {7, 7 * ms}}}
	p.count()
	want := Report{Sent: 10, Received: 4, Lost: 6, Duplicated: 1, Gap: 4 * time.Millisecond}
	if diff := cmp.Diff(want, p.report); diff != "" {
		t.Error(diff)
	}
	if p.report.Err() == nil {
		t.Error("a lossy report is no error")
	}
}

func TestInventoryDiffNamesWhatCameAndWent(t *testing.T) {
	a := Inventory{"link": {"lo", "weftb1", "x", "x"}, "set": nil}
	b := Inventory{"link": {"lo", "x"}, "set": {"weft-s"}}
	if got, want := a.Diff(b), "- link: weftb1\n- link: x\n+ set: weft-s\n"; got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
	if got := a.Diff(a); got != "" {
		t.Errorf("a differs from itself: %s", got)
	}
}
