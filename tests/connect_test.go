package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
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
	fetches(t, inContainer(t, client), "http://10.32.1.10/", "welcome")
	fetches(t, inContainer(t, client), "http://[fd00:32::a]/", "welcome")
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
	raw, err := out.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER, syscall.IP_PMTUDISC_DO)
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
	c := run(t, a, "fixed", "--network", "app", "--ip", "10.32.1.77", "--ip6", "fd00:32::77", "--mac-address", "02:11:22:33:44:55")
	docker(t, a, "network", "connect", "--ip", "10.42.0.77", "second", "fixed")
	link := interfaceOf(t, c, "10.32.1.77")
	if link != interfaceOf(t, c, "fd00:32::77") {
		t.Error("the IPv6 address is on another link than the IPv4 address")
	}
	// Docker's older API has no MAC address per network, and newer engines drop it.
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
	fetches(t, onHost(t, b), "http://"+a.Address.String()+":8080/", "published")
	fetches(t, onHost(t, a), "http://"+a.Address.String()+":8080/", "published")
	fetches(t, onHost(t, a), "http://127.0.0.1:8080/", "published")
	if out := docker(t, a, "ps", "--filter", "name=pub", "--format", "{{.Ports}}"); !strings.Contains(out, "0.0.0.0:8080->80/tcp") {
		t.Errorf("docker ps shows %q", out)
	}
	// The way out: the underlay's gateway answers through Docker's masquerading.
	reach(t, c, "192.0.2.1")
	docker(t, a, "rm", "--force", "pub")
}

// internalNetwork has no way out, and Docker adds no bridge of its own.
func internalNetwork(t *testing.T, lab *hosts.Lab) {
	createNetwork(t, lab, "inner", 43, "--internal")
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
// host and another network through the bridge.
func isolation(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	createNetwork(t, lab, "other", 44, "--ipv6", "--subnet", "fd00:44::/64")
	target := run(t, a, "target", "--network", "other", "--ip", "10.44.1.10", "--ip6", "fd00:44::10")
	remote := run(t, b, "remote", "--network", "other", "--ip", "10.44.2.10", "--ip6", "fd00:44::20")
	reach(t, target, "10.44.2.10")
	reach(t, remote, "fd00:44::10")
	for _, h := range []*hosts.Host{a, b} {
		spy := run(t, h, "spy", "--network", "app", "--cap-add", "NET_ADMIN")
		tried := closed(t, spy, "app", "other", "10.44.1.10", "10.44.2.10", "fd00:44::10", "fd00:44::20")
		// By Docker's bridge, which both have a link to.
		gw := command(t, target, "sh", "-c", "ip -o -4 address show | grep -o '172[0-9.]*' | head -1")
		if h == a && gw != "" {
			silent(t, spy, gw)
			tried++
		}
		if h == b {
			figure(t, "isolation", tried*2, "ways tried from a container to its host and to another network: 0 open")
		}
		docker(t, h, "rm", "--force", "spy")
	}
	docker(t, a, "rm", "--force", "target")
	docker(t, b, "rm", "--force", "remote")
	for _, h := range lab.Hosts {
		docker(t, h, "network", "rm", "other")
	}
}

// closed tries every address of the host and of another network, with frames sent
// to the bridge's and to the other bridge's MAC address, and returns how many ways
// it tried.
func closed(t *testing.T, spy hosts.Container, network, other string, targets ...string) int {
	t.Helper()
	h := spy.Host
	link := interfaceOf(t, spy, addressOf(t, spy, network).String())
	ways := append([]string{h.Address.String(), h.Address6.String(), "fe80::1"}, targets...)
	bridge := networkOf(t, h, network).Bridge
	macs := []string{bridgeMAC(t, h, bridge)}
	if other != "" {
		macs = append(macs, bridgeMAC(t, h, networkOf(t, h, other).Bridge))
	}
	for _, mac := range macs {
		for _, to := range ways {
			family, bits := "-4", "/32"
			if strings.Contains(to, ":") {
				family, bits = "-6", "/128"
			}
			command(t, spy, "sh", "-c", fmt.Sprintf("ip %s neigh replace %s lladdr %s dev %s nud permanent; ip %s route replace %s%s dev %s",
				family, to, mac, link, family, to, bits, link))
			silent(t, spy, to, "-I", link)
		}
	}
	return len(macs) * len(ways)
}

func bridgeMAC(t *testing.T, h *hosts.Host, bridge string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "cat", "/sys/class/net/"+bridge+"/address")
	if err != nil {
		t.Fatal(err)
	}
	return out
}
