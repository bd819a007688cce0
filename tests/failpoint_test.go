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
	name, opposite string
	thing          string // what it makes or removes
	makes          bool
	do             func(ctx context.Context, f *failHost) error
}

// The stages, in an order in which each finds what it needs.
var stages = []stage{
	{"network create", "network rm", "network", true, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName,
			"--subnet", f.subnet, "-o", "vni="+f.vni, "cycle")
		return err
	}},
	{"run", "rm", "container", true, func(ctx context.Context, f *failHost) error {
		// A container that could not start is removed and tried anew.
		_, _ = f.host.Docker(ctx, "rm", "--force", "short")
		_, err := f.host.Run(ctx, "short", "--network", "cycle")
		return err
	}},
	{"rm", "run", "container", false, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "rm", "--force", "short")
		return ignoreGone(err)
	}},
	{"network rm", "network create", "network", false, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "rm", "cycle")
		return ignoreGone(err)
	}},
	{"routed create", "routed rm", "routed network", true, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "create", "-d", hosts.PluginName, "-o", "mode=routed", "--ipam-driver", hosts.PluginName,
			"--subnet", f.routed, "-o", "vni=1"+f.vni, "way")
		return err
	}},
	{"routed run", "routed stop", "routed container", true, func(ctx context.Context, f *failHost) error {
		_, _ = f.host.Docker(ctx, "rm", "--force", "far")
		_, err := f.host.Run(ctx, "far", "--network", "way", "--publish", "8080:80")
		return err
	}},
	{"routed stop", "routed run", "routed container", false, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "rm", "--force", "far")
		return ignoreGone(err)
	}},
	{"routed rm", "routed create", "routed network", false, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "rm", "way")
		return ignoreGone(err)
	}},
	{"vault create", "vault rm", "vault", true, func(ctx context.Context, f *failHost) error {
		return f.vault(ctx, f.host)
	}},
	{"vault create on the peer", "vault rm on the peer", "vault of the peer", true, func(ctx context.Context, f *failHost) error {
		return f.vault(ctx, f.peer)
	}},
	{"vault rm on the peer", "vault create on the peer", "vault of the peer", false, func(ctx context.Context, f *failHost) error {
		_, err := f.peer.Docker(ctx, "network", "rm", "vault"+f.vni)
		return ignoreGone(err)
	}},
	{"vault rm", "vault create", "vault", false, func(ctx context.Context, f *failHost) error {
		_, err := f.host.Docker(ctx, "network", "rm", "vault"+f.vni)
		return ignoreGone(err)
	}},
	{"run on the peer", "rm on the peer", "visitor", true, func(ctx context.Context, f *failHost) error {
		_, _ = f.peer.Docker(ctx, "rm", "--force", "visitor")
		_, err := f.peer.Run(ctx, "visitor", "--network", "app")
		return err
	}},
	{"rm on the peer", "run on the peer", "visitor", false, func(ctx context.Context, f *failHost) error {
		_, err := f.peer.Docker(ctx, "rm", "--force", "visitor")
		return ignoreGone(err)
	}},
}

// vault makes the encrypted network of f on a host.
func (f *failHost) vault(ctx context.Context, h *hosts.Host) error {
	_, err := h.Docker(ctx, "network", "create", "-d", hosts.PluginName, "-o", "encrypted",
		"--subnet", f.encrypted, "-o", "vni=2"+f.vni, "vault"+f.vni)
	return err
}

func ignoreGone(err error) error {
	if err != nil && (strings.Contains(err.Error(), "No such") || strings.Contains(err.Error(), "not found")) {
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
		{"driver.Program", "routed run"}, {"kernel.put.route", "routed run"}, {"kernel.put.rule", "routed create"}, {"kernel.put.blackhole", "routed create"},
		{"kernel.delete.route", "routed stop"}, {"kernel.delete.rule", "routed rm"}, {"kernel.delete.blackhole", "routed rm"},
		{"kernel.put.wireguard", "vault create"}, {"kernel.delete.wireguard", "vault rm"},
		{"kernel.put.peer", "vault create on the peer"}, {"kernel.delete.peer", "vault rm on the peer"},
		{"kernel.put.dest", "run"}, {"kernel.delete.dest", "rm"}, {"kernel.put.veth", "run"}, {"kernel.put.fdb", "run"}, {"kernel.put.neigh", "run on the peer"}, {"kernel.put.", "network create"},
		{"kernel.delete.veth", "rm"}, {"kernel.delete.fdb", "rm"}, {"kernel.delete.neigh", "rm on the peer"}, {"kernel.delete.", "network rm"},
	} {
		if strings.HasPrefix(step, s.prefix) {
			return s.stage
		}
	}
	return ""
}

