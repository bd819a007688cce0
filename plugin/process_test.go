package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// startTime is how long a start may take here; the promise is 500 ms, and the
// tests print what it was.
const startTime = 5 * time.Second

// plugin is a running process in the network namespace of its test.
type plugin struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
	log *syncBuffer
}

// buildPlugin builds the program as it is shipped: without cgo.
func buildPlugin(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "weft")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// start starts the program on the folder dir and waits until it serves Docker's
// first call.
func start(t *testing.T, program, dir string, env ...string) *plugin {
	t.Helper()
	p := &plugin{t: t, dir: dir, log: &syncBuffer{}}
	p.cmd = exec.Command(program, "plugin", "--run-dir", filepath.Join(dir, "run"), "--state-dir", filepath.Join(dir, "state"), "--sysnet", "/proc/sys/net")
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	begun := time.Now()
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.stop(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("log of the plugin:\n%s", p.log)
		}
	})
	p.await("the first answer", func() bool {
		_, err := getUnix(t.Context(), filepath.Join(dir, "run", adminSocket), "/v1/version", time.Second)
		return err == nil
	})
	t.Logf("listens after %s", time.Since(begun).Round(time.Millisecond))
	return p
}

// stop sends a signal and waits for the end.
func (p *plugin) stop(sig syscall.Signal) error {
	if p.cmd.ProcessState != nil {
		return nil
	}
	_ = p.cmd.Process.Signal(sig) // may have ended
	return p.cmd.Wait()
}

// child returns the process that does the work.
func (p *plugin) child() int {
	p.t.Helper()
	return kerneltest.Child(p.t, p.cmd.Process.Pid)
}

func (p *plugin) await(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(startTime + retryAfter); !ok(); {
		if time.Now().After(deadline) {
			p.t.Fatalf("no %s\n%s", what, p.log)
		}
		select {
		case <-p.t.Context().Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// call posts to Docker's socket and returns Err.
func (p *plugin) call(method, body string) string {
	p.t.Helper()
	s := testServer{socket: filepath.Join(p.dir, "run", dockerSocket)}
	_, answer := s.call(p.t, method, strings.NewReader(body))
	var reply errorReply
	if err := json.Unmarshal([]byte(answer), &reply); err != nil {
		p.t.Fatalf("%s answered %q: %v", method, answer, err)
	}
	return reply.Err
}

// weft runs the command against the plugin.
func (p *plugin) weft(args ...string) (text string, status int) {
	p.t.Helper()
	var out bytes.Buffer
	status = dispatch(p.t.Context(), append([]string{"weft"}, append(args, "--socket", filepath.Join(p.dir, "run", adminSocket))...), &out, &out)
	return out.String(), status
}

func (p *plugin) mustCall(method, body string) {
	p.t.Helper()
	if text := p.call(method, body); text != "" {
		p.t.Fatalf("%s: %s", method, text)
	}
}

func (p *plugin) makeNetwork() {
	p.t.Helper()
	p.mustCall("NetworkDriver.CreateNetwork", `{"NetworkID":"`+testNetwork+`","IPv4Data":[{"AddressSpace":"x","Pool":"10.99.0.0/24","Gateway":"10.99.0.1/24"}],"IPv6Data":[],"Options":{}}`)
	p.mustCall("NetworkDriver.CreateEndpoint", `{"NetworkID":"`+testNetwork+`","EndpointID":"`+testEndpoint+`","Interface":{"Address":"10.99.0.5/24"}}`)
}

// mustAgree fails unless records and kernel are the same within a few seconds.
func (p *plugin) mustAgree() {
	p.t.Helper()
	if text, status := p.weft("audit", "--docker=false", "--settle", "5s"); status != exitFine {
		p.t.Fatalf("audit: %s", text)
	}
}

// TestProcess runs the program as Docker does, in network namespaces of its own.
func TestProcess(t *testing.T) {
	kerneltest.Need(t, "root", os.Geteuid() == 0, "needs root to make network namespaces")
	program := buildPlugin(t)
	for _, c := range []struct {
		name string
		run  func(*testing.T, string)
	}{
		{"keeps four capabilities", keepsFourCapabilities},
		{"rebuilds a damaged database", rebuildsADamagedDatabase},
		{"survives what it cannot open", survivesWhatItCannotOpen},
		{"serves with wrong settings", servesWithWrongSettings},
		{"works without gossip", worksWithoutGossip},
		{"outlives its child", outlivesItsChild},
		{"takes its child along", takesItsChildAlong},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, program) })
	}
}

