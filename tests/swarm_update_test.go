package tests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// rolling replaces the tasks of a service one by one, while a container beside them
// asks for the service by name again and again.
func (s *swarm) rolling(t *testing.T) {
	a, b := s.lab.Hosts[0], s.lab.Hosts[1]
	rounds := 1
	if soak() {
		rounds = 10
	}
	s.network(t, "app", 77)
	now := s.service(t, "web", 6, "--network", "app")
	beside := run(t, b, "beside", "--network", "app")
	resolves(t, beside, "web", "app", now)
	l := &lookups{netns: netnsOf(t, beside)}
	replaced, duplicates := 0, 0
	for round := range rounds {
		order := []string{"start-first", "stop-first"}[round%2]
		docker(t, a, "service", "update", "--detach", "--no-resolve-image", "--force", "--update-parallelism", "1", "--update-delay", "0s",
			"--update-monitor", "1s", "--update-order", order, "web")
		eventually(t, 3*time.Minute, "all tasks are replaced, "+order, func(ctx context.Context) error {
			l.look(ctx, t, a)
			duplicates += s.duplicates(t, s.lab.Hosts...)
			return updated(ctx, a, "web")
		})
		now = s.replaced(t, "web", now, 6)
		replaced += len(now)
	}
	resolves(t, beside, "web", "app", now)
	s.mesh(t, "app", now)
	if l.failed == l.asked || l.tried == 0 {
		t.Errorf("of %d lookups %d were without an answer, of %d tasks was asked who they are: nothing was tried", l.asked, l.failed, l.tried)
	}
	figure(t, "swarm: rolling update one by one on "+s.name, rounds, "%d tasks replaced; %d lookups, %d without an answer by Docker; of %d addresses of running tasks silent or another's: %d (target 0); that two have: %d (target 0)",
		replaced, l.asked, l.failed, l.tried, l.wrong, duplicates)
	docker(t, b, "rm", "--force", "beside")
	s.removeServices(t, "web")
	s.removeNetworks(t, "app")
	s.forgotten(t)
}

// updated returns nil when the last update of the service is complete.
func updated(ctx context.Context, h *hosts.Host, service string) error {
	out, err := h.Docker(ctx, "service", "inspect", "--format", "{{with .UpdateStatus}}{{.State}} {{.Message}}{{end}}", service)
	if err == nil && !strings.HasPrefix(out, "completed") && !strings.HasPrefix(out, "rollback_completed") {
		err = fmt.Errorf("the update is %q", strings.TrimSpace(out))
	}
	return err
}

// lookups counts what a container finds behind the name web.
type lookups struct {
	netns         string
	asked, failed int // names
	tried, wrong  int // addresses of tasks that Docker said are running
}

// look resolves the name once and asks each address who it is. What Docker does not
// call running before and after may be silent.
func (l *lookups) look(ctx context.Context, t *testing.T, h *hosts.Host) {
	t.Helper()
	before := runningTasks(ctx, t, h)
	l.asked++
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialIn(ctx, l.netns, network, "127.0.0.11:53")
	}}
	found, err := resolver.LookupNetIP(ctx, "ip4", "web.")
	if err != nil {
		t.Logf("lookup: %v", err)
		l.failed++
	}
	answers := make([]string, len(found))
	errs := make([]error, len(found))
	var wait sync.WaitGroup
	for i, address := range found {
		wait.Go(func() { answers[i], errs[i] = whoIs(ctx, l.netns, address) })
	}
	wait.Wait()
	after := runningTasks(ctx, t, h)
	for i, address := range found {
		task := before[address]
		if task.ID == "" || after[address].ID != task.ID {
			continue
		}
		l.tried++
		if want := task.Container[:12]; answers[i] != want {
			l.wrong++
			t.Errorf("%s is task %.8s on host %s, container %s, and answers %q: %v", address, task.ID, task.Host, want, answers[i], errs[i])
		}
	}
}

// runningTasks returns by address the tasks of web that run and should.
func runningTasks(ctx context.Context, t *testing.T, h *hosts.Host) map[netip.Addr]hosts.Task {
	t.Helper()
	tasks, err := h.Tasks(ctx, "web")
	if err != nil {
		t.Error(err)
	}
	out := map[netip.Addr]hosts.Task{}
	for _, task := range tasks {
		if task.Live() && task.State == "running" && task.Container != "" {
			out[task.Addresses["app"]] = task
		}
	}
	return out
}

