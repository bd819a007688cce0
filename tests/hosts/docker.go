package hosts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// PluginName is the name under which InstallPlugin creates the plugin, and the
// one that "docker network create -d" wants.
const PluginName = "weft:latest"

// Docker runs the Docker command against the host and returns its output.
func (h *Host) Docker(ctx context.Context, args ...string) (string, error) {
	return run(ctx, h.dockerEnv(), "docker", args...)
}

// DockerCommand prepares a Docker command that the caller starts himself.
func (h *Host) DockerCommand(ctx context.Context, args ...string) *exec.Cmd {
	return command(ctx, h.dockerEnv(), "docker", args...)
}

// composeProgram is Docker's Compose, which is also "docker compose".
const composeProgram = "docker-compose"

// Compose runs Compose's command with a file against the host and returns its output.
func (h *Host) Compose(ctx context.Context, file string, args ...string) (string, error) {
	dir, err := builtDir()
	if err != nil {
		return "", err
	}
	return run(ctx, h.dockerEnv(), filepath.Join(dir, composeProgram), append([]string{"--file", file, "--progress", "plain"}, args...)...)
}

func (h *Host) dockerEnv() []string {
	// A folder of its own: the user's logins, contexts and proxies are not ours.
	return []string{"DOCKER_HOST=unix://" + h.socket(), "DOCKER_CONFIG=" + filepath.Join(h.Dir, "cli"), "DOCKER_CONTEXT=", "DOCKER_TLS_VERIFY="}
}

// InstallPlugin creates, sets and enables the plugin from a folder as `make
// plugin` leaves it. A setting is NAME=VALUE. The host's `weft` command (Exec)
// is the one of that folder.
func (h *Host) InstallPlugin(ctx context.Context, dir string, settings ...string) error {
	if err := h.LinkCommand(dir); err != nil {
		return err
	}
	if _, err := h.Docker(ctx, "plugin", "create", PluginName, dir); err != nil {
		return err
	}
	if len(settings) > 0 {
		if _, err := h.Docker(ctx, append([]string{"plugin", "set", PluginName}, settings...)...); err != nil {
			return err
		}
	}
	if _, err := h.Docker(ctx, "plugin", "enable", PluginName); err != nil {
		return fmt.Errorf("%w; the end of dockerd's log:\n%s", err, tail(h.LogFile(), 15))
	}
	return nil
}

// LinkCommand makes the weft program of a plugin folder the host's command.
func (h *Host) LinkCommand(dir string) error {
	abs, err := filepath.Abs(filepath.Join(dir, "rootfs/bin/weft"))
	if err != nil {
		return err
	}
	link := filepath.Join(h.Dir, "bin", "weft")
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(abs, link)
}

// PluginID returns Docker's id of the plugin, 64 hex digits.
func (h *Host) PluginID(ctx context.Context) (string, error) {
	return h.Docker(ctx, "plugin", "inspect", "--format", "{{.Id}}", PluginName)
}

// StateDir is the plugin's propagated mount, seen from the host.
func (h *Host) StateDir(ctx context.Context) (string, error) {
	id, err := h.PluginID(ctx)
	return filepath.Join(h.Dir, "data/plugins", id, "propagated-mount"), err
}

// SocketDir is the folder of the plugin's sockets, seen from the host. Its paths
// are too long to dial; /proc/PID/root/run/docker/plugins is the same.
func (h *Host) SocketDir(ctx context.Context) (string, error) {
	id, err := h.PluginID(ctx)
	return filepath.Join(h.Dir, "run/plugins", id), err
}

// PluginPID returns the process of the plugin that does the work. It does not ask
// dockerd when id is given, so it also works while dockerd is away.
func (h *Host) PluginPID(ctx context.Context, id string) (int, error) {
	parent, err := h.PluginParent(ctx, id)
	if err != nil {
		return 0, err
	}
	pid, err := PluginChild(parent)
	if err != nil {
		err = fmt.Errorf("host %s: %w", h.Name, err)
	}
	return pid, err
}

