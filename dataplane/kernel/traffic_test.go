package kernel_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// machine is one host of a test network, with its containers.
type machine struct {
	*kerneltest.Place
	fabric     *kerneltest.Place
	k          *kernel.Kernel
	self       store.Host
	under      dataplane.Underlay
	encrypted  bool // the network
	led        bool // it has its own gateway
	routed     bool // it is
	services   []store.Service
	endpoints  []store.Endpoint
	containers []*kerneltest.Place
	filled     bool                   // maps of the port program are, and
	refused    map[dataplane.Key]bool // found no room
}

const trafficVNI = 5000

// newMachine makes host i (from 1) and wires it to the fabric.
func newMachine(t *testing.T, fabric *kerneltest.Place, i int, v6 bool) *machine {
	return newMachineWith(t, fabric, i, v6, nil)
}

// newMachineWith is newMachine with a port program.
func newMachineWith(t *testing.T, fabric *kerneltest.Place, i int, v6 bool, program *kernel.Program) *machine {
	m := &machine{Place: kerneltest.NewPlace(t), fabric: fabric}
	address := netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i))
	if v6 {
		address = netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i))
	}
	port := fmt.Sprintf("port%d", i)
	kerneltest.Wire(t, m.Place, "under0", []netip.Prefix{address}, fabric, port, nil)
	fabric.Run(t, "ip link set "+port+" master fabric")
	m.self = store.Host{ID: store.HostID(fmt.Sprintf("host%d", i)), Address: address.Addr(), DataPort: kerneltest.Port}
	m.open(t, program)
	t.Cleanup(func() { m.k.Close() })
	return m
}

