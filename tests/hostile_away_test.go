package tests

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/tests/hosts"
)

// stream sends hostile frames to the victims of a scene, one after the other.
type stream struct {
	scene
	ears []*ear
	sent atomic.Int64
}

// streams starts to send on all networks with the guard, until stop.
func (x *hostile) streams(t *testing.T) (all []*stream, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	for _, s := range x.guarded {
		m := &stream{scene: s}
		var frames [][]byte
		rng := rand.New(rand.NewPCG(hostileSeed, uint64(s.second)))
		for range 10 {
			for _, v := range s.victims {
				for _, f := range kerneltest.Frames(rng, s.attacker.Station, v.Station) {
					if f.Reason != "" {
						s.attacker.readdress(f.Data, v, s.next)
						frames = append(frames, f.Data)
					}
				}
			}
		}
		for _, v := range s.victims {
			m.ears = append(m.ears, v.listens(t))
		}
		fd := s.attacker.packetSocket(t, 0, func(int) error { return nil })
		wait.Go(func() {
			defer func() { _ = unix.Close(fd) }()
			for i := 0; ctx.Err() == nil; i++ {
				if _, err := unix.Write(fd, frames[i%len(frames)]); err == nil {
					m.sent.Add(1)
				}
				if i%50 == 0 { // the plugin needs a processor, too
					time.Sleep(5 * time.Millisecond)
				}
			}
		})
		all = append(all, m)
	}
	return all, func() { cancel(); wait.Wait() }
}

// accepted returns how many frames the victims accepted until now.
func (m *stream) accepted(t *testing.T) (n int64) {
	pause(t, 100*time.Millisecond) // on their way
	for _, e := range m.ears {
		n += e.accepted.Load()
	}
	return n
}

// withoutPlugin has hostile frames come all the time, while the plugin of the host is
// killed, and disabled and enabled, and while its program is taken off the links: there
// the guard is open until that is repaired.
func (x *hostile) withoutPlugin(t *testing.T) {
	h := x.lab.Hosts[0]
	all, stop := x.streams(t)
	defer stop()
	for _, phase := range []struct {
		name string
		play func()
	}{
		{"killed", func() { killParent(t, h) }},
		{"disabled", func() {
			docker(t, h, "plugin", "disable", "-f", hosts.PluginName)
			pause(t, 2*time.Second)
			docker(t, h, "plugin", "enable", hosts.PluginName)
			clean(t, h)
		}},
	} {
		before := make([]int64, len(all))
		tables := make([]map[string][]string, len(all))
		for i, m := range all { // of the victims alone: a plugin that encrypts itself has links
			before[i], tables[i] = m.sent.Load(), lookAt(t, m.victims, m.known())
		}
		phase.play()
		sent, accepted, changed := int64(0), int64(0), 0
		for i, m := range all {
			n := m.sent.Load() - before[i]
			if sent += n; n == 0 {
				t.Errorf("%s: nothing was sent on network %s", phase.name, m.name)
			}
			accepted += m.accepted(t)
			changed += changes(t, tables[i], lookAt(t, m.victims, m.known()))
		}
		if accepted != 0 || changed != 0 {
			t.Errorf("%s: accepted %d, changed %d, want 0 and 0", phase.name, accepted, changed)
		}
		figure(t, "hostile frames while the plugin is "+phase.name, int(sent), "accepted %d, victims changed %d (target 0)", accepted, changed)
	}

	accepted, times, slowest := int64(0), 0, time.Duration(0)
	for _, m := range all {
		for _, away := range []string{"filter del dev LINK ingress", "qdisc del dev LINK clsact"} {
			before := m.accepted(t)
			slowest = max(slowest, x.detached(t, h, m, away))
			repaired := m.accepted(t)
			times++
			accepted += repaired - before
			t.Logf("%s: tc %s: %d frames accepted", m.name, away, repaired-before)
			sent := m.sent.Load()
			pause(t, time.Second)
			if after := m.accepted(t); after != repaired || m.sent.Load() == sent {
				t.Errorf("%s: after the repair %d of %d frames are accepted, want 0 of some", m.name, after-repaired, m.sent.Load()-sent)
			}
		}
	}
	if accepted == 0 {
		t.Error("without the program nothing is accepted: the frames do not bite")
	}
	figure(t, "hostile frames while the program is taken off", times, "accepted %d in all, guard open for %s at most (target 2 s)", accepted, slowest.Round(time.Millisecond))
	stop()
	for _, m := range all {
		m.attacker.talks(t, m.ears) // honest ones still pass
	}
}

// detached takes the program off the attacker's link by tc, and waits until it is there
// again.
func (x *hostile) detached(t *testing.T, h *hosts.Host, m *stream, away string) time.Duration {
	t.Helper()
	link := ""
	for _, e := range view[[]endpointView](t, h, "endpoints") {
		if e.Local && e.IPv4 == m.attacker.IPv4 {
			link = e.Link
		}
	}
	if out, err := h.Exec(t.Context(), "sh", "-c", "tc "+strings.Replace(away, "LINK", link, 1)); err != nil {
		t.Fatalf("network %s: tc %s: %v %s", m.name, away, err, out)
	}
	return eventually(t, eventLimit+10*time.Second, "the program is on the attacker's link again", func(ctx context.Context) error {
		out, err := h.Exec(ctx, "tc", "filter", "show", "dev", link, "ingress")
		if err == nil && !strings.Contains(out, "weft") {
			err = errors.New("it is not")
		}
		return err
	})
}
