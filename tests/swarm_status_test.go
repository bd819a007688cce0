package tests

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestSwarmStatus follows what weft status and weft audit say of a Swarm, and types
// what they tell to type.
func TestSwarmStatus(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "debian" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSwarm(t, engine, false, "WEFT_SCOPE=global", "docker.source=/run/docker.sock", "WEFT_PROGRAM=off")
			a, b, c := s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
			for _, h := range s.lab.Hosts {
				says(t, h, nil)
			}
			t.Run("virtual addresses", s.virtualAddresses)
			t.Run("audit after another leader", func(t *testing.T) {
				s.settled(t)
				old := s.leader(t, nil)
				if err := old.StopDockerd(t.Context()); err != nil {
					t.Fatal(err)
				}
				s.leader(t, old)
				if err := old.StartDockerd(t.Context()); err != nil {
					t.Fatal(err)
				}
				s.settled(t)
			})
			t.Run("plugin disabled", func(t *testing.T) {
				docker(t, c, "plugin", "disable", "-f", hosts.PluginName)
				says(t, a, []string{"where the plugin weft:latest was disabled or removed: c;", "silent hosts: c"})
				docker(t, c, "plugin", "enable", hosts.PluginName)
				says(t, a, nil)
			})
			t.Run("other settings", s.otherSettings)
			t.Run("worker", s.worksAlone)
			t.Run("other plugin", s.otherPlugin)
			t.Run("Docker does not answer", func(t *testing.T) {
				hold := func(signal string) {
					if _, err := b.Exec(t.Context(), "sh", "-c", "kill -"+signal+" $(cat /run/docker/docker.pid)"); err != nil {
						t.Fatal(err)
					}
				}
				hold("STOP")
				start := time.Now()
				out, _ := b.Exec(t.Context(), "weft", "status")
				took := time.Since(start)
				hold("CONT")
				figure(t, "swarm: weft status beside a stopped dockerd on "+name, 1, "%v (target 3 s)", took.Round(10*time.Millisecond))
				for _, part := range []string{"Docker did not answer within 2s", "underlay   192.0.2."} {
					if !strings.Contains(out, part) {
						t.Errorf("%q is not in\n%s", part, out)
					}
				}
			})
			t.Run("outside", func(t *testing.T) {
				if err := c.LeaveSwarm(t.Context()); err != nil {
					t.Fatal(err)
				}
				all := view[statusView](t, c, "status").Problems
				if !slices.ContainsFunc(all, func(p struct {
					Text, Remedy string
					Advice       bool
				}) bool {
					return strings.HasPrefix(p.Text, "scope is global, but Docker is in no Swarm")
				}) {
					t.Errorf("problems are %+v", all)
				}
			})
		})
	}
}

// worksAlone makes a host a worker, which knows of services only what managers tell.
func (s *swarm) worksAlone(t *testing.T) {
	a, c := s.lab.Hosts[0], s.lab.Hosts[2]
	s.network(t, "late", 63)
	s.service(t, "late", 1, "--network", "late", "--endpoint-mode", "vip")
	run(t, c, "late", "--network", "late")
	demote(t, a, c)
	says(t, c, []string{"no answer from virtual addresses of services (late): the port program is off"})
	docker(t, c, "rm", "-f", "late")
	s.removeServices(t, "late")
	s.removeNetworks(t, "late")
}

// otherSettings gives a host settings that differ from those of the others.
func (s *swarm) otherSettings(t *testing.T) {
	a, c := s.lab.Hosts[0], s.lab.Hosts[2]
	set := func(setting string) {
		docker(t, c, "plugin", "disable", "-f", hosts.PluginName)
		docker(t, c, "plugin", "set", hosts.PluginName, setting)
		docker(t, c, "plugin", "enable", hosts.PluginName)
	}
	for _, row := range []struct{ other, same, said string }{
		{"WEFT_SCOPE=local", "WEFT_SCOPE=global", "WEFT_SCOPE differs: c has local, this host global"},
		{"WEFT_DATA_PORT=4900", "WEFT_DATA_PORT=4797", "WEFT_DATA_PORT differs: c has 4900, this host 4797"},
		{"WEFT_PORT=4900", "WEFT_PORT=4796", "silent hosts: c"},
	} {
		set(row.other)
		says(t, a, []string{row.said})
		set(row.same)
		says(t, a, nil)
	}
}

