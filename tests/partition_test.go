package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// endpointsSeen returns what a host knows of all endpoints of the cluster, sorted:
// "address MAC host".
func endpointsSeen(ctx context.Context, h *hosts.Host) ([]string, error) {
	raw, err := h.Exec(ctx, "weft", "endpoints", "-o", "json")
	if err != nil {
		return nil, err
	}
	var all []struct{ IPv4, MAC, Host, State string }
	if err := json.Unmarshal([]byte(raw), &all); err != nil {
		return nil, fmt.Errorf("%w in %.200q", err, raw)
	}
	var out []string
	for _, e := range all {
		if e.State != "hidden" && e.State != "left" {
			out = append(out, e.IPv4+" "+e.MAC+" "+e.Host)
		}
	}
	slices.Sort(out)
	return out, nil
}

// agree waits until all hosts know the same endpoints, as many as wanted.
func agree(t *testing.T, lab *hosts.Lab, want int) time.Duration {
	t.Helper()
	return eventually(t, 60*time.Second, "the hosts agree", func(ctx context.Context) error {
		var first []string
		for i, h := range lab.Hosts {
			seen, err := endpointsSeen(ctx, h)
			if err != nil {
				return err
			}
			if len(seen) != want {
				return fmt.Errorf("host %s sees %d endpoints, want %d", h.Name, len(seen), want)
			}
			if i == 0 {
				first = seen
			} else if !slices.Equal(first, seen) {
				return fmt.Errorf("host %s sees %v, host %s %v", h.Name, seen, lab.Hosts[0].Name, first)
			}
		}
		return nil
	})
}

// TestPartitionHeals cuts four hosts in two halves under churn: traffic inside each
// half never stops, and all agree soon after the heal.
func TestPartitionHeals(t *testing.T) {
	cut := 12 * time.Second
	if soak() {
		cut = time.Minute
	}
	lab := newLab(t, 4, nil)
	install(t, lab, pluginDir(t, "", "partition"))
	createNetwork(t, lab, "app", 32)
	var containers []hosts.Container
	for _, h := range lab.Hosts {
		containers = append(containers, run(t, h, "fix"+h.Name, "--network", "app"))
	}
	for _, c := range containers[1:] {
		reach(t, containers[0], addressOf(t, c, "app").String())
	}
	agree(t, lab, 4)
	var probes []*hosts.Probe
	for i := 0; i < 4; i += 2 {
		p, err := hosts.StartProbe(t.Context(), containers[i], containers[i+1], addressOf(t, containers[i+1], "app"))
		if err != nil {
			t.Fatal(err)
		}
		probes = append(probes, p)
	}
	churn := startChurn(t, lab, "app")
	if err := lab.Underlay.Partition(t.Context(), lab.Hosts[:2], lab.Hosts[2:]); err != nil {
		t.Fatal(err)
	}
	// New endpoints in each half while they are apart.
	for i, h := range lab.Hosts {
		containers = append(containers, run(t, h, "new"+h.Name, "--network", "app"))
		if i%2 == 1 {
			reach(t, containers[i-1], addressOf(t, containers[len(containers)-1], "app").String())
		}
	}
	pause(t, cut)
	good, bad := churn.stop()
	for _, h := range lab.Hosts {
		removeOthers(t, h, "fix"+h.Name, "new"+h.Name)
	}
	if err := lab.Underlay.Heal(t.Context(), lab.Hosts...); err != nil {
		t.Fatal(err)
	}
	took := agree(t, lab, 8)
	lost := uint64(0)
	for _, p := range probes {
		lost += lossless(t, p).Lost
	}
	reach(t, containers[0], addressOf(t, containers[7], "app").String())
	reach(t, containers[3], addressOf(t, containers[4], "app").String())
	for _, h := range lab.Hosts {
		clean(t, h)
	}
	figure(t, "M1 half of four hosts cut off and healed", 1, "%s cut, %d packets lost inside the halves (target 0), all agree %s after the heal (target 10 s); churn %d ran, %d failed",
		cut, lost, took.Round(10*time.Millisecond), good, bad)
}

// TestHostMovesAndDies: a host that changes its address is followed, one that dies
// is shown as silent, one with another key is kept out and it is said.
func TestHostMovesAndDies(t *testing.T) {
	lab := newLab(t, 3, nil)
	install(t, lab, pluginDir(t, "", "partition"))
	createNetwork(t, lab, "app", 32)
	a, b, c := lab.Hosts[0], lab.Hosts[1], lab.Hosts[2]
	one, two := run(t, a, "one", "--network", "app"), run(t, b, "two", "--network", "app")
	address := addressOf(t, two, "app").String()
	reach(t, one, address)

	if _, err := b.Exec(t.Context(), "sh", "-ec", "ip -4 addr flush dev eth0; ip addr add 192.0.2.77/24 dev eth0; ip route add default via 192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, 60*time.Second, "host a follows b to its new address", func(ctx context.Context) error {
		out, err := a.Exec(ctx, "weft", "peers")
		if err == nil && !strings.Contains(out, "192.0.2.77") {
			err = fmt.Errorf("a sees %s", out)
		}
		if err == nil {
			_, err = one.Exec(ctx, "ping", "-c", "1", "-W", "1", address)
		}
		return err
	})
	figure(t, "M5 host changes its address", 1, "followed after %s (target 5 s)", took.Round(10*time.Millisecond))

	pid, err := c.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.KillDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	took = eventually(t, 60*time.Second, "host a sees that c is silent", func(ctx context.Context) error {
		out, err := a.Exec(ctx, "weft", "peers")
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "c ") && !strings.Contains(line, "alive") {
				return nil
			}
		}
		return fmt.Errorf("a sees %s %v", out, err)
	})
	figure(t, "M2 host dies", 1, "seen after %s", took.Round(10*time.Millisecond))
}

// TestWrongKeyIsKeptOut: with a key on one host and another on the other they do not
// meet, both keep working, and status says it.
func TestWrongKeyIsKeptOut(t *testing.T) {
	lab := newLab(t, 2, nil)
	dir := pluginDir(t, "", "partition")
	for i, h := range lab.Hosts {
		key := strings.Repeat(string(rune('A'+i)), 43) + "="
		if err := h.InstallPlugin(t.Context(), dir, "WEFT_JOIN=192.0.2.10,192.0.2.11", "WEFT_KEY="+key); err != nil {
			t.Fatal(err)
		}
	}
	createNetwork(t, lab, "app", 32)
	run(t, lab.Hosts[0], "one", "--network", "app")
	eventually(t, 30*time.Second, "status says that no other host is heard", func(ctx context.Context) error {
		out, err := lab.Hosts[0].Exec(ctx, "weft", "status")
		if !strings.Contains(out, "WEFT_KEY") || !strings.Contains(out, "0 alive") {
			return fmt.Errorf("it says %s %w", out, err)
		}
		return nil
	})
}
