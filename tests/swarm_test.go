package tests

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestSwarm does on a Swarm of three managers what its users do, and then lets
// hosts and plugins die, on either engine.
func TestSwarm(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of the time is waiting for Swarm's clocks
			s := newSwarm(t, engine, name == "newest", "WEFT_SCOPE=global")
			for _, scene := range []struct {
				engine string // in the short form on this one alone; "": on both
				name   string
				play   func(*testing.T)
			}{
				{"", "network", s.networks},
				{"", "stack", s.stacks},
				{"", "compose", s.compose},
				{"", "projects", s.projects},
				{"", "families", s.families},
				{"", "routed", s.routed},
				{"debian", "service", s.services},
				{"debian", "update", s.updates},
				{"newest", "rolling", s.rolling},
				{"debian", "kept", s.kept},
				{"newest", "drain", s.drain},
				{"newest", "plugins killed", s.pluginsKilled},
				{"debian", "cut", s.cut},
				{"debian", "worker", s.worker},
				{"newest", "manager", s.manager},
				{"newest", "leader killed", s.leaderKilled},
				{"", "nothing left", s.nothingLeft},
			} {
				if scene.engine == "" || scene.engine == name || soak() {
					t.Run(scene.name, scene.play)
				}
			}
		})
	}
}

// swarm is three hosts a, b and c in a Swarm, with the plugin. The networks of a
// test are 10.<second>.0.0/16.
type swarm struct {
	name  string // engine
	lab   *hosts.Lab
	first []hosts.Inventory // what each host held before the first network
}

// heartbeat makes Swarm see after six seconds, not fifteen, that a host is gone.
const heartbeat = 2 * time.Second

// newSwarm makes the hosts of a lab a Swarm with the plugin on all. It is there
// before the Swarm is, or enabled when Docker has told of all hosts already: then
// Docker names to the plugin no host but its own, and the leader's plugin must.
func newSwarm(t *testing.T, engine hosts.Engine, late bool, settings ...string) *swarm {
	t.Helper()
	s := &swarm{name: engine.Name}
	s.lab = newLab(t, 3, func(_ int, o *hosts.HostOptions) { o.Engine = engine })
	if late {
		s.form(t)
	}
	dir := pluginDir(t, "failpoint", "crash")
	var wait sync.WaitGroup
	errs := make([]error, len(s.lab.Hosts))
	for i, h := range s.lab.Hosts {
		wait.Go(func() { errs[i] = h.InstallPlugin(t.Context(), dir, settings...) })
	}
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if !late {
		s.form(t)
	}
	// Docker makes docker_gwbridge with the first container, for ever.
	for _, h := range s.lab.Hosts {
		eventually(t, 20*time.Second, "host "+h.Name+" has docker_gwbridge", func(ctx context.Context) error {
			_, err := h.Docker(ctx, "network", "inspect", "docker_gwbridge")
			return err
		})
	}
	s.first = inventories(t, s.lab.Hosts...)
	return s
}

func (s *swarm) form(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.lab.FormSwarm(ctx, 3, heartbeat); err != nil {
		t.Fatal(err)
	}
}

