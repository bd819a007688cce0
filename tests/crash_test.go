package tests

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// crashSeed makes the instants of the kills the same in each run, as far as a
// busy machine allows.
const crashSeed = 20240607

// TestCrashLosesNoPacket kills the plugin on either host at random instants while
// containers come and go on both and a probe runs across them.
func TestCrashLosesNoPacket(t *testing.T) {
	t.Parallel()
	kills := 10
	if soak() {
		kills = 1000
	}
	lab := newLab(t, 2, nil)
	install(t, lab, pluginDir(t, "failpoint", "crash"))
	createNetwork(t, lab, "app", 32)
	createNetwork(t, lab, "churn", 33, "--ipam-driver", hosts.PluginName)
	probe, _, _ := probePair(t, lab, "app")
	for _, h := range lab.Hosts {
		clean(t, h)
	}
	before := inventories(t, lab.Hosts...)

	churn := startChurn(t, lab, "churn")
	t.Logf("seed %d", crashSeed)
	random := rand.New(rand.NewPCG(crashSeed, 0))
	var times, early, parents []time.Duration
	for i := range kills {
		h := lab.Hosts[random.IntN(len(lab.Hosts))]
		if i%10 == 9 {
			parents = append(parents, killParent(t, h))
			continue
		}
		pause(t, time.Duration(random.IntN(1000))*time.Millisecond)
		times = append(times, killPlugin(t, h))
		if i%10 == 4 {
			early = append(early, killPlugin(t, h))
		}
	}
	good, bad := churn.stop()
	r := lossless(t, probe)
	figure(t, "L1 packets lost while the plugin is killed", kills, "%d of %d UDP packets lost, TCP %s, slowest message %s (target 0)",
		r.Lost, r.Sent, broken(r), r.TCPDelay.Round(time.Millisecond))
	figure(t, "L1 served again after kill -9", kills, "p50 %s p99 %s (target 2 s); churn: %d containers ran, %d starts failed", percentile(times, 50), percentile(times, 99), good, bad)
	figure(t, "L1 killed again as soon as it serves", len(early), "served again p50 %s max %s", percentile(early, 50), percentile(early, 100))
	figure(t, "L1 both processes killed, Docker starts them again", len(parents), "served again p50 %s max %s (target 2 s)", percentile(parents, 50), percentile(parents, 100))

	leaks := 0
	for i, h := range lab.Hosts {
		removeOthers(t, h, "from", "to")
		if settled(t, h) {
			leaks++
		}
		unleaked(t, h, before[i], "plugin file")
	}
	figure(t, "L1 left over after the kills", kills, "0 after the audits; hosts that needed the slow audits: %d of %d", leaks, len(lab.Hosts))
}

// killPlugin returns how long it took until calls were served again.
func killPlugin(t *testing.T, h *hosts.Host) time.Duration {
	t.Helper()
	pid, err := h.KillPlugin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	took, err := served(t.Context(), h, pid)
	if err != nil {
		t.Fatal(err)
	}
	return took
}

// killParent kills the process that Docker knows, and the other with it.
func killParent(t *testing.T, h *hosts.Host) time.Duration {
	t.Helper()
	if err := started(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	pid, err := h.KillPluginParent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	took, err := served(t.Context(), h, pid)
	if err != nil {
		t.Fatal(err)
	}
	return took
}

// started waits until Docker has finished with the start of the plugin: half a second
// and two calls after its process. A plugin that Docker sees die before that is not
// started again, but disabled after 12 seconds.
func started(ctx context.Context, h *hosts.Host) error {
	const enough = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		age, err := h.PluginAge(ctx)
		if err == nil && age >= enough {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("plugin on host %s has run for %v: %w", h.Name, age, errors.Join(err, ctx.Err()))
		}
		wait(ctx, 50*time.Millisecond)
	}
}

func broken(r hosts.Report) string {
	if r.TCPErr != nil {
		return "broke: " + r.TCPErr.Error()
	}
	return "unbroken"
}

// churn starts short containers on every host until stop.
type churn struct {
	cancel    context.CancelFunc
	group     sync.WaitGroup
	good, bad atomic.Int64
}

func startChurn(t *testing.T, lab *hosts.Lab, network string) *churn {
	ctx, cancel := context.WithCancel(t.Context())
	c := &churn{cancel: cancel}
	for _, h := range lab.Hosts {
		c.group.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				// A start that is under way is not given up.
				_, err := h.Docker(t.Context(), "run", "--rm", "--name", fmt.Sprintf("churn%d", i), "--network", network, hosts.Image, "true")
				if err == nil {
					c.good.Add(1)
				} else {
					c.bad.Add(1)
				}
			}
		})
	}
	t.Cleanup(func() { c.stop() })
	return c
}

// stop ends the churn and returns how many containers ran and how many did not.
func (c *churn) stop() (good, bad int64) {
	c.cancel()
	c.group.Wait()
	return c.good.Load(), c.bad.Load()
}

// removeOthers removes all containers but those named, as a user cleans up.
func removeOthers(t *testing.T, h *hosts.Host, keep ...string) {
	t.Helper()
	for _, line := range strings.Fields(docker(t, h, "ps", "--all", "--format", "{{.Names}}")) {
		kept := false
		for _, k := range keep {
			kept = kept || k == line
		}
		if !kept {
			docker(t, h, "rm", "--force", line)
		}
	}
}
