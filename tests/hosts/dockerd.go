package hosts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Engine is a dockerd with its containerd and runc.
type Engine struct {
	Name string // for messages
	Dir  string // folder of its programs; empty for the machine's PATH
}

// Debian is the engine that is installed on the machine.
func Debian() Engine { return Engine{Name: "debian"} }

// Newest is the engine that tests/engine.sh builds, in $WEFT_ENGINE_DIR or the
// user's cache. The error says how to get it.
func Newest() (Engine, error) {
	dir, err := builtDir()
	if err != nil {
		return Engine{}, err
	}
	for _, p := range []string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc", composeProgram} {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			return Engine{}, fmt.Errorf("newest engine: %w; run tests/engine.sh, or set WEFT_ENGINE_DIR", err)
		}
	}
	return Engine{Name: "newest", Dir: dir}, nil
}

// builtDir is where tests/engine.sh puts what it builds.
func builtDir() (string, error) {
	if dir := os.Getenv("WEFT_ENGINE_DIR"); dir != "" {
		return dir, nil
	}
	cache, err := os.UserCacheDir()
	return filepath.Join(cache, "weft", "engine", "bin"), err
}

// daemon is a running dockerd. Its goroutine waits for the process and closes
// done; err is valid after that.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

const dockerdTimeout = 60 * time.Second

// offline makes a task of a Swarm start from the image that the host has. Otherwise
// Swarm first tries a registry, which nobody answers: measured, six tasks then take
// 31 to 52 s to start instead of 2 to 4 s.
const offline = "DOCKER_SERVICE_PREFER_OFFLINE_IMAGE=1"

// StartDockerd starts dockerd and waits until it answers.
func (h *Host) StartDockerd(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.daemon != nil {
		return fmt.Errorf("host %s: dockerd runs already, or the lab is closed", h.Name)
	}
	procs, err := makeCgroup(h.cgroup() + "/engine")
	if err != nil {
		return err
	}
	logFile, err := os.OpenFile(h.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = logFile.Close() }()

	// In the lab's cgroup, so that everything dockerd starts can be found.
	args := append([]string{"-c", `while [ "$1" != -- ]; do echo $$ >"$1"; shift; done; shift; exec "$@"`, "sh"}, procs...)
	args = append(append(args, "--"), h.inside(h.dockerdArgs(ctx)...)...)
	// Not bound to ctx: dockerd outlives the call.
	cmd := command(context.WithoutCancel(ctx), []string{"DOCKER_MIN_API_VERSION=1.24", offline}, "sh", args...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		return err
	}
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	h.daemon = d

	wctx, cancel := context.WithTimeout(ctx, Patience(dockerdTimeout))
	defer cancel()
	err = waitFor(wctx, 20*time.Millisecond, "dockerd to answer", func() (bool, error) {
		select {
		case <-d.done:
			h.daemon = nil
			return false, fmt.Errorf("dockerd ended: %w", d.err)
		default:
			return h.ping(wctx), nil
		}
	})
	if ctx.Err() != nil {
		return ctx.Err() // we were asked to end: the log explains nothing
	}
	if err != nil {
		return fmt.Errorf("host %s: %w; the end of its log:\n%s", h.Name, err, tail(h.LogFile(), 15))
	}
	return nil
}

func (h *Host) dockerdArgs(ctx context.Context) []string {
	args := []string{"dockerd",
		"--data-root", filepath.Join(h.Dir, "data"),
		"--exec-root", "/run/docker",
		"--host", "unix:///run/docker.sock",
		"--host", "unix://" + h.socket(),
		"--pidfile", "/run/docker/docker.pid",
		"--cgroup-parent", "/" + h.cgroup() + "/containers",
		// /run/systemd is hidden, and systemd knows nothing of this host.
		"--exec-opt", "native.cgroupdriver=cgroupfs",
	}
	if e := h.options.Engine; e.Dir != "" {
		if _, err := os.Stat(filepath.Join(e.Dir, "docker-proxy")); err != nil {
			args = append(args, "--userland-proxy=false")
		}
		if out, err := run(ctx, nil, filepath.Join(e.Dir, "runc"), "--version"); err == nil && !strings.Contains(out, "libseccomp") {
			args = append(args, "--seccomp-profile=unconfined")
		}
	}
	if h.options.LiveRestore {
		args = append(args, "--live-restore")
	}
	return append(args, h.options.Flags...)
}

// StopDockerd asks dockerd to end and waits for it. Without live-restore it
// stops the containers and the plugins first.
func (h *Host) StopDockerd(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stopLocked(ctx)
}

func (h *Host) stopLocked(ctx context.Context) error {
	return h.endLocked(ctx, syscall.SIGTERM)
}

// KillDockerd kills dockerd with SIGKILL; its containerd dies with it. A dockerd
// that finds the old containerd still dying would wait for it and give up.
func (h *Host) KillDockerd(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	raw, err := os.ReadFile(filepath.Join(h.Dir, "run/containerd/containerd.pid"))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return err
	}
	if err := h.endLocked(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	if err := waitFor(ctx, 5*time.Millisecond, "containerd to end", func() (bool, error) {
		return !exists(fmt.Sprintf("/proc/%d", pid)), nil
	}); err != nil {
		return err
	}
	// Another process may have one of their numbers by now, and dockerd would not start.
	for _, file := range []string{"docker.pid", "containerd/containerd.pid"} {
		if err := os.Remove(filepath.Join(h.Dir, "run", file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// EndOrphans ends the processes of containers that dockerd was starting when it was
// killed, and returns the containers' ids: Docker thinks that they do not run, or knows
// nothing of them, never ends them, and they hold their namespaces and what is in there.
func (h *Host) EndOrphans(ctx context.Context) (string, error) {
	return h.Exec(ctx, "sh", "-c", `for shim in $(pgrep -f '/containerd-shim-runc-v2 -namespace moby '); do
		[ "$(readlink /proc/$shim/ns/mnt)" = "$(readlink /proc/self/ns/mnt)" ] || continue # of another host
		id=$(tr '\0' '\n' </proc/$shim/cmdline | grep -A1 -x -e -id | tail -1)
		[ -n "$id" ] && [ "$(docker inspect --format '{{.State.Running}}' $id 2>/dev/null)" != true ] || continue
		echo $id
		pkill -KILL -P $shim
		kill -KILL $shim
	done; true`)
}

func (h *Host) endLocked(ctx context.Context, sig syscall.Signal) error {
	d := h.daemon
	if d == nil {
		return fmt.Errorf("host %s: dockerd does not run", h.Name)
	}
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.done:
		h.daemon = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("host %s: wait for dockerd to end: %w", h.Name, ctx.Err())
	}
}

// LogFile is where dockerd writes, and through it the plugin.
func (h *Host) LogFile() string { return filepath.Join(h.Dir, "dockerd.log") }

func (h *Host) socket() string { return filepath.Join(h.Dir, "docker.sock") }

// ping says whether dockerd answers. It does so only after it has restored its
// networks and containers.
func (h *Host) ping(ctx context.Context) bool {
	resp, err := unixClient(h.socket()).Do(request(ctx, http.MethodGet, "/_ping"))
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func unixClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
}

func request(ctx context.Context, method, path string) *http.Request {
	r, _ := http.NewRequestWithContext(ctx, method, "http://host"+path, nil) // both are constants
	return r
}
