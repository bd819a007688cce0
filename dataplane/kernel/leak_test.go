package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// TestNoVXLANFromContainers has a container behind a bridge of Docker's, which the host
// masquerades, send VXLAN to a peer, as if the host had: it must not leave the host.
func TestNoVXLANFromContainers(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "ipv4 underlay", true: "ipv6 underlay"}[v6], func(t *testing.T) { leaks(t, v6) })
	}
}

func leaks(t *testing.T, v6 bool) {
	fabric := kerneltest.NewPlace(t)
	fabric.Run(t, "ip link add fabric type bridge\nip link set fabric up")
	a, b := newMachine(t, fabric, 1, v6), newMachine(t, fabric, 2, v6)
	a.endpoint(10)
	b.endpoint(11)
	a.program(t, a, b)
	b.program(t, a, b)
	b.start(t)
	b.program(t, a, b)

	tables := "iptables"
	gateway, address, all := netip.MustParsePrefix("172.30.0.1/24"), netip.MustParsePrefix("172.30.0.2/24"), "0.0.0.0/0"
	if v6 {
		tables = "ip6tables"
		gateway, address, all = netip.MustParsePrefix("fd30::1/64"), netip.MustParsePrefix("fd30::2/64"), "::/0"
	}
	c := kerneltest.NewPlace(t)
	kerneltest.Wire(t, c, "eth0", []netip.Prefix{address}, a.Place, "docker0", []netip.Prefix{gateway})
	c.Run(t, "ip route add "+all+" via "+gateway.Addr().String())
	a.Run(t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\n"+tables+" -t nat -A POSTROUTING -s "+address.Masked().String()+" ! -o docker0 -j MASQUERADE")

	target := b.endpoints[0]
	var in net.PacketConn
	var out net.Conn
	var err, err2 error
	b.containers[0].Do(func() { in, err = net.ListenPacket("udp4", netip.AddrPortFrom(target.IPv4.Addr(), 7001).String()) })
	c.Do(func() { out, err2 = net.Dial("udp", netip.AddrPortFrom(b.self.Address, kerneltest.Port).String()) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), out.Close() }()
	injects := func(wait time.Duration) bool {
		t.Helper()
		for range 3 {
			if _, err := out.Write(vxlanFrame(a.endpoints[0], target, 7001, 1)); err != nil {
				t.Fatal(err)
			}
		}
		_ = in.SetReadDeadline(time.Now().Add(wait))
		_, _, err := in.ReadFrom(make([]byte, 100))
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return err == nil
	}
	if injects(300 * time.Millisecond) {
		t.Error("a container's VXLAN reached one of a peer")
	}
	// Either table alone keeps it in, and without both it comes through.
	for _, table := range []string{"raw", "filter"} {
		a.Run(t, tables+" -t "+table+" -F")
		if injects(300 * time.Millisecond) {
			t.Errorf("with %s flushed, a container's VXLAN reached one of a peer", table)
		}
		a.program(t, a, b)
	}
	a.Run(t, tables+" -t raw -F\n"+tables+" -F")
	if !injects(5 * time.Second) {
		t.Error("without rules, the test's own packet does not come through")
	}
}