// PluginChild returns the process that works for the one that was started as the plugin.
func PluginChild(parent int) (int, error) {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent)) // proc(5)
	if err != nil {
		return 0, err
	}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for _, child := range strings.Fields(string(raw)) {
			pid, err := strconv.Atoi(child)
			line, _ := os.ReadFile("/proc/" + child + "/cmdline") // empty once it has ended
			if err == nil && strings.Contains(string(line), "-inherit") {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("plugin process %d has no child that works", parent)
}

// PluginParent returns the plugin's process that Docker has started, which keeps the
// one of PluginPID. It asks dockerd like that.
func (h *Host) PluginParent(ctx context.Context, id string) (int, error) {
	if id == "" {
		var err error
		if id, err = h.PluginID(ctx); err != nil {
			return 0, err
		}
	}
	raw, err := os.ReadFile(filepath.Join(h.Dir, "run/containerd/daemon/io.containerd.runtime.v2.task/plugins.moby", id, "init.pid"))
	if err != nil {
		return 0, fmt.Errorf("host %s: plugin does not run: %w", h.Name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return 0, err
	}
	if isZombie(pid) {
		return 0, fmt.Errorf("host %s: plugin process %d has ended", h.Name, pid)
	}
	return pid, nil
}

// PluginAge returns how long ago Docker has started the plugin's process.
func (h *Host) PluginAge(ctx context.Context) (time.Duration, error) {
	pid, err := h.PluginParent(ctx, "")
	if err != nil {
		return 0, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	up, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0, err
	}
	// Field 22 of proc(5), starttime, is the 20th after the name; USER_HZ is 100.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	began, err := strconv.ParseFloat(fields[19], 64)
	if err != nil {
		return 0, err
	}
	now, err := strconv.ParseFloat(strings.Fields(string(up))[0], 64)
	return time.Duration((now - began/100) * float64(time.Second)), err
}

// KillPlugin kills the plugin's process that works with SIGKILL and returns which it
// was. Docker does not notice.
func (h *Host) KillPlugin(ctx context.Context) (int, error) {
	pid, err := h.PluginPID(ctx, "")
	if err != nil {
		return 0, err
	}
	return pid, syscall.Kill(pid, syscall.SIGKILL)
}

// KillPluginParent kills both processes of the plugin and returns which one worked.
// Docker starts the plugin again, or disables it if it had started it less than half a
// second ago.
func (h *Host) KillPluginParent(ctx context.Context) (int, error) {
	pid, err := h.PluginPID(ctx, "")
	if err != nil {
		return 0, err
	}
	parent, err := h.PluginParent(ctx, "")
	if err != nil {
		return 0, err
	}
	return pid, syscall.Kill(parent, syscall.SIGKILL)
}

// WaitPlugin waits until a plugin process other than old serves calls, and
// returns how long that took.
func (h *Host) WaitPlugin(ctx context.Context, old int) (time.Duration, error) {
	id, err := h.PluginID(ctx)
	if err != nil {
		return 0, err
	}
	started := time.Now()
	err = waitFor(ctx, 10*time.Millisecond, "plugin on host "+h.Name+" to serve", func() (bool, error) {
		pid, err := h.PluginPID(ctx, id)
		if err != nil || pid == old {
			return false, nil
		}
		// By the plugin's own root: the host's path of the socket is longer than
		// the 107 bytes of a Unix address.
		socket := fmt.Sprintf("/proc/%d/root/run/docker/plugins/weft.sock", pid)
		resp, err := unixClient(socket).Do(request(ctx, http.MethodPost, "/NetworkDriver.GetCapabilities"))
		if err != nil {
			return false, nil
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK, nil
	})
	return time.Since(started), err
}

// Container is one container of a host.
type Container struct {
	Host *Host
	Name string
}

// Run starts a container of the image in the background. The arguments go
// between "docker run -d --name NAME" and the image.
func (h *Host) Run(ctx context.Context, name string, args ...string) (Container, error) {
	line := append([]string{"run", "--detach", "--name", name, "--stop-timeout", "1"}, args...)
	_, err := h.Docker(ctx, append(line, Image, "sleep", "infinity")...)
	return Container{Host: h, Name: name}, err
}

// Exec runs a command in the container.
func (c Container) Exec(ctx context.Context, args ...string) (string, error) {
	return c.Host.Docker(ctx, append([]string{"exec", c.Name}, args...)...)
}

// Address returns the container's IPv4 address in the network.
func (c Container) Address(ctx context.Context, network string) (netip.Addr, error) {
	out, err := c.Host.Docker(ctx, "inspect", "--format",
		fmt.Sprintf("{{(index .NetworkSettings.Networks %q).IPAddress}}", network), c.Name)
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(out)
}

// PID returns the container's first process.
func (c Container) PID(ctx context.Context) (int, error) {
	out, err := c.Host.Docker(ctx, "inspect", "--format", "{{.State.Pid}}", c.Name)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(out)
	if err == nil && pid == 0 {
		err = fmt.Errorf("container %s on host %s does not run", c.Name, c.Host.Name)
	}
	return pid, err
}

// Remove removes the container at once.
func (c Container) Remove(ctx context.Context) error {
	_, err := c.Host.Docker(ctx, "rm", "--force", "--volumes", c.Name)
	return err
}
