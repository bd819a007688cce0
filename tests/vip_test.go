package tests

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestVIP asks a Swarm service at its virtual address, Docker's default, from every
// kind of container, while its tasks come and go.
func TestVIP(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "debian" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSwarm(t, engine, false, "WEFT_SCOPE=global", "docker.source=/run/docker.sock")
			v := &vips{swarm: s}
			s.network(t, "app", 60)
			s.service(t, "web", 3, "--network", "app", "--endpoint-mode", "vip")
			for _, h := range s.lab.Hosts {
				v.clients = append(v.clients, run(t, h, "client", "--network", "app"))
			}
			v.address = v.virtual(t, "web")
			for _, scene := range []struct {
				name string
				play func(*testing.T)
				long bool // in the soak alone
			}{
				{"from everywhere", v.fromEverywhere, false},
				{"its own tasks", v.ownTasks, false},
				{"other protocols", v.otherProtocols, false},
				{"other modes", v.modes, false},
				{"health", v.health, false},
				{"plugin killed", v.pluginKilled, false},
				{"updates and kills", v.updatesAndKills, false},
				{"killed in mid-change", v.killedInMidChange, false},
				{"another leader", v.anotherLeader, false},
				{"no manager", v.noManager, true},
				{"a dead task's connection is reset", v.resets, false},
				{"gone", v.gone, false},
			} {
				if !scene.long || soak() {
					t.Run(scene.name, scene.play)
				}
			}
			for _, h := range s.lab.Hosts {
				docker(t, h, "rm", "-f", "client")
			}
			s.removeNetworks(t, "app")
			s.nothingLeft(t)
		})
	}
}

// vips is a Swarm with the service web and a client on every host.
type vips struct {
	*swarm
	clients []hosts.Container
	address netip.Addr
}

