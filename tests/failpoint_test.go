package tests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// stage is an operation of Docker's user on one host, and how the user gets the
// same result after it was cut off.
type stage struct {
	name string
	do   func(ctx context.Context, f *failHost) error
}

// The stages, in an order in which each finds what it needs.
var stages = []stage{
	{"network create", func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName,
			"--subnet", f.subnet, "-o", "vni="+f.vni, "cycle")
		return err
	}},
	{"run", func(ctx context.Context, f *failHost) error {
		// A container that could not start is removed and tried anew.
		_, _ = f.host.Docker(ctx, "rm", "--force", "short")
		_, err := f.host.Run(ctx, "short", "--network", "cycle")
		return err
	}},
	{"rm", func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "rm", "--force", "short")
		return ignoreGone(err)
	}},
	{"network rm", func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "rm", "cycle")
		return ignoreGone(err)
	}},
	{"run on the peer", func(ctx context.Context, f *failHost) error {
		_, _ = f.peer.Docker(ctx, "rm", "--force", "visitor")
		_, err := f.peer.Run(ctx, "visitor", "--network", "app")
		return err
	}},
	{"rm on the peer", func(ctx context.Context, f *failHost) error {
		_, err := f.peer.Docker(ctx, "rm", "--force", "visitor")
		return ignoreGone(err)
	}},
}

func ignoreGone(err error) error {
	if err != nil && strings.Contains(strings.ToLower(err.Error()), "no such") {
		return nil
	}
	return err
}

// stageOf says which operation reaches a step.
func stageOf(step string) string {
	for _, s := range []struct{ prefix, stage string }{
		{"driver.CreateNetwork", "network create"}, {"ipam.RequestPool", "network create"},
		{"driver.CreateEndpoint", "run"}, {"driver.Join", "run"}, {"ipam.RequestAddress", "run"},
		{"driver.Leave", "rm"}, {"driver.DeleteEndpoint", "rm"}, {"ipam.ReleaseAddress", "rm"}, {"ipam.Audit", "rm"},
		{"driver.DeleteNetwork", "network rm"}, {"ipam.ReleasePool", "network rm"},
		{"kernel.put.veth", "run"}, {"kernel.put.fdb", "run"}, {"kernel.put.neigh", "run on the peer"}, {"kernel.put.", "network create"},
		{"kernel.delete.veth", "rm"}, {"kernel.delete.fdb", "rm"}, {"kernel.delete.neigh", "rm on the peer"}, {"kernel.delete.", "network rm"},
	} {
		if strings.HasPrefix(step, s.prefix) {
			return s.stage
		}
	}
	return ""
}

// onlyAlone are the steps that a host takes for its first and last network.
var onlyAlone = []string{"kernel.put.set", "kernel.put.jump", "kernel.delete.set", "kernel.delete.jump", "kernel.delete.chain"}

// failHost is a host whose plugin is killed at chosen steps.
type failHost struct {
	host, peer   *hosts.Host
	subnet, vni  string
	state        string        // folder of the fail point's file
	stays        func() error  // tells whether what runs still talks; nil before anything runs
	killed, slow int           // steps; and those that the slow audits had to clean up
	slept        time.Duration // until calls were served again, summed
	missed       []string      // steps that were not reached
}

