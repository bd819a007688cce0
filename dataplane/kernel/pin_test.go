package kernel

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// bpfFolder mounts a bpf file system for the time of the test.
func bpfFolder(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	if err := unix.Mount("bpf", folder, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a bpf file system: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(folder, 0)) })
	return folder
}

func loadPinned(t *testing.T, folder string) *Program {
	t.Helper()
	p := LoadProgram(folder)
	must(t, p.Err())
	if p.pins == "" {
		t.Fatal("there is no place for pins")
	}
	return p
}

// TestUpgradeKeepsWhatItCan: a version in which one map is laid out in another way goes on
// with the others, and its filters are told from those that have that map.
func TestUpgradeKeepsWhatItCan(t *testing.T) {
	kerneltest.Netns(t)
	folder := bpfFolder(t)
	old := loadPinned(t, folder)
	must(t, old.pin())
	flow, to := bpf.ProgramFlow{Vni: 1, Src: 2, Dst: 3}, bpf.ProgramFlowTo{Ip4: 4}
	must(t, old.objects.WeftFlowsTo.Put(flow, to))
	must(t, os.Remove(filepath.Join(old.pins, "weft_parts")))
	parts, err := ebpf.NewMap(&ebpf.MapSpec{Name: "weft_parts", Type: ebpf.LRUHash, KeySize: 4, ValueSize: 4, MaxEntries: 8})
	must(t, err)
	must(t, parts.Pin(filepath.Join(old.pins, "weft_parts")))
	must(t, parts.Close())
	defer old.Close() // what stands on links has its maps still

	now := loadPinned(t, folder)
	defer now.Close()
	var got bpf.ProgramFlowTo
	if err := now.objects.WeftFlowsTo.Lookup(flow, &got); err != nil || got != to {
		t.Errorf("after the upgrade the flow goes to %v, %v; want %v", got, err, to)
	}
	must(t, now.pin())
	again := loadPinned(t, folder)
	defer again.Close()
	for i := range now.name {
		if now.name[i] == old.name[i] {
			t.Errorf("a filter of other maps has the same name: %s", now.name[i])
		}
		if again.name[i] != now.name[i] {
			t.Errorf("a filter of the same maps is %q, and then %q", now.name[i], again.name[i])
		}
		if !strings.HasPrefix(now.name[i], filterPrefix) {
			t.Errorf("filter %q is not known as ours", now.name[i])
		}
	}
}

// TestPinsAreNeverAway: who cannot pin a map leaves the pin that is there, and what a
// process left half way is in nobody's way.
func TestPinsAreNeverAway(t *testing.T) {
	kerneltest.Netns(t)
	p := loadPinned(t, bpfFolder(t))
	defer p.Close()
	must(t, p.pin())
	path := filepath.Join(p.pins, "weft_parts")
	must(t, pinAs(p.objects.WeftParts, path+"_new")) // one died before the rename
	p.pinned = false
	must(t, p.pin())
	if left, err := filepath.Glob(filepath.Join(p.pins, "*_new")); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	must(t, p.objects.WeftParts.Close())
	p.pinned = false
	if err := p.pin(); err == nil {
		t.Error("a closed map was pinned")
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the pin that was there: %v", err)
	}
}
