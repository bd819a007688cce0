package sim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// The two ends of layer C's cable. The peers are behind a router, as in a cloud:
// a thousand of them on one link would also fill the kernel's table of neighbours
// (net.ipv4.neigh.default.gc_thresh3 is 1,024).
const (
	pluginAddress = "10.199.0.2"
	routerAddress = "10.199.0.1"
	firstPeer     = "10.200.0.1"
	peersRange    = "10.200.0.0/16"
	clusterKey    = "0707070707070707070707070707070707070707070707070707070707070707"
	settleMost    = 5 * time.Minute
)

// TestOneHostOfMany (layer C) runs the built plugin in a network namespace, with a
// cluster replayed by store/gossip: real members and record streams. It prints how
// long it takes and what it costs, and fails if the kernel holds anything wrong.
func TestOneHostOfMany(t *testing.T) {
	kerneltest.Need(t, "root", os.Geteuid() == 0, "needs root to make network namespaces")
	peers, networks, perNetwork, busy := 20, 4, 5, 3
	if os.Getenv("WEFT_SIM") != "" {
		peers, networks, perNetwork, busy = 1000, 10, 5, 20
	}
	endpoints := peers * networks * perNetwork
	dir := t.TempDir()
	program, player := filepath.Join(dir, "weft"), filepath.Join(dir, "gossip.test")
	build(t, "build", "-o", program, "../../plugin")
	build(t, "test", "-c", "-o", player, "../../store/gossip")

	kerneltest.Netns(t)
	r := startReplay(t, player, fmt.Sprintf("%d %d %d %s %s 4796 4797", peers, networks, perNetwork, firstPeer, pluginAddress))
	h := &onePlugin{t: t, program: program, dir: dir}
	h.start()
	for k := range networks {
		h.call("NetworkDriver.CreateNetwork", fmt.Sprintf(`{"NetworkID":"%064x","IPv4Data":[{"AddressSpace":"x","Pool":"10.%d.0.0/16","Gateway":"10.%d.0.1/16"}],
			"IPv6Data":[],"Options":{"com.docker.network.generic":{"vni":"%d"}}}`, k+1, 100+k, 100+k, 7001+k))
	}
	figure(t, "layer C: peers and endpoints", "%d and %d in %d networks", peers, endpoints, networks)

	begun, cpu := time.Now(), h.cpu()
	r.connect()
	h.awaitEndpoints(endpoints)
	figure(t, "layer C: first program of all remote state from nothing", "%.1f s, %.1f s of processor, %d passes", time.Since(begun).Seconds(), h.cpu()-cpu, h.status().Loop.Passes)
	h.mustAgree()
	figure(t, "layer C: memory", "%d MB, %d MB at most", h.memory("VmRSS"), h.memory("VmHWM"))

	pause(t, 5*time.Second)
	cpu, begun = h.cpu(), time.Now()
	pause(t, time.Duration(busy)*3*time.Second)
	figure(t, "layer C: CPU of one core, quiet", "%.1f %%", 100*(h.cpu()-cpu)/time.Since(begun).Seconds())

	cpu, begun = h.cpu(), time.Now()
	r.change(100, busy)
	took := time.Since(begun).Seconds()
	endpoints += 100 * busy
	h.awaitEndpoints(endpoints)
	figure(t, "layer C: CPU of one core, 100 changes/s", "%.1f %%, all known %.2f s after the last", 100*(h.cpu()-cpu)/time.Since(begun).Seconds(), time.Since(begun).Seconds()-took)
	h.mustAgree()
	figure(t, "layer C: memory after changes", "%d MB, %d MB at most", h.memory("VmRSS"), h.memory("VmHWM"))

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		h.stop(sig)
		begun = time.Now()
		h.start()
		answers := time.Since(begun)
		h.call("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+strings.Repeat("f", 64)+`"}`)
		serves := time.Since(begun)
		h.awaitPeers(peers)
		synced, cpu := time.Since(begun), h.cpu()
		h.mustAgree()
		st := h.status()
		figure(t, fmt.Sprintf("layer C: restart after %v", sig), "listens %.2f s, serves %.2f s, in sync with all peers %.1f s, %.1f s of processor, %d changes to the kernel",
			answers.Seconds(), serves.Seconds(), synced.Seconds(), cpu, st.Loop.Ops)
		if n := h.remote(); n != endpoints {
			t.Errorf("%d endpoints in the kernel after the restart, want %d", n, endpoints)
		}
	}
	figure(t, "layer C: memory after the restarts", "%d MB, %d MB at most", h.memory("VmRSS"), h.memory("VmHWM"))
	h.stop(syscall.SIGTERM)
}

func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// figure prints one line for the table of docs/benchmarks.md.
func figure(t *testing.T, name, format string, args ...any) {
	t.Helper()
	t.Logf("SCALE %s | %s", name, fmt.Sprintf(format, args...))
}

// pause waits while the plugin is measured.
func pause(t *testing.T, d time.Duration) {
	select {
	case <-t.Context().Done():
	case <-time.After(d):
	}
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() (bool, string)) {
	t.Helper()
	for end := time.Now().Add(settleMost); ; pause(t, 300*time.Millisecond) {
		good, text := ok()
		if good {
			return
		}
		if time.Now().After(end) || t.Context().Err() != nil {
			t.Fatalf("%s: not within %v: %s", what, settleMost, text)
		}
	}
}

// replay is the process of the peers, in a namespace of its own.
type replay struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

func startReplay(t *testing.T, program, shape string) *replay {
	t.Helper()
	// It binds its addresses at once, so they must be there first: a shell waits
	// for the word.
	r := &replay{t: t, lines: make(chan string, 16)}
	r.cmd = exec.Command("sh", "-c", `read go; exec "$0" -test.run '^TestReplay$' -test.timeout 0`, program)
	r.cmd.Env = append(os.Environ(), "WEFT_REPLAY="+shape)
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	var err error
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = os.Stderr
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = r.in.Close()
		for range r.lines { // until it ends
		}
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("the replayed peers: %v", err)
		}
	})
	go func() {
		defer close(r.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			if strings.HasPrefix(s.Text(), "replay: ") {
				r.lines <- s.Text()
			} else if s.Text() != "PASS" {
				fmt.Fprintln(os.Stderr, s.Text())
			}
		}
	}()
	pid := strconv.Itoa(r.cmd.Process.Pid)
	kerneltest.Script(t, `
		ip link add under0 type veth peer name under1
		ip link set under1 netns `+pid+`
		ip addr add `+pluginAddress+`/24 dev under0
		ip link set under0 up
		ip route add default via `+routerAddress+`
		nsenter -t `+pid+` -n ip link set lo up
		nsenter -t `+pid+` -n ip addr add `+routerAddress+`/24 dev under1
		nsenter -t `+pid+` -n ip route add local `+peersRange+` dev lo
		nsenter -t `+pid+` -n ip link set under1 up
	`)
	// Until connect, the peers reach nobody.
	kerneltest.Run(t, "ip", "route", "add", "blackhole", peersRange)
	fmt.Fprintln(r.in, "go")
	r.await("replay: ready")
	return r
}

func (r *replay) await(want string) {
	r.t.Helper()
	select {
	case got := <-r.lines:
		if got != want {
			r.t.Fatalf("the replayed peers say %q, want %q", got, want)
		}
	case <-time.After(settleMost):
		r.t.Fatalf("the replayed peers do not say %q", want)
	}
}

// connect lets peers and plugin reach each other.
func (r *replay) connect() { kerneltest.Run(r.t, "ip", "route", "del", "blackhole", peersRange) }

// change makes so many new endpoints a second, for so long.
func (r *replay) change(perSecond, seconds int) {
	r.t.Helper()
	fmt.Fprintln(r.in, perSecond, seconds)
	r.await("replay: done")
}

// onePlugin is the built plugin in the namespace of the test.
type onePlugin struct {
	t       *testing.T
	program string
	dir     string
	cmd     *exec.Cmd
	log     *os.File
}

func (h *onePlugin) start() {
	h.t.Helper()
	var err error
	if h.log, err = os.OpenFile(filepath.Join(h.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.cmd = exec.Command(h.program, "plugin", "--run-dir", filepath.Join(h.dir, "run"), "--state-dir", filepath.Join(h.dir, "state"), "--sysnet", "/proc/sys/net")
	h.cmd.Env = append(os.Environ(), "WEFT_KEY="+clusterKey, "WEFT_JOIN="+firstPeer)
	h.cmd.Stdout, h.cmd.Stderr = h.log, h.log
	if err := h.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	cmd := h.cmd
	h.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // killed
		}
		if h.t.Failed() {
			raw, _ := os.ReadFile(filepath.Join(h.dir, "log"))
			h.t.Logf("end of the plugin's log:\n%s", raw[max(0, len(raw)-4000):])
		}
	})
	eventually(h.t, "the plugin listens", func() (bool, string) {
		_, err := h.get("/v1/version")
		return err == nil, fmt.Sprint(err)
	})
}

func (h *onePlugin) stop(sig syscall.Signal) {
	h.t.Helper()
	_ = h.cmd.Process.Signal(sig) // it lives
	_ = h.cmd.Wait()              // killed is an error
	_ = h.log.Close()
}

func (h *onePlugin) client(socket string) *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(h.dir, "run", socket))
		}}}
}

func (h *onePlugin) get(path string) ([]byte, error) {
	resp, err := h.client("weft-admin.sock").Get("http://weft" + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

// call makes a call of Docker's that must succeed.
func (h *onePlugin) call(method, body string) {
	h.t.Helper()
	resp, err := h.client("weft.sock").Post("http://weft/"+method, "application/json", strings.NewReader(body))
	if err != nil {
		h.t.Fatalf("%s: %v", method, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || bytes.Contains(raw, []byte(`"Err":"`)) && !bytes.Contains(raw, []byte(`"Err":""`)) {
		h.t.Fatalf("%s: %s: %s (%v)", method, resp.Status, raw, err)
	}
}