// onlyAlone are the steps that a host takes for its first and last network.
var onlyAlone = []string{"kernel.put.set", "kernel.put.jump", "kernel.delete.set", "kernel.delete.jump", "kernel.delete.chain", "kernel.put.program", "kernel.delete.program"}

// inSwarm are the steps that only a Swarm reaches: TestVIP kills there.
var inSwarm = []string{"kernel.put.service", "kernel.delete.service"}

// failHost is a host whose plugin is killed at chosen steps. While the hosts work
// side by side, each has its own goroutine.
type failHost struct {
	host, peer   *hosts.Host
	subnet, vni  string
	routed       string       // subnet of its routed network
	encrypted    string       // subnet of its encrypted network
	state        string       // folder of the fail point's file
	steps        []string     // to be killed at
	stays        func() error // tells whether what runs still talks; nil before anything runs
	before       hosts.Inventory
	killed, slow int // steps; and those that the slow audits had to clean up
}

// TestEveryStepCanBeTheLast kills the plugin at every step of every call and of
// the kernel's changes, one at a time, and then does what a user would.
func TestEveryStepCanBeTheLast(t *testing.T) {
	t.Parallel()
	// Most of the time Docker waits before it tries again: four hosts share it.
	lab := newLab(t, 4, nil)
	install(t, lab, pluginDir(t, "failpoint", "crash"), clusterKey)
	out, err := lab.Hosts[0].Exec(t.Context(), "weft", "failpoints")
	if err != nil {
		t.Fatal(err)
	}
	steps := strings.Fields(out)
	if len(steps) < 40 {
		t.Fatalf("only %d steps: %s", len(steps), out)
	}
	all := make([]*failHost, len(lab.Hosts))
	for i, h := range lab.Hosts {
		all[i] = &failHost{host: h, peer: lab.Hosts[(i+1)%len(lab.Hosts)], subnet: fmt.Sprintf("10.%d.0.0/16", 41+i), routed: fmt.Sprintf("10.%d.0.0/16", 51+i), encrypted: fmt.Sprintf("10.%d.0.0/16", 61+i), vni: fmt.Sprint(5001 + i)}
		if all[i].state, err = h.StateDir(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	note(t, all)
	alone, withPeer, others := split(t, steps)

	// A host's first and last network, while there is no other.
	deal(all, alone)
	finish(t, all)

	createNetwork(t, lab, "app", 32)
	probe, from, to := probePair(t, lab, "app")
	addresses := []string{addressOf(t, to, "app").String(), addressOf(t, from, "app").String()}
	for i, f := range all {
		who := []hosts.Container{from, to}
		if i > 1 {
			who = append(who, run(t, f.host, "keeper", "--network", "app"))
		}
		f.stays = func() error {
			_, err := who[len(who)-1].Exec(t.Context(), "ping", "-c", "1", "-W", "2", addresses[1])
			return err
		}
	}
	all[0].stays = func() error {
		_, err := from.Exec(t.Context(), "ping", "-c", "1", "-W", "2", addresses[0])
		return err
	}
	for _, f := range all {
		settled(t, f.host)
	}
	note(t, all)
	deal(all, others)
	finish(t, all)
	// What a peer must do comes last, when the peer has nothing of its own.
	all[0].steps = withPeer
	finish(t, all)
	r := lossless(t, probe)
	killed, slow := 0, 0
	for _, f := range all {
		killed, slow = killed+f.killed, slow+f.slow
	}
	figure(t, "fail points: plugin killed at each step", killed, "%d of %d steps reached, 0 left over (after %d of them only thanks to the slow audits), %d of %d packets lost, TCP %s",
		killed, len(steps)-len(inSwarm), slow, r.Lost, r.Sent, broken(r))
}

// split returns the steps that need a host without other networks, those that
// need its peer, and the others.
func split(t *testing.T, steps []string) (alone, withPeer, others []string) {
	for _, step := range steps {
		switch stage := stageOf(step); {
		case slices.Contains(inSwarm, step):
		case stage == "":
			t.Errorf("no operation is known that reaches step %s", step)
		case slices.Contains(onlyAlone, step):
			alone = append(alone, step)
		case strings.HasSuffix(stage, "on the peer"):
			withPeer = append(withPeer, step)
		default:
			others = append(others, step)
		}
	}
	return alone, withPeer, others
}

// deal gives the steps of each stage to the hosts in turn.
func deal(all []*failHost, steps []string) {
	dealt := map[string]int{}
	for _, step := range steps {
		stage := stageOf(step)
		f := all[dealt[stage]%len(all)]
		f.steps = append(f.steps, step)
		dealt[stage]++
	}
}

// note remembers what each host holds.
func note(t *testing.T, all []*failHost) {
	t.Helper()
	var list []*hosts.Host
	for _, f := range all {
		list = append(list, f.host)
	}
	for i, inv := range inventories(t, list...) {
		all[i].before = inv
	}
}

// finish does the steps of all hosts, side by side, and ends the test unless all
// were reached and nothing is left.
func finish(t *testing.T, all []*failHost) {
	t.Helper()
	var group sync.WaitGroup
	for _, f := range all {
		group.Go(func() { f.cycles(t, f.steps) })
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for _, f := range all {
		f.steps = nil
		unleaked(t, f.host, f.before, "plugin file")
	}
}

// cycles runs through the stages again and again until the plugin was killed once
// at each step. A stage without a step of its own is done undisturbed where
// another needs it.
func (f *failHost) cycles(t *testing.T, steps []string) {
	left := map[string][]string{}
	for _, s := range steps {
		left[stageOf(s)] = append(left[stageOf(s)], s)
	}
	count := func(names ...string) (n int) {
		for _, name := range names {
			n += len(left[name])
		}
		return n
	}
	there := map[string]bool{}
	for range 2 * len(steps) {
		for _, s := range stages {
			inside := 0 // steps that need what this stage makes or removes
			switch s.thing {
			case "network":
				inside = count("run", "rm")
			case "routed network":
				inside = count("routed run", "routed stop")
			case "vault":
				inside = count("vault create on the peer", "vault rm on the peer")
			}
			switch {
			case s.makes == there[s.thing]:
				continue
			case s.makes && inside+count(s.name, s.opposite) == 0:
				continue
			case !s.makes && inside > 0 && count(s.name, s.opposite) == 0:
				continue
			}
			step := ""
			if l := left[s.name]; len(l) > 0 {
				step, left[s.name] = l[0], l[1:]
			}
			if f.stage(t, s, step); t.Failed() {
				return
			}
			there[s.thing] = s.makes
		}
	}
	if len(steps) > 0 && (there["network"] || there["routed network"] || there["vault"] || slices.ContainsFunc(stages, func(s stage) bool { return count(s.name) > 0 })) {
		t.Errorf("host %s: not all steps were tried: %v", f.host.Name, left)
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
		_ = leap(ctx, f.host) // it has something to do once the address has cooled
	}
	if err := gone(ctx, file); err != nil {
		_ = os.Remove(file)
		t.Errorf("host %s: %s did not reach step %s: %v (%v)", f.host.Name, s.name, step, err, first)
		return
	}
	if _, err := served(ctx, f.host, pid); err != nil {
		t.Errorf("killed at %s: %v", step, err)
		return
	}
	f.killed++
	// Docker's call may have failed or not; the user tries again.
	var again error
	if first != nil || !s.makes {
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
	t.Logf("host %s: killed at %s: %s: error %t, slow audits %t", f.host.Name, step, s.name, first != nil, slow)
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

// diesAt has the plugin of a host die before a step; the answer waits until it has.
func diesAt(t *testing.T, h *hosts.Host, step string) (dies func()) {
	t.Helper()
	state, err := h.StateDir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(state, "failpoint")
	if err := os.WriteFile(file, []byte(step), 0o600); err != nil {
		t.Fatal(err)
	}
	return func() {
		eventually(t, 60*time.Second, "the plugin died at "+step, func(context.Context) error {
			if _, err := os.Stat(file); err == nil {
				return errors.New("it did not come there")
			}
			return nil
		})
	}
}
