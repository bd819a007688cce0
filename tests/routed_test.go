package tests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestRouted has networks with their own gateway on two hosts of either engine, routed
// ones and then such with a bridge.
func TestRouted(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for i, way := range []string{"mode=routed", "gateway=weft"} {
				if !soak() && (i == 1) != (name == "newest") {
					continue // the soak has both on both
				}
				// Each on hosts of its own: what they are damaged by is not all Weft's.
				t.Run(way, func(t *testing.T) {
					lab := newLab(t, 2, func(_ int, o *hosts.HostOptions) { o.Engine = engine })
					install(t, lab, pluginDir(t, "", "test"))
					r := &routed{name: name, way: way, lab: lab, first: inventories(t, lab.Hosts...)}
					t.Run("across hosts", r.acrossHosts)
					t.Run("port table", r.portTable)
					t.Run("published", r.published)
					t.Run("clients", r.clients)
					t.Run("internal", r.internal) // before Docker's rules are flushed
					t.Run("sctp", r.sctp)
					t.Run("survives", r.survives)
					t.Run("isolation", r.isolation)
					t.Run("nothing left", r.nothingLeft)
				})
			}
		})
	}
}

type routed struct {
	name  string
	way   string // option of the networks: routed, or a bridge with the network's own gateway
	lab   *hosts.Lab
	first []hosts.Inventory
}

func (r *routed) acrossHosts(t *testing.T) {
	var all []hosts.Container
	for i, h := range r.lab.Hosts {
		docker(t, h, "network", "create", "-d", hosts.PluginName, "-o", r.way, "--subnet", "10.80.0.0/16", "--gateway", "10.80.0.1", "--ip-range", fmt.Sprintf("10.80.%d.0/24", i+1),
			"--ipv6", "--subnet", "fd00:80::/64", "app")
		for j := range 2 {
			all = append(all, run(t, h, fmt.Sprintf("app%d%d", i, j), "--network", "app", "--ip6", fmt.Sprintf("fd00:80::%d%d", i+1, j+1)))
		}
	}
	for _, c := range all {
		for _, o := range all {
			reach(t, c, addressOf(t, o, "app").String())
		}
	}
	for i, c := range all {
		for j := range all {
			reach(t, c, fmt.Sprintf("fd00:80::%d%d", j/2+1, j%2+1))
		}
		reach(t, c, r.lab.Hosts[i/2].Address.String())
		reach(t, c, r.lab.Hosts[1-i/2].Address.String()) // masqueraded
		reach(t, c, "10.80.0.1")
	}
	// IPv6 goes through a tunnel here, whose MTU is smaller than the containers': the
	// host has to tell the sender.
	serve(t, all[0], "word")
	command(t, all[0], "dd", "if=/dev/zero", "of=/srv/big", "bs=1M", "count=4")
	for _, c := range all[1:] {
		for _, host := range []string{addressOf(t, all[0], "app").String(), "[fd00:80::11]"} {
			if out := command(t, c, "sh", "-c", "timeout 20 wget -q -O - http://"+host+"/big | wc -c"); strings.TrimSpace(out) != "4194304" {
				t.Errorf("container %s gets %s bytes of 4 MiB from %s", c.Name, out, host)
			}
		}
	}
}

// fetch asks for a page from where the command runs, and returns it.
func fetch(ctx context.Context, from hosts.Container, address string) (string, error) {
	return from.Exec(ctx, "timeout", "3", "wget", "-q", "-O", "-", "http://"+address+"/")
}

// hostFetch asks from the host itself.
func hostFetch(ctx context.Context, h *hosts.Host, address string) (out string, err error) {
	nsErr := hosts.InNetNS(h.NetNS(), func() error {
		// The socket belongs to this thread's namespace for good.
		dialer := net.Dialer{Timeout: 2 * time.Second}
		c, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
			return err
		}
		raw, err := io.ReadAll(c)
		out = string(raw)
		return err
	})
	if nsErr == nil && out == "" {
		nsErr = errors.New("the answer is empty")
	}
	return out, nsErr
}

