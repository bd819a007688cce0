package kernel_test

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

const sctpHostPort, sctpPort, sctpClient = 3868, 4000, 40000

// An SCTP port of the host leads to the endpoint, and the answer back. Where the kernel
// has no SCTP sockets the first two packets of an association are made by hand: netfilter
// translates them all the same, if it follows SCTP.
func TestSCTPIsPublished(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(map[bool]string{false: "ipv4", true: "ipv6"}[v6], func(t *testing.T) {
			fabric := kerneltest.NewPlace(t)
			fabric.Run(t, "ip link add fabric type bridge\nip link set fabric up\niptables -P FORWARD ACCEPT")
			host, client := newMachine(t, fabric, 1, v6), newMachine(t, fabric, 2, v6)
			host.Run(t, "iptables -P FORWARD DROP\nip6tables -P FORWARD DROP\nsysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
			host.led = true
			host.endpoint(10)
			host.endpoints[0].Ports = []store.Port{{Proto: "sctp", Port: sctpPort, HostPort: sctpHostPort}}
			host.program(t)
			host.start(t)
			host.program(t)
			gateway, to := "10.9.0.1", host.endpoints[0].IPv4.Addr()
			if v6 {
				gateway, to = "fd09::1", host.endpoints[0].IPv6.Addr()
			}
			host.containers[0].Run(t, "ip route add default via "+gateway)
			if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err == nil {
				_ = unix.Close(fd)
				associate(t, client, host.containers[0], to, host.self.Address)
				return
			}
			handshake(t, client, host.containers[0], to, host.self.Address)
		})
	}
}

// handshake sends an INIT chunk to the host's port and an INIT ACK back (RFC 9260,
// section 3.3), and looks at what arrives.
func handshake(t *testing.T, client *machine, container *kerneltest.Place, to, host netip.Addr) {
	network := "ip4:132"
	if host.Is6() {
		network = "ip6:132"
	}
	var out, in *net.IPConn
	var err, err2 error
	client.Do(func() { out, err = net.ListenIP(network, &net.IPAddr{IP: client.self.Address.AsSlice()}) })
	container.Do(func() { in, err2 = net.ListenIP(network, &net.IPAddr{IP: to.AsSlice()}) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = out.Close(), in.Close() }()
	// Tag, window, streams out and in, first number.
	init := []byte{1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1}
	ack := append([]byte{2}, init[1:]...)
	if _, err := out.WriteToIP(sctpPacket(sctpClient, sctpHostPort, 0, init), &net.IPAddr{IP: host.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	from := arrivesSCTP(t, in, sctpClient, sctpPort, init)
	if from != client.self.Address {
		t.Errorf("the container sees %s as the client, want %s", from, client.self.Address)
	}
	if _, err := in.WriteToIP(sctpPacket(sctpPort, sctpClient, 7, ack), &net.IPAddr{IP: from.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	if from := arrivesSCTP(t, out, sctpHostPort, sctpClient, ack); from != host {
		t.Errorf("the answer comes from %s, want %s", from, host)
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sctpPacket(from, to uint16, tag uint32, chunk []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(append(b, 0, 0, 0, 0), chunk...)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// arrivesSCTP waits for a packet with the ports and chunk, and returns its sender.
func arrivesSCTP(t *testing.T, c *net.IPConn, from, to uint16, chunk []byte) netip.Addr {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 2048)
	n, sender, err := c.ReadFromIP(buf)
	if err != nil {
		t.Fatalf("SCTP to port %d: %v", to, err)
	}
	tag := binary.BigEndian.Uint32(buf[4:])
	if want := sctpPacket(from, to, tag, chunk); string(buf[:n]) != string(want) {
		t.Errorf("got SCTP packet %x, want %x", buf[:n], want)
	}
	a, _ := netip.AddrFromSlice(sender.IP)
	return a.Unmap()
}

// associate sends words both ways through real sockets.
func associate(t *testing.T, client *machine, container *kerneltest.Place, to, host netip.Addr) {
	var listener, out int
	var err, err2 error
	container.Do(func() { listener, err = sctpSocket(to) })
	client.Do(func() { out, err2 = sctpSocket(client.self.Address) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = unix.Close(listener), unix.Close(out) }()
	if err := errors.Join(unix.Bind(listener, sockaddr(netip.AddrPortFrom(to, sctpPort))), unix.Listen(listener, 1)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(out, sockaddr(netip.AddrPortFrom(host, sctpHostPort))); err != nil {
		t.Fatal(err)
	}
	in, _, err := unix.Accept(listener)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(in) }()
	for _, way := range [][2]int{{out, in}, {in, out}} {
		buf := make([]byte, 10)
		if _, err := unix.Write(way[0], []byte("word")); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(way[1], buf); err != nil || string(buf[:n]) != "word" {
			t.Errorf("%q, %v", buf[:max(n, 0)], err)
		}
	}
}

// sctpSocket returns a socket whose calls end after ten seconds.
func sctpSocket(of netip.Addr) (int, error) {
	family := unix.AF_INET
	if of.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err != nil {
		return -1, err
	}
	limit := unix.Timeval{Sec: 10}
	return fd, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}
