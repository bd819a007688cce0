package tests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// ready waits until Swarm starts tasks on all hosts.
func (s *swarm) ready(t *testing.T) {
	t.Helper()
	leader := s.leader(t, nil)
	for _, h := range s.lab.Hosts {
		if err := leader.WaitNode(within(t), h, "ready"); err != nil {
			t.Fatal(err)
		}
	}
}

// running is a network and a service of six tasks, for what must survive; second
// as in network.
func (s *swarm) running(t *testing.T, network string, second int) []hosts.Task {
	t.Helper()
	s.ready(t)
	s.network(t, network, second)
	tasks := s.service(t, network+"-web", 6, "--network", network)
	s.mesh(t, network, tasks)
	return tasks
}

func (s *swarm) remove(t *testing.T, network string) {
	t.Helper()
	s.removeServices(t, network+"-web")
	s.removeNetworks(t, network)
}

// between starts containers on two hosts, which Swarm does not move, and a probe
// between them. What it returns stops the probe and removes them.
func (s *swarm) between(t *testing.T, network string, from, to *hosts.Host) (stop func() hosts.Report) {
	t.Helper()
	one := run(t, from, network+"-from", "--network", network)
	two := run(t, to, network+"-to", "--network", network)
	address := addressOf(t, two, network)
	reach(t, one, address.String())
	probe := startProbe(t, one, two, address)
	return func() hosts.Report {
		t.Helper()
		report := lossless(t, probe)
		docker(t, from, "rm", "--force", one.Name)
		docker(t, to, "rm", "--force", two.Name)
		return report
	}
}

// whole waits until the service is complete, its tasks reach each other, a task
// finds all by name, and every host's kernel is as the records say.
func (s *swarm) whole(t *testing.T, asked *hosts.Host, network string, n int) {
	t.Helper()
	s.noStale(t, asked, network+"-web", n)
	tasks := s.tasks(t, asked, network+"-web", n)
	s.mesh(t, network, tasks)
	resolves(t, s.lab.Container(tasks[0]), network+"-web", network, tasks)
	s.settled(t)
	s.duplicates(t, s.lab.Hosts...)
}

// settled waits until audit finds no difference on any host. It is the settled of
// crash tests for killed hosts: Docker asks nobody to remove an endpoint there, its
// network only goes without endpoints, and the pool without the network.
func (s *swarm) settled(t *testing.T) {
	t.Helper()
	var wait sync.WaitGroup
	for _, h := range s.lab.Hosts {
		wait.Go(func() {
			for range 4 {
				out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "2s")
				if err == nil {
					return
				}
				t.Logf("host %s: for the slow audits: %s", h.Name, out)
				if ended, err := h.EndOrphans(t.Context()); err != nil || ended != "" {
					t.Logf("host %s: processes that a killed dockerd left, ended: %s, %v", h.Name, ended, err)
				}
				if err := leap(t.Context(), h); err != nil {
					t.Error(err)
					return
				}
			}
			if out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "20s"); err != nil {
				held, _ := h.Exec(t.Context(), "sh", "-c", "docker ps --all --no-trunc; ls -l /run/docker/netns; weft endpoints; ip -brief link; lsns --type net --output NS,PID,COMMAND") // as far as it works
				t.Errorf("host %s: %v\n%s\n%s", h.Name, err, out, held)
			}
		})
	}
	wait.Wait()
}

// moved waits until none of the service's n tasks is on a host that is down.
func (s *swarm) moved(t *testing.T, asked, from *hosts.Host, service string, n int) []hosts.Task {
	t.Helper()
	var tasks []hosts.Task
	eventually(t, 60*time.Second, "service "+service+" leaves host "+from.Name, func(ctx context.Context) (err error) {
		if tasks, err = asked.WaitService(ctx, service, n); err == nil && len(onHost(tasks, from)) > 0 {
			err = fmt.Errorf("there are %+v", onHost(tasks, from))
		}
		return err
	})
	return tasks
}