// within bounds a wait for Swarm: two elections, and a start of everything.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// leader returns the host that leads; other is one that does not any more, or nil.
func (s *swarm) leader(t *testing.T, other *hosts.Host) *hosts.Host {
	t.Helper()
	h, err := s.lab.WaitLeader(within(t), other)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// followers returns the hosts that do not lead.
func (s *swarm) followers(t *testing.T) []*hosts.Host {
	t.Helper()
	leader := s.leader(t, nil)
	return slices.DeleteFunc(slices.Clone(s.lab.Hosts), func(h *hosts.Host) bool { return h == leader })
}

// network makes a network of the Swarm.
func (s *swarm) network(t *testing.T, name string, second int, args ...string) {
	t.Helper()
	docker(t, s.lab.Hosts[0], append([]string{"network", "create", "-d", hosts.PluginName, "--attachable",
		"--subnet", fmt.Sprintf("10.%d.0.0/16", second)}, append(args, name)...)...)
	s.shown(t, name)
}

// shown waits until Docker shows a network of the Swarm: Docker 29 does not before the
// network is allocated.
func (s *swarm) shown(t *testing.T, name string) {
	t.Helper()
	eventually(t, 30*time.Second, "network "+name+" is shown", func(ctx context.Context) error {
		_, err := s.lab.Hosts[0].Docker(ctx, "network", "inspect", name)
		return err
	})
}

// removeNetworks removes networks, once their last tasks have ended.
func (s *swarm) removeNetworks(t *testing.T, names ...string) {
	t.Helper()
	removeUnused(t, s.lab.Hosts[0], names...)
}

// removeUnused removes networks of a host, once nothing uses them.
func removeUnused(t *testing.T, h *hosts.Host, names ...string) {
	t.Helper()
	for _, n := range names {
		eventually(t, 60*time.Second, "network "+n+" is removed", func(ctx context.Context) error {
			_, err := h.Docker(ctx, "network", "rm", n)
			return err
		})
	}
}

// createService starts a service whose tasks answer HTTP on port 80 with their
// container's name, and does not wait.
func (s *swarm) createService(t *testing.T, h *hosts.Host, name string, args ...string) {
	t.Helper()
	docker(t, h, serviceCreate(name, args...)...)
}

func serviceCreate(name string, args ...string) []string {
	args = append([]string{"service", "create", "--detach", "--no-resolve-image", "--endpoint-mode", "dnsrr", "--name", name,
		"--stop-signal", "KILL", "--restart-delay", "1s", "--update-parallelism", "0"}, args...)
	return append(args, hosts.Image, "sh", "-c", "hostname >/srv/index.html; exec httpd -f -p 80 -h /srv")
}

// service starts a service and waits for its n tasks.
func (s *swarm) service(t *testing.T, name string, n int, args ...string) []hosts.Task {
	t.Helper()
	if !slices.Contains(args, "global") {
		args = append(args, "--replicas", fmt.Sprint(n))
	}
	s.createService(t, s.lab.Hosts[0], name, args...)
	return s.tasks(t, s.lab.Hosts[0], name, n)
}

// tasks waits until the service has n tasks, and all run.
func (s *swarm) tasks(t *testing.T, h *hosts.Host, name string, n int) []hosts.Task {
	t.Helper()
	// Two busy cores start a container in a second or two.
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second+time.Duration(n)*3*time.Second)
	defer cancel()
	tasks, err := h.WaitService(ctx, name, n)
	if err != nil {
		t.Fatal(err)
	}
	return tasks
}

