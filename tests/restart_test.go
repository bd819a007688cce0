package tests

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestDockerdRestart stops and kills dockerd, with and without live-restore, on
// either engine. Host a restarts its containers, host b keeps them, host c stays as
// it is and looks on.
func TestDockerdRestart(t *testing.T) {
	t.Parallel()
	rounds := 1
	if soak() {
		rounds = 50
	}
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			lab := newLab(t, 3, func(i int, o *hosts.HostOptions) { o.Engine, o.LiveRestore = engine, i == 1 })
			install(t, lab, pluginDir(t, "", "test"))
			for i, h := range lab.Hosts {
				docker(t, h, "network", "create", "-d", hosts.PluginName, "--ipv6",
					"--subnet", "10.32.0.0/16", "--ip-range", fmt.Sprintf("10.32.%d.0/24", i+1),
					"--subnet", "fd00:32::/64", "--ip-range", fmt.Sprintf("fd00:32::%d:0/112", i+1), "app")
			}
			looker := run(t, lab.Hosts[2], "looker", "--network", "app", "--ip", "10.32.3.10", "--ip6", "fd00:32::3:a")
			for i, h := range lab.Hosts[:2] {
				run(t, h, "fixed", "--network", "app", "--restart", "always", "--network-alias", "shop",
					"--ip", fmt.Sprintf("10.32.%d.10", i+1), "--ip6", fmt.Sprintf("fd00:32::%d:a", i+1), "-p", "8080:80")
				run(t, h, "dynamic", "--network", "app", "--restart", "always")
				reach(t, looker, fmt.Sprintf("10.32.%d.10", i+1))
			}
			r := restarts{lab: lab, looker: looker}
			t.Run("both", func(t *testing.T) { // ends when both have
				t.Run("without live-restore", func(t *testing.T) {
					t.Parallel()
					for range rounds {
						r.comesBack(t, "stop", (*hosts.Host).StopDockerd)
						r.comesBack(t, "kill -9", (*hosts.Host).KillDockerd)
					}
				})
				t.Run("live-restore", func(t *testing.T) {
					t.Parallel()
					for range rounds {
						r.carriesOn(t, "stop", (*hosts.Host).StopDockerd)
						r.carriesOn(t, "kill -9", (*hosts.Host).KillDockerd)
					}
				})
			})
			clean(t, lab.Hosts[2])
			figure(t, "L3 restarts of dockerd on "+name, len(r.times), "containers with another address: 0; reached again p50 %s max %s",
				percentile(r.times, 50), percentile(r.times, 100))
			figure(t, "L3 live-restore on "+name, r.kept, "%d of %d packets lost (target 0)", r.lost, r.sent)
		})
	}
}

// restarts counts what TestDockerdRestart saw on one engine.
type restarts struct {
	lab    *hosts.Lab
	looker hosts.Container

	times []time.Duration // without live-restore

	kept       int // with it
	lost, sent uint64
}

// end is a way to end a host's dockerd.
type end = func(*hosts.Host, context.Context) error

// comesBack restarts dockerd without live-restore: containers and plugin end with
// it, and come back.
func (r *restarts) comesBack(t *testing.T, how string, down end) {
	t.Helper()
	h := r.lab.Hosts[0]
	if err := down(h, t.Context()); err != nil {
		t.Fatalf("%s: %v", how, err)
	}
	start := time.Now()
	if err := h.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	up := time.Since(start)
	r.alive(t, h, 1)
	took := time.Since(start)
	t.Logf("%s: dockerd answers after %s, containers reached after %s", how, up.Round(10*time.Millisecond), took.Round(10*time.Millisecond))
	r.times = append(r.times, took)
	clean(t, h)
}

// carriesOn restarts dockerd with live-restore: containers and plugin go on.
func (r *restarts) carriesOn(t *testing.T, how string, down end) {
	t.Helper()
	h := r.lab.Hosts[1]
	fixed := hosts.Container{Host: h, Name: "fixed"}
	plugin, err := h.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	probe, err := hosts.StartProbe(t.Context(), r.looker, fixed, addressOf(t, fixed, "app"))
	if err != nil {
		t.Fatal(err)
	}
	if err := down(h, t.Context()); err != nil {
		t.Fatalf("%s: %v", how, err)
	}
	if err := h.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.alive(t, h, 2)
	report := lossless(t, probe)
	r.lost, r.sent = r.lost+report.Lost, r.sent+report.Sent
	if after, err := h.PluginPID(t.Context(), ""); err != nil || after != plugin {
		t.Errorf("%s: the plugin was process %d and is %d, %v", how, plugin, after, err)
	}
	// The plugin still serves this dockerd.
	again := run(t, h, "again", "--network", "app")
	reach(t, r.looker, addressOf(t, again, "app").String())
	docker(t, h, "rm", "--force", "again")
	r.kept++
	clean(t, h)
}

// alive waits until the host's containers have their addresses and answer another
// host, by IPv4, IPv6 and the published port, and the alias resolves.
func (r *restarts) alive(t *testing.T, h *hosts.Host, number int) {
	t.Helper()
	fixed, dynamic := hosts.Container{Host: h, Name: "fixed"}, hosts.Container{Host: h, Name: "dynamic"}
	eventually(t, 60*time.Second, "containers of host "+h.Name+" run", func(ctx context.Context) error {
		for _, c := range []hosts.Container{fixed, dynamic} {
			if _, err := c.PID(ctx); err != nil {
				return err
			}
			if _, err := c.Address(ctx, "app"); err != nil {
				return err
			}
		}
		return nil
	})
	if got, want := addressOf(t, fixed, "app").String(), fmt.Sprintf("10.32.%d.10", number); got != want {
		t.Errorf("the container on host %s has %s, want %s", h.Name, got, want)
	}
	reach(t, r.looker, fmt.Sprintf("10.32.%d.10", number))
	reach(t, r.looker, fmt.Sprintf("fd00:32::%d:a", number))
	reach(t, r.looker, addressOf(t, dynamic, "app").String())
	reach(t, fixed, "10.32.3.10")
	serve(t, fixed, "back")
	fetches(t, r.lab.Hosts[2].NetNS(), "http://"+h.Address.String()+":8080/", "back")
	if out, err := dynamic.Exec(t.Context(), "nslookup", "shop", "127.0.0.11"); err != nil || !strings.Contains(out, fmt.Sprintf("10.32.%d.10", number)) {
		t.Errorf("the alias shop does not resolve on host %s: %s %v", h.Name, out, err)
	}
}
