package tests

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// flowView is a flow as `weft flows -o json` shows it.
type flowView struct {
	Source, Destination struct {
		Address                  netip.Addr
		Pretends                 bool
		Host, Container, Service string
		Labels                   map[string]string
	}
	Virtual        netip.Addr
	VirtualService string
	Protocol       string
	Port           uint16
	Verdict        string
	Packets, Bytes int
	First, Last    time.Time
}

// TestFlows sends a known number of packets and reads them in weft flows, by the names
// of the containers.
func TestFlows(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 2, nil)
	install(t, lab, pluginDir(t, "", ""))
	createNetwork(t, lab, "app", 32)
	a, b := lab.Hosts[0], lab.Hosts[1]
	f := &flows{a: a, b: b,
		web: run(t, a, "web", "--network", "app", "--label", "com.docker.compose.service=front", "--label", "tier=1"),
		db:  run(t, a, "db", "--network", "app"),
		api: run(t, b, "api", "--network", "app")}
	for _, to := range []hosts.Container{f.db, f.api} {
		reach(t, f.web, addressOf(t, to, "app").String())
	}
	for _, scene := range []struct {
		name string
		play func(*testing.T)
	}{
		{"counted", f.counted},
		{"dropped", f.dropped},
		{"followed", f.followed},
		{"plugin killed", f.pluginKilled},
		{"bounded", f.bounded},
		{"switched off", f.switchedOff},
	} {
		if !t.Run(scene.name, scene.play) {
			return
		}
	}
}

// flows is host a with the containers web and db, and host b with api.
type flows struct {
	a, b         *hosts.Host
	web, db, api hosts.Container
}

const (
	flowPayload = 100
	flowHeaders = 14 + 20 + 8 // Ethernet, IPv4, UDP
)

