package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// layFirewalls lays what tests/firewall.sh has unpacked over a host's own folders, and
// starts a bus for firewalld and Docker: all in the host's private mounts.
const layFirewalls = `set -eu
mkdir -p /run/lay/upper /run/lay/work /run/dbus
mount -t overlay -o lowerdir="$1/usr":/usr none /usr
mount -t overlay -o lowerdir="$1/etc":/etc,upperdir=/run/lay/upper,workdir=/run/lay/work none /etc
cat >/run/bus.conf <<'CONF'
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
CONF
dbus-daemon --config-file=/run/bus.conf --fork --nopidfile`

// What the README says under Firewalls.
const (
	ufwAllows = `ufw allow 4796:4797/tcp
ufw allow 4796:4799/udp`
	firewalldAllows = `firewall-cmd --permanent --add-port=4796-4797/tcp --add-port=4796-4799/udp
firewall-cmd --permanent --new-zone=weft
firewall-cmd --permanent --zone=weft --set-target=ACCEPT
firewall-cmd --permanent --zone=weft --add-interface=weft+
firewall-cmd --permanent --new-policy=weft-in
firewall-cmd --permanent --policy=weft-in --set-target=ACCEPT
firewall-cmd --permanent --policy=weft-in --add-ingress-zone=ANY
firewall-cmd --permanent --policy=weft-in --add-egress-zone=weft
sed -i s/^IPv6_rpfilter=.*/IPv6_rpfilter=no/ /etc/firewalld/firewalld.conf
firewall-cmd --reload`
)

// firewalls is two hosts, of which the first gets ufw and firewalld, with each kind of
// network, and a container on Docker's bridge to compare with.
type firewalls struct {
	lab    *hosts.Lab
	a, b   *hosts.Host
	states int
	asked  int // published ports of Docker's and Weft's, from all clients
	closed int // the same, that Docker did not answer and Weft did
}

var firewallKinds = []struct {
	name string
	args []string
}{
	{"vxlan", nil}, {"led", []string{"-o", "gateway=weft"}}, {"routed", []string{"-o", "mode=routed"}}, {"crypt", []string{"-o", "encrypted"}},
}

// TestFirewalls runs the real ufw and firewalld on a host: they are switched on, loaded
// anew and switched off while containers talk.
func TestFirewalls(t *testing.T) {
	t.Parallel()
	hosts.Require(t, "root", "docker", "engine", "firewall")
	dir, err := hosts.FirewallDir()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, lines := range []string{ufwAllows, firewalldAllows} {
		if said := "\n    " + strings.ReplaceAll(lines, "\n", "\n    ") + "\n"; !strings.Contains(string(readme), said) {
			t.Errorf("the README does not say%s", said)
		}
	}
	for name, engine := range engines(t) {
		if name == "debian" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			lab := newLab(t, 2, func(i int, o *hosts.HostOptions) {
				o.Engine = engine
				if i == 0 {
					o.Before = []string{"sh", "-c", layFirewalls, "sh", filepath.Join(dir, "root")}
				}
			})
			install(t, lab, pluginDir(t, "", "test"), clusterKey)
			f := &firewalls{lab: lab, a: lab.Hosts[0], b: lab.Hosts[1]}
			f.start(t)
			f.talk(t, "without a firewall", true)
			f.restartDocker(t) // it puts its rules first
			f.talk(t, "without a firewall, Docker started again", true)
			f.ufw(t)
			f.firewalld(t, "nftables") // its default
			if soak() {
				f.firewalld(t, "iptables")
			}
			figure(t, "ufw and firewalld on "+name, f.states, "states of both: all kinds of networks talk, %d of %d answers of published ports are Weft's alone; answered by Docker alone: 0 (target 0)", f.closed, f.asked)
		})
	}
}

// start makes the networks, containers, and a service of the host's own.
func (f *firewalls) start(t *testing.T) {
	for i, kind := range firewallKinds {
		createNetwork(t, f.lab, kind.name, 60+i, append([]string{"--gateway", fmt.Sprintf("10.%d.0.1", 60+i), "--ipv6", "--subnet", fmt.Sprintf("fd00:%d::/64", 60+i), "--gateway", fmt.Sprintf("fd00:%d::1", 60+i)}, kind.args...)...)
		for j, h := range f.lab.Hosts {
			run(t, h, kind.name, "--network", kind.name, "--ip6", f.address6(i, j), "-p", fmt.Sprintf("80%d:80", 60+i))
		}
	}
	run(t, f.a, "bridge", "-p", "8059:80")
	f.serve(t)
	listenIn(t, f.a.NetNS(), 9000, func(c net.Conn) { _, _ = c.Write([]byte("own")) })
}