// noStale waits until the containers of a service on the hosts are those of its n
// tasks: Swarm ends what it has meanwhile started elsewhere.
func (s *swarm) noStale(t *testing.T, asked *hosts.Host, service string, n int) {
	t.Helper()
	eventually(t, 60*time.Second, "containers of service "+service+" are its tasks", func(ctx context.Context) error {
		tasks, err := asked.WaitService(ctx, service, n)
		if err != nil {
			return err
		}
		for _, h := range s.lab.Hosts {
			out, err := h.Docker(ctx, "ps", "--quiet", "--no-trunc", "--filter", "name="+service+".")
			if err != nil {
				return err
			}
			for _, id := range strings.Fields(out) {
				if !slices.ContainsFunc(onHost(tasks, h), func(t hosts.Task) bool { return t.Container == id }) {
					return fmt.Errorf("host %s still runs %.12s", h.Name, id)
				}
			}
		}
		return nil
	})
}

// pluginsKilled kills the plugin on all hosts at once, both of its processes. Docker then names no peer
// to the new processes.
func (s *swarm) pluginsKilled(t *testing.T) {
	rounds := 1
	if soak() {
		rounds = 50
	}
	a, b := s.lab.Hosts[0], s.lab.Hosts[1]
	s.running(t, "killed", 43)
	stop := s.between(t, "killed", a, b)
	var times []time.Duration
	for range rounds {
		for _, h := range s.lab.Hosts {
			if err := started(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		old := make([]int, len(s.lab.Hosts))
		for i, h := range s.lab.Hosts {
			var err error
			if old[i], err = h.KillPluginParent(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for i, h := range s.lab.Hosts {
			if _, err := served(t.Context(), h, old[i]); err != nil {
				t.Fatal(err)
			}
		}
		for _, h := range s.lab.Hosts {
			meets(t, h, len(s.lab.Hosts)-1)
		}
		times = append(times, time.Since(start))
	}
	report := stop()
	docker(t, a, "service", "scale", "--detach", "killed-web=9")
	s.whole(t, a, "killed", 9)
	figure(t, "swarm: plugin killed on all hosts at once on "+s.name, rounds, "%d of %d packets lost (target 0); all served and met again p50 %s max %s",
		report.Lost, report.Sent, percentile(times, 50), percentile(times, 100))
	s.remove(t, "killed")
	s.forgotten(t)
}

// cut takes a host off the cable: what runs on it goes on talking, and so do the
// others. After the heal all is right again.
func (s *swarm) cut(t *testing.T) {
	long := 5 * time.Second // after Swarm saw it
	if soak() {
		long = 5 * time.Minute
	}
	s.ready(t)
	leader, rest := s.leader(t, nil), s.followers(t)
	away, stays := rest[1], rest[0]
	tasks := s.running(t, "cut", 44)
	here := run(t, stays, "here", "--network", "cut")
	there := run(t, away, "there", "--network", "cut")
	stop := s.between(t, "cut", leader, stays)
	spread(t, tasks, away)
	pair := onHost(tasks, away)
	inside := startProbe(t, s.lab.Container(pair[0]), s.lab.Container(pair[1]), pair[1].Addresses["cut"])
	if err := s.lab.Underlay.Cut(t.Context(), away); err != nil {
		t.Fatal(err)
	}
	if err := leader.WaitNode(within(t), away, "down"); err != nil {
		t.Fatal(err)
	}
	pause(t, long)
	s.mesh(t, "cut", s.moved(t, leader, away, "cut-web", 6))
	report := lossless(t, inside)
	if err := s.lab.Underlay.Heal(t.Context(), away); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	reach(t, here, addressOf(t, there, "cut").String())
	reach(t, there, addressOf(t, here, "cut").String())
	reached := time.Since(start)
	agreed := (&cluster{lab: s.lab}).agree(t, start)
	named(t, here, "there")
	named(t, there, "here")
	named := time.Since(start)
	// Swarm itself elects anew when a manager comes back, and then ends the tasks
	// that it started elsewhere.
	s.ready(t)
	s.whole(t, leader, "cut", 6)
	whole := time.Since(start)
	other := stop()
	figure(t, "swarm: host cut off for "+long.String()+" on "+s.name, 1,
		"%d of %d packets lost on it, %d of %d between the others (target 0); after the heal containers reach each other after %s, all hosts agree after %s, names are right after %s (target 10 s); Swarm is done after %s",
		report.Lost, report.Sent, other.Lost, other.Sent, reached.Round(100*time.Millisecond), agreed.Round(100*time.Millisecond), named.Round(100*time.Millisecond), whole.Round(100*time.Millisecond))
	docker(t, stays, "rm", "--force", "here")
	docker(t, away, "rm", "--force", "there")
	s.remove(t, "cut")
	s.forgotten(t)
}

// demote makes a manager a worker. Docker refuses it while it thinks that the managers
// left would be no majority, as it does shortly after some of them joined. Until the host
// is one it has its part in the majority.
func demote(t *testing.T, leader, h *hosts.Host) {
	t.Helper()
	eventually(t, 30*time.Second, h.Name+" is demoted", func(ctx context.Context) error {
		_, err := leader.Docker(ctx, "node", "demote", h.Name)
		return err
	})
	eventually(t, 30*time.Second, "host "+h.Name+" is a worker", func(ctx context.Context) error {
		out, err := h.Docker(ctx, "info", "--format", "{{.Swarm.ControlAvailable}}")
		if err == nil && out != "false" {
			err = errors.New("it is still a manager")
		}
		return err
	})
}

// promote makes a worker a manager. Docker refuses it while the host's record changes.
func promote(t *testing.T, leader, h *hosts.Host) {
	t.Helper()
	eventually(t, 30*time.Second, h.Name+" is promoted", func(ctx context.Context) error {
		_, err := leader.Docker(ctx, "node", "promote", h.Name)
		return err
	})
	eventually(t, 30*time.Second, "host "+h.Name+" is a manager", func(ctx context.Context) error {
		_, err := h.Nodes(ctx)
		return err
	})
}

// named waits until a container reaches another by its name. Names are Docker's: its
// own gossip looks once a minute for hosts that it lost.
func named(t *testing.T, from hosts.Container, name string) {
	t.Helper()
	reachWithin(t, 2*time.Minute, from, name)
}

// worker makes a manager a worker, kills its dockerd, lets it leave the Swarm and
// join it again, and makes it a manager.
func (s *swarm) worker(t *testing.T) {
	leader, h := s.leader(t, nil), s.followers(t)[1]
	demote(t, leader, h)
	s.comesBack(t, "worker", 45, leader, h, "killed")
	s.rejoins(t, leader, h)
	promote(t, leader, h)
}

// rejoins takes a worker out of the Swarm and in again.
func (s *swarm) rejoins(t *testing.T, leader, h *hosts.Host) {
	t.Helper()
	if err := h.LeaveSwarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := leader.WaitNode(within(t), h, "down"); err != nil {
		t.Fatal(err)
	}
	nodes, err := leader.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Host == h.Name {
			docker(t, leader, "node", "rm", "--force", n.ID)
		}
	}
	if err := h.JoinSwarm(t.Context(), leader, hosts.Worker); err != nil {
		t.Fatal(err)
	}
	s.running(t, "joined", 49)
	meets(t, h, len(s.lab.Hosts)-1)
	s.whole(t, leader, "joined", 6)
	s.remove(t, "joined")
	s.forgotten(t)
}

// manager stops the dockerd of a manager that does not lead.
func (s *swarm) manager(t *testing.T) {
	s.comesBack(t, "manager", 46, s.leader(t, nil), s.followers(t)[0], "stopped")
}

// comesBack stops or kills dockerd on one host while tasks on the others talk; short
// says which in the short form.
func (s *swarm) comesBack(t *testing.T, network string, second int, leader, h *hosts.Host, short string) {
	t.Helper()
	ways := []string{short}
	if soak() {
		ways = []string{"stopped", "killed", "stopped", "killed"}
	}
	s.running(t, network, second)
	other := s.lab.Hosts[slices.IndexFunc(s.lab.Hosts, func(o *hosts.Host) bool { return o != leader && o != h })]
	stop := s.between(t, network, leader, other)
	for _, how := range ways {
		down := map[string]end{"stopped": (*hosts.Host).StopDockerd, "killed": (*hosts.Host).KillDockerd}[how]
		if err := down(h, t.Context()); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if err := leader.WaitNode(within(t), h, "down"); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		s.mesh(t, network, s.moved(t, leader, h, network+"-web", 6))
		start := time.Now()
		if err := h.StartDockerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := leader.WaitNode(within(t), h, "ready"); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		docker(t, leader, "service", "scale", "--detach", network+"-web=9")
		s.whole(t, leader, network, 9)
		t.Logf("%s %s: all is right %s after its start", network, how, time.Since(start).Round(100*time.Millisecond))
		docker(t, leader, "service", "scale", "--detach", network+"-web=6")
	}
	report := stop()
	figure(t, "swarm: dockerd of a "+network+" "+strings.Join(ways, ", ")+" on "+s.name, len(ways), "%d of %d packets between the others lost (target 0)", report.Lost, report.Sent)
	s.remove(t, network)
	s.forgotten(t)
}

// leaderKilled kills the leader's dockerd while a service grows. The new leader
// has to know what the old one gave out.
func (s *swarm) leaderKilled(t *testing.T) {
	rounds, few, many := 1, 4, 16
	if soak() {
		rounds, many = 50, 60
	}
	s.network(t, "led", 47)
	s.network(t, "led-own", 48, "--ipam-driver", hosts.PluginName)
	s.service(t, "led-web", few, "--network", "led", "--network", "led-own")
	var elected, complete []time.Duration
	duplicates, lost, sent := 0, uint64(0), uint64(0)
	for range rounds {
		old, rest := s.leader(t, nil), s.followers(t)
		one, two := run(t, rest[0], "one", "--network", "led"), run(t, rest[1], "two", "--network", "led-own", "--network-alias", "two")
		docker(t, rest[1], "network", "connect", "led", "two")
		reach(t, one, addressOf(t, two, "led").String())
		probe := startProbe(t, one, two, addressOf(t, two, "led"))
		docker(t, old, "service", "scale", "--detach", fmt.Sprintf("led-web=%d", many))
		if err := old.KillDockerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		leader := s.leader(t, old)
		elected = append(elected, time.Since(start))
		s.tasks(t, leader, "led-web", many)
		complete = append(complete, time.Since(start))
		duplicates += s.duplicates(t, rest...)
		if err := old.StartDockerd(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := leader.WaitNode(within(t), old, "ready"); err != nil {
			t.Fatal(err)
		}
		report := lossless(t, probe)
		lost, sent = lost+report.Lost, sent+report.Sent
		// Down and up again: the host that was dead has to take tasks.
		docker(t, leader, "service", "scale", "--detach", fmt.Sprintf("led-web=%d", few))
		s.tasks(t, leader, "led-web", few)
		docker(t, leader, "service", "scale", "--detach", fmt.Sprintf("led-web=%d", 2*few))
		tasks := s.tasks(t, leader, "led-web", 2*few)
		spread(t, tasks, old)
		s.mesh(t, "led", tasks)
		s.mesh(t, "led-own", tasks)
		s.settled(t)
		duplicates += s.duplicates(t, s.lab.Hosts...)
		docker(t, rest[0], "rm", "--force", "one")
		docker(t, rest[1], "rm", "--force", "two")
		docker(t, leader, "service", "scale", "--detach", fmt.Sprintf("led-web=%d", few))
		s.tasks(t, leader, "led-web", few)
	}
	figure(t, "M10 swarm leader killed in scale-up on "+s.name, rounds,
		"duplicate addresses %d (target 0), stuck tasks 0, %d of %d packets between the others lost (target 0); new leader p50 %s max %s, all tasks run p50 %s max %s",
		duplicates, lost, sent, percentile(elected, 50), percentile(elected, 100), percentile(complete, 50), percentile(complete, 100))
	s.removeServices(t, "led-web")
	s.removeNetworks(t, "led", "led-own")
	s.forgotten(t)
}
