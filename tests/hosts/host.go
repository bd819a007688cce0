package hosts

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// HostOptions describe one host.
type HostOptions struct {
	Name string // up to 13 characters, such as "a"
	// Engine is the dockerd to run; the zero value is the machine's.
	Engine Engine
	// LiveRestore keeps containers and plugins while dockerd is away.
	LiveRestore bool
	// IPTables is the variant that dockerd and Exec call iptables: "nft",
	// "legacy" or "" for the machine's choice.
	IPTables string
	// NAT puts the host behind the router of that name (lab.Router), which forwards the
	// host's ports to it: Address is then the one inside, and Public the router's. Hosts
	// that name the same router share it, with different ports.
	NAT string
	// Router puts the host behind the router of that name, which does no NAT: Address is
	// one of a subnet of its own, to which all hosts on the cable have a route.
	Router string
	// Before is a command that runs on the host before dockerd first starts.
	Before []string
	// Flags are added to dockerd's.
	Flags []string
}

// Host is one Docker host.
type Host struct {
	Name     string
	Address  netip.Addr // on the underlay
	Address6 netip.Addr
	Public   netip.Addr // of the NAT in front of it; zero: none
	Port     uint16     // the first of Weft's four: gossip, records, and two of WireGuard
	Dir      string     // everything it has on disk; "run" in it is its /run/docker

	lab     *Lab
	router  *Router // in front of it; nil: none
	options HostOptions
	netns   string
	holder  *exec.Cmd      // keeps the mount namespace
	hold    io.WriteCloser // the holder ends when this closes, also when we die

	mu     sync.Mutex // guards what follows
	daemon *daemon    // nil while dockerd does not run
	closed bool
}

// hostScript makes the private mounts of a host and then waits.
//
//go:embed host.sh
var hostScript string

func (h *Host) start(ctx context.Context) error {
	for _, d := range []string{"run", "data", "bin", "cli"} {
		if err := os.MkdirAll(filepath.Join(h.Dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := h.chooseIPTables(); err != nil {
		return err
	}
	if _, err := run(ctx, nil, "ip", "netns", "add", h.netns); err != nil {
		return err
	}
	if err := h.lab.Underlay.connect(ctx, h); err != nil {
		return err
	}
	if err := h.startHolder(ctx); err != nil {
		return err
	}
	if len(h.options.Before) > 0 {
		if _, err := h.Exec(ctx, h.options.Before...); err != nil {
			return err
		}
	}
	err := h.StartDockerd(ctx)
	for tries := 0; err != nil && InGuest() && tries < 3; tries++ { // which may not have been enough
		err = h.StartDockerd(ctx)
	}
	if err != nil {
		return err
	}
	return h.importImage(ctx)
}

// startHolder starts the process that keeps the host's mount and UTS namespaces
// while dockerd comes and goes.
func (h *Host) startHolder(ctx context.Context) error {
	// Not bound to ctx: Close ends it, or the pipe does.
	h.holder = command(context.WithoutCancel(ctx), nil, "nsenter", "--net=/run/netns/"+h.netns,
		"unshare", "--mount", "--uts", "--propagation", "private",
		"sh", "-c", hostScript, "host.sh", h.Dir, h.Name, h.cgroup())
	var errOut strings.Builder
	h.holder.Stderr = &errOut
	stdin, err := h.holder.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := h.holder.StdoutPipe()
	if err != nil {
		return err
	}
	if err := h.holder.Start(); err != nil {
		return err
	}
	h.hold = stdin
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		_ = h.holder.Wait()
		return fmt.Errorf("make mounts: %w: %s", err, strings.TrimSpace(errOut.String()))
	}
	return nil
}

// stop ends dockerd in order and lets go of the namespaces; removeLab does the
// rest.
func (h *Host) stop(ctx context.Context) error {
	sctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	h.mu.Lock()
	h.closed = true
	var err error
	if h.daemon != nil {
		// Containers would get ten seconds each to end; nobody needs their end.
		_ = killCgroup(h.cgroup() + "/containers")
		err = h.stopLocked(sctx)
	}
	h.mu.Unlock()
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil // it is killed with everything else
	}
	if h.hold != nil {
		_ = h.hold.Close()
		_ = h.holder.Wait()
	}
	return err
}

// chooseIPTables puts the wanted variant under the plain names, first in PATH.
func (h *Host) chooseIPTables() error {
	v := h.options.IPTables
	if v == "" {
		return nil
	}
	multi, err := exec.LookPath("xtables-" + v + "-multi")
	if err != nil {
		return fmt.Errorf("iptables variant %q: %w", v, err)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			if err := os.Symlink(multi, filepath.Join(h.Dir, "bin", family+verb)); err != nil {
				return err
			}
		}
	}
	return nil
}

// path returns the PATH of the host's processes.
func (h *Host) path() string {
	dirs := []string{filepath.Join(h.Dir, "bin")}
	if h.options.Engine.Dir != "" {
		dirs = append(dirs, h.options.Engine.Dir)
	}
	return strings.Join(append(dirs, os.Getenv("PATH"), "/usr/sbin", "/sbin"), ":")
}

// inside returns the command line that enters the host's namespaces.
func (h *Host) inside(args ...string) []string {
	return append([]string{"nsenter", "--target", strconv.Itoa(h.holder.Process.Pid),
		"--net", "--mount", "--uts", "--", "env", "PATH=" + h.path()}, args...)
}

// Exec runs a command as root on the host and returns its output.
func (h *Host) Exec(ctx context.Context, args ...string) (string, error) {
	in := h.inside(args...)
	return run(ctx, nil, in[0], in[1:]...)
}

// Command prepares a command on the host that the caller starts himself.
func (h *Host) Command(ctx context.Context, args ...string) *exec.Cmd {
	in := h.inside(args...)
	return command(ctx, nil, in[0], in[1:]...)
}

// cgroup holds the host's dockerd and containers; relative to the roots.
func (h *Host) cgroup() string { return h.lab.Name + "/" + h.Name }

// NetNS is the path of the host's network namespace.
func (h *Host) NetNS() string { return "/run/netns/" + h.netns }
