// Command demo shows Weft at work: two Docker hosts on this machine, the managed
// plugin on both, containers that talk. Every command and its output is real.
// Everything is removed at the end, also after Ctrl-C or a failure.
package main

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

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	d := &demo{ctx: ctx, tty: isTerminal(os.Stdout)}
	err := d.run()
	d.title("Clean up")
	if d.lab != nil {
		if closeErr := d.lab.Close(); closeErr != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", closeErr))
		} else {
			fmt.Println("both hosts are gone: no namespace, link, rule, mount, process or container is left")
		}
	}
	d.title("Summary")
	for _, line := range d.summary {
		fmt.Println("  ok   " + line)
	}
	if err != nil {
		fmt.Println("  FAIL " + err.Error())
		stop()
		os.Exit(1)
	}
	fmt.Printf("\n%d of %d steps, %.0f seconds\n", len(d.summary), len(d.summary), time.Since(start).Seconds())
}

// demo is one run.
type demo struct {
	ctx     context.Context
	tty     bool
	lab     *hosts.Lab
	summary []string
}

// where names the folder of the plugin that make leaves, below the checkout.
const where = "build/plugin"

func (d *demo) run() error {
	d.title("Build the plugin")
	if err := d.local("make", "-s", "plugin"); err != nil {
		return err
	}
	if err := d.local("ls", where); err != nil {
		return err
	}
	d.ok("make plugin made a folder for docker plugin create, without a registry")

	d.title("Two Docker hosts on one cable")
	lab, err := hosts.New(d.ctx, hosts.Options{
		Hosts: []hosts.HostOptions{{Name: "alpha"}, {Name: "beta"}},
		Logf:  func(f string, a ...any) { fmt.Printf(f+"\n", a...) },
	})
	if err != nil {
		return err
	}
	d.lab = lab
	a, b := lab.Hosts[0], lab.Hosts[1]
	for _, h := range lab.Hosts {
		if _, err := d.docker(h, "version", "-f", "dockerd {{.Server.Version}} on "+h.Name+", "+h.Address.String()); err != nil {
			return err
		}
	}
	d.ok("two dockerds, each with its own network, storage and rules")

	steps := []func(a, b *hosts.Host) error{d.install, d.network, d.talk, d.publish, d.kill, d.look}
	for _, step := range steps {
		if err := step(a, b); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) install(a, b *hosts.Host) error {
	d.title("Install the managed plugin on both")
	dir, err := filepath.Abs(where)
	if err != nil {
		return err
	}
	join := "WEFT_JOIN=" + a.Address.String() + "," + b.Address.String()
	for _, h := range []*hosts.Host{a, b} {
		if err := h.LinkCommand(dir); err != nil {
			return err
		}
		if err := d.dockers(h, []string{"plugin", "create", hosts.PluginName, dir},
			[]string{"plugin", "set", hosts.PluginName, join},
			[]string{"plugin", "enable", hosts.PluginName},
			[]string{"plugin", "ls"}); err != nil {
			return err
		}
	}
	d.ok("plugin created, set and enabled on both hosts")
	return nil
}

func (d *demo) network(a, b *hosts.Host) error {
	d.title("One network, made on both hosts")
	for i, h := range []*hosts.Host{a, b} {
		if err := d.dockers(h, []string{"network", "create", "-d", hosts.PluginName, "--subnet", "10.32.0.0/16",
			"--ip-range", fmt.Sprintf("10.32.%d.0/24", i+1), "app"}); err != nil {
			return err
		}
	}
	if err := d.dockers(a, []string{"network", "ls"}); err != nil {
		return err
	}
	d.ok("network app on both hosts, one subnet, an address range for each")
	return nil
}

func (d *demo) talk(a, b *hosts.Host) error {
	d.title("Containers that talk across the hosts")
	if err := d.dockers(a, []string{"run", "-d", "--name", "web", "--network", "app", "--ip", "10.32.1.10", "-p", "8080:80", hosts.Image,
		"sh", "-c", "mkdir /www; echo hello from web on alpha >/www/index.html; exec httpd -f -p 80 -h /www"}); err != nil {
		return err
	}
	if err := d.dockers(b, []string{"run", "-d", "--name", "client", "--network", "app", hosts.Image, "sleep", "1000"}); err != nil {
		return err
	}
	if err := d.expect(b, "0% packet loss", "exec", "client", "ping", "-c", "3", "10.32.1.10"); err != nil {
		return err
	}
	if err := d.expect(b, "hello from web", "exec", "client", "wget", "-qO-", "http://10.32.1.10/"); err != nil {
		return err
	}
	d.ok("ping and TCP from a container on beta to one on alpha")
	return nil
}

func (d *demo) publish(a, b *hosts.Host) error {
	d.title("A published port")
	if err := d.expect(a, "8080->80/tcp", "ps"); err != nil {
		return err
	}
	url := "http://" + a.Address.String() + ":8080/"
	out, err := d.exec(b, "busybox", "wget", "-qO-", url)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "hello from web") {
		return fmt.Errorf("%s answered %q", url, out)
	}
	d.ok("port 8080 of alpha answers from beta and shows in docker ps")
	return nil
}