// send sends UDP packets from a container, from as many sockets as clients.
func (f *flows) send(t *testing.T, from hosts.Container, local string, to hosts.Container, port, clients, each int) {
	t.Helper()
	at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(addressOf(t, to, "app"), uint16(port)))
	err := inside(t, from, func() error {
		for range clients {
			c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(local)})
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			for range each {
				if _, err := c.WriteToUDP(make([]byte, flowPayload), at); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// of returns the flows from one container to another at a UDP port, and the sums.
func (f *flows) of(t *testing.T, from, to hosts.Container, port int) (found []flowView, packets, bytes int) {
	t.Helper()
	at := addressOf(t, to, "app")
	for _, v := range view[[]flowView](t, from.Host, "flows") {
		if v.Source.Container == from.Name && v.Destination.Address == at && v.Protocol == "udp" && int(v.Port) == port {
			found, packets, bytes = append(found, v), packets+v.Packets, bytes+v.Bytes
		}
	}
	return found, packets, bytes
}

func (f *flows) counted(t *testing.T) {
	const clients, each = 3, 100
	for _, c := range []struct {
		from, to  hosts.Container
		host      string // of to
		container string // its name, where Docker of the sender's host knows it
	}{{f.web, f.db, "a", "db"}, {f.web, f.api, "b", ""}, {f.api, f.web, "a", ""}} {
		f.send(t, c.from, "", c.to, 5000, clients, each)
		found, packets, bytes := f.of(t, c.from, c.to, 5000)
		if packets != clients*each || bytes != packets*(flowPayload+flowHeaders) || len(found) == 0 || len(found) > 2 {
			t.Errorf("%s to %s: %d packets, %d bytes in %+v; want %d packets in a flow for each verdict", c.from.Name, c.to.Name, packets, bytes, found, clients*each)
		}
		for _, v := range found {
			if v.Verdict != "fast" && v.Verdict != "slow" || v.Source.Host != c.from.Host.Name || v.Destination.Host != c.host || v.Destination.Container != c.container || v.Source.Pretends || v.Last.Before(v.First) {
				t.Errorf("%s to %s: %+v", c.from.Name, c.to.Name, v)
			}
			if c.from.Name == "web" && (v.Source.Service != "front" || v.Source.Labels["tier"] != "1") {
				t.Errorf("service and labels of web: %+v", v.Source)
			}
		}
	}
	if out, err := f.a.Exec(t.Context(), "weft", "flows"); err != nil || !strings.Contains(out, addressOf(t, f.api, "app").String()+" on b") {
		t.Errorf("%v\n%s", err, out)
	}
	figure(t, "flows: UDP packets counted of those sent", 3*clients*each, "on one host and across hosts, both ways: all, each once")
}

// dropped sends from an address that web does not have.
func (f *flows) dropped(t *testing.T) {
	const other, each = "10.32.200.9", 50
	link := interfaceOf(t, f.web, addressOf(t, f.web, "app").String())
	ipBatch(t, netnsOf(t, f.web), "address add "+other+"/32 dev "+link)
	f.send(t, f.web, other, f.db, 5001, 1, each)
	ipBatch(t, netnsOf(t, f.web), "address delete "+other+"/32 dev "+link)
	found, packets, _ := f.of(t, f.web, f.db, 5001)
	if len(found) != 1 || packets != each || found[0].Verdict != "dropped: ipv4" || !found[0].Source.Pretends || found[0].Source.Address.String() != other {
		t.Errorf("want %d packets dropped for their address: %+v", each, found)
	}
	if out, err := f.a.Exec(t.Context(), "weft", "flows"); err != nil || !strings.Contains(out, "web as "+other) {
		t.Errorf("%v\n%s", err, out)
	}
	if out := f.metrics(t); !strings.Contains(out, fmt.Sprintf(`weft_flow_packets_total{reason="ipv4",verdict="dropped"} %d`, each)) {
		t.Errorf("the sum is not in the metrics:\n%s", out)
	}
	figure(t, "flows: packets dropped by the guard, shown", each, "under the container that sent them, with the reason")
}

func (f *flows) metrics(t *testing.T) string {
	t.Helper()
	raw, err := ask(t.Context(), f.a, "weft-admin.sock", http.MethodGet, "/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// followed sends until weft flows -f has told of it.
func (f *flows) followed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := f.a.Command(ctx, "weft", "flows", "-f")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	told := make(chan bool)
	go func() { // ends with the command
		defer close(told)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.Contains(lines.Text(), "web -> db  udp/5002  fast  ") {
				told <- true
				return
			}
		}
	}()
	for seen := false; !seen; {
		f.send(t, f.web, "", f.db, 5002, 1, 10)
		select {
		case seen = <-told:
			if !seen {
				t.Fatalf("weft flows -f ended and did not tell: %v", cmd.Wait())
			}
		case <-time.After(50 * time.Millisecond):
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("interrupted: %v", err)
	}
}

// pluginKilled: the counts outlive the plugin's process.
func (f *flows) pluginKilled(t *testing.T) {
	if _, err := f.a.KillPlugin(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.send(t, f.web, "", f.db, 5000, 1, 100) // while it is away
	eventually(t, 20*time.Second, "the plugin is back", func(ctx context.Context) error {
		_, err := f.a.Exec(ctx, "weft", "flows")
		return err
	})
	if found, packets, _ := f.of(t, f.web, f.db, 5000); packets != 400 {
		t.Errorf("want the 300 packets of before and 100 that were sent meanwhile: %+v", found)
	}
}

// bounded scans more ports than flows are kept.
func (f *flows) bounded(t *testing.T) {
	sent, targets := 0, []netip.Addr{addressOf(t, f.db, "app"), addressOf(t, f.api, "app")}
	err := inside(t, f.web, func() error {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 65535})
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		for _, address := range targets {
			for port := uint16(1); port < 65535; port++ {
				if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(address, port)); err != nil {
					return err
				}
				sent++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	kept := len(view[[]flowView](t, f.a, "flows"))
	found, _, _ := f.of(t, f.web, f.api, 65534)
	if kept > 65536 || kept < 32768 || len(found) != 1 {
		t.Errorf("after %d flows %d are kept, of at most 65536; the last one is %+v", sent, kept, found)
	}
	if n := metric(t, f.a, "weft_flows"); n > 65536 || n < 32768 {
		t.Errorf("weft_flows is %v", n)
	}
	figure(t, "flows kept while a container scans ports", sent, "%d of at most 65536, the latest among them", kept)
}

func (f *flows) switchedOff(t *testing.T) {
	configure(t, f.b, "WEFT_FLOWS=off")
	eventually(t, 20*time.Second, "the program does not count", func(ctx context.Context) error {
		out, err := f.b.Exec(ctx, "weft", "plan", "host")
		if err != nil || strings.Contains(out, " flows") || !strings.Contains(out, "program ") {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	if out, err := f.b.Exec(t.Context(), "weft", "flows"); err == nil || !strings.Contains(err.Error(), "WEFT_FLOWS=off") {
		t.Errorf("%v\n%s", err, out)
	}
	clean(t, f.b)
}

// TestFlowsOfServices asks a Swarm service at its virtual address; a manager's weft flows
// names service and tasks, whatever their host.
func TestFlowsOfServices(t *testing.T) {
	t.Parallel()
	s := newSwarm(t, engines(t)["newest"], false, "WEFT_SCOPE=global", "docker.source=/run/docker.sock")
	s.network(t, "app", 60)
	s.service(t, "web", 3, "--network", "app", "--endpoint-mode", "vip")
	v := &vips{swarm: s, address: (&vips{swarm: s}).virtual(t, "web")}
	client := run(t, s.lab.Hosts[0], "client", "--network", "app")
	v.balanced(t, client, 3)
	tasks := map[string]string{} // host by name
	for _, f := range view[[]flowView](t, client.Host, "flows") {
		// What was sent to the address before this host knew the service has no task.
		if f.Source.Container != "client" || f.Protocol != "tcp" || f.Port != 80 || f.Destination.Address == v.address {
			continue
		}
		if f.VirtualService != "web" || f.Virtual != v.address || f.Destination.Service != "web" || f.Packets == 0 {
			t.Errorf("%+v", f)
		}
		tasks[f.Destination.Container] = f.Destination.Host
	}
	for _, name := range []string{"web.1", "web.2", "web.3"} {
		if tasks[name] == "" {
			t.Errorf("%s is not among the tasks that were asked: %v", name, tasks)
		}
	}
}
