// Package show is the stage of the demos: a lab of Docker hosts, commands that are
// printed as one would type them, and their real output. What a demo made is removed
// at its end, also after Ctrl-C or a failure.
package show

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// Show is one run of a demo.
type Show struct {
	Ctx context.Context
	Lab *hosts.Lab // nil before Hosts

	tty     bool
	summary []string
}

// Main runs a demo, removes its lab, and ends the process with 1 if something
// failed.
func Main(run func(*Show) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	s := &Show{Ctx: ctx, tty: isTerminal(os.Stdout)}
	err := run(s)
	s.Title("Clean up")
	if s.Lab != nil {
		if closeErr := s.Lab.Close(); closeErr != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", closeErr))
		} else {
			fmt.Println("all hosts are gone: no namespace, link, rule, mount, process or container is left")
		}
	}
	s.Title("Summary")
	for _, line := range s.summary {
		fmt.Println("  ok   " + line)
	}
	if err != nil {
		fmt.Println("  FAIL " + err.Error())
		stop()
		os.Exit(1)
	}
	fmt.Printf("\n%d of %d steps, %.0f seconds\n", len(s.summary), len(s.summary), time.Since(start).Seconds())
}

// where names the folder of the plugin that make leaves, below the checkout.
const where = "build/plugin"

// Build makes the plugin's folder.
func (s *Show) Build() error {
	s.Title("Build the plugin")
	if err := s.local("make", "-s", "plugin"); err != nil {
		return err
	}
	if err := s.local("ls", where); err != nil {
		return err
	}
	s.OK("make plugin made a folder for docker plugin create, without a registry")
	return nil
}

// Hosts makes the lab. A host behind a NAT is host/router.
func (s *Show) Hosts(names ...string) error {
	o := hosts.Options{Logf: func(f string, a ...any) { fmt.Printf(f+"\n", a...) }}
	for _, n := range names {
		name, router, _ := strings.Cut(n, "/")
		o.Hosts = append(o.Hosts, hosts.HostOptions{Name: name, NAT: router})
	}
	lab, err := hosts.New(s.Ctx, o)
	if err != nil {
		return err
	}
	s.Lab = lab
	for _, h := range lab.Hosts {
		if _, err := s.Docker(h, "version", "-f", "dockerd {{.Server.Version}} on "+h.Name+", "+h.Address.String()); err != nil {
			return err
		}
	}
	return nil
}

// Install creates, sets and enables the plugin on all hosts.
func (s *Show) Install(settings ...string) error {
	for _, h := range s.Lab.Hosts {
		if err := s.InstallOn(h, settings...); err != nil {
			return err
		}
	}
	return nil
}

// InstallOn creates, sets and enables the plugin on one host.
func (s *Show) InstallOn(h *hosts.Host, settings ...string) error {
	dir, err := filepath.Abs(where)
	if err != nil {
		return err
	}
	if err := h.LinkCommand(dir); err != nil {
		return err
	}
	return s.Dockers(h, []string{"plugin", "create", hosts.PluginName, dir},
		append([]string{"plugin", "set", hosts.PluginName}, settings...),
		[]string{"plugin", "enable", hosts.PluginName},
		[]string{"plugin", "ls"})
}

// KillPlugin kills the plugin with all its processes, and waits until Docker has started
// it again and it serves.
func (s *Show) KillPlugin(h *hosts.Host) error {
	old, err := h.KillPluginParent(s.Ctx)
	if err != nil {
		return err
	}
	s.Prompt(h.Name, fmt.Sprintf("kill -9 %d    # the plugin", old))
	took, err := h.WaitPlugin(s.Ctx, old)
	if err != nil {
		return err
	}
	fmt.Printf("Docker started it again; it served after %.1f s\n", took.Seconds())
	return nil
}

// OK notes a step for the summary.
func (s *Show) OK(line string) { s.summary = append(s.summary, line) }

// Title prints what comes next.
func (s *Show) Title(text string) {
	if s.tty {
		text = "\x1b[1m" + text + "\x1b[0m"
	}
	fmt.Printf("\n%s\n", text)
}

// Prompt prints a command as it was typed on a host.
func (s *Show) Prompt(host, line string) {
	if s.tty {
		line = "\x1b[36m" + line + "\x1b[0m"
	}
	fmt.Printf("%s$ %s\n", host, line)
}

// Dockers runs Docker commands on a host until one fails.
func (s *Show) Dockers(h *hosts.Host, commands ...[]string) error {
	for _, args := range commands {
		if _, err := s.Docker(h, args...); err != nil {
			return err
		}
	}
	return nil
}

// Docker runs a Docker command on a host and returns what it printed.
func (s *Show) Docker(h *hosts.Host, args ...string) (string, error) {
	s.Prompt(h.Name, "docker "+Quote(args))
	return s.print(h.DockerCommand(s.Ctx, args...))
}

// Exec runs a command as root on a host and returns what it printed.
func (s *Show) Exec(h *hosts.Host, args ...string) (string, error) {
	s.Prompt(h.Name, Quote(args))
	return s.print(h.Command(s.Ctx, args...))
}

// Expect runs a Docker command and fails unless its output has the text.
func (s *Show) Expect(h *hosts.Host, want string, args ...string) error {
	out, err := s.Docker(h, args...)
	if err == nil && !strings.Contains(out, want) {
		err = fmt.Errorf("docker %s on %s: the output lacks %q", Quote(args), h.Name, want)
	}
	return err
}

func (s *Show) local(args ...string) error {
	s.Prompt("", Quote(args))
	cmd := exec.CommandContext(s.Ctx, args[0], args[1:]...)
	// With its children: make's compiler would go on writing into the folder.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	_, err := s.print(cmd)
	return err
}

func (s *Show) print(c *exec.Cmd) (string, error) {
	raw, err := c.CombinedOutput()
	out := strings.TrimSpace(string(raw))
	if out != "" {
		fmt.Println(out)
	}
	if err != nil {
		return out, fmt.Errorf("%s: %w", Quote(c.Args[max(0, len(c.Args)-4):]), errors.Join(err, s.Ctx.Err()))
	}
	return out, nil
}

// Quote writes arguments as one would type them.
func Quote(args []string) string {
	out := make([]string, len(args))
	for i, a := range args {
		if strings.ContainsAny(a, " {}&;|<>'*") {
			a = "'" + a + "'"
		}
		out[i] = a
	}
	return strings.Join(out, " ")
}

func isTerminal(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
