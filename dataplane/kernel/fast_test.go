package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// encryptedMode stands for an encrypted network in a table of modes.
const encryptedMode = "encrypted"

// TestFastPath has containers talk on one host and across two, with the port program
// on both hosts, on one of them, and with its maps empty: the answers are the same, and
// the counters tell which way they came.
func TestFastPath(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{store.ModeVXLAN, store.ModeRouted, encryptedMode} {
		for _, c := range []struct {
			name   string
			on     [2]bool
			broken bool // the maps are cleared
		}{{"both", [2]bool{true, true}, false}, {"one", [2]bool{true, false}, false}, {"other", [2]bool{false, true}, false}, {"cleared", [2]bool{true, true}, true}} {
			t.Run(mode+"/"+c.name, func(t *testing.T) {
				all := fastHosts(t, mode, c.on)
				if c.broken {
					for _, m := range all {
						m.k.ClearMap(t, "weft_dests")
					}
				}
				a, b := all[0], all[1]
				for v6, ip := range []func(e store.Endpoint) netip.Prefix{
					func(e store.Endpoint) netip.Prefix { return e.IPv4 },
					func(e store.Endpoint) netip.Prefix { return e.IPv6 },
				} {
					echo(t, a.containers[0], a.containers[1], ip(a.endpoints[1]).Addr())
					echo(t, a.containers[0], b.containers[0], ip(b.endpoints[0]).Addr())
					echo(t, b.containers[1], a.containers[1], ip(a.endpoints[1]).Addr())
					for i, m := range all {
						sum, err := m.k.Counters()
						if c.on[i] == (err != nil) {
							t.Errorf("counters of %s: %v", m.self.ID, err)
						}
						// Of a megabyte there and back most segments go past the stack; but IPv6 of a
						// routed network takes the VXLAN device over an IPv4 underlay.
						fast := sum.Fast > 4*sum.Slow
						if c.on[i] && fast == c.broken && (mode != store.ModeRouted || v6 == 0) {
							t.Errorf("%s: %d frames by the fast path, %d by the slow one", m.self.ID, sum.Fast, sum.Slow)
						}
						for reason, n := range sum.Dropped {
							t.Errorf("%s: %d frames dropped: %s", m.self.ID, n, reason)
						}
					}
				}
			})
		}
	}
}

// fastHosts makes two hosts with two containers each on a network of the mode, with the
// port program or without.
func fastHosts(t *testing.T, mode string, on [2]bool) (all []*machine) {
	t.Helper()
	return fastHostsWith(t, mode, loaded(t, on[0]), loaded(t, on[1]))
}

func fastHostsWith(t *testing.T, mode string, programs ...*kernel.Program) (all []*machine) {
	t.Helper()
	fabric := kerneltest.NewPlace(t)
	fabric.Run(t, "ip link add fabric type bridge\nip link set fabric up\niptables -P FORWARD ACCEPT")
	for i, program := range programs {
		m := newMachineWith(t, fabric, i+1, false, program)
		m.routed, m.encrypted = mode == store.ModeRouted, mode == encryptedMode
		if m.encrypted {
			m.self.Tunnel = kerneltest.TunnelOf(m.self.ID, 1)
		}
		m.Run(t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\niptables -P FORWARD DROP\nip6tables -P FORWARD DROP")
		m.endpoint(10 + 2*i)
		m.endpoint(11 + 2*i)
		all = append(all, m)
	}
	for _, m := range all {
		m.program(t, all...)
		m.start(t)
		m.program(t, all...) // they have joined
		if mode == store.ModeVXLAN {
			continue
		}
		for _, c := range m.containers {
			c.Run(t, `ip route add 10.9.0.1 dev eth0
				ip route add 10.9.0.0/25 via 10.9.0.1
				ip -6 route add fd09::1 dev eth0
				ip -6 route add fd09::/65 via fd09::1`)
		}
	}
	return all
}

func loaded(t *testing.T, on bool) *kernel.Program {
	if !on {
		return nil
	}
	p := kernel.LoadProgram("")
	if err := p.Err(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// TestHops sends packets with little time to live: a bridge takes nothing from it, and
// each host that routes takes one, on either path.
func TestHops(t *testing.T) {
	for _, mode := range []string{store.ModeVXLAN, store.ModeRouted, encryptedMode} {
		for _, on := range []bool{true, false} {
			t.Run(mode+map[bool]string{true: "/fast", false: "/slow"}[on], func(t *testing.T) {
				all := fastHosts(t, mode, [2]bool{on, on})
				from := all[0].containers[0]
				// A container takes a packet with one left; a host that routes does not.
				hops := map[bool][2]int{false: {1, 1}, true: {2, 3}}[mode != store.ModeVXLAN]
				for i, to := range []*machine{all[0], all[1]} {
					at := []int{1, 0}[i]
					for ttl := 1; ttl <= 3; ttl++ {
						if got := arrivesWith(t, from, to.containers[at], to.endpoints[at].IPv4.Addr(), ttl); got != (ttl >= hops[i]) {
							t.Errorf("to %s with ttl %d: arrives %t", to.endpoints[at].IPv4, ttl, got)
						}
					}
				}
			})
		}
	}
}

// arrivesWith reports whether one of a few packets with so much time to live arrives.
func arrivesWith(t *testing.T, from, to *kerneltest.Place, address netip.Addr, ttl int) bool {
	t.Helper()
	target := netip.AddrPortFrom(address, 7003).String()
	var in net.PacketConn
	var out net.Conn
	var err, err2 error
	to.Do(func() { in, err = net.ListenPacket("udp4", target) })
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		err2 := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_TTL, ttl) })
		return errors.Join(err, err2)
	}}
	from.Do(func() { out, err2 = dialer.Dial("udp4", target) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), out.Close() }()
	for range 5 {
		_, _ = out.Write([]byte("x")) // what a router answers is an error of the next
		_ = in.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, _, _ := in.ReadFrom(make([]byte, 10)); n == 1 {
			return true
		}
	}
	return false
}

// TestRemovedEndpointsAreForgotten: nothing of them is left for a repair to find, of one
// alone nor of several at once.
func TestRemovedEndpointsAreForgotten(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	e := kerneltest.Examples()[0]
	e.Underlay.Program, e.Underlay.Ethernet = true, true
	passHost(t, k, e.HostPlan())
	pass(t, k, e)
	for _, left := range []int{1, 0} {
		e.Snapshot.Endpoints = e.Snapshot.Endpoints[:left]
		pass(t, k, e)
		settled(t, k, e)
	}
	e = kerneltest.Examples()[0]
	e.Underlay.Program, e.Underlay.Ethernet = true, true
	pass(t, k, e)
	e.Snapshot.Endpoints = nil
	pass(t, k, e)
	settled(t, k, e)
}
