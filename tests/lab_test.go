package tests

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// soak says whether the full numbers run (make soak) or the short forms.
func soak() bool { return os.Getenv("WEFT_SOAK") == "1" }

// figure prints one line of the scorecard: name, runs, figure, target.
func figure(t *testing.T, name string, runs int, format string, args ...any) {
	t.Helper()
	t.Logf("SCORE %s | runs %d | %s", name, runs, fmt.Sprintf(format, args...))
}

var plugins struct {
	sync.Mutex
	dirs map[string]string
}

// pluginDir builds the plugin's folder once per tag set, as make plugin does, and
// returns it. Tags are build tags such as "failpoint"; version is what the plugin
// says of itself.
func pluginDir(t *testing.T, tags, version string) string {
	t.Helper()
	if built := os.Getenv(guestPlugin); built != "" && tags == "" && version == "test" {
		return built
	}
	plugins.Lock()
	defer plugins.Unlock()
	key := tags + " " + version
	if dir, ok := plugins.dirs[key]; ok {
		return dir
	}
	dir := filepath.Join(tempDir, fmt.Sprintf("plugin%d", len(plugins.dirs)))
	cmd := exec.Command("make", "-s", "-C", "..", "plugin", "PLUGIN="+dir, "TAGS="+tags, "VERSION="+version)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make plugin: %v\n%s", err, out)
	}
	if plugins.dirs == nil {
		plugins.dirs = map[string]string{}
	}
	plugins.dirs[key] = dir
	return dir
}

// tempDir holds what the tests build; TestMain removes it.
var tempDir string

// interrupted ends with Ctrl-C; labs then close themselves, and TestMain waits for
// them.
var (
	interrupted context.Context
	labs        sync.WaitGroup
)

func TestMain(m *testing.M) {
	if docker := os.Getenv(guestVariable); docker != "" {
		fmt.Fprintln(os.Stderr, insideGuest(docker))
		os.Exit(1)
	}
	if file := os.Getenv(liarVariable); file != "" {
		fmt.Fprintln(os.Stderr, lie(file))
		os.Exit(1)
	}
	var err error
	var stop context.CancelFunc
	interrupted, stop = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	go func() {
		<-interrupted.Done()
		labs.Wait()
		_ = os.RemoveAll(tempDir)
		os.Exit(130)
	}()
	if tempDir, err = os.MkdirTemp("", "weft-tests-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(tempDir)
	os.Exit(code)
}

// engines are the two generations that install, connect, publish and restart
// scenarios run on.
func engines(t *testing.T) map[string]hosts.Engine {
	t.Helper()
	hosts.Require(t, "root", "docker", "engine")
	newest, err := hosts.Newest()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]hosts.Engine{"debian": hosts.Debian(), "newest": newest}
}

// newLab makes hosts a, b, … and removes them when the test ends. After a failure
// the ends of the dockerds' logs are shown.
func newLab(t *testing.T, n int, change func(i int, o *hosts.HostOptions)) *hosts.Lab {
	t.Helper()
	return newLabMTU(t, 0, n, change)
}

// newLabMTU is newLab on an underlay with another MTU; 0 means 1500.
func newLabMTU(t *testing.T, mtu, n int, change func(i int, o *hosts.HostOptions)) *hosts.Lab {
	t.Helper()
	hosts.Require(t, "root", "docker")
	o := hosts.Options{Logf: t.Logf, MTU: mtu}
	for i := range n {
		h := hosts.HostOptions{Name: string(rune('a' + i))}
		if change != nil {
			change(i, &h)
		}
		o.Hosts = append(o.Hosts, h)
	}
	// The lab outlives the test's context, which ends before its clean-up.
	labs.Add(1)
	lab, err := hosts.New(interrupted, o)
	if err != nil {
		labs.Done()
		t.Fatal(err)
	}
	go func() {
		<-interrupted.Done()
		_ = lab.Close() // again, or wait for the one that runs
		labs.Done()
	}()
	t.Cleanup(func() {
		if t.Failed() {
			for _, h := range lab.Hosts {
				t.Logf("end of %s's log:\n%s", h.Name, logEnd(h, 40))
			}
		}
		if err := lab.Close(); err != nil {
			t.Errorf("the lab was not removed: %v", err)
		}
	})
	return lab
}

