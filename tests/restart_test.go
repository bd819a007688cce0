package tests

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestDockerdRestarts stops and kills dockerd, with and without live-restore, on
// both engines: containers keep or get back their addresses, and are reached from
// the other host.
func TestDockerdRestarts(t *testing.T) {
	rounds := 1
	if soak() {
		rounds = 50
	}
	for name, engine := range engines(t) {
		for _, live := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/live-restore=%v", name, live), func(t *testing.T) { restarts(t, engine, live, rounds) })
		}
	}
}

func restarts(t *testing.T, engine hosts.Engine, live bool, rounds int) {
	lab := newLab(t, 2, func(i int, o *hosts.HostOptions) { o.Engine, o.LiveRestore = engine, live && i == 0 })
	install(t, lab, pluginDir(t, "", "restart"))
	createNetwork(t, lab, "app", 32)
	a, b := lab.Hosts[0], lab.Hosts[1]
	fixed := run(t, a, "fixed", "--network", "app", "--ip", "10.32.1.10", "--restart", "always", "-p", "8080:80")
	dynamic := run(t, a, "dynamic", "--network", "app", "--restart", "always")
	other := run(t, b, "other", "--network", "app")
	reach(t, other, "10.32.1.10")
	started := func(c hosts.Container) string {
		return docker(t, a, "inspect", "-f", "{{.State.Running}} {{.State.StartedAt}}", c.Name)
	}
	changed, lost := 0, uint64(0)
	var slowest time.Duration
	for i := range rounds {
		for _, end := range []struct {
			name string
			fn   func(context.Context) error
		}{{"stop", a.StopDockerd}, {"kill", a.KillDockerd}} {
			before := started(fixed)
			var probe *hosts.Probe
			if live {
				var err error
				if probe, err = hosts.StartProbe(t.Context(), fixed, other, addressOf(t, other, "app")); err != nil {
					t.Fatal(err)
				}
			}
			if err := end.fn(t.Context()); err != nil {
				t.Fatalf("round %d: %s: %v", i, end.name, err)
			}
			if err := a.StartDockerd(t.Context()); err != nil {
				t.Fatalf("round %d: after %s: %v", i, end.name, err)
			}
			up := time.Now()
			if live {
				lost += lossless(t, probe).Lost
				if now := started(fixed); now != before {
					t.Errorf("round %d: after %s the container is %q, was %q", i, end.name, now, before)
				}
			}
			for _, c := range []hosts.Container{fixed, dynamic} {
				eventually(t, 60*time.Second, c.Name+" runs again", func(ctx context.Context) error {
					if s := started(c); !strings.HasPrefix(s, "true") {
						return fmt.Errorf("it is %s", s)
					}
					_, err := c.Address(ctx, "app")
					return err
				})
			}
			if got := addressOf(t, fixed, "app").String(); got != "10.32.1.10" {
				changed++
				t.Errorf("round %d: after %s the address is %s", i, end.name, got)
			}
			reach(t, other, "10.32.1.10")
			reach(t, other, addressOf(t, dynamic, "app").String())
			if took := time.Since(up); took > slowest {
				slowest = took
			}
			if ports := docker(t, a, "ps", "--filter", "name=fixed"); !strings.Contains(ports, "8080->80") {
				t.Errorf("round %d: after %s the port is not published: %s", i, end.name, ports)
			}
		}
	}
	clean(t, a)
	clean(t, b)
	figure(t, "L3 dockerd restarted, "+engine.Name+fmt.Sprintf(", live-restore %v", live), 2*rounds,
		"addresses changed %d (target 0), packets lost with live-restore %d (target 0), all reached %s after dockerd was up", changed, lost, slowest.Round(time.Millisecond))
}
