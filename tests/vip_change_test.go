package tests

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/tests/hosts"
)

// look is what a client's host had for the virtual address at some time between start
// and end: the tasks, and how many of them did not answer the client themselves.
type look struct {
	start, end time.Time
	tasks      []netip.Addr
	deaf       int
}

func (l look) whole() bool { return len(l.tasks) > 0 && l.deaf == 0 }

// watch looks at one host's tasks again and again, one goroutine until its context ends.
type watch struct {
	mu  sync.Mutex // guards what follows
	all []look
}

// watches looks into the program's map of services: to ask the plugin could make it look.
func (v *vips) watches(t *testing.T, ctx context.Context, wait *sync.WaitGroup) (out []*watch) {
	t.Helper()
	for _, c := range v.clients {
		pid, err := c.Host.PluginPID(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		pins, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/weft/bpf/weft-*/weft_services", pid))
		if err != nil || len(pins) != 1 {
			t.Fatalf("host %s: maps of services: %v, %v", c.Host.Name, pins, err)
		}
		m, err := ebpf.LoadPinnedMap(pins[0], &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			t.Fatalf("host %s: %s: %v", c.Host.Name, pins[0], err)
		}
		w, ns := &watch{}, netnsOf(t, c)
		out = append(out, w)
		wait.Go(func() {
			defer func() { _ = m.Close() }()
			for ctx.Err() == nil {
				l := look{start: time.Now()}
				if l.tasks, err = tasksIn(m, v.address); err != nil {
					t.Errorf("host %s: %v", c.Host.Name, err)
					return
				}
				for _, a := range l.tasks {
					if !opens(ns, a) {
						l.deaf++
					}
				}
				l.end = time.Now()
				w.mu.Lock()
				w.all = append(w.all, l)
				w.mu.Unlock()
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	return out
}

// tasksIn reads the tasks behind a virtual address (dataplane/kernel/bpf/maps.h: dest_key,
// service).
func tasksIn(m *ebpf.Map, vip netip.Addr) (out []netip.Addr, err error) {
	var key, value []byte
	all := m.Iterate()
	for all.Next(&key, &value) {
		if [16]byte(key[4:20]) != vip.As16() {
			continue
		}
		for task := range binary.NativeEndian.Uint32(value) {
			out = append(out, netip.AddrFrom4([4]byte(value[4+12*task:])))
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, all.Err()
}

// opens reports whether a task takes a connection at its own address.
func opens(netns string, task netip.Addr) bool {
	err := hosts.InNetNS(netns, func() error {
		c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(task, 80).String(), time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
	return err == nil
}

// changing reports whether the host may have had a task that does not answer, or may have
// learned of another, at some time between start and end.
func (w *watch) changing(start, end time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.all) == 0 || start.Before(w.all[0].end) || end.After(w.all[len(w.all)-1].start) {
		return true // nobody looked
	}
	for i, l := range w.all[1:] {
		before := w.all[i]
		if before.start.Before(end) && start.Before(l.end) && !(before.whole() && l.whole() && slices.Equal(before.tasks, l.tasks)) {
			return true
		}
	}
	return false
}

// knows waits until the host has n tasks, all of which answer.
func (w *watch) knows(t *testing.T, n int) {
	t.Helper()
	asked := time.Now()
	eventually(t, 60*time.Second, fmt.Sprintf("the host's program has %d tasks that answer", n), func(context.Context) error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.all) == 0 || w.all[len(w.all)-1].start.Before(asked) {
			return errors.New("nobody looked")
		}
		if l := w.all[len(w.all)-1]; len(l.tasks) != n || l.deaf > 0 {
			return fmt.Errorf("it has %v, of which %d do not answer", l.tasks, l.deaf)
		}
		return nil
	})
}

// longest returns the longest time between two looks at which all was well.
func (w *watch) longest() (d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	well := -1
	for i, l := range w.all {
		if l.whole() {
			if well >= 0 && well < i-1 {
				d = max(d, l.start.Sub(w.all[well].start))
			}
			well = i
		}
	}
	return d
}

// asking is one connection to the virtual address.
type asking struct {
	start, end time.Time
	err        error
}

// updatesAndKills asks all the time while the service is updated and its tasks are
// killed. A connection may fail for one reason alone: the client's host has a task that
// does not answer, because it has just died, or just begun.
func (v *vips) updatesAndKills(t *testing.T) {
	want := 2000
	if soak() {
		want = 10000
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wait, looks sync.WaitGroup
	watching, stop := context.WithCancel(t.Context())
	defer stop()
	watches := v.watches(t, watching, &looks)
	for _, w := range watches {
		w.knows(t, 3)
	}
	var mu sync.Mutex
	all := make([][]asking, len(v.clients))
	asked := 0
	for i, c := range v.clients {
		ns := netnsOf(t, c)
		for range 2 {
			wait.Go(func() {
				for ctx.Err() == nil {
					a := asking{start: time.Now()}
					_, a.err = answerer(ns, v.address.String())
					a.end = time.Now()
					mu.Lock()
					asked++
					all[i] = append(all[i], a)
					mu.Unlock()
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	known := func() {
		for _, w := range watches {
			w.knows(t, 3)
		}
	}
	kill := func() {
		tasks := v.tasks(t, v.lab.Hosts[0], "web", 3)
		docker(t, v.lab.Host(tasks[0].Host), "kill", tasks[0].Container)
		pause(t, 2*time.Second)
		v.tasks(t, v.lab.Hosts[0], "web", 3)
	}
	for i := 0; ; i++ {
		v.update(t, "web", 3, "--force", "--update-parallelism", "1", "--update-order", "start-first")
		known()
		kill()
		known()
		mu.Lock()
		enough := asked >= want && i >= 2
		mu.Unlock()
		if enough {
			break
		}
	}
	cancel()
	wait.Wait()
	known() // somebody has looked after the last connection
	stop()
	looks.Wait()

	var hung, refused, ended, others, changing int
	longest := time.Duration(0)
	for i, w := range watches {
		longest = max(longest, w.longest())
		for _, a := range all[i] {
			during := w.changing(a.start, a.end)
			if during {
				changing++
			}
			var op *net.OpError
			switch {
			case a.err == nil:
				continue
			case errors.Is(a.err, os.ErrDeadlineExceeded) || errors.Is(a.err, syscall.ETIMEDOUT):
				hung++
				t.Logf("hung: %v", a.err)
				continue
			case errors.As(a.err, &op) && op.Op == "dial":
				refused++
			default:
				ended++
			}
			if !during {
				others++
				t.Errorf("host %s: a connection fails, and all tasks answer: %v", v.clients[i].Host.Name, a.err)
			}
		}
	}
	if hung > 0 {
		t.Errorf("%d of %d connections hung", hung, asked)
	}
	// Of three or four tasks one dies at a time, and one begins.
	if 2*(refused+ended) > changing {
		t.Errorf("%d of the %d connections fail that met a change; want half at most", refused+ended, changing)
	}
	figure(t, "VIP connections during updates and kills", asked, "%d hung; of %d at a change %d refused and %d ended with their task; %d others failed; target 0 hung, 0 others; a dead task known by all within %s",
		hung, changing, refused, ended, others, longest.Round(10*time.Millisecond))
	v.settled(t)
	// All is known again: nothing fails any more.
	for _, c := range v.clients {
		ns := netnsOf(t, c)
		for range 100 {
			if _, err := answerer(ns, v.address.String()); err != nil {
				t.Fatalf("host %s: %v", c.Host.Name, err)
			}
		}
	}
}

// answeredBy waits until the virtual address is answered again and again, by such tasks
// alone.
func (v *vips) answeredBy(t *testing.T, c hosts.Container, ok func(name string) bool) {
	t.Helper()
	ns := netnsOf(t, c)
	eventually(t, 60*time.Second, fmt.Sprintf("the tasks that should answer host %s", c.Host.Name), func(context.Context) error {
		for range 50 {
			name, err := answerer(ns, v.address.String())
			if err != nil {
				return err
			}
			if !ok(name) {
				return fmt.Errorf("%s answers", name)
			}
		}
		return nil
	})
}

// healthCommand is a health check that waits for a word of the test.
const healthCommand = "until [ -e /srv/well ] || [ -e /srv/sick ]; do sleep 0.1; done; [ ! -e /srv/sick ]"

// health asks a service whose tasks have a health check: one that listens is not asked
// before it is healthy, nor when it is not any more. Swarm then ends it and starts
// another, which is asked when it is healthy.
func (v *vips) health(t *testing.T) {
	v.createService(t, v.lab.Hosts[0], "checked", "--network", "app", "--endpoint-mode", "vip", "--replicas", "2",
		"--health-cmd", healthCommand, "--health-interval", "1s", "--health-timeout", "60s", "--health-retries", "1")
	s := &vips{swarm: v.swarm, clients: v.clients, address: v.virtual(t, "checked")}
	first := s.listening(t)
	say := func(task hosts.Task, word string) {
		command(t, s.lab.Container(task), "touch", "/srv/"+word)
	}
	only := func(task hosts.Task) {
		for _, c := range s.clients {
			s.answeredBy(t, c, func(name string) bool { return name == task.Container[:12] })
		}
	}
	say(first[0], "well")
	only(first[0])
	say(first[1], "well")
	for _, c := range s.clients {
		s.balanced(t, c, 2)
	}
	say(first[0], "sick")
	only(first[1])
	now := s.listening(t)
	next := slices.IndexFunc(now, func(task hosts.Task) bool { return task.ID != first[1].ID })
	only(first[1])
	say(now[next], "well")
	for _, c := range s.clients {
		s.balanced(t, c, 2)
	}
	figure(t, "VIP of a service with a health check", 2, "asked when healthy, and only then")
	s.removeServices(t, "checked")
}

// listening waits until both tasks of the service listen, healthy or not.
func (v *vips) listening(t *testing.T) (live []hosts.Task) {
	t.Helper()
	ns := netnsOf(t, v.clients[0])
	eventually(t, 90*time.Second, "two tasks listen", func(ctx context.Context) error {
		all, err := v.lab.Hosts[0].Tasks(ctx, "checked")
		if err != nil {
			return err
		}
		live = slices.DeleteFunc(all, func(task hosts.Task) bool { return !task.Live() || task.Container == "" })
		for _, task := range live {
			if !opens(ns, task.Addresses["app"]) {
				return fmt.Errorf("task %s does not listen", task.ID)
			}
		}
		if len(live) != 2 {
			return fmt.Errorf("there are %+v", live)
		}
		return nil
	})
	return live
}
