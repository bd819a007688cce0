package tests

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestSwarmRandom does random things to a Swarm, kills and cuts among them, and
// then compares Docker, records and kernel on every host. The same seed does the
// same things.
func TestSwarmRandom(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "newest" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			randomly(t, engine)
		})
	}
}

func randomly(t *testing.T, engine hosts.Engine) {
	long, most, seed := 20*time.Second, 8, uint64(3)
	if soak() {
		long, most = 10*time.Minute, 30
	}
	s := newSwarm(t, engine, false, "WEFT_SCOPE=global")
	r := &random{swarm: s, rand: rand.New(rand.NewPCG(seed, seed)), most: most, services: map[string]int{}}
	defer func() { t.Logf("it did: %s", strings.Join(r.did, ", ")) }()
	for end := time.Now().Add(long); time.Now().Before(end); {
		r.step(t)
	}
	r.recover(t)
	leader := s.leader(t, nil)
	for name, n := range r.services {
		s.noStale(t, leader, name, n)
		tasks := s.tasks(t, leader, name, n)
		s.mesh(t, r.networkOf(name), tasks)
	}
	s.settled(t)
	duplicates := s.duplicates(t, s.lab.Hosts...)
	figure(t, "swarm: random operations for "+long.String()+" on "+s.name, len(r.did), "seed %d: %d networks and %d services at the end; differences on 3 hosts 0, duplicate addresses %d (target 0)",
		seed, len(r.networks), len(r.services), duplicates)
	for name := range r.services {
		r.docker(t, leader, "service", "rm", name)
	}
	removeUnused(t, leader, r.networks...)
	// Docker asks nobody to delete networks that a killed dockerd had: the audit finds
	// them at a second look, a quarter of an hour after the first.
	for _, h := range s.lab.Hosts {
		if err := leap(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
	s.forgotten(t)
	s.nothingLeft(t)
}

// random is what was done so far. Each service is on the network that its name
// begins with.
type random struct {
	*swarm
	rand     *rand.Rand
	made     int // networks and services
	networks []string
	services map[string]int // tasks
	did      []string
	most     int      // seconds that trouble lasts at least, at most
	out      *trouble // of a host that is cut off or without dockerd
	drained  *trouble
}

// trouble lasts over other operations. Two of three hosts go on.
type trouble struct {
	host  *hosts.Host
	steps int       // how many operations,
	until time.Time // and at least until then
	end   func(*testing.T)
}

func (r *random) lasting(h *hosts.Host, end func(*testing.T)) *trouble {
	return &trouble{host: h, steps: 1 + r.rand.IntN(5), until: time.Now().Add(time.Duration(2+r.rand.IntN(r.most-1)) * time.Second), end: end}
}

// goesOn returns the trouble that is left after another operation. What is done depends
// on how many there were, not on the time.
func (r *random) goesOn(t *testing.T, now *trouble) *trouble {
	t.Helper()
	if now == nil {
		return nil
	}
	if now.steps--; now.steps > 0 {
		return now
	}
	pause(t, time.Until(now.until))
	now.end(t)
	return nil
}

// up returns the hosts that can be asked.
func (r *random) up() []*hosts.Host {
	return slices.DeleteFunc(slices.Clone(r.lab.Hosts), func(h *hosts.Host) bool { return r.out != nil && h == r.out.host })
}

func (r *random) networkOf(service string) string { return strings.Split(service, "-")[0] }

// names of the services in order: the same seed chooses the same.
func (r *random) names() []string {
	var names []string
	for n := range r.services {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// docker repeats a command of Swarm until it succeeds: a manager without a leader
// refuses.
func (r *random) docker(t *testing.T, h *hosts.Host, args ...string) {
	t.Helper()
	eventually(t, 90*time.Second, "docker "+strings.Join(args, " "), func(ctx context.Context) error {
		_, err := h.Docker(ctx, args...)
		return err
	})
}

// step does one thing. Swarm is not given the time to finish it.
func (r *random) step(t *testing.T) {
	r.out = r.goesOn(t, r.out)
	r.drained = r.goesOn(t, r.drained)
	up := r.up()
	host := up[r.rand.IntN(len(up))]
	names := r.names()
	what := r.rand.IntN(10)
	switch {
	case what == 0 && len(r.networks) < 4 || len(r.networks) == 0:
		r.made++
		name := fmt.Sprintf("net%d", r.made)
		args := []string{"network", "create", "-d", hosts.PluginName, "--attachable", "--subnet", fmt.Sprintf("10.%d.0.0/24", 60+r.made%100)}
		if r.rand.IntN(2) == 0 {
			args = append(args, "--ipam-driver", hosts.PluginName)
		}
		r.docker(t, host, append(args, name)...)
		r.networks = append(r.networks, name)
		r.did = append(r.did, "create "+name)
	case what <= 2 && len(names) < 5 || len(names) == 0:
		r.made++
		name, n := fmt.Sprintf("%s-%d", r.networks[r.rand.IntN(len(r.networks))], r.made), 1+r.rand.IntN(4)
		var out *hosts.Host
		if r.out != nil {
			out = r.out.host
		}
		r.leader(t, out) // without one it is refused
		r.createService(t, host, name, "--replicas", fmt.Sprint(n), "--network", r.networkOf(name))
		r.services[name] = n
		r.did = append(r.did, fmt.Sprintf("create %s of %d on %s", name, n, host.Name))
	case what <= 4:
		name, n := names[r.rand.IntN(len(names))], r.rand.IntN(8)
		r.docker(t, host, "service", "scale", "--detach", fmt.Sprintf("%s=%d", name, n))
		r.services[name] = n
		r.did = append(r.did, fmt.Sprintf("scale %s to %d", name, n))
	case what == 5:
		name := names[r.rand.IntN(len(names))]
		r.docker(t, host, "service", "update", "--detach", "--no-resolve-image", "--force", name)
		r.did = append(r.did, "update "+name)
	case what == 6:
		name := names[r.rand.IntN(len(names))]
		r.docker(t, host, "service", "rm", name)
		delete(r.services, name)
		r.did = append(r.did, "remove "+name)
	case what == 7:
		old, err := host.KillPlugin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := served(t.Context(), host, old); err != nil {
			t.Fatal(err)
		}
		r.did = append(r.did, "kill the plugin on "+host.Name)
	case what == 8 && r.drained == nil:
		h := r.lab.Hosts[r.rand.IntN(3)]
		r.did = append(r.did, "drain "+h.Name)
		r.docker(t, host, "node", "update", "--availability", "drain", h.Name)
		r.drained = r.lasting(h, func(t *testing.T) {
			r.did = append(r.did, "fill "+h.Name)
			r.docker(t, r.up()[0], "node", "update", "--availability", "active", h.Name)
		})
	case what == 9 && r.out == nil:
		r.outage(t, host)
	}
}

// outage kills the host's dockerd or takes it off the cable for a while.
func (r *random) outage(t *testing.T, h *hosts.Host) {
	t.Helper()
	what, begin, end := "kill dockerd on ", h.KillDockerd, h.StartDockerd
	if r.rand.IntN(2) == 0 {
		what = "cut off "
		begin = func(ctx context.Context) error { return r.lab.Underlay.Cut(ctx, h) }
		end = func(ctx context.Context) error { return r.lab.Underlay.Heal(ctx, h) }
	}
	r.did = append(r.did, what+h.Name)
	if err := begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.out = r.lasting(h, func(t *testing.T) {
		t.Helper()
		r.did = append(r.did, h.Name+" comes back")
		if err := end(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, 90*time.Second, "host "+h.Name+" is a manager again", func(ctx context.Context) error {
			_, err := h.Nodes(ctx)
			return err
		})
	})
	r.leader(t, h)
}

// recover ends all trouble, and waits until all hosts are members that take tasks.
func (r *random) recover(t *testing.T) {
	t.Helper()
	for r.out != nil {
		r.out = r.goesOn(t, r.out)
	}
	for r.drained != nil {
		r.drained = r.goesOn(t, r.drained)
	}
	r.ready(t)
}