// virtual returns the virtual address of a service.
func (v *vips) virtual(t *testing.T, service string) netip.Addr {
	t.Helper()
	out := docker(t, v.lab.Hosts[0], "service", "inspect", "--format", "{{range .Endpoint.VirtualIPs}}{{.Addr}}{{end}}", service)
	p, err := netip.ParsePrefix(strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	return p.Addr()
}

// answerer connects to port 80 of an address from a namespace and returns who answers.
func answerer(netns, address string) (string, error) {
	var c net.Conn
	err := hosts.InNetNS(netns, func() (err error) {
		c, err = net.DialTimeout("tcp4", net.JoinHostPort(address, "80"), hungAfter)
		return err
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(hungAfter))
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	all, err := io.ReadAll(bufio.NewReader(c))
	if err != nil {
		return "", err
	}
	_, body, ok := strings.Cut(string(all), "\r\n\r\n")
	if !ok {
		return "", fmt.Errorf("no answer: %w", io.ErrUnexpectedEOF)
	}
	return strings.TrimSpace(body), nil
}

// hungAfter is when a connection counts as hung: a segment that is lost is sent again
// after one second, and then after two.
const hungAfter = 10 * time.Second

// balanced asks until each of n tasks has answered.
func (v *vips) balanced(t *testing.T, c hosts.Container, n int) {
	t.Helper()
	ns := netnsOf(t, c)
	eventually(t, 60*time.Second, fmt.Sprintf("%d tasks answer %s on host %s", n, c.Name, c.Host.Name), func(context.Context) error {
		who := map[string]int{}
		for range 20 * n {
			name, err := answerer(ns, v.address.String())
			if err != nil {
				return err
			}
			who[name]++
		}
		if len(who) != n {
			return fmt.Errorf("%v answer", who)
		}
		for name, times := range who {
			if times < 5 {
				return fmt.Errorf("%s has a small part of %v", name, who)
			}
		}
		return nil
	})
}

func (v *vips) fromEverywhere(t *testing.T) {
	for i, c := range v.clients {
		v.balanced(t, c, 3)
		reach(t, c, v.address.String())
		if out := command(t, c, "timeout", "5", "wget", "-q", "-O", "-", "http://web/"); len(strings.TrimSpace(out)) != 12 {
			t.Errorf("by its name: %q", out)
		}
		says(t, v.lab.Hosts[i], nil)
	}
	figure(t, "VIP answered from every host, by all tasks", 3*60, "balanced over 3 tasks")
}

// ownTasks asks from the tasks themselves, of which each gets itself too.
func (v *vips) ownTasks(t *testing.T) {
	for _, c := range v.running(t) {
		v.balanced(t, c, 3)
	}
}

// otherProtocols listens in a task, and looks who asks.
func (v *vips) otherProtocols(t *testing.T) {
	const port = 9000
	heard := make(chan string, 64)
	for _, c := range v.running(t) {
		err := inside(t, c, func() error {
			u, err := net.ListenUDP("udp4", &net.UDPAddr{Port: port})
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = u.Close() })
			go func() {
				buf := make([]byte, 1<<16)
				for {
					n, from, err := u.ReadFromUDPAddrPort(buf)
					if err != nil {
						return
					}
					heard <- from.Addr().Unmap().String()
					_, _ = u.WriteToUDPAddrPort(buf[:n], from)
				}
			}()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range v.clients {
		var u *net.UDPConn
		if err := inside(t, c, func() (err error) {
			u, err = net.DialUDP("udp4", nil, &net.UDPAddr{IP: v.address.AsSlice(), Port: port})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		own := u.LocalAddr().(*net.UDPAddr).AddrPort().Addr().String()
		for i := range 10 {
			text := strings.Repeat("hello", 1+i%2*1000) // in one packet, and in four
			_, _ = u.Write([]byte(text))
			_ = u.SetReadDeadline(time.Now().Add(5 * time.Second))
			buf := make([]byte, 1<<16)
			if n, err := u.Read(buf); err != nil || string(buf[:n]) != text {
				t.Fatalf("UDP from host %s, %d bytes: %d, %v", c.Host.Name, len(text), n, err)
			}
			if from := <-heard; from != own {
				t.Errorf("a task is asked by %s, not by %s", from, own)
			}
		}
		_ = u.Close()
		// A port on which no task listens: the task's host says so, in the address's name.
		if err := inside(t, c, func() error {
			u, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: v.address.AsSlice(), Port: port + 99})
			if err != nil {
				return err
			}
			defer u.Close()
			_, _ = u.Write([]byte("hello"))
			_ = u.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = u.Read(make([]byte, 1))
			return err
		}); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("host %s asks a port without a listener: %v", c.Host.Name, err)
		}
		for _, size := range []string{"56", "5000"} {
			if out, err := c.Exec(t.Context(), "ping", "-c", "5", "-W", "2", "-s", size, v.address.String()); err != nil {
				t.Errorf("ping of %s bytes from host %s: %v %s", size, c.Host.Name, err, out)
			}
		}
	}
}

// pluginKilled keeps connections busy while the plugin is killed on every host.
func (v *vips) pluginKilled(t *testing.T) {
	const port = 9001
	v.echo(t, port)
	var conns []net.Conn
	for _, c := range v.clients {
		conns = append(conns, v.connect(t, c, 10, port)...)
	}
	for _, h := range v.lab.Hosts {
		pid, err := h.PluginPID(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	// Another container changes nothing for those that are there.
	for _, h := range v.lab.Hosts {
		run(t, h, "late", "--network", "app")
	}
	broken := 0
	for range 50 {
		for _, c := range conns {
			if err := roundTrip(c); err != nil {
				broken++
				t.Logf("connection: %v", err)
			}
		}
		pause(t, 50*time.Millisecond)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	for _, h := range v.lab.Hosts {
		docker(t, h, "rm", "-f", "late")
	}
	if broken > 0 {
		t.Errorf("%d of %d connections broke", broken, len(conns))
	}
	figure(t, "VIP connections through a plugin killed everywhere", len(conns), "%d broken; target 0", broken)
	v.settled(t)
}

// running returns the containers of the three tasks.
func (v *vips) running(t *testing.T) (out []hosts.Container) {
	t.Helper()
	for _, task := range v.tasks(t, v.lab.Hosts[0], "web", 3) {
		out = append(out, hosts.Container{Host: v.lab.Host(task.Host), Name: task.Container})
	}
	return out
}

// echo makes the three tasks listen on a port and send back what comes.
func (v *vips) echo(t *testing.T, port int) {
	t.Helper()
	for _, c := range v.running(t) {
		listenIn(t, netnsOf(t, c), port, func(c net.Conn) { _, _ = io.Copy(c, c) })
	}
}

// connect opens connections to a port of the virtual address.
func (v *vips) connect(t *testing.T, from hosts.Container, n, port int) (conns []net.Conn) {
	t.Helper()
	ns := netnsOf(t, from)
	for range n {
		if err := hosts.InNetNS(ns, func() error {
			silent := net.Dialer{Timeout: hungAfter, KeepAlive: -1}
			c, err := silent.Dial("tcp4", net.JoinHostPort(v.address.String(), strconv.Itoa(port)))
			conns = append(conns, c)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return conns
}

func roundTrip(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(hungAfter))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// killedInMidChange kills the plugin at the step that changes the tasks of a service.
func (v *vips) killedInMidChange(t *testing.T) {
	h := v.lab.Hosts[1]
	dies := diesAt(t, h, "kernel.put.service")
	docker(t, v.lab.Hosts[0], "service", "scale", "--detach", "web=4")
	v.tasks(t, v.lab.Hosts[0], "web", 4)
	dies()
	v.balanced(t, v.clients[1], 4)
	docker(t, v.lab.Hosts[0], "service", "scale", "--detach", "web=3")
	v.balanced(t, v.clients[1], 3)
}

// anotherLeader kills the leader: what it told holds, and the next one goes on.
func (v *vips) anotherLeader(t *testing.T) {
	old := v.leader(t, nil)
	if err := old.StopDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Tasks of the host without dockerd are dead, and known to be soon: their host said so.
	for _, c := range v.clients {
		if c.Host != old {
			v.answeredBy(t, c, func(string) bool { return true })
		}
	}
	v.leader(t, old)
	if err := old.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.tasks(t, v.lab.Hosts[0], "web", 3)
	v.settled(t)
	for i, h := range v.lab.Hosts {
		if h == old {
			docker(t, h, "rm", "-f", "client")
			v.clients[i] = run(t, h, "client", "--network", "app")
		}
		v.balanced(t, v.clients[i], 3)
	}
}

// noManager makes two hosts workers and kills the dockerd of the only manager. A
// worker whose plugin starts anew meanwhile serves what was known last.
func (v *vips) noManager(t *testing.T) {
	boss := v.leader(t, nil)
	for _, h := range v.lab.Hosts {
		if h != boss {
			demote(t, boss, h)
		}
	}
	// Docker writes that it is the only one with the next change alone: killed before that,
	// it waits for the vote of the last that it demoted for ever.
	docker(t, boss, "node", "update", "--label-add", "alone=yes", boss.Name)
	if err := boss.KillDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range v.clients {
		if c.Host != boss {
			killParent(t, c.Host)
			v.balanced(t, c, 3)
		}
	}
	figure(t, "VIP without any manager", 2, "workers whose plugin started anew have all 3 tasks answer")
	if err := boss.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Docker may wait half a minute for a peer of its own networks before it attaches
	// anything. An attachment gives up after twenty seconds, and leaves a task in its way.
	time.Sleep(35 * time.Second)
	for i, h := range v.lab.Hosts {
		if h == boss {
			docker(t, h, "rm", "-f", "client")
			v.clients[i] = run(t, h, "client", "--network", "app")
			continue
		}
		eventually(t, 60*time.Second, h.Name+" is promoted", func(ctx context.Context) error {
			_, err := boss.Docker(ctx, "node", "promote", h.Name)
			return err
		})
	}
	v.tasks(t, boss, "web", 3)
	v.settled(t)
	for _, c := range v.clients {
		v.balanced(t, c, 3)
	}
}