// otherPlugin takes the plugin from a host: its tasks wait. Then it puts one of another
// version there.
func (s *swarm) otherPlugin(t *testing.T) {
	a, c := s.lab.Hosts[0], s.lab.Hosts[2]
	docker(t, c, "rm", "-f", "attached", "other")
	docker(t, c, "plugin", "disable", "-f", hosts.PluginName)
	docker(t, c, "plugin", "rm", "-f", hosts.PluginName)
	// Until its next start dockerd tells Swarm of a plugin that was enabled once.
	if err := c.StopDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	tells(t, a, "hosts of the Swarm without the plugin weft:latest: c;")
	s.network(t, "there", 62)
	s.createService(t, a, "there", "--network", "there", "--constraint", "node.hostname==c")
	eventually(t, 60*time.Second, "Docker says why the task waits", func(ctx context.Context) error {
		out, err := a.Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.CurrentState}} {{.Error}}", "there")
		for _, part := range []string{"Pending", "no suitable node", "missing plugin on 1 node"} {
			if err == nil && !strings.Contains(out, part) {
				err = fmt.Errorf("docker service ps shows %s", out)
			}
		}
		return err
	})
	if err := c.InstallPlugin(t.Context(), pluginDir(t, "failpoint", "other"), "WEFT_SCOPE=global", "docker.source=/run/docker.sock", "WEFT_PROGRAM=off"); err != nil {
		t.Fatal(err)
	}
	s.tasks(t, a, "there", 1)
	tells(t, a, "the plugin's version differs: c has other, this host crash")
	s.removeServices(t, "there")
	s.removeNetworks(t, "there")
}

// virtualAddresses makes services in Docker's default mode beside attached
// containers, on networks of Docker's and of Weft's address management.
func (s *swarm) virtualAddresses(t *testing.T) {
	a := s.lab.Hosts[0]
	s.network(t, "app", 60)
	s.network(t, "ours", 61, "--ipam-driver", hosts.PluginName)
	web := s.service(t, "web", 3, "--network", "app", "--endpoint-mode", "vip")
	s.service(t, "shop", 2, "--network", "ours", "--endpoint-mode", "vip", "--publish", "8080:80")
	var attached []hosts.Container
	for _, h := range s.lab.Hosts {
		attached = append(attached, run(t, h, "attached", "--network", "app"))
		run(t, h, "other", "--network", "ours")
	}
	here := []string{"no answer from virtual addresses of services (web): the port program is off", "no answer from virtual addresses of services (shop): the port program is off"}
	says(t, a, append([]string{"service web: nobody answers its virtual address, 10.60.", "service shop: nobody answers its virtual address, 10.61."}, here...))
	eventually(t, 90*time.Second, "the log tells of the services and what to type", func(context.Context) error {
		raw, err := os.ReadFile(a.LogFile())
		for _, part := range []string{"service web: nobody answers its virtual address, 10.60.", "service shop: nobody answers its virtual address, 10.61.", "docker service update --endpoint-mode dnsrr"} {
			if err == nil && !bytes.Contains(raw, []byte(part)) {
				err = fmt.Errorf("%q is not in it", part)
			}
		}
		return err
	})
	s.settled(t)
	for i := range s.lab.Hosts {
		resolves(t, attached[i], "tasks.web", "app", web)
		silent(t, attached[i], "web")
		reach(t, attached[i], "tasks.web")
	}
	for _, p := range view[statusView](t, a, "status").Problems {
		if !strings.HasPrefix(p.Text, "service ") {
			continue
		}
		// The test does not wait for a registry.
		typed := strings.Fields(strings.Replace(p.Remedy, "docker service update", "service update --detach --no-resolve-image", 1))
		docker(t, a, typed...)
	}
	says(t, a, nil)
	s.tasks(t, a, "shop", 2)
	eventually(t, 60*time.Second, "the name web is that of its tasks", func(ctx context.Context) error {
		tasks, err := a.WaitService(ctx, "web", 3)
		if err != nil {
			return err
		}
		out, _ := attached[0].Exec(ctx, "nslookup", "-type=a", "web", "127.0.0.11")
		for _, task := range tasks {
			if !strings.Contains(out, task.Addresses["app"].String()) {
				return fmt.Errorf("%v is not in %s", task.Addresses["app"], out)
			}
		}
		return nil
	})
	s.settled(t)
}

// says waits until the problems of weft status, without advice, are those that
// begin with or hold the parts, in any order.
func says(t *testing.T, h *hosts.Host, parts []string) {
	t.Helper()
	eventually(t, 90*time.Second, fmt.Sprintf("host %s says %q", h.Name, parts), func(context.Context) error {
		var got []string
		for _, p := range view[statusView](t, h, "status").Problems {
			if !p.Advice {
				got = append(got, p.Text)
			}
		}
		for _, part := range parts {
			if !slices.ContainsFunc(got, func(text string) bool { return strings.Contains(text, part) }) {
				return fmt.Errorf("%q is not in %q", part, got)
			}
		}
		if len(got) != len(parts) {
			return fmt.Errorf("it says %q", got)
		}
		return nil
	})
}
