package tests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// acrossHosts makes a dual-stack network on both hosts and talks over it: ping and
// TCP, IPv4 and IPv6.
func acrossHosts(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	createNetwork(t, lab, "app", 32, "--ipv6", "--subnet", "fd00:32::/64", "--attachable")
	web := run(t, a, "web", "--network", "app", "--ip", "10.32.1.10", "--ip6", "fd00:32::a", "--network-alias", "shop")
	client := run(t, b, "client", "--network", "app", "--ip", "10.32.2.10", "--ip6", "fd00:32::b")
	start := time.Now()
	reach(t, client, "10.32.1.10")
	reach(t, web, "10.32.2.10")
	reach(t, client, "fd00:32::a")
	reach(t, web, "fd00:32::b")
	figure(t, "containers on two hosts reach each other", 1, "IPv4 and IPv6 both ways in %s", time.Since(start).Round(time.Millisecond))
	serve(t, web, "welcome")
	fetches(t, netnsOf(t, client), "http://10.32.1.10/", "welcome")
	fetches(t, netnsOf(t, client), "http://[fd00:32::a]/", "welcome")
	if n := networkOf(t, a, "app"); n.Endpoints != 1 || n.Remote != 1 || len(n.Peers) != 1 || n.Peers[0] != "b" {
		t.Errorf("weft networks on a: %+v", n)
	}
	for _, h := range lab.Hosts {
		clean(t, h)
	}
}

// frames sends the largest packet that may not be fragmented, one byte more, a
// broadcast and a multicast across the hosts.
func frames(t *testing.T, lab *hosts.Lab) {
	web, client := hosts.Container{Host: lab.Hosts[0], Name: "web"}, hosts.Container{Host: lab.Hosts[1], Name: "client"}
	link := interfaceOf(t, client, "10.32.2.10")
	want := lab.Underlay.MTU - 50
	if got := mtuOf(t, client, link); got != want {
		t.Errorf("the MTU in the container is %d, want the underlay's %d - 50", got, lab.Underlay.MTU)
	}
	const headers = 28 // IPv4 and UDP
	for _, to := range []struct{ listen, send string }{
		{"10.32.2.10:7001", "10.32.2.10:7001"},
		{"0.0.0.0:7002", "10.32.255.255:7002"},
		{"239.1.2.3:7003", "239.1.2.3:7003"},
	} {
		if err := delivers(t, web, client, "10.32.1.10", link, to.listen, to.send, want-headers); err != nil {
			t.Errorf("a packet of %d bytes to %s: %v", want, to.send, err)
		}
	}
	err := delivers(t, web, client, "10.32.1.10", link, "10.32.2.10:7004", "10.32.2.10:7004", want-headers+1)
	if !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("a packet of %d bytes that must not be fragmented: %v, want %v", want+1, err, syscall.EMSGSIZE)
	}
	figure(t, "MTU", 1, "%d inside of %d; the largest packet, a broadcast and a multicast arrive whole", want, lab.Underlay.MTU)
}