// open opens the machine's kernel, as a new process does.
func (m *machine) open(t *testing.T, program *kernel.Program) {
	t.Helper()
	var err error
	m.Do(func() {
		m.k, err = kernel.New(kernel.Config{Program: program, WireGuardKey: kerneltest.WireGuardKey, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
		if err == nil {
			m.under, err = m.k.Underlay(t.Context(), m.self.Address)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// endpoint adds the endpoint number i of the network to the machine's records.
func (m *machine) endpoint(i int) {
	m.endpoints = append(m.endpoints, store.Endpoint{
		ID: store.EndpointID(fmt.Sprintf("%064x", i)), Network: "net", VNI: trafficVNI, MAC: store.MAC{2, 0, 0, 0, 0, byte(i)},
		IPv4: netip.MustParsePrefix(fmt.Sprintf("10.9.0.%d/24", i)), IPv6: netip.MustParsePrefix(fmt.Sprintf("fd09::%x/64", i))})
}

// program makes the kernel hold what the planner says, given all machines.
func (m *machine) program(t *testing.T, all ...*machine) {
	t.Helper()
	n := store.Network{ID: "net", VNI: trafficVNI, Mode: store.ModeVXLAN, Encrypted: m.encrypted, GatewayWeft: m.led, Subnets: []store.Subnet{
		{Pool: netip.MustParsePrefix("10.9.0.0/24"), Gateway: netip.MustParseAddr("10.9.0.1")}, {Pool: netip.MustParsePrefix("fd09::/64"), Gateway: netip.MustParseAddr("fd09::1")}}}
	if m.routed {
		n.Mode = store.ModeRouted
	}
	s := store.Snapshot{VNI: trafficVNI, Self: m.self, Network: &n, Endpoints: m.endpoints, Services: m.services, Served: len(m.services) > 0}
	for _, o := range all {
		if o == m {
			continue
		}
		s.Peers = append(s.Peers, store.Peer{Host: o.self})
		for _, e := range o.endpoints {
			s.Remote = append(s.Remote, store.RemoteEndpoint{Owner: o.self.ID, SharedEndpoint: e.Shared()})
		}
	}
	s.Around = s.Peers
	network, err := dataplane.PlanNetwork(s, m.under)
	if err != nil {
		t.Fatal(err)
	}
	records := store.HostSnapshot{Self: m.self, Networks: []store.Network{n}, Peers: s.Peers}
	if m.encrypted {
		records.Tunnels = s.Peers
	}
	if m.routed {
		records.Routed = s.Peers
	}
	if m.led {
		records.Published = m.endpoints
	}
	host := dataplane.PlanHost(records, m.under)
	m.Do(func() {
		for v, want := range []dataplane.Plan{store.HostVNI: host, 1: network} {
			v := store.VNI(v) * trafficVNI
			for range 2 {
				have, err := m.k.Read(t.Context(), v)
				if err != nil {
					t.Error(err)
				}
				for _, err := range m.k.Apply(t.Context(), dataplane.Diff(want, have)) {
					if m.filled && errors.Is(err, dataplane.ErrFull) {
						m.refused[err.Op.Object.Key()] = true
						continue
					}
					t.Errorf("%s: %v", m.self.ID, err)
				}
			}
		}
	})
}

// start gives every endpoint a container that has none.
func (m *machine) start(t *testing.T) {
	for i := len(m.containers); i < len(m.endpoints); i++ {
		e := m.endpoints[i]
		c := kerneltest.NewPlace(t)
		c.Take(t, m.Place, dataplane.PeerName(dataplane.VethName(e.ID)), "eth0", e.IPv4, e.IPv6)
		m.endpoints[i].Sandbox = "/there"
		m.containers = append(m.containers, c)
	}
}

// echo checks that from reaches to by UDP and by a megabyte of TCP.
func echo(t *testing.T, from, to *kerneltest.Place, address netip.Addr) {
	t.Helper()
	// A socket that is closed may still hold its port: in a child that was just forked.
	target := netip.AddrPortFrom(address, 0).String()
	var server net.Listener
	var packets net.PacketConn
	var err, err2 error
	to.Do(func() {
		server, err = net.Listen("tcp", target)
		packets, err2 = net.ListenPacket("udp", target)
	})
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = server.Close(), packets.Close() }()
	go func() {
		if c, err := server.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = packets.WriteTo(buf[:n], from)
		}
	}()
	var c, u net.Conn
	from.Do(func() {
		c, err = (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", server.Addr().String())
		u, err2 = net.Dial("udp", packets.LocalAddr().String())
	})
	if err := errors.Join(err, err2); err != nil {
		t.Errorf("connect to %s: %v", target, err)
		return
	}
	defer func() { _, _ = c.Close(), u.Close() }()
	deadline := time.Now().Add(10 * time.Second)
	_, _ = c.SetDeadline(deadline), u.SetDeadline(deadline)
	if _, err := u.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	if n, err := u.Read(make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("udp to %s: %d bytes, %v", target, n, err)
	}
	const size = 1 << 20
	go func() { _, _ = c.Write(make([]byte, size)) }()
	if n, err := io.CopyN(io.Discard, c, size); err != nil {
		t.Errorf("tcp to %s: %d bytes, %v", target, n, err)
	}
}

// Two hosts with the real planner's output: containers talk on one host and across,
// in both families, also where iptables sees bridged frames and its policy is DROP.
// The host itself is closed to them, and VXLAN from a stranger is dropped.
func TestTraffic(t *testing.T) {
	t.Parallel()
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "ipv4 underlay", true: "ipv6 underlay"}[v6], func(t *testing.T) { traffic(t, v6) })
	}
}

func traffic(t *testing.T, v6 bool) {
	fabric := kerneltest.NewPlace(t)
	fabric.Run(t, "ip link add fabric type bridge\nip link set fabric up\niptables -P FORWARD ACCEPT")
	a, b, stranger := newMachine(t, fabric, 1, v6), newMachine(t, fabric, 2, v6), newMachine(t, fabric, 3, v6)
	for i, m := range []*machine{a, a, b, b} {
		m.endpoint(10 + i)
	}
	for _, m := range []*machine{a, b} {
		m.Run(t, `sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 net.bridge.bridge-nf-call-arptables=1
			iptables -P FORWARD DROP
			ip6tables -P FORWARD DROP`)
		m.program(t, a, b)
		m.start(t)
		m.program(t, a, b) // they have joined
	}
	for _, ip := range []func(e store.Endpoint) netip.Prefix{
		func(e store.Endpoint) netip.Prefix { return e.IPv4 },
		func(e store.Endpoint) netip.Prefix { return e.IPv6 },
	} {
		echo(t, a.containers[0], a.containers[1], ip(a.endpoints[1]).Addr())
		echo(t, a.containers[0], b.containers[0], ip(b.endpoints[0]).Addr())
		echo(t, b.containers[1], a.containers[1], ip(a.endpoints[1]).Addr())
	}
	strangers(t, a, b, stranger)
	closed(t, a)
}

// strangers sends a frame for a container in VXLAN from a host that is no peer,
// and then from the same host as a peer, to know that the frame was a good one.
func strangers(t *testing.T, a, b, stranger *machine) {
	target := b.endpoints[0]
	var in net.PacketConn
	var err error
	b.containers[0].Do(func() { in, err = net.ListenPacket("udp4", netip.AddrPortFrom(target.IPv4.Addr(), 7001).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	var out net.Conn
	stranger.Do(func() { out, err = net.Dial("udp", netip.AddrPortFrom(b.self.Address, kerneltest.Port).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	try := byte(0)
	arrives := func(wait time.Duration) bool {
		try++
		_ = in.SetReadDeadline(time.Now().Add(wait))
		for range 3 {
			if _, err := out.Write(vxlanFrame(a.endpoints[0], target, 7001, try)); err != nil {
				t.Fatal(err)
			}
		}
		got := make([]byte, 100)
		for got[0] != try { // those of earlier tries may still be there
			_, _, err := in.ReadFrom(got)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return false
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		return true
	}
	if arrives(300 * time.Millisecond) {
		t.Error("VXLAN from a stranger reached a container")
	}
	// Either table alone keeps it out, and without both it comes in.
	b.Run(t, "iptables -P FORWARD ACCEPT")
	for _, table := range []string{"raw", "filter"} {
		b.Run(t, "iptables -t "+table+" -F\nip6tables -t "+table+" -F")
		if came := arrives(300 * time.Millisecond); came != (table == "filter") {
			t.Errorf("with %s flushed, VXLAN from a stranger reached a container: %t", table, came)
		}
	}
	b.program(t, a, b)
	if arrives(300 * time.Millisecond) {
		t.Error("VXLAN from a stranger reached a container after repair")
	}
	b.program(t, a, b, stranger)
	if !arrives(5 * time.Second) {
		t.Error("VXLAN from a peer did not reach a container")
	}
}

// vxlanFrame returns a VXLAN packet (RFC 7348) with a UDP packet from one endpoint
// to another.
func vxlanFrame(from, to store.Endpoint, port uint16, content byte) []byte {
	b := []byte{8, 0, 0, 0, 0, trafficVNI >> 8, trafficVNI & 0xff, 0}
	b = append(b, to.MAC[:]...)
	b = append(b, from.MAC[:]...)
	b = append(b, 8, 0)
	udp := binary.BigEndian.AppendUint16(nil, 9)
	udp = binary.BigEndian.AppendUint16(udp, port)
	udp = append(udp, 0, 10, 0, 0, content, 0)
	ip := []byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, 17, 0, 0}
	ip = append(append(ip, from.IPv4.Addr().AsSlice()...), to.IPv4.Addr().AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum&0xffff))
	return append(append(b, ip...), udp...)
}

// closed checks that a container does not reach the host through the bridge, even
// with all rules gone: it sends to the bridge's MAC, with an address of the host.
func closed(t *testing.T, m *machine) {
	bridge := store.DeriveMAC("bridge", string(m.self.ID), dataplane.BridgeName(trafficVNI))
	m.Run(t, `ip addr add 203.0.113.1/32 dev lo
		ip addr add 2001:db8:5::1/128 dev lo nodad
		iptables -F
		iptables -t raw -F
		ip6tables -F
		ip6tables -t raw -F`)
	m.containers[0].Run(t, `ip neigh replace 10.9.0.254 lladdr `+bridge.String()+` dev eth0 nud permanent
		ip neigh replace fd09::fe lladdr `+bridge.String()+` dev eth0 nud permanent
		ip route add 203.0.113.1 via 10.9.0.254
		ip route add 2001:db8:5::1 via fd09::fe`)
	for _, address := range []string{"203.0.113.1", "2001:db8:5::1"} {
		var in net.PacketConn
		var out net.Conn
		var err, err2 error
		target := netip.AddrPortFrom(netip.MustParseAddr(address), 7002).String()
		m.Do(func() { in, err = net.ListenPacket("udp", target) })
		m.containers[0].Do(func() {
			if out, err2 = net.Dial("udp", target); err2 == nil {
				_, err2 = out.Write([]byte("hello"))
			}
		})
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		_ = in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, from, err := in.ReadFrom(make([]byte, 10)); err == nil {
			t.Errorf("the host received %d bytes at %s from container %s", n, address, from)
		}
		_, _ = in.Close(), out.Close()
	}
}