func logEnd(h *hosts.Host, lines int) string {
	raw, err := os.ReadFile(h.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// install puts the plugin on every host, each joined to all.
func install(t *testing.T, lab *hosts.Lab, dir string, settings ...string) {
	t.Helper()
	join := make([]string, 0, len(lab.Hosts))
	for _, h := range lab.Hosts {
		at := h.Address
		if h.Public.IsValid() {
			at = h.Public
		}
		join = append(join, netip.AddrPortFrom(at, h.Port).String())
	}
	var wait sync.WaitGroup
	errs := make([]error, len(lab.Hosts))
	for i, h := range lab.Hosts {
		wait.Go(func() {
			own := append([]string{"WEFT_JOIN=" + strings.Join(join, ",")}, settings...)
			if h.Public.IsValid() {
				own = append(own, "WEFT_PUBLIC_ADDRESS="+h.Public.String(), fmt.Sprintf("WEFT_PORT=%d", h.Port),
					fmt.Sprintf("WEFT_DATA_PORT=%d", h.Port+1), fmt.Sprintf("WEFT_WIREGUARD_PORT=%d", h.Port+2))
			}
			errs[i] = h.InstallPlugin(t.Context(), dir, own...)
		})
	}
	wait.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("host %s: %v", lab.Hosts[i].Name, err)
		}
	}
}

// createNetwork makes one network on every host: the subnet 10.<second>.0.0/16, of
// which host i gives out 10.<second>.<i+1>.0/24.
func createNetwork(t *testing.T, lab *hosts.Lab, name string, second int, args ...string) {
	t.Helper()
	for i, h := range lab.Hosts {
		docker(t, h, append([]string{"network", "create", "-d", hosts.PluginName,
			"--subnet", fmt.Sprintf("10.%d.0.0/16", second), "--ip-range", fmt.Sprintf("10.%d.%d.0/24", second, i+1)}, append(args, name)...)...)
	}
}

func docker(t *testing.T, h *hosts.Host, args ...string) string {
	t.Helper()
	out, err := h.Docker(t.Context(), args...)
	if err != nil {
		t.Fatalf("host %s: %v", h.Name, err)
	}
	return strings.TrimSpace(out)
}

func run(t *testing.T, h *hosts.Host, name string, args ...string) hosts.Container {
	t.Helper()
	c, err := h.Run(t.Context(), name, args...)
	if err != nil {
		t.Fatalf("host %s: %v", h.Name, err)
	}
	return c
}

// eventually waits until ok returns nil, and fails the test when d is over (in a guest
// some times that). It returns how long it took.
func eventually(t *testing.T, d time.Duration, what string, ok func(context.Context) error) time.Duration {
	t.Helper()
	start := time.Now()
	d = hosts.Patience(d)
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for {
		err := ok(ctx)
		if err == nil {
			return time.Since(start)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v: %v", what, d, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reach waits until one container answers the other's ping.
func reach(t *testing.T, from hosts.Container, address string) {
	t.Helper()
	reachWithin(t, 20*time.Second, from, address)
}

// reachWithin is reach with another limit than 20 seconds; address may be a name.
func reachWithin(t *testing.T, d time.Duration, from hosts.Container, address string) {
	t.Helper()
	eventually(t, d, from.Name+" reaches "+address, func(ctx context.Context) error {
		_, err := from.Exec(ctx, "ping", "-c", "1", "-W", "1", address)
		return err
	})
}

// clean fails unless weft audit finds no difference between Docker, records and
// kernel on the host.
func clean(t *testing.T, h *hosts.Host) {
	t.Helper()
	if out, err := h.Exec(t.Context(), "weft", "audit", "--settle", "15s"); err != nil {
		t.Errorf("host %s: %v\n%s", h.Name, err, out)
	}
}