// TestEveryStepCanBeTheLast kills the plugin at every step of every call and of
// the kernel's changes, one at a time, and then does what a user would.
func TestEveryStepCanBeTheLast(t *testing.T) {
	lab := newLab(t, 2, nil)
	install(t, lab, pluginDir(t, "failpoint", "crash"))
	a, b := lab.Hosts[0], lab.Hosts[1]
	out, err := a.Exec(t.Context(), "weft", "failpoints")
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Fields(out)
	if len(steps) < 40 {
		t.Fatalf("only %d steps: %s", len(steps), out)
	}

	// Each step is for one of the hosts, so that both work at the same time; what a
	// peer must do for it comes at the end, when the peer has nothing of its own.
	work := map[*hosts.Host][]string{}
	var withPeer, alone []string
	for i, step := range steps {
		switch {
		case stageOf(step) == "":
			t.Errorf("no operation is known that reaches step %s", step)
		case slices.Contains(onlyAlone, step):
			alone = append(alone, step)
		case strings.HasSuffix(stageOf(step), "on the peer"):
			withPeer = append(withPeer, step)
		default:
			h := lab.Hosts[i%2]
			work[h] = append(work[h], step)
		}
	}
	both := []*failHost{
		{host: a, peer: b, subnet: "10.41.0.0/16", vni: "5001"},
		{host: b, peer: a, subnet: "10.42.0.0/16", vni: "5002"},
	}
	empty := make([]hosts.Inventory, 2)
	for i, f := range both {
		if f.state, err = f.host.StateDir(t.Context()); err != nil {
			t.Fatal(err)
		}
		empty[i] = inventory(t, f.host)
	}
	inParallel(both, func(i int, f *failHost) { f.cycles(t, everySecond(alone, i)) })
	if t.Failed() {
		return
	}
	for i, f := range both {
		unleaked(t, f.host, empty[i], "plugin file")
	}

	createNetwork(t, lab, "app", 32)
	probe, from, to := probePair(t, lab, "app")
	toAddress, fromAddress := addressOf(t, to, "app").String(), addressOf(t, from, "app").String()
	before := []hosts.Inventory{}
	for i, f := range both {
		who, where := from, toAddress
		if i == 1 {
			who, where = to, fromAddress
		}
		f.stays = func() error {
			_, err := who.Exec(t.Context(), "ping", "-c", "1", "-W", "2", where)
			return err
		}
		before = append(before, inventory(t, f.host))
	}
	inParallel(both, func(_ int, f *failHost) { f.cycles(t, work[f.host]) })
	if !t.Failed() {
		both[0].cycles(t, withPeer)
	}
	r := lossless(t, probe)
	killed, slow := 0, 0
	var slept time.Duration
	for i, f := range both {
		killed, slow, slept = killed+f.killed, slow+f.slow, slept+f.slept
		if len(f.missed) > 0 {
			t.Errorf("host %s: steps that no operation reached: %v", f.host.Name, f.missed)
		}
		if !t.Failed() {
			unleaked(t, f.host, before[i], "plugin file")
		}
	}
	figure(t, "fail points: plugin killed at each step", killed, "%d of %d steps reached, 0 left over (%d by the slow audits), %d of %d packets lost, TCP %s; served again after %s on average",
		killed, len(steps), slow, r.Lost, r.Sent, broken(r), (slept / time.Duration(max(killed, 1))).Round(time.Millisecond))
}

func everySecond(all []string, first int) []string {
	var out []string
	for i := first; i < len(all); i += 2 {
		out = append(out, all[i])
	}
	return out
}

func inParallel(both []*failHost, fn func(int, *failHost)) {
	var group sync.WaitGroup
	for i, f := range both {
		group.Go(func() { fn(i, f) })
	}
	group.Wait()
}

// cycles runs through the stages again and again until the plugin was killed once
// at each step. A stage without a step of its own left is done undisturbed.
func (f *failHost) cycles(t *testing.T, steps []string) {
	left := map[string][]string{}
	for _, s := range steps {
		left[stageOf(s)] = append(left[stageOf(s)], s)
	}
	for n := len(steps); n > 0 && !t.Failed(); {
		for _, s := range stages {
			step := ""
			if l := left[s.name]; len(l) > 0 {
				step, left[s.name] = l[0], l[1:]
				n--
			}
			if strings.HasSuffix(s.name, "on the peer") && f.stays == nil {
				continue
			}
			if strings.HasSuffix(s.name, "on the peer") && len(left["run on the peer"])+len(left["rm on the peer"]) == 0 && step == "" {
				continue
			}
			f.stage(t, s, step)
			if t.Failed() {
				return
			}
		}
	}
}

// stage does one operation, with the plugin killed at the step if one is given.
func (f *failHost) stage(t *testing.T, s stage, step string) {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	if step == "" {
		if err := s.do(ctx, f); err != nil {
			t.Errorf("host %s: %s: %v", f.host.Name, s.name, err)
		}
		return
	}
	file := filepath.Join(f.state, "failpoint")
	pid, err := f.host.PluginPID(ctx, "")
	if err == nil {
		err = os.WriteFile(file, []byte(step), 0o600)
	}
	if err != nil {
		t.Errorf("host %s: %v", f.host.Name, err)
		return
	}
	first := s.do(ctx, f)
	if strings.HasPrefix(step, "ipam.Audit") {
		leap(t, f.host) // it has something to do once the address has cooled
	}
	if err := gone(ctx, file); err != nil {
		f.missed = append(f.missed, step)
		_ = os.Remove(file)
		t.Errorf("host %s: %s did not reach step %s: %v (%v)", f.host.Name, s.name, step, err, first)
		return
	}
	took := served(t, f.host, pid)
	f.killed++
	f.slept += took
	// Docker's call may have failed or not; the user tries again.
	var again error
	if first != nil || s.name == "rm" || s.name == "network rm" {
		again = s.do(ctx, f)
	}
	if again != nil {
		t.Errorf("host %s: killed at %s: %s: %v; again: %v", f.host.Name, step, s.name, first, again)
		return
	}
	slow := settled(t, f.host)
	if slow {
		f.slow++
	}
	t.Logf("host %s: killed at %s: %s: error %t, served again after %s, slow audits %t", f.host.Name, step, s.name, first != nil, took.Round(time.Millisecond), slow)
	if f.stays != nil {
		if err := f.stays(); err != nil {
			t.Errorf("host %s: killed at %s: what ran lost its connection: %v", f.host.Name, step, err)
		}
	}
}

// gone waits until the file is not there.
func gone(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still there: %w", file, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
