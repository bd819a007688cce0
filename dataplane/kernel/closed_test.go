package kernel_test

import (
	"net"
	"strings"
	"testing"
	"time"
)

// layers keep packets of an encrypted network off the underlay, each alone; with the
// command that takes it away. Rules in raw do it only while no route leads back.
var layers = []struct{ name, without string }{
	{"routes", "ip rule del pref 4796\nip -6 rule del pref 4796\nip route flush table 4796\nip -6 route flush table 4796"},
	{"routing rules", "ip rule del pref 4797\nip -6 rule del pref 4797"},
	{"rules in filter", "iptables -F\nip6tables -F"},
	{"rules in raw", "iptables -t raw -F\nip6tables -t raw -F"},
}

// TestEncryptedStaysClosed takes away all layers but one, on a host that has a default
// route and forwards all that nobody forbids, and repairs nothing: no packet of an
// encrypted network goes out plain, whether its destination exists or not. Without any
// they do, so the test can fail.
func TestEncryptedStaysClosed(t *testing.T) {
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
	// Of what containers send a moment later, how much is plain on the fabric?
	leaks := func() int64 {
		before, all := plain.Load(), seen.Load()
		a.containers[0].Do(func() {
			for _, to := range []string{"10.9.0.77", "fd09::77", b.endpoints[0].IPv4.Addr().String(), b.endpoints[0].IPv6.Addr().String()} {
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
		if n := leaks(); n != 0 {
			t.Errorf("with nothing left but the %s, %d packets are plain", kept.name, n)
		}
	}
	a.program(t, a, b)
	for _, l := range layers {
		a.Run(t, l.without)
	}
	if leaks() == 0 {
		t.Error("without any layer no packet is plain: the test sees nothing")
	}
	a.program(t, a, b)
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
	if n := leaks(); n != 0 {
		t.Errorf("after the repair %d packets are plain", n)
	}
}
