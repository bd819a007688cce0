package tests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// ask sends one request to a socket of the plugin and returns the answer's body.
func ask(ctx context.Context, h *hosts.Host, socket, method, path string, body any) ([]byte, error) {
	pid, err := h.PluginParent(ctx, "")
	if err != nil {
		return nil, err
	}
	// The host's own path is too long for a socket's address.
	return askAt(ctx, fmt.Sprintf("/proc/%d/root/run/docker/plugins/%s", pid, socket), method, path, body)
}

// askAt sends one request to any Unix socket. A status of success (2xx) is one.
func askAt(ctx context.Context, socket, method, path string, body any) ([]byte, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	var text io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		text = bytes.NewReader(raw)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://weft"+path, text)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: status %d: %s", method, path, resp.StatusCode, raw)
	}
	return raw, err
}

// served waits until a plugin process other than old serves calls from its
// records, and returns how long that took.
func served(ctx context.Context, h *hosts.Host, old int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	start := time.Now()
	if _, err := h.WaitPlugin(ctx, old); err != nil {
		return 0, fmt.Errorf("host %s: %w", h.Name, err)
	}
	// Waits for the database inside the plugin.
	if _, err := ask(ctx, h, "weft-admin.sock", http.MethodGet, "/v1/networks", nil); err != nil {
		return 0, fmt.Errorf("host %s: %w", h.Name, err)
	}
	return time.Since(start), nil
}

// metric reads one number without labels from the plugin's metrics.
func metric(t *testing.T, h *hosts.Host, name string) float64 {
	t.Helper()
	raw, err := ask(t.Context(), h, "weft-admin.sock", http.MethodGet, "/metrics", nil)
	if err != nil {
		t.Fatalf("host %s: %v", h.Name, err)
	}
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("host %s: no metric %s", h.Name, name)
	return 0
}

// settled is clean for a test build after crashes: what the audits inside the
// plugin are to find gets found, by setting their clock ahead of their grace
// times. It reports whether that was needed, and may run beside the test's own
// goroutine.
func settled(t *testing.T, h *hosts.Host) bool {
	t.Helper()
	out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "3s")
	if err == nil {
		return false
	}
	t.Logf("host %s: for the slow audits: %s", h.Name, out)
	if err := leap(t.Context(), h); err != nil {
		t.Error(err)
		return true
	}
	if out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "20s"); err != nil {
		t.Errorf("host %s: %v\n%s", h.Name, err, out)
	}
	return true
}

// leap sets the audits' clock ahead by half an hour more, once they have looked.
func leap(ctx context.Context, h *hosts.Host) error {
	state, err := h.StateDir(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(state, "ahead")
	ahead := time.Duration(0)
	if raw, err := os.ReadFile(file); err == nil {
		if ahead, err = time.ParseDuration(string(raw)); err != nil {
			return err
		}
	}
	// They look each second; what is leaked must have been seen once.
	wait(ctx, 2500*time.Millisecond)
	return os.WriteFile(file, []byte((ahead + 30*time.Minute).String()), 0o600)
}

// pause lets time pass where there is no state to wait for: between random kills,
// or for a clock.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	wait(t.Context(), d)
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// inventory reads what a host holds once that has come to rest: the kernel gives a
// new link its IPv6 routes seconds later.
func inventory(t *testing.T, h *hosts.Host) hosts.Inventory {
	t.Helper()
	return inventories(t, h)[0]
}

// inventories is inventory for several hosts.
func inventories(t *testing.T, all ...*hosts.Host) []hosts.Inventory {
	t.Helper()
	found := make([]hosts.Inventory, len(all))
	eventually(t, 60*time.Second, "the hosts come to rest", func(ctx context.Context) error {
		var changes error
		for i, h := range all {
			last := found[i]
			var err error
			if found[i], err = h.TakeInventory(ctx); err != nil {
				return err
			}
			if diff := last.Diff(found[i]); last == nil || diff != "" {
				changes = fmt.Errorf("host %s still changes:\n%s", h.Name, diff)
			}
		}
		if changes != nil {
			wait(ctx, 2*time.Second)
		}
		return changes
	})
	return found
}

// unleaked waits until the host holds what it held before, apart from the kinds
// named. The names under /run/docker/netns are left out: Docker removes them a
// minute after their namespaces, and a living one is also a mount. The plugin may
// hold fewer files than before: its streams to peers come and go.
func unleaked(t *testing.T, h *hosts.Host, before hosts.Inventory, except ...string) {
	t.Helper()
	var last error
	eventually(t, 20*time.Second, "host "+h.Name+" holds what it held before", func(ctx context.Context) error {
		after, err := h.TakeInventory(ctx)
		if err != nil {
			return errors.Join(last, err)
		}
		for _, kind := range append(except, "namespace") {
			after[kind] = before[kind]
		}
		if len(after["plugin file"]) <= len(before["plugin file"]) {
			after["plugin file"] = before["plugin file"]
		}
		if diff := before.Diff(after); diff != "" {
			last = fmt.Errorf("it differs:\n%s", diff)
			return last
		}
		return nil
	})
}

// probePair starts a container on each of the first two hosts and a probe between
// them.
func probePair(t *testing.T, lab *hosts.Lab, network string) (*hosts.Probe, hosts.Container, hosts.Container) {
	t.Helper()
	from, to := run(t, lab.Hosts[0], "from", "--network", network), run(t, lab.Hosts[1], "to", "--network", network)
	address := addressOf(t, to, network)
	reach(t, from, address.String())
	reach(t, to, addressOf(t, from, network).String())
	return startProbe(t, from, to, address), from, to
}

func startProbe(t *testing.T, from, to hosts.Container, address netip.Addr) *hosts.Probe {
	t.Helper()
	p, err := hosts.StartProbe(t.Context(), from, to, address)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func addressOf(t *testing.T, c hosts.Container, network string) netip.Addr {
	t.Helper()
	a, err := c.Address(t.Context(), network)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// lossless stops the probe and fails the test unless everything arrived.
func lossless(t *testing.T, p *hosts.Probe) hosts.Report {
	t.Helper()
	r, err := p.Stop()
	t.Logf("probe: %s", r)
	if err != nil {
		t.Errorf("the probe lost something: %v", err)
	}
	return r
}

// percentile returns the p-th of a hundred parts of the durations.
func percentile(all []time.Duration, p int) time.Duration {
	if len(all) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(all))
	return s[min(len(s)-1, len(s)*p/100)].Round(time.Millisecond)
}