func keepsFourCapabilities(t *testing.T, program string) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			kerneltest.Netns(t)
			kerneltest.MakeUnderlay(t)
			kerneltest.Run(t, "ip", "route", "add", "default", "via", "192.0.2.254")
			p := start(t, program, t.TempDir(), "WEFT_IPTABLES="+backend)
			checkCapabilities(t, p.cmd.Process.Pid)
			checkCapabilities(t, p.child())
			// They suffice for links, sets and, in a child process, for rules.
			p.makeNetwork()
			p.mustAgree()
			if rules := kerneltest.Run(t, "iptables-"+backend, "-t", "raw", "-S"); !strings.Contains(rules, "--match-set weft-peers4 src") {
				t.Errorf("rules are\n%s", rules)
			}
			// A stopped plugin leaves everything, the next takes it over.
			if err := p.stop(syscall.SIGTERM); err != nil {
				t.Errorf("ended with %v", err)
			}
			before := kerneltest.Run(t, "ip", "-o", "link")
			p = start(t, program, p.dir, "WEFT_IPTABLES="+backend)
			p.mustAgree()
			if after := kerneltest.Run(t, "ip", "-o", "link"); after != before {
				t.Errorf("links changed from\n%s to\n%s", before, after)
			}
			p.mustCall("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+testNetwork+`"}`)
			p.mustAgree()
			if links := kerneltest.Run(t, "ip", "-o", "link"); strings.Contains(links, "weft") {
				t.Errorf("left behind:\n%s", links)
			}
		})
	}
}

// checkCapabilities reads the sets of every thread: 0x3400 is NET_ADMIN, NET_RAW and
// NET_BIND_SERVICE, 1<<39 is BPF.
func checkCapabilities(t *testing.T, pid int) {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	want := map[string]string{"CapInh": "0000000000000000", "CapPrm": "0000008000003400", "CapEff": "0000008000003400",
		"CapBnd": "0000008000003400", "CapAmb": "0000000000000000", "NoNewPrivs": "1"}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(raw)) {
			if name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t"); want[name] != "" && value != want[name] {
				t.Errorf("%s: %s is %s, want %s", path, name, value, want[name])
			}
		}
	}
}

func rebuildsADamagedDatabase(t *testing.T, program string) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	kerneltest.Run(t, "ip", "route", "add", "default", "via", "192.0.2.254")
	p := start(t, program, t.TempDir())
	p.makeNetwork()
	p.mustAgree()
	before := kerneltest.Run(t, "ip", "-o", "link")
	_ = p.stop(syscall.SIGKILL)
	if err := os.WriteFile(filepath.Join(p.dir, "state", databaseFile), bytes.Repeat([]byte("damage"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	p = start(t, program, p.dir)
	p.mustAgree()
	if after := kerneltest.Run(t, "ip", "-o", "link"); after != before {
		t.Errorf("links changed from\n%s to\n%s", before, after)
	}
	if text, status := p.weft("status"); status != exitProblem || !strings.Contains(text, "rebuilt from the kernel: 1 networks, 1 endpoints") {
		t.Errorf("status %d:\n%s", status, text)
	}
	kept, _ := filepath.Glob(filepath.Join(p.dir, "state", databaseFile+".bad-*"))
	if len(kept) != 1 {
		t.Errorf("damaged files: %v", kept)
	}
	// Said until the next start, and not rebuilt again from then on.
	_ = p.stop(syscall.SIGTERM)
	p = start(t, program, p.dir)
	p.mustAgree()
	if text, status := p.weft("status"); status != exitFine {
		t.Errorf("status %d:\n%s", status, text)
	}
	p.mustCall("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+testNetwork+`"}`)
	p.mustAgree()
	if links := kerneltest.Run(t, "ip", "-o", "link"); strings.Contains(links, "weft") {
		t.Errorf("left behind:\n%s", links)
	}
}

func survivesWhatItCannotOpen(t *testing.T, program string) {
	kerneltest.Netns(t)
	dir := t.TempDir()
	database := filepath.Join(dir, "state", databaseFile)
	if err := os.MkdirAll(database, 0o700); err != nil {
		t.Fatal(err)
	}
	p := start(t, program, dir)
	p.await("answer with the reason", func() bool {
		return strings.Contains(p.call("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+testNetwork+`"}`), "is not a regular file")
	})
	if text, status := p.weft("status"); status != exitProblem || !strings.Contains(text, "every call of Docker is refused") {
		t.Errorf("status %d:\n%s", status, text)
	}
	if err := os.Remove(database); err != nil {
		t.Fatal(err)
	}
	p.await("recovery", func() bool { return p.call("NetworkDriver.DeleteNetwork", `{"NetworkID":"`+testNetwork+`"}`) == "" })
	if n := strings.Count(p.log.String(), "does not work; trying again"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

func servesWithWrongSettings(t *testing.T, program string) {
	kerneltest.Netns(t)
	p := start(t, program, t.TempDir(), "WEFT_PORT=many", "WEFT_IPTABLES=yes")
	text := p.call("NetworkDriver.CreateNetwork", `{"NetworkID":"`+testNetwork+`"}`)
	if !strings.Contains(text, `WEFT_PORT="many"`) || !strings.Contains(text, `WEFT_IPTABLES="yes"`) {
		t.Errorf("answered %q", text)
	}
	if text, status := p.weft("status"); status != exitProblem || !strings.Contains(text, "WEFT_PORT") {
		t.Errorf("status %d:\n%s", status, text)
	}
	if err := p.stop(syscall.SIGTERM); err != nil {
		t.Errorf("ended with %v", err)
	}
}

// Gossip that cannot start (its port is taken) must not stop this host's networks.
func worksWithoutGossip(t *testing.T, program string) {
	kerneltest.Netns(t)
	kerneltest.MakeUnderlay(t)
	kerneltest.Run(t, "ip", "route", "add", "default", "via", "192.0.2.254")
	squatter, err := net.Listen("tcp", ":4796") // on this thread, so in its namespace
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	p := start(t, program, t.TempDir(), "WEFT_JOIN=192.0.2.9", "WEFT_KEY="+testKey)
	p.makeNetwork()
	p.await("complaint", func() bool {
		text, status := p.weft("status")
		return status == exitProblem && strings.Contains(text, "other hosts are not heard: gossip: ") && strings.Contains(text, "address already in use")
	})
	p.mustAgree()
	if strings.Contains(p.log.String(), testKey) {
		t.Error("the key is in the log")
	}
}