// delivers sends a UDP packet that must not be fragmented from one container and
// waits for it in the other, where link joins multicast groups.
func delivers(t *testing.T, from, to hosts.Container, source, link, listen, send string, size int) error {
	t.Helper()
	var in, out *net.UDPConn
	err := inside(t, to, func() (err error) {
		at := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(listen))
		if at.IP.IsMulticast() {
			i, err := net.InterfaceByName(link)
			if err != nil {
				return err
			}
			in, err = net.ListenMulticastUDP("udp4", i, at)
			return err
		}
		in, err = net.ListenUDP("udp4", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	err = inside(t, from, func() (err error) {
		// The source address also chooses the link of a multicast.
		at := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0))
		out, err = net.DialUDP("udp4", at, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(send)))
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	return arrives(out, in, false, size)
}

// arrives sends a datagram with so many bytes that must not be fragmented, until it is
// received whole.
func arrives(out, in *net.UDPConn, v6 bool, size int) error {
	raw, err := out.SyscallConn()
	if err != nil {
		return err
	}
	level, option := syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER
	if v6 {
		level, option = syscall.IPPROTO_IPV6, syscall.IPV6_MTU_DISCOVER
	}
	cerr := raw.Control(func(fd uintptr) { // both families have the same values
		err = syscall.SetsockoptInt(int(fd), level, option, syscall.IP_PMTUDISC_DO)
	})
	if err = errors.Join(cerr, err); err != nil {
		return err
	}
	buf := make([]byte, 1<<16)
	for range 5 { // UDP may be lost once
		if _, err = out.Write(make([]byte, size)); err != nil {
			return err
		}
		_ = in.SetReadDeadline(time.Now().Add(time.Second))
		var n int
		if n, err = in.Read(buf); err == nil {
			if n != size {
				return fmt.Errorf("%d bytes arrived of %d", n, size)
			}
			return nil
		}
	}
	return err
}

// endpointOptions looks at what --ip, --ip6, --mac-address, --network-alias and a
// second network did.
func endpointOptions(t *testing.T, lab *hosts.Lab) {
	a := lab.Hosts[0]
	docker(t, a, "network", "create", "-d", hosts.PluginName, "--subnet", "10.42.0.0/24", "second")
	c := runFixed(t, a)
	docker(t, a, "network", "connect", "--ip", "10.42.0.77", "second", "fixed")
	link := interfaceOf(t, c, "10.32.1.77")
	if link != interfaceOf(t, c, "fd00:32::77") {
		t.Error("the IPv6 address is on another link than the IPv4 address")
	}
	mac := command(t, c, "cat", "/sys/class/net/"+link+"/address")
	told := docker(t, a, "inspect", "--format", `{{(index .NetworkSettings.Networks "app").MacAddress}}`, "fixed")
	if mac != "02:11:22:33:44:55" || told != mac {
		t.Errorf("the MAC address is %s, and Docker says %s; want 02:11:22:33:44:55", mac, told)
	}
	second := interfaceOf(t, c, "10.42.0.77")
	if second == link {
		t.Errorf("both networks are on %s", link)
	}
	if out, err := c.Exec(t.Context(), "nslookup", "shop", "127.0.0.11"); err != nil || !strings.Contains(out, "10.32.1.10") {
		t.Errorf("the alias shop does not resolve: %s %v", out, err)
	}
	other := run(t, a, "other", "--network", "second", "--ip", "10.42.0.78")
	reach(t, c, "10.42.0.78")
	reach(t, other, "10.42.0.77")
	reach(t, c, "10.32.2.10") // across hosts
	docker(t, a, "rm", "--force", "other")
}

// runFixed runs a container with fixed addresses. Newer docker commands do not
// know how to ask an older engine for a MAC address; its API still does.
func runFixed(t *testing.T, h *hosts.Host) hosts.Container {
	t.Helper()
	body := fmt.Sprintf(`{"Image":%q,"Cmd":["sleep","infinity"],"StopTimeout":1,"MacAddress":"02:11:22:33:44:55","HostConfig":{"NetworkMode":"app"},
		"NetworkingConfig":{"EndpointsConfig":{"app":{"IPAMConfig":{"IPv4Address":"10.32.1.77","IPv6Address":"fd00:32::77"}}}}}`, hosts.Image)
	client := unixClient(filepath.Join(h.Dir, "docker.sock"))
	resp, err := client.Post("http://docker/v1.41/containers/create?name=fixed", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	said, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("create a container by the API: status %d: %s", resp.StatusCode, said)
	}
	docker(t, h, "start", "fixed")
	return hosts.Container{Host: h, Name: "fixed"}
}

// connectWhileRunning plugs a running container into a network and out again.
func connectWhileRunning(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	client := hosts.Container{Host: b, Name: "client"}
	late := run(t, a, "late", "--network", "second")
	silent(t, late, "10.32.2.10")
	docker(t, a, "network", "connect", "--ip", "10.32.1.88", "--ip6", "fd00:32::88", "app", "late")
	start := time.Now()
	reach(t, client, "10.32.1.88")
	figure(t, "connect while running", 1, "reached from another host %s after", time.Since(start).Round(time.Millisecond))
	reach(t, late, "fd00:32::b")
	docker(t, a, "network", "disconnect", "app", "late")
	silent(t, late, "10.32.2.10")
	eventually(t, 10*time.Second, "host b forgets the endpoint", func(context.Context) error {
		for _, e := range view[[]endpointView](t, b, "endpoints") {
			if e.IPv4 == netip.MustParseAddr("10.32.1.88") {
				return fmt.Errorf("%+v", e)
			}
		}
		return nil
	})
	docker(t, a, "rm", "--force", "late", "fixed")
	docker(t, a, "network", "rm", "second")
}

// published asks a published port on every address of its host, and docker ps.
func published(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	c := run(t, a, "pub", "--network", "app", "-p", "8080:80")
	serve(t, c, "published")
	fetches(t, b.NetNS(), "http://"+a.Address.String()+":8080/", "published")
	fetches(t, a.NetNS(), "http://"+a.Address.String()+":8080/", "published")
	fetches(t, a.NetNS(), "http://127.0.0.1:8080/", "published")
	if out := docker(t, a, "ps", "--filter", "name=pub", "--format", "{{.Ports}}"); !strings.Contains(out, "0.0.0.0:8080->80/tcp") {
		t.Errorf("docker ps shows %q", out)
	}
	// The way out: the underlay's gateway answers through Docker's masquerading.
	reach(t, c, "192.0.2.1")
	docker(t, a, "rm", "--force", "pub")
}

// internalNetwork has no way out, and Docker adds no bridge of its own, whichever way
// the user says it.
func internalNetwork(t *testing.T, lab *hosts.Lab) {
	for _, way := range [][]string{{"--internal"}, {"-o", "internal"}} {
		t.Run(strings.TrimLeft(way[0], "-"), func(t *testing.T) { isInternal(t, lab, way...) })
	}
}

func isInternal(t *testing.T, lab *hosts.Lab, way ...string) {
	createNetwork(t, lab, "inner", 43, append(way, "-o", "vni=5043")...)
	a, b := lab.Hosts[0], lab.Hosts[1]
	one, two := run(t, a, "in1", "--network", "inner", "--ip", "10.43.1.10"), run(t, b, "in2", "--network", "inner", "--ip", "10.43.2.10")
	reach(t, one, "10.43.2.10")
	reach(t, two, "10.43.1.10")
	if out := command(t, one, "ip", "route"); strings.Contains(out, "default") || strings.Contains(out, "172.") {
		t.Errorf("a container of an internal network has a way out:\n%s", out)
	}
	silent(t, one, "192.0.2.1")
	silent(t, one, a.Address.String())
	for _, h := range lab.Hosts {
		docker(t, h, "rm", "--force", "in1", "in2")
		docker(t, h, "network", "rm", "inner")
	}
}

// isolation tries, as a container that may change its own routes, to reach the
// hosts and another network through the bridge.
func isolation(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	// By number: the hosts' lowest free VNIs can differ for a moment after a network
	// was removed on both.
	createNetwork(t, lab, "other", 44, "--ipv6", "--subnet", "fd00:44::/64", "-o", "vni=5044")
	target := run(t, a, "target", "--network", "other", "--ip", "10.44.1.10", "--ip6", "fd00:44::10")
	remote := run(t, b, "remote", "--network", "other", "--ip", "10.44.2.10", "--ip6", "fd00:44::20")
	reach(t, target, "10.44.2.10")
	reach(t, remote, "fd00:44::10")
	tried := 0
	for _, h := range []*hosts.Host{a, b} {
		spy := run(t, h, "spy", "--network", "app")
		if h == a { // by its way out, in its host's name
			if got := [2]bool{injects(t, netnsOf(t, spy), remote, "10.44.2.10", 5044), injects(t, a.NetNS(), remote, "10.44.2.10", 5044)}; got != [2]bool{false, true} {
				t.Errorf("VXLAN of a container and of its host is accepted by a peer: %v, want false, true", got)
			}
			tried++
		}
		others := []string{"10.44.1.10", "10.44.2.10", "fd00:44::10", "fd00:44::20"}
		macs := []string{bridgeMAC(t, a, "app"), bridgeMAC(t, b, "app"), bridgeMAC(t, h, "other")}
		tried += closed(t, spy, "app", lab, macs, others...)
		if h == a { // by Docker's own bridge, which both have a link to
			gw := command(t, target, "sh", "-c", "ip -o -4 address show | grep -o '172[0-9.]*' | head -1")
			silent(t, spy, gw)
			tried++
		}
		docker(t, h, "rm", "--force", "spy")
	}
	figure(t, "isolation", tried, "ways tried from a container to the hosts and to another network: 0 open")
	docker(t, a, "rm", "--force", "target")
	docker(t, b, "rm", "--force", "remote")
	for _, h := range lab.Hosts {
		docker(t, h, "network", "rm", "other")
	}
}

// closed fails the test if openWays finds any. It returns how many it tried.
func closed(t *testing.T, spy hosts.Container, network string, lab *hosts.Lab, macs []string, more ...string) int {
	t.Helper()
	open, tried := openWays(t, spy, network, lab, macs, more...)
	for _, way := range open {
		t.Errorf("container %s on host %s: %s", spy.Name, spy.Host.Name, way)
	}
	return tried
}

// openWays tries to reach every host of the lab and more addresses from a container,
// as if it had changed its own routes, by frames to the MAC addresses given. It
// returns what is open, and how many ways it tried. What a host takes in silence
// counts as open too.
func openWays(t *testing.T, spy hosts.Container, network string, lab *hosts.Lab, macs []string, more ...string) (open []string, tried int) {
	t.Helper()
	link := interfaceOf(t, spy, addressOf(t, spy, network).String())
	ways := more
	for _, h := range lab.Hosts {
		ways = append(ways, h.Address.String(), h.Address6.String())
	}
	ears := listenOn(t, lab)
	for _, mac := range macs {
		all := append([]string{linkLocal(t, mac)}, ways...)
		var set, try strings.Builder
		for _, to := range all {
			fmt.Fprintf(&set, "neigh replace %s lladdr %s dev %s nud permanent\nroute replace %s dev %s\n", to, mac, link, to, link)
			fmt.Fprintf(&try, "(ping -c 2 -i 0.2 -W 1 -I %s %s >/dev/null 2>&1 && echo %s) & ", link, to, to)
		}
		ipBatch(t, netnsOf(t, spy), set.String())
		err := inside(t, spy, func() error {
			for _, to := range all {
				if err := say(to, link); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for to := range strings.FieldsSeq(command(t, spy, "sh", "-c", try.String()+"wait")) {
			open = append(open, to+" answers frames to "+mac)
		}
	}
	for name, ear := range ears {
		_ = ear.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, from, err := ear.ReadFrom(make([]byte, 100)); err == nil {
			open = append(open, fmt.Sprintf("host %s takes a packet of %s", name, from))
		}
		_ = ear.Close()
	}
	return open, len(macs) * (len(ways) + 1)
}

// ipBatch runs lines of the ip command in a network namespace.
func ipBatch(t *testing.T, netns, lines string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "nsenter", "--net="+netns, "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip -batch: %v: %s\n%s", err, out, lines)
	}
}

// say sends a UDP packet to earPort.
func say(to, link string) error {
	if strings.HasPrefix(to, "fe80") {
		// By number: package net remembers names, of other namespaces too.
		i, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		to += "%" + strconv.Itoa(i.Index)
	}
	conn, err := net.Dial("udp", net.JoinHostPort(to, strconv.Itoa(earPort)))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = conn.Write([]byte("hear me"))
	return err
}

// earPort is where the hosts of a lab listen for what they must not hear.
const earPort = 7070

func listenOn(t *testing.T, lab *hosts.Lab) map[string]net.PacketConn {
	t.Helper()
	ears := map[string]net.PacketConn{}
	for _, h := range lab.Hosts {
		err := hosts.InNetNS(h.NetNS(), func() (err error) {
			ears[h.Name], err = net.ListenPacket("udp", fmt.Sprintf(":%d", earPort))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return ears
}

// linkLocal is the address that a kernel with IPv6 derives from a MAC address
// (RFC 4291, appendix A).
func linkLocal(t *testing.T, mac string) string {
	t.Helper()
	m, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]}).String()
}

// bridgeMAC returns the MAC address of a network's bridge.
func bridgeMAC(t *testing.T, h *hosts.Host, network string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "cat", "/sys/class/net/"+networkOf(t, h, network).Bridge+"/address")
	if err != nil {
		t.Fatal(err)
	}
	return out
}