// update changes a service and waits until n new tasks have taken the place of all
// that were there.
func (s *swarm) update(t *testing.T, name string, n int, args ...string) []hosts.Task {
	t.Helper()
	h := s.lab.Hosts[0]
	old, err := h.Tasks(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	docker(t, h, append(append([]string{"service", "update", "--detach", "--no-resolve-image"}, args...), name)...)
	return s.replaced(t, name, old, n)
}

// replaced waits until n tasks of a service run and none of the old ones should.
func (s *swarm) replaced(t *testing.T, name string, old []hosts.Task, n int) []hosts.Task {
	t.Helper()
	var now []hosts.Task
	eventually(t, 60*time.Second, "service "+name+" is updated", func(ctx context.Context) (err error) {
		if now, err = s.lab.Hosts[0].WaitService(ctx, name, n); err != nil {
			return err
		}
		for _, task := range now {
			if slices.ContainsFunc(old, func(o hosts.Task) bool { return o.ID == task.ID }) {
				return fmt.Errorf("task %s is still there", task.ID)
			}
		}
		return nil
	})
	return now
}

func (s *swarm) removeServices(t *testing.T, names ...string) {
	t.Helper()
	docker(t, s.lab.Hosts[0], append([]string{"service", "rm"}, names...)...)
}

// onHost returns those of the tasks that run on the host.
func onHost(tasks []hosts.Task, h *hosts.Host) []hosts.Task {
	return slices.DeleteFunc(slices.Clone(tasks), func(t hosts.Task) bool { return t.Host != h.Name })
}

// spread fails unless some of the tasks run on each of the hosts.
func spread(t *testing.T, tasks []hosts.Task, all ...*hosts.Host) {
	t.Helper()
	for _, h := range all {
		if len(onHost(tasks, h)) == 0 {
			t.Fatalf("no task on host %s: %+v", h.Name, tasks)
		}
	}
}

// mesh waits until each of the tasks reaches all of them on the network.
func (s *swarm) mesh(t *testing.T, network string, tasks []hosts.Task) {
	t.Helper()
	var all []string
	for _, task := range tasks {
		all = append(all, task.Addresses[network].String())
	}
	for _, task := range tasks {
		reachAll(t, s.lab.Container(task), all)
	}
}

// reachAll waits until the container reaches all addresses in one go.
func reachAll(t *testing.T, c hosts.Container, all []string) {
	t.Helper()
	script := "for a in " + strings.Join(all, " ") + "; do ping -c 1 -W 1 $a >/dev/null || { echo no answer from $a; exit 1; }; done"
	var last error
	eventually(t, 20*time.Second, fmt.Sprintf("container %.12s on host %s reaches %v", c.Name, c.Host.Name, all), func(ctx context.Context) error {
		_, err := c.Exec(ctx, "sh", "-c", script)
		if err != nil && ctx.Err() == nil {
			last = err
		}
		if err != nil {
			err = errors.Join(last, err)
		}
		return err
	})
}

var addressLine = regexp.MustCompile(`(?m)^Address:?\s+(?:\d+:\s+)?(\d+\.\d+\.\d+\.\d+)\s*$`)

// resolves waits until the container finds exactly these tasks by the name; see named.
func resolves(t *testing.T, c hosts.Container, name, network string, tasks []hosts.Task) {
	t.Helper()
	var want []string
	for _, task := range tasks {
		want = append(want, task.Addresses[network].String())
	}
	slices.Sort(want)
	eventually(t, 2*time.Minute, fmt.Sprintf("%s resolves to the tasks of the service", name), func(ctx context.Context) error {
		// A name server that knows no AAAA makes nslookup fail.
		out, _ := c.Host.Docker(ctx, "exec", c.Name, "nslookup", "-type=a", name, "127.0.0.11")
		var got []string
		for _, m := range addressLine.FindAllStringSubmatch(out, -1) {
			got = append(got, m[1])
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("host %s: %v, want %v: %s", c.Host.Name, got, want, out)
		}
		return nil
	})
}

// duplicates counts the addresses that two live tasks, or two endpoints on the
// hosts, have at the same time.
func (s *swarm) duplicates(t *testing.T, all ...*hosts.Host) int {
	t.Helper()
	taken := map[string]string{}
	count := 0
	take := func(key, who string) {
		if other, ok := taken[key]; ok && other != who {
			count++
			t.Errorf("%s is the address of %s and of %s", key, other, who)
		}
		taken[key] = who
	}
	tasks, err := all[0].Tasks(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if task.Live() {
			for network, a := range task.Addresses {
				take("task: "+network+" "+a.String(), task.ID)
			}
		}
	}
	for _, h := range all {
		for _, e := range view[[]endpointView](t, h, "endpoints") {
			if e.Local && e.IPv4 != (netip.Addr{}) {
				take(fmt.Sprintf("endpoint: %d %s", e.VNI, e.IPv4), e.ID)
			}
		}
	}
	return count
}

// nothingLeft removes what the tests made, and compares with the beginning. Docker
// numbers its own links and rules anew with each restart, so only Weft's count.
func (s *swarm) nothingLeft(t *testing.T) {
	s.settled(t)
	left := 0
	for i, h := range s.lab.Hosts {
		if n := len(view[[]networkView](t, h, "networks")) + len(view[[]endpointView](t, h, "endpoints")); n > 0 {
			left += n
			t.Errorf("host %s still knows %d networks and endpoints", h.Name, n)
		}
		unleaked(t, h, s.first[i], "plugin file", "mount", "route", "route6", "link")
		if out, _ := h.Exec(t.Context(), "sh", "-c", "{ ip -br link; ip route show table all; ip -6 route show table all; } | grep weft"); out != "" {
			left++
			t.Errorf("host %s still has\n%s", h.Name, out)
		}
	}
	figure(t, "swarm: left at the end on "+s.name, 1, "%d (target 0)", left)
}
