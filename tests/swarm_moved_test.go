package tests

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// configure gives the plugin of a host other settings.
func configure(t *testing.T, h *hosts.Host, settings ...string) {
	t.Helper()
	docker(t, h, "plugin", "disable", "--force", hosts.PluginName)
	docker(t, h, append([]string{"plugin", "set", hosts.PluginName}, settings...)...)
	docker(t, h, "plugin", "enable", hosts.PluginName)
}

// leaves takes host c out of the Swarm.
func (s *swarmInput) leaves(t *testing.T) {
	t.Helper()
	if err := s.c.LeaveSwarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.a.WaitNode(within(t), s.c, "down"); err != nil {
		t.Fatal(err)
	}
	nodes, err := s.a.Nodes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Host == s.c.Name {
			docker(t, s.a, "node", "rm", "--force", n.ID)
		}
	}
}

// renumbered gives a worker another address: outside the Swarm, and while its dockerd
// is stopped.
func (s *swarmInput) renumbered(t *testing.T) {
	s.network(t, "moving", 90)
	s.leaves(t)
	first := s.c.Address
	if err := s.c.Renumber(t.Context(), netip.MustParseAddr("192.0.2.112")); err != nil {
		t.Fatal(err)
	}
	if err := s.c.JoinSwarm(t.Context(), s.a, hosts.Worker); err != nil {
		t.Fatal(err)
	}
	web := s.service(t, "web", 6, "--network", "moving")
	spread(t, web, s.lab.Hosts...)
	start := time.Now()
	s.mesh(t, "moving", web)
	s.found(t, first)
	took := time.Since(start)

	second := s.c.Address
	if err := s.c.StopDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.a.WaitNode(within(t), s.c, "down"); err != nil {
		t.Fatal(err)
	}
	if err := s.c.Renumber(t.Context(), netip.MustParseAddr("192.0.2.113")); err != nil {
		t.Fatal(err)
	}
	if err := s.c.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.a.WaitNode(within(t), s.c, "ready"); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	web = s.update(t, "web", 6, "--force")
	spread(t, web, s.lab.Hosts...)
	s.mesh(t, "moving", web)
	s.found(t, first, second)
	figure(t, "swarm: a renumbered worker on "+s.name, 2, "joined again: reached, and its former address closed, after %s; renumbered while dockerd was stopped: after %s",
		took.Round(100*time.Millisecond), time.Since(start).Round(100*time.Millisecond))
	s.removeServices(t, "web")
	s.removeNetworks(t, "moving")
	s.forgotten(t)
}

// found waits until hosts a and b know host c at its address and at no other.
func (s *swarmInput) found(t *testing.T, former ...netip.Addr) {
	t.Helper()
	for _, h := range []*hosts.Host{s.a, s.b} {
		eventually(t, 60*time.Second, "host "+h.Name+" knows host c at "+s.c.Address.String(), func(context.Context) error {
			peers := slices.DeleteFunc(view[[]peerView](t, h, "peers"), func(p peerView) bool { return p.Name != "c" })
			if len(peers) != 1 || peers[0].Address != s.c.Address || !peers[0].Alive || !peers[0].InSync {
				return fmt.Errorf("weft peers shows %+v", peers)
			}
			in := s.letIn(t, h)
			if len(in) != 2 || !slices.Contains(in, s.c.Address) {
				return fmt.Errorf("it lets in %v, not %s alone of %v", in, s.c.Address, former)
			}
			return nil
		})
	}
}

// copied starts host c with the state folder of host b, as a cloned machine has it.
func (s *swarmInput) copied(t *testing.T) {
	s.network(t, "cloned", 91)
	web := s.service(t, "web", 4, "--network", "cloned", "--constraint", "node.hostname!=c")
	docker(t, s.c, "plugin", "disable", "--force", hosts.PluginName)
	from, to := stateFolder(t, s.b), stateFolder(t, s.c)
	pid, err := s.b.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	aside := t.TempDir()
	for _, name := range []string{"host.key", "weft.db"} {
		copyFile(t, filepath.Join(to, name), filepath.Join(aside, name))
	}
	// A file that is written meanwhile is no copy.
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"host.key", "weft.db"} {
		copyFile(t, filepath.Join(from, name), filepath.Join(to, name))
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	probe := startProbe(t, s.lab.Container(onHost(web, s.a)[0]), s.lab.Container(onHost(web, s.b)[0]), onHost(web, s.b)[0].Addresses["cloned"])
	docker(t, s.c, "plugin", "enable", hosts.PluginName)
	tells(t, s.c, "every call of Docker is refused: this host's state folder is a copy: the host at "+s.b.Address.String())
	tells(t, s.b, "host "+s.c.Address.String()+" has the same identity as this one")
	s.createService(t, s.a, "all", "--mode", "global", "--network", "cloned")
	eventually(t, 60*time.Second, "the copy refuses tasks", func(ctx context.Context) error {
		out, err := s.a.Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.Node}} {{.CurrentState}} {{.Error}}", "all")
		if err == nil && !strings.Contains(out, "lives under the same identity; remove host.key here") {
			err = fmt.Errorf("docker service ps shows %s", out)
		}
		return err
	})
	if now := held(t, s.c); strings.Contains(now, "weftb") || strings.Contains(now, "weftx") || strings.Contains(now, "add weft-peers") {
		t.Errorf("the copy has built something:\n%s", now)
	}
	s.mesh(t, "cloned", web)
	report := lossless(t, probe)

	// What weft status says to do.
	docker(t, s.c, "plugin", "disable", "--force", hosts.PluginName)
	for _, name := range []string{"host.key", "weft.db"} {
		if err := os.Remove(filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
	docker(t, s.c, "plugin", "enable", hosts.PluginName)
	all := s.tasks(t, s.a, "all", 3)
	s.mesh(t, "cloned", append(all, web...))
	clean(t, s.c)
	figure(t, "swarm: a host with a copied state folder on "+s.name, 1, "it refused its tasks and said why; %d of %d packets between the others lost (target 0); it took its task once it was a host of its own", report.Lost, report.Sent)
	s.removeServices(t, "web", "all")
	s.removeNetworks(t, "cloned")
	s.forgotten(t)
}

func stateFolder(t *testing.T, h *hosts.Host) string {
	t.Helper()
	dir, err := h.StateDir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// copyFile copies a file that nobody writes.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	raw, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}