// published reaches a port of the host from everywhere; then conflicts, ranges and
// ports of Docker's choice.
func (r *routed) published(t *testing.T) {
	a, b := r.lab.Hosts[0], r.lab.Hosts[1]
	web := run(t, a, "web", "--network", "app", "--ip", "10.80.1.99", "--ip6", "fd00:80::99", "-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "80:80")
	serve(t, web, "web")
	docker(t, a, "network", "create", "-d", hosts.PluginName, "-o", r.way, "--subnet", "10.81.0.0/16", "--gateway", "10.81.0.1", "other")
	here, there := a.Address.String(), "[fd00:80::99]:80"
	near := hosts.Container{Host: a, Name: "app00"}
	far := hosts.Container{Host: b, Name: "app10"}
	other := run(t, a, "other1", "--network", "other")
	bridge := run(t, a, "bridge1")
	for what, get := range map[string]func(context.Context) (string, error){
		"another host":                 func(ctx context.Context) (string, error) { return hostFetch(ctx, b, here+":8080") },
		"another host, port 80":        func(ctx context.Context) (string, error) { return hostFetch(ctx, b, here+":80") },
		"the host by its address":      func(ctx context.Context) (string, error) { return hostFetch(ctx, a, here+":8080") },
		"the host by 127.0.0.1":        func(ctx context.Context) (string, error) { return hostFetch(ctx, a, "127.0.0.1:8080") },
		"the host, port on 127.0.0.1":  func(ctx context.Context) (string, error) { return hostFetch(ctx, a, "127.0.0.1:8081") },
		"the container itself":         func(ctx context.Context) (string, error) { return fetch(ctx, web, here+":8080") },
		"one on the same network":      func(ctx context.Context) (string, error) { return fetch(ctx, near, here+":8080") },
		"one on another host":          func(ctx context.Context) (string, error) { return fetch(ctx, far, here+":8080") },
		"one on another Weft network":  func(ctx context.Context) (string, error) { return fetch(ctx, other, here+":8080") },
		"one on Docker's bridge":       func(ctx context.Context) (string, error) { return fetch(ctx, bridge, here+":8080") },
		"one on the network, by IPv6":  func(ctx context.Context) (string, error) { return fetch(ctx, far, there) },
		"one by its gateway's address": func(ctx context.Context) (string, error) { return fetch(ctx, near, "10.80.0.1:8080") },
	} {
		eventually(t, 20*time.Second, "the published port answers to "+what, func(ctx context.Context) error {
			out, err := get(ctx)
			if err == nil && !strings.Contains(out, "web") {
				err = fmt.Errorf("it answers %q", out)
			}
			return err
		})
	}
	if out, err := hostFetch(t.Context(), b, here+":8081"); err == nil {
		t.Errorf("a port of 127.0.0.1 answers to another host: %s", out)
	}

	// What the user forbids in Docker's chain for it holds here too.
	for _, rule := range []string{"-I", "-D"} {
		if _, err := a.Exec(t.Context(), "iptables", rule, "DOCKER-USER", "-d", "10.80.1.99", "-j", "DROP"); err != nil {
			t.Fatal(err)
		}
		if out, err := hostFetch(t.Context(), b, here+":8080"); (err == nil) != (rule == "-D") {
			t.Errorf("after %s of a rule in DOCKER-USER: %s, %v", rule, out, err)
		}
	}

	refused := func(what string, args ...string) {
		t.Helper()
		out, err := a.Docker(t.Context(), append(append([]string{"run", "--detach", "--name", "late"}, args...), hosts.Image, "sleep", "1")...)
		if err == nil || !strings.Contains(err.Error(), "8080") {
			t.Errorf("%s: %s, %v", what, out, err)
		}
		_, _ = a.Docker(t.Context(), "rm", "--force", "late")
	}
	refused("a port that another container has", "--network", "app", "-p", "8080:80")
	refused("a port that a container of Weft's has, on Docker's bridge", "-p", "8080:80")
	docker(t, a, "rm", "--force", "web")
	run(t, a, "bridge2", "-p", "8080:80")
	refused("a port that a container on Docker's bridge has", "--network", "app", "-p", "8080:80")
	docker(t, a, "rm", "--force", "bridge2")
	var l net.Listener
	if err := hosts.InNetNS(a.NetNS(), func() (err error) { l, err = net.Listen("tcp4", "0.0.0.0:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	refused("a port that a process has", "--network", "app", "-p", "8080:80")
	_ = l.Close()
	web = run(t, a, "web", "--network", "app", "--ip6", "fd00:80::a2", "-p", "8080-8082:80", "-p", "8090:80/udp")
	two := run(t, a, "web2", "--network", "app", "--ip6", "fd00:80::a3", "-p", "8080-8082:80")
	serve(t, web, "first")
	serve(t, two, "second")
	for port, want := range map[string]string{"8080": "first", "8081": "second"} {
		eventually(t, 20*time.Second, "a port of a range answers", func(ctx context.Context) error {
			out, err := hostFetch(ctx, b, here+":"+port)
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("port %s answers %q, want %s", port, out, want)
			}
			return err
		})
	}
	for _, h := range r.lab.Hosts {
		removeOthers(t, h)
	}
	docker(t, a, "network", "rm", "other")
	figure(t, r.way+": published ports on "+r.name, 1, "answer to 12 kinds of client; 4 conflicts refused")
}

// survives: the plugin is killed while containers on two hosts talk; then what it made
// is taken away piece by piece, and comes back.
func (r *routed) survives(t *testing.T) {
	a, b := r.lab.Hosts[0], r.lab.Hosts[1]
	from := run(t, a, "from", "--network", "app", "--ip6", "fd00:80::c1", "-p", "8080:80")
	to := run(t, b, "to", "--network", "app", "--ip6", "fd00:80::c2")
	serve(t, from, "from")
	address := addressOf(t, to, "app")
	reach(t, from, address.String())
	runs := 3
	if soak() {
		runs = 50
	}
	probe := startProbe(t, from, to, address)
	for range runs {
		for _, h := range r.lab.Hosts {
			pid, err := h.KillPlugin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := h.WaitPlugin(t.Context(), pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	report := lossless(t, probe)
	figure(t, r.way+": plugin killed on "+r.name, runs*len(r.lab.Hosts), "%d of %d packets lost (target 0)", report.Lost, report.Sent)
	for _, damage := range []string{
		"ip route flush table 4796", "ip -6 route flush table 4796", "ip rule del pref 4796", "ip -6 rule del pref 4796",
		"iptables -t nat -F", "iptables -t filter -F", "iptables -t raw -F", "ip6tables -t filter -F",
		"ip link del weftx4096", "ip neigh flush nud permanent",
		"for l in $(ls /sys/class/net | grep weftv); do ip addr flush dev $l; done",
		"for l in $(ls /sys/class/net | grep weftv); do ip link set $l down; done",
		"r=$(ip route show default); ip link set eth0 down; ip link set eth0 up; ip route replace $r",
	} {
		repaired(t, a, "rules rules6 entries links addresses routes", damage)
		eventually(t, 20*time.Second, "the published port answers after "+damage, func(ctx context.Context) error {
			_, err := hostFetch(ctx, b, a.Address.String()+":8080")
			return err
		})
		reach(t, from, address.String())
		reach(t, from, "fd00:80::c2")
		reach(t, to, b.Address.String())
	}
	// A route of somebody else's over the subnet takes nothing away, stays, and is told.
	if _, err := a.Exec(t.Context(), "ip", "route", "add", "10.80.2.0/24", "via", "192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	reach(t, from, address.String())
	if out, err := a.Exec(t.Context(), "weft", "status"); err == nil || !strings.Contains(out, "has the route 10.80.2.0/24 on eth0") {
		t.Errorf("weft status does not tell of the route: %v\n%s", err, out)
	}
	if _, err := a.Exec(t.Context(), "ip", "route", "del", "10.80.2.0/24", "via", "192.0.2.1"); err != nil {
		t.Error(err)
	}
	for _, c := range []hosts.Container{from, to} {
		docker(t, c.Host, "rm", "--force", c.Name)
	}
}

// isolation: nothing passes between networks, and nobody sends from another's address.
func (r *routed) isolation(t *testing.T) {
	a, b := r.lab.Hosts[0], r.lab.Hosts[1]
	for _, h := range r.lab.Hosts {
		docker(t, h, "network", "create", "-d", hosts.PluginName, "-o", r.way, "--subnet", "10.82.0.0/16", "--gateway", "10.82.0.1", "--ipam-driver", hosts.PluginName, "--internal", "-o", "vni=5082", "inner")
	}
	app, inner := run(t, a, "iso1", "--network", "app", "--ip6", "fd00:80::a1", "--cap-add", "NET_ADMIN"), run(t, a, "iso2", "--network", "inner", "--cap-add", "NET_ADMIN")
	appB, innerB := run(t, b, "iso3", "--network", "app", "--ip6", "fd00:80::b1"), run(t, b, "iso4", "--network", "inner")
	bridge := run(t, a, "iso5")
	reach(t, inner, addressOf(t, innerB, "inner").String())
	reach(t, app, addressOf(t, appB, "app").String())
	for _, pair := range [][2]hosts.Container{{app, inner}, {app, innerB}, {inner, app}, {inner, appB}, {bridge, app}, {bridge, inner}, {app, bridge}} {
		network := "bridge"
		if strings.HasPrefix(pair[1].Name, "iso") && pair[1].Name != "iso5" {
			network = map[bool]string{true: "app", false: "inner"}[pair[1].Name == "iso1" || pair[1].Name == "iso3"]
		}
		silent(t, pair[0], addressOf(t, pair[1], network).String())
	}
	// Out of an internal network, also by a route of the container's own making.
	command(t, inner, "ip", "route", "add", "default", "via", "10.82.0.1")
	silent(t, inner, b.Address.String())
	// From another's address.
	command(t, app, "ip", "addr", "add", addressOf(t, appB, "app").String()+"/32", "dev", "lo")
	if out, err := app.Exec(t.Context(), "ping", "-c", "1", "-W", "1", "-I", addressOf(t, appB, "app").String(), "10.80.0.1"); err == nil {
		t.Errorf("a container sends from another's address: %s", out)
	}
	for _, h := range r.lab.Hosts {
		removeOthers(t, h)
		docker(t, h, "network", "rm", "inner", "app")
	}
}

func (r *routed) nothingLeft(t *testing.T) {
	for i, h := range r.lab.Hosts {
		clean(t, h)
		unleaked(t, h, r.first[i], "plugin file", "mount", "route", "route6", "link")
		if out, _ := h.Exec(t.Context(), "sh", "-c", "ip rule; ip route show table 4796; ip -6 route show table 4796; iptables-save; ip6tables-save"); strings.Contains(out, "4796") || strings.Contains(out, "WEFT") {
			t.Errorf("host %s still has\n%s", h.Name, out)
		}
	}
}

// routed runs a service on a routed network of the Swarm, which publishes a port on each
// host that has a task.
func (s *swarm) routed(t *testing.T) {
	a := s.lab.Hosts[0]
	s.network(t, "way", 83, "-o", "mode=routed")
	tasks := s.service(t, "way-web", 3, "--network", "way", "--publish", "mode=host,target=80,published=8080")
	s.mesh(t, "way", tasks)
	resolves(t, s.lab.Container(tasks[0]), "way-web", "way", tasks)
	for _, task := range tasks {
		h := s.lab.Host(task.Host)
		eventually(t, 20*time.Second, "the published port on host "+h.Name+" answers", func(ctx context.Context) error {
			_, err := hostFetch(ctx, a, h.Address.String()+":8080")
			return err
		})
	}
	figure(t, "swarm: service on a routed network on "+s.name, 1, "%d tasks reach each other, the port of each host answers; addresses that two have: %d (target 0)", len(tasks), s.duplicates(t, s.lab.Hosts...))
	s.removeServices(t, "way-web")
	s.removeNetworks(t, "way")
	s.forgotten(t)
}