type status struct {
	Records struct{ Remote, PeersAlive int }
	Loop    struct{ Passes, Ops uint64 }
}

func (h *onePlugin) status() (s status) {
	h.t.Helper()
	raw, err := h.get("/v1/status")
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err != nil {
		h.t.Fatalf("status: %v", err)
	}
	return s
}

// remote counts the forwarding entries of peers' endpoints in the kernel; those of
// the floods have no address of their own.
func (h *onePlugin) remote() (n int) {
	h.t.Helper()
	for line := range strings.Lines(kerneltest.Run(h.t, "bridge", "fdb", "show")) {
		if strings.Contains(line, " dst 10.200.") && !strings.HasPrefix(line, "00:00:00:00:00:00 ") {
			n++
		}
	}
	return n
}

func (h *onePlugin) awaitEndpoints(want int) {
	h.t.Helper()
	eventually(h.t, "the kernel holds all endpoints", func() (bool, string) {
		if got := h.status().Records.Remote; got < want { // cheaper than the kernel's list
			return false, fmt.Sprintf("%d records of %d", got, want)
		}
		got := h.remote()
		return got == want, fmt.Sprintf("%d of %d", got, want)
	})
}

// awaitPeers waits until every peer is alive and its records are compared.
func (h *onePlugin) awaitPeers(want int) {
	h.t.Helper()
	eventually(h.t, "all peers are in sync", func() (bool, string) {
		var peers []struct {
			Alive, InSync bool
			LastErr       string
		}
		raw, err := h.get("/v1/peers")
		if err == nil {
			err = json.Unmarshal(raw, &peers)
		}
		synced, alive, last := 0, 0, ""
		for _, p := range peers {
			if p.InSync {
				synced++
			} else if p.LastErr != "" {
				last = p.LastErr
			}
			if p.Alive {
				alive++
			}
		}
		return synced == want, fmt.Sprintf("%d of %d, %d are alive, the last error is %q (%v)", synced, want, alive, last, err)
	})
}

// mustAgree fails unless records and kernel are the same.
func (h *onePlugin) mustAgree() {
	h.t.Helper()
	out, err := exec.Command(h.program, "audit", "--docker=false", "--settle", "60s", "--socket", filepath.Join(h.dir, "run", "weft-admin.sock")).CombinedOutput()
	if err != nil {
		h.t.Errorf("audit: %v\n%.2000s", err, out)
	}
}

// child is the plugin's process that works.
func (h *onePlugin) child() int {
	h.t.Helper()
	return kerneltest.Child(h.t, h.cmd.Process.Pid)
}

// cpu is the processor time of the plugin and its children, in seconds.
func (h *onePlugin) cpu() float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.child()))
	if err != nil {
		h.t.Fatal(err)
	}
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	sum := 0.0
	for _, field := range f[11:15] { // utime stime cutime cstime, proc(5)
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			h.t.Fatal(err)
		}
		sum += n / 100 // USER_HZ
	}
	return sum
}

// memory is a line of the plugin's /proc/PID/status, in MB.
func (h *onePlugin) memory(name string) int {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.child()))
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				h.t.Fatal(err)
			}
			return kb / 1024
		}
	}
	h.t.Fatalf("no %s", name)
	return 0
}
