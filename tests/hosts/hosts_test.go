package hosts

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
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

// A lab whose process died leaves processes, namespaces, cgroups and files; the
// next lab takes them away, and nothing of a living one.
func TestSweepRemovesWhatADeadProcessLeft(t *testing.T) {
	Require(t, "root", "docker")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	owner := exec.Command("true")
	if err := owner.Run(); err != nil {
		t.Fatal(err)
	}
	dead := fmt.Sprintf("%s%d-1", prefix, owner.Process.Pid)
	alive := fmt.Sprintf("%s%d-99999", prefix, os.Getpid())
	spaces := map[string]string{}
	for _, lab := range []string{dead, alive} {
		dir := filepath.Join(root, lab)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := writeOwner(dir); err != nil {
			t.Fatal(err)
		}
		spaces[lab] = lab + "-a"
		if _, err := run(ctx, nil, "ip", "netns", "add", spaces[lab]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := removeLab(context.WithoutCancel(ctx), lab); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := makeCgroup(dead + "/a/engine"); err != nil {
		t.Fatal(err)
	}
	left := command(ctx, nil, "ip", "netns", "exec", spaces[dead], "sleep", "60")
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- left.Wait() }()

	space, err := os.Stat("/run/netns/" + spaces[dead])
	if err != nil {
		t.Fatal(err)
	}
	inode := space.Sys().(*syscall.Stat_t).Ino
	err = waitFor(ctx, time.Millisecond, "the process to enter the namespace", func() (bool, error) {
		pids, err := labProcesses(dead, map[uint64]bool{inode: true})
		return len(pids) > 0, err
	})
	if err != nil {
		t.Fatal(err)
	}

	if err := Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || ctx.Err() != nil {
		t.Errorf("the process was not killed: %v", err)
	}
	for _, p := range []string{filepath.Join(root, dead), "/run/netns/" + spaces[dead], filepath.Join(cgroupRoots()[0], dead)} {
		if exists(p) {
			t.Errorf("%s is still there", p)
		}
	}
	for _, p := range []string{filepath.Join(root, alive), "/run/netns/" + spaces[alive]} {
		if !exists(p) {
			t.Errorf("%s of a living process is gone", p)
		}
	}
}

// A lab whose owner is being noted is not a dead one's.
func TestLabThatBeginsIsAlive(t *testing.T) {
	Require(t, "root")
	name := prefix + strconv.Itoa(os.Getpid()) + "-99999"
	dir := filepath.Join(root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, text := range []string{"", "1"} {
		if err := os.WriteFile(filepath.Join(dir, "owner"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if alive := ownerAlive(name, os.Getpid()); alive != (text == "") {
			t.Errorf("owner %q: alive %t", text, alive)
		}
	}
}