func (d *demo) kill(a, b *hosts.Host) error {
	d.title("kill -9 the plugin on both hosts while a ping runs")
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	d.prompt(b.Name, "docker exec client ping -i 0.01 -c 500 10.32.1.10 &")
	go func() {
		out, err := b.Docker(d.ctx, "exec", "client", "ping", "-q", "-i", "0.01", "-c", "500", "10.32.1.10")
		done <- result{out, err}
	}()
	for _, h := range []*hosts.Host{a, b} {
		old, err := h.KillPlugin(d.ctx)
		if err != nil {
			return err
		}
		d.prompt(h.Name, fmt.Sprintf("kill -9 %d    # the plugin", old))
		took, err := h.WaitPlugin(d.ctx, old)
		if err != nil {
			return err
		}
		fmt.Printf("Docker started it again; it served after %.1f s\n", took.Seconds())
	}
	r := <-done
	fmt.Println(r.out)
	if r.err != nil {
		return r.err
	}
	if !strings.Contains(r.out, "500 packets transmitted, 500 packets received") {
		return errors.New("packets were lost while the plugin was dead")
	}
	d.ok("no packet of 500 lost while both plugins were killed")
	return nil
}

func (d *demo) look(a, b *hosts.Host) error {
	d.title("What Weft says")
	for _, args := range [][]string{{"weft", "status"}, {"weft", "peers"}, {"weft", "endpoints"}, {"weft", "audit"}} {
		if _, err := d.exec(a, args...); err != nil {
			return err
		}
	}
	d.ok("weft status is well, weft audit finds no difference")
	d.title("Remove it")
	for _, h := range []*hosts.Host{a, b} {
		name := map[string]string{a.Name: "web", b.Name: "client"}[h.Name]
		if err := d.dockers(h, []string{"rm", "-f", name}, []string{"network", "rm", "app"},
			[]string{"plugin", "disable", hosts.PluginName}, []string{"plugin", "rm", hosts.PluginName}); err != nil {
			return err
		}
		out, err := d.exec(h, "sh", "-c", "ip -br link; iptables-save | grep -c WEFT")
		if strings.Contains(out, "weft") {
			return fmt.Errorf("links are left on %s: %s %w", h.Name, out, err)
		}
	}
	d.ok("containers, network and plugin removed; no link or rule of Weft's is left on the hosts")
	return nil
}

// ok notes a step for the summary.
func (d *demo) ok(line string) { d.summary = append(d.summary, line) }

func (d *demo) title(s string) {
	if d.tty {
		s = "\x1b[1m" + s + "\x1b[0m"
	}
	fmt.Printf("\n%s\n", s)
}

// prompt prints a command as it was typed on a host.
func (d *demo) prompt(host, line string) {
	if d.tty {
		line = "\x1b[36m" + line + "\x1b[0m"
	}
	fmt.Printf("%s$ %s\n", host, line)
}

func (d *demo) dockers(h *hosts.Host, commands ...[]string) error {
	for _, args := range commands {
		if _, err := d.docker(h, args...); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) docker(h *hosts.Host, args ...string) (string, error) {
	d.prompt(h.Name, "docker "+quote(args))
	return d.print(h.DockerCommand(d.ctx, args...))
}

func (d *demo) exec(h *hosts.Host, args ...string) (string, error) {
	d.prompt(h.Name, quote(args))
	return d.print(h.Command(d.ctx, args...))
}

// expect runs a docker command and fails unless its output has the text.
func (d *demo) expect(h *hosts.Host, want string, args ...string) error {
	out, err := d.docker(h, args...)
	if err == nil && !strings.Contains(out, want) {
		err = fmt.Errorf("docker %s on %s: the output lacks %q", quote(args), h.Name, want)
	}
	return err
}

func (d *demo) local(args ...string) error {
	d.prompt("", quote(args))
	cmd := exec.CommandContext(d.ctx, args[0], args[1:]...)
	// With its children: make's compiler would go on writing into the folder.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	_, err := d.print(cmd)
	return err
}

func (d *demo) print(c *exec.Cmd) (string, error) {
	raw, err := c.CombinedOutput()
	out := strings.TrimSpace(string(raw))
	if out != "" {
		fmt.Println(out)
	}
	if err != nil {
		return out, fmt.Errorf("%s: %w", quote(c.Args[max(0, len(c.Args)-4):]), errors.Join(err, d.ctx.Err()))
	}
	return out, nil
}

// quote writes arguments as one would type them.
func quote(args []string) string {
	out := make([]string, len(args))
	for i, a := range args {
		if strings.ContainsAny(a, " {}&;|<>'") {
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