// whoIs asks an address by HTTP for the name of its container; a server that has
// just started may need a moment.
func whoIs(ctx context.Context, netns string, address netip.Addr) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		word, err := getOnce(ctx, netns, address)
		if err == nil && word != "" {
			return word, nil
		}
		select {
		case <-ctx.Done():
			return word, errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func getOnce(ctx context.Context, netns string, address netip.Addr) (string, error) {
	conn, err := dialIn(ctx, netns, "tcp", netip.AddrPortFrom(address, 80).String())
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	end, _ := ctx.Deadline()
	if err := conn.SetDeadline(end); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "GET /index.html HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	raw, err := io.ReadAll(conn)
	_, body, _ := strings.Cut(string(raw), "\r\n\r\n")
	return strings.TrimSpace(body), err
}

// dialIn dials in the network namespace at path.
func dialIn(ctx context.Context, path, network, address string) (conn net.Conn, err error) {
	err = hosts.InNetNS(path, func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// kept updates a service and takes it back; its secret, its config and its alias
// stay what they are. A service on all hosts leaves one that is drained, and comes
// back.
func (s *swarm) kept(t *testing.T) {
	a, b, c := s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
	dir := t.TempDir()
	for _, c := range []struct{ kind, name, text string }{{"secret", "word", "whisper"}, {"config", "note", "note"}} {
		file := filepath.Join(dir, c.name)
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		docker(t, a, c.kind, "create", c.name, file)
	}
	s.network(t, "app", 78)
	s.network(t, "more", 79, "--ipam-driver", hosts.PluginName)
	seen := run(t, b, "seen", "--network", "app")
	turns := 0
	same := func(tasks []hosts.Task) {
		t.Helper()
		turns++
		s.mesh(t, "app", tasks)
		resolves(t, seen, "backend", "app", tasks)
		for _, task := range tasks {
			if got := command(t, s.lab.Container(task), "cat", "/run/secrets/word", "/srv/note"); got != "whispernote" {
				t.Errorf("task %.8s reads secret and config %q", task.ID, got)
			}
		}
	}
	now := s.service(t, "api", 3, "--network", "name=app,alias=backend", "--secret", "word", "--config", "source=note,target=/srv/note")
	same(now)
	now = s.update(t, "api", 3, "--force")
	same(now)
	now = s.update(t, "api", 3, "--network-add", "more", "--env-add", "WORD=1")
	same(now)
	s.mesh(t, "more", now)
	docker(t, a, "service", "rollback", "--detach", "api")
	now = s.replaced(t, "api", now, 3)
	same(now)
	if _, ok := now[0].Addresses["more"]; ok {
		t.Errorf("a task is still on the network that was added after the state it was rolled back to: %+v", now[0])
	}

	web := s.service(t, "web", 3, "--mode", "global", "--network", "app")
	docker(t, a, "node", "update", "--availability", "pause", "c")
	paused := s.tasks(t, a, "web", 3)
	if onHost(paused, c)[0].ID != onHost(web, c)[0].ID {
		t.Errorf("the task of a host that pauses was replaced: %+v", paused)
	}
	s.mesh(t, "app", paused)
	docker(t, a, "node", "update", "--availability", "drain", "c")
	s.tasks(t, a, "web", 2)
	s.moved(t, a, c, "api", 3)
	eventually(t, 30*time.Second, "host c has forgotten the network", func(context.Context) error {
		if n := view[[]networkView](t, c, "networks"); len(n) > 0 {
			return fmt.Errorf("it knows %+v", n)
		}
		return nil
	})
	docker(t, a, "node", "update", "--availability", "active", "c")
	web = s.tasks(t, a, "web", 3)
	spread(t, web, a, b, c)
	api := s.tasks(t, a, "api", 3)
	same(api)
	s.mesh(t, "app", append(slices.Clone(web), api...))
	resolves(t, seen, "web", "app", web)
	figure(t, "swarm: update, rollback, pause and drain on "+s.name, 1, "secrets, configs and aliases as before in %d turns; addresses that two have: %d (target 0)", turns, s.duplicates(t, s.lab.Hosts...))
	docker(t, b, "rm", "--force", "seen")
	s.removeServices(t, "web", "api")
	s.removeNetworks(t, "app", "more")
	docker(t, a, "secret", "rm", "word")
	docker(t, a, "config", "rm", "note")
	s.forgotten(t)
}