func (f *firewalls) address6(kind, host int) string {
	return fmt.Sprintf("fd00:%d::1%d", 60+kind, host)
}

func (f *firewalls) serve(t *testing.T) {
	for _, name := range []string{"vxlan", "led", "routed", "crypt", "bridge"} {
		serve(t, hosts.Container{Host: f.a, Name: name}, name)
	}
}

// talk checks what must hold in every state; open says whether the firewall lets others
// reach the host's own service.
func (f *firewalls) talk(t *testing.T, state string, open bool) {
	t.Helper()
	f.states++
	start := time.Now()
	eventually(t, 30*time.Second, state+": the host's own service is "+map[bool]string{true: "open", false: "closed"}[open], func(ctx context.Context) error {
		out, err := hostFetch(ctx, f.b, f.a.Address.String()+":9000")
		if open {
			return err
		}
		if err == nil {
			return fmt.Errorf("it answers %q", out)
		}
		return nil
	})
	for _, command := range []string{"audit", "status"} {
		eventually(t, 30*time.Second, state+": weft "+command+" finds nothing", func(ctx context.Context) error {
			out, err := f.a.Exec(ctx, "weft", command)
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	// One that the other host learns of only now.
	late := run(t, f.a, "late", "--network", "vxlan", "--ip6", "fd00:60::99")
	reach(t, hosts.Container{Host: f.b, Name: "vxlan"}, addressOf(t, late, "vxlan").String())
	for i, kind := range firewallKinds {
		from, to := hosts.Container{Host: f.a, Name: kind.name}, hosts.Container{Host: f.b, Name: kind.name}
		for _, pair := range [][2]hosts.Container{{from, to}, {to, from}} {
			reach(t, pair[0], addressOf(t, pair[1], kind.name).String())
		}
		reach(t, from, f.address6(i, 1))
		reach(t, to, f.address6(i, 0))
		if kind.name == "led" || kind.name == "routed" {
			reach(t, from, f.b.Address.String()) // out, masqueraded
		}
	}
	docker(t, f.a, "rm", "--force", "late")
	bridge := hosts.Container{Host: f.a, Name: "bridge"}
	silent(t, bridge, addressOf(t, hosts.Container{Host: f.a, Name: "led"}, "led").String())
	silent(t, bridge, addressOf(t, hosts.Container{Host: f.a, Name: "routed"}, "routed").String())
	f.ports(t, state)
	t.Logf("%s: all well after %s", state, time.Since(start).Round(time.Second/10))
}

// ports asks for published ports. Weft's own answer always; those that Docker publishes
// for networks of Weft's, wherever its bridge's does.
func (f *firewalls) ports(t *testing.T, state string) {
	t.Helper()
	here := f.a.Address.String()
	bridge := hosts.Container{Host: f.a, Name: "bridge"}
	const onBridge = "one on Docker's bridge"
	clients := map[string]func(ctx context.Context, port string) (string, error){
		"another host":          func(ctx context.Context, port string) (string, error) { return hostFetch(ctx, f.b, here+":"+port) },
		"the host":              func(ctx context.Context, port string) (string, error) { return hostFetch(ctx, f.a, here+":"+port) },
		"the host by 127.0.0.1": func(ctx context.Context, port string) (string, error) { return hostFetch(ctx, f.a, "127.0.0.1:"+port) },
		onBridge:                func(ctx context.Context, port string) (string, error) { return fetch(ctx, bridge, here+":"+port) },
		"another host's IPv6": func(ctx context.Context, port string) (string, error) {
			return hostFetch(ctx, f.b, net.JoinHostPort(f.a.Address6.String(), port))
		},
	}
	var wait sync.WaitGroup
	var mu sync.Mutex
	dockers := map[string]bool{} // whom Docker's bridge answers
	for who, ask := range clients {
		wait.Go(func() {
			for range 2 {
				if out, err := ask(t.Context(), "8059"); err == nil && strings.Contains(out, "bridge") {
					mu.Lock()
					dockers[who] = true
					mu.Unlock()
					return
				}
			}
		})
	}
	wait.Wait()
	for who, ask := range clients {
		answers := dockers[who]
		for i, kind := range firewallKinds {
			own := kind.name == "led" || kind.name == "routed"
			if !answers && (!own || who == onBridge) { // flushed, Docker's bridge has no way out
				continue
			}
			f.asked++
			if !answers {
				f.closed++
			}
			eventually(t, 30*time.Second, fmt.Sprintf("%s: the port of %s answers to %s (Docker's bridge: %t)", state, kind.name, who, answers), func(ctx context.Context) error {
				out, err := ask(ctx, fmt.Sprintf("80%d", 60+i))
				if err == nil && !strings.Contains(out, kind.name) {
					err = fmt.Errorf("it answers %q", out)
				}
				return err
			})
		}
	}
}

func (f *firewalls) exec(t *testing.T, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		if _, err := f.a.Exec(t.Context(), strings.Fields(line)...); err != nil {
			t.Fatal(err)
		}
	}
}

func (f *firewalls) ufw(t *testing.T) {
	f.exec(t, ufwAllows)
	f.exec(t, "ufw --force enable")
	f.talk(t, "ufw enabled", false)
	f.exec(t, "ufw reload")
	f.talk(t, "ufw reloaded", false)
	// The setting with which it takes everybody's rules for its own, flushes them, and
	// then removes the chains: it gives up where Weft was faster and uses one again.
	f.exec(t, "sed -i s/MANAGE_BUILTINS=no/MANAGE_BUILTINS=yes/ /etc/default/ufw")
	eventually(t, 60*time.Second, "ufw reloads with MANAGE_BUILTINS", func(ctx context.Context) error {
		_, err := f.a.Exec(ctx, "ufw", "reload")
		return err
	})
	f.talk(t, "ufw reloaded, with MANAGE_BUILTINS", false)
	f.exec(t, "sed -i s/MANAGE_BUILTINS=yes/MANAGE_BUILTINS=no/ /etc/default/ufw")
	eventually(t, 60*time.Second, "ufw is disabled", func(ctx context.Context) error {
		_, err := f.a.Exec(ctx, "ufw", "disable")
		return err
	})

	f.talk(t, "ufw disabled", true)
}

// firewalld starts it, as late as can be, and then Docker again, which looks for it only
// when it starts itself.
func (f *firewalls) firewalld(t *testing.T, backend string) {
	name := "firewalld with " + backend
	f.exec(t, "sed -i s/^FirewallBackend=.*/FirewallBackend="+backend+"/;s/^IPv6_rpfilter=.*/IPv6_rpfilter=yes/ /etc/firewalld/firewalld.conf\nrm -rf /etc/firewalld/zones/weft.xml /etc/firewalld/zones/public.xml /etc/firewalld/policies/weft-in.xml")
	daemon := f.a.Command(context.WithoutCancel(t.Context()), "firewalld", "--nofork")
	logFile, err := os.Create(filepath.Join(t.TempDir(), "firewalld.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = logFile.Close() }()
	daemon.Stdout, daemon.Stderr = logFile, logFile
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	t.Cleanup(func() { _ = daemon.Process.Kill() })
	eventually(t, 30*time.Second, name+" runs", func(ctx context.Context) error {
		_, err := f.a.Exec(ctx, "firewall-cmd", "--state")
		return err
	})
	out, err := f.a.Exec(t.Context(), "weft", "status")
	if err == nil || strings.Contains(out, "weft+ are in none of its zones") != (backend == "nftables") || !strings.Contains(out, "firewalld drops the IPv6 of network") {
		t.Errorf("%s: weft status does not tell what is in the way: %v\n%s", name, err, out)
	}
	f.exec(t, firewalldAllows)
	f.talk(t, name+", Docker not started again", false)
	f.restartDocker(t)
	f.talk(t, name+", Docker started again", false)
	f.reload(t, "--reload")
	f.talk(t, name+", reloaded", false)
	f.reload(t, "--complete-reload")
	f.talk(t, name+", completely reloaded", false)
	if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := <-ended; err != nil && !errors.As(err, &exit) {
		t.Error(err)
	}
	f.talk(t, name+", stopped", true)
}

// reload makes firewalld load its rules again. Its ebtables-restore of Debian 12 fails now
// and then when somebody else, as Docker and Weft after a reload, writes rules meanwhile.
func (f *firewalls) reload(t *testing.T, how string) {
	t.Helper()
	eventually(t, 30*time.Second, "firewall-cmd "+how, func(ctx context.Context) error {
		_, err := f.a.Exec(ctx, "firewall-cmd", how)
		if err != nil {
			t.Logf("firewall-cmd %s: %v", how, err)
		}
		return err
	})
}

func (f *firewalls) restartDocker(t *testing.T) {
	t.Helper()
	if err := f.a.StopDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.a.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	docker(t, f.a, "start", "vxlan", "led", "routed", "crypt", "bridge")
	f.serve(t)
}
