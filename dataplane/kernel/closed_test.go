package kernel_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kerneltest"
)

// layers keep packets of an encrypted network off the underlay, each alone; with the
// command that takes it away. Rules in raw do it only while no route leads back, and not
// with what has come out of the tunnel.
var layers = []struct {
	name, without string
	tunnel        bool // it keeps that, too
}{
	{"routes", "ip rule del pref 4796\nip -6 rule del pref 4796\nip route flush table 4796\nip -6 route flush table 4796", true},
	{"routing rules", "ip rule del pref 4797\nip -6 rule del pref 4797", true},
	{"rules in filter", "iptables -F\nip6tables -F", true},
	{"rules in raw", "iptables -t raw -F\nip6tables -t raw -F", false},
}

// TestEncryptedStaysClosed takes away all layers but one, on a host that has a default
// route and forwards all that nobody forbids, and repairs nothing: no packet of an
// encrypted network goes out plain, whether its destination exists or not, and none that
// came out of the tunnel goes on. Without any they do, so the test can fail.
func TestEncryptedStaysClosed(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{false, true} {
		t.Run(map[bool]string{false: "stack", true: "program"}[on], func(t *testing.T) { staysClosed(t, on) })
	}
}

func staysClosed(t *testing.T, on bool) {
	a, b, seen, plain := encryptedPair(t, on)
	a.Run(t, `iptables -P FORWARD ACCEPT
		ip6tables -P FORWARD ACCEPT
		ip addr add 2001:db8::1/64 dev under0 nodad
		ip neigh add 192.0.2.99 lladdr 02:00:00:00:00:99 dev under0
		ip neigh add 2001:db8::99 lladdr 02:00:00:00:00:99 dev under0
		ip route add default via 192.0.2.99
		ip -6 route add default via 2001:db8::99`)
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
	sends := func(from *kerneltest.Place, all ...string) {
		from.Do(func() {
			for _, to := range all {
				c, err := net.Dial("udp", net.JoinHostPort(to, "7000"))
				if err != nil {
					t.Error(err)
					continue
				}
				for range 3 {
					_, _ = c.Write([]byte("hello")) // may be refused
				}
				_ = c.Close()
			}
		})
	}
	// Of what containers send a moment later, also through the tunnel to here, how much is
	// plain on the fabric?
	leaks := func(tunnel bool) int64 {
		before, all := plain.Load(), seen.Load()
		sends(a.containers[0], "10.9.0.77", "fd09::77", b.endpoints[0].IPv4.Addr().String(), b.endpoints[0].IPv6.Addr().String())
		if tunnel {
			sends(b.containers[0], a.endpoints[0].IPv4.Addr().String(), a.endpoints[0].IPv6.Addr().String())
		}
		a.Do(func() { // is seen after all that
			if c, err := net.Dial("udp", "192.0.2.99:9"); err == nil {
				_, _ = c.Write([]byte("last"))
				_ = c.Close()
			}
		})
		for tries := 0; seen.Load() == all && tries < 100; tries++ {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(200 * time.Millisecond)
		return plain.Load() - before
	}
	for _, kept := range layers {
		a.program(t, a, b)
		for _, l := range layers {
			if l != kept {
				a.Run(t, strings.TrimSpace(l.without))
			}
		}
		if n := leaks(kept.tunnel); n != 0 {
			t.Errorf("with nothing left but the %s, %d packets are plain", kept.name, n)
		}
	}
	a.program(t, a, b)
	for _, l := range layers {
		a.Run(t, l.without)
	}
	if leaks(false) == 0 {
		t.Error("without any layer no packet is plain: the test sees nothing")
	}
	before := plain.Load()
	sends(b.containers[0], a.endpoints[0].IPv4.Addr().String(), a.endpoints[0].IPv6.Addr().String())
	time.Sleep(200 * time.Millisecond)
	if out := plain.Load() > before; out == on { // the program knows where that goes
		t.Errorf("without any layer something comes out of the tunnel and goes on plain: %t", out)
	}
	a.program(t, a, b)
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
	if n := leaks(true); n != 0 {
		t.Errorf("after the repair %d packets are plain", n)
	}
}

// arriving keep packets in the clear that arrive from the underlay off the containers of an
// encrypted network, each alone.
var arriving = []struct{ name, without string }{
	{"rules in filter", "iptables -F\nip6tables -F"},
	{"rules in raw", "iptables -t raw -F\nip6tables -t raw -F"},
}

// TestEncryptedTakesNothingPlain has a stranger send to a container of an encrypted network
// with its host as next hop, under an address of the network and one of its own.
func TestEncryptedTakesNothingPlain(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{false, true} {
		t.Run(map[bool]string{false: "stack", true: "program"}[on], func(t *testing.T) { takesNothing(t, on) })
	}
}

func takesNothing(t *testing.T, on bool) {
	a, b, _, _ := encryptedPair(t, on)
	stranger := kerneltest.NewPlace(t)
	own := []netip.Prefix{netip.MustParsePrefix("192.0.2.3/24"), netip.MustParsePrefix("2001:db8::3/64")}
	kerneltest.Wire(t, stranger, "eth0", own, a.fabric, "port3", nil)
	a.fabric.Run(t, "ip link set port3 master fabric")
	stranger.Configure(t, "lo", netip.MustParsePrefix("10.9.0.11/32"), netip.MustParsePrefix("fd09::b/128")) // container b's
	stranger.Run(t, "ip route add 10.9.0.0/24 via 192.0.2.1\nip -6 route add fd09::/64 via 2001:db8::1")
	a.Configure(t, "under0", netip.MustParsePrefix("2001:db8::1/64"))
	a.Run(t, `iptables -P FORWARD ACCEPT
		ip6tables -P FORWARD ACCEPT
		sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.under0.rp_filter=0`)
	var in net.PacketConn
	var err error
	a.containers[0].Do(func() { in, err = net.ListenPacket("udp", ":7003") })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	// got sends from each address of the stranger, and returns those of which something
	// came.
	try := byte(0)
	got := func() map[string]bool {
		try++
		stranger.Do(func() {
			for from, to := range map[string]string{"10.9.0.11": "10.9.0.10", "192.0.2.3": "10.9.0.10", "fd09::b": "fd09::a", "2001:db8::3": "fd09::a"} {
				dialer := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
				c, err := dialer.Dial("udp", net.JoinHostPort(to, "7003"))
				if err != nil {
					t.Error(err)
					continue
				}
				for range 3 {
					_, _ = c.Write([]byte{try})
				}
				_ = c.Close()
			}
		})
		out := map[string]bool{}
		_ = in.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		for buf := make([]byte, 10); ; {
			_, from, err := in.ReadFrom(buf)
			if err != nil {
				return out
			}
			if buf[0] == try { // not one of an earlier try
				out[from.(*net.UDPAddr).IP.String()] = true
			}
		}
	}
	if all := got(); len(all) > 0 {
		t.Errorf("packets in the clear come from %v", all)
	}
	for _, kept := range arriving {
		a.program(t, a, b)
		for _, l := range arriving {
			if l != kept {
				a.Run(t, l.without)
			}
		}
		if all := got(); len(all) > 0 {
			t.Errorf("with nothing left but the %s, packets in the clear come from %v", kept.name, all)
		}
	}
	for _, l := range arriving {
		a.Run(t, l.without)
	}
	if all := got(); len(all) != 4 {
		t.Errorf("without any layer packets come from %v alone: the test sees nothing", all)
	}
	a.program(t, a, b)
	if all := got(); len(all) > 0 {
		t.Errorf("after the repair packets in the clear come from %v", all)
	}
}
