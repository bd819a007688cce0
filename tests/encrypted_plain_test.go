package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/tests/hosts"
)

// control sends another marker on a plain network.
const control = "WEFT-CONTROL-MARKER"

func (e *encrypted) sendControl(t *testing.T) {
	a, b := run(t, e.lab.Hosts[0], "plain", "--network", "plain"), run(t, e.lab.Hosts[1], "plain", "--network", "plain")
	reach(t, a, addressOf(t, b, "plain").String())
	for range 10 {
		sendText(t, a, addressOf(t, b, "plain").String(), control)
		time.Sleep(200 * time.Millisecond) // tcpdump is told of packets after a second at most
	}
}

// sendText sends a datagram from a container; nobody need hear it.
func sendText(t *testing.T, from hosts.Container, to, text string) {
	t.Helper()
	if err := inside(t, from, func() error {
		c, err := net.Dial("udp", net.JoinHostPort(to, "7777"))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// nothingPlain looks for the marker, and for addresses of the networks, in what the
// hosts sent.
func (e *encrypted) nothingPlain(t *testing.T) {
	e.sendControl(t)
	plain, wireguard, controls := 0, 0, 0
	for i, c := range e.captures {
		lines, raw := stopped(t, c)
		plain += bytes.Count(raw, []byte(marker))
		controls += bytes.Count(raw, []byte(control))
		for _, l := range lines {
			if strings.Contains(l, ".4798") {
				wireguard++
			}
			for _, n := range encryptedNetworks {
				if strings.Contains(l, fmt.Sprintf(" 10.%d.", n.second)) || strings.Contains(l, fmt.Sprintf(" fd00:%d::", n.second)) {
					plain++
					t.Errorf("on the cable of host %s: %s", e.lab.Hosts[i].Name, l)
				}
			}
		}
	}
	if wireguard == 0 || controls == 0 {
		t.Errorf("%d packets of WireGuard on the underlay, %d of a plain network: the captures see nothing", wireguard, controls)
	}
	figure(t, "encrypted: plain packets on the underlay on "+e.name, e.sent+int(e.flooded), "%d, beside %d of WireGuard (target 0)", plain, wireguard)
	if plain > 0 {
		t.Errorf("%d packets on the underlay are plain", plain)
	}
}

// stopped ends a capture and returns its packets, a line each, and all that is in them.
func stopped(t *testing.T, c *hosts.Capture) (lines []string, raw []byte) {
	t.Helper()
	lines, err := c.Stop(t.Context())
	if err == nil {
		raw, err = os.ReadFile(c.File)
	}
	if err != nil {
		t.Fatal(err)
	}
	return lines, raw
}

// nothingPlainTaken lets a stranger on the cable send to the first host's containers in the
// clear what would come from the second's: as IP with the host as next hop, and in VXLAN in
// the second host's name. Containers of plain networks beside get it.
func (e *encrypted) nothingPlainTaken(t *testing.T) {
	a, b := e.lab.Hosts[0], e.lab.Hosts[1]
	createNetwork(t, e.lab, "flat", 95, "-o", "mode=routed", "--gateway", "10.95.0.1", "--ipv6", "--subnet", "fd00:95::/64")
	run(t, a, "flat", "--network", "flat", "--ip6", "fd00:95::a1")
	run(t, b, "flat", "--network", "flat", "--ip6", "fd00:95::a2")
	reach(t, hosts.Container{Host: a, Name: "flat"}, "fd00:95::a2")
	s := newStranger(t, a, b)
	asIP, asVXLAN := e.victim(t, "flat"), e.victim(t, "plain") // of these each is open to one way
	plainly := func(what string) {
		t.Helper()
		for _, way := range []struct {
			name string
			of   victim
			send func(victim)
		}{{"IP", asIP, s.asIP}, {"IPv6", asIP.six(), s.asIP}, {"VXLAN", asVXLAN, s.asVXLAN}} {
			for way.of.hears(t, time.Millisecond) { // of earlier tries
			}
			for tries := 0; ; tries++ {
				way.send(way.of)
				if way.of.hears(t, time.Second) {
					break
				}
				if tries == 10 {
					t.Fatalf("%s: what a stranger sends as %s does not reach a container of a plain network: the test sees nothing", what, way.name)
				}
			}
		}
	}
	plainly("before")
	var victims []victim
	for _, n := range encryptedNetworks {
		if n.name == "come" {
			continue
		}
		v := e.victim(t, n.name)
		if victims = append(victims, v); n.six {
			victims = append(victims, v.six())
		}
	}
	const times = 3
	for range times {
		for _, v := range victims {
			s.asIP(v)
			s.asVXLAN(v)
			v.from = s.stranger(v.at)
			s.asIP(v)
		}
	}
	plainly("after") // so all that was sent has come, or never will
	for _, v := range victims {
		if v.hears(t, 100*time.Millisecond) {
			t.Errorf("a container of network %s got at %s what was sent in the clear", v.network, v.at)
		}
	}
	figure(t, "encrypted: packets in the clear that arrive at a host on "+e.name, 3*times*len(victims), "0 reached a container; plain networks beside get them")
}

// victim is a container of the first host, with the one of the second from which what is
// sent to it seems to come.
type victim struct {
	network  string
	vni      int
	at, from netip.Addr
	at6      netip.Addr // the same of IPv6
	from6    netip.Addr
	mac, by  store.MAC
	in       net.PacketConn
}

const plainPort = 7010

func (e *encrypted) victim(t *testing.T, network string) victim {
	t.Helper()
	a := hosts.Container{Host: e.lab.Hosts[0], Name: network}
	b := hosts.Container{Host: e.lab.Hosts[1], Name: network}
	v := victim{network: network, vni: networkOf(t, a.Host, network).VNI, at: addressOf(t, a, network), from: addressOf(t, b, network)}
	for _, o := range view[[]endpointView](t, a.Host, "endpoints") {
		mac, err := store.ParseMAC(o.MAC)
		if err != nil {
			t.Fatal(err)
		}
		switch o.IPv4 {
		case v.at:
			v.mac, v.at6 = mac, o.IPv6
		case v.from:
			v.by, v.from6 = mac, o.IPv6
		}
	}
	if v.mac.IsZero() || v.by.IsZero() {
		t.Fatalf("host a does not know both ends of %+v", v)
	}
	if err := inside(t, a, func() (err error) {
		v.in, err = net.ListenPacket("udp", fmt.Sprintf(":%d", plainPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.in.Close() })
	return v
}

// six is the same container, by IPv6.
func (v victim) six() victim {
	v.at, v.from = v.at6, v.from6
	return v
}

// hears waits for a datagram.
func (v victim) hears(t *testing.T, d time.Duration) bool {
	t.Helper()
	_ = v.in.SetReadDeadline(time.Now().Add(d))
	_, _, err := v.in.ReadFrom(make([]byte, 100))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return err == nil
}

// wire is the cable's end at a host, as a stranger there has it.
type wire struct {
	t        *testing.T
	fd       int
	mac      store.MAC // of the host
	to, peer netip.Addr
}

func newStranger(t *testing.T, to, peer *hosts.Host) *wire {
	t.Helper()
	text, err := to.Exec(t.Context(), "cat", "/sys/class/net/eth0/address")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{t: t, to: to.Address, peer: peer.Address}
	if w.mac, err = store.ParseMAC(strings.TrimSpace(text)); err != nil {
		t.Fatal(err)
	}
	if w.fd, err = to.Wire(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(w.fd) })
	return w
}

// stranger is an address of nobody, of the same family.
func (w *wire) stranger(as netip.Addr) netip.Addr {
	if as.Is4() {
		return netip.MustParseAddr("192.0.2.99")
	}
	return netip.MustParseAddr("2001:db8::99")
}

// asIP sends a datagram to a victim with the host as next hop.
func (w *wire) asIP(v victim) {
	w.send(udpPacket(netip.AddrPortFrom(v.from, 7), netip.AddrPortFrom(v.at, plainPort), []byte(control)))
}

// asVXLAN sends it in a frame of the victim's network, in the peer's name.
func (w *wire) asVXLAN(v victim) {
	header := []byte{8, 0, 0, 0, byte(v.vni >> 16), byte(v.vni >> 8), byte(v.vni), 0} // RFC 7348
	frame := ethernetFrame(v.mac, v.by, udpPacket(netip.AddrPortFrom(v.from, 7), netip.AddrPortFrom(v.at, plainPort), []byte(control)))
	w.send(udpPacket(netip.AddrPortFrom(w.peer, 50000), netip.AddrPortFrom(w.to, 4797), append(header, frame...)))
}

func (w *wire) send(packet []byte) {
	w.t.Helper()
	if _, err := unix.Write(w.fd, ethernetFrame(w.mac, store.MAC{2, 0, 0, 0, 0, 0x99}, packet)); err != nil {
		w.t.Fatal(err)
	}
}

func ethernetFrame(to, from store.MAC, packet []byte) []byte {
	kind := []byte{8, 0}
	if packet[0]>>4 == 6 {
		kind = []byte{0x86, 0xdd}
	}
	return slices.Concat(to[:], from[:], kind, packet)
}

// udpPacket returns a datagram with its headers of UDP and IP.
func udpPacket(from, to netip.AddrPort, payload []byte) []byte {
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	length := uint16(8 + len(payload))
	udp := binary.BigEndian.AppendUint16(nil, from.Port())
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = binary.BigEndian.AppendUint16(udp, length)
	udp = append(append(udp, 0, 0), payload...)
	pseudo := slices.Concat(src, dst, []byte{0, unix.IPPROTO_UDP, byte(length >> 8), byte(length)}, udp)
	binary.BigEndian.PutUint16(udp[6:], checksum(pseudo))
	if from.Addr().Is6() {
		ip := []byte{0x60, 0, 0, 0, byte(length >> 8), byte(length), unix.IPPROTO_UDP, 64}
		return slices.Concat(ip, src, dst, udp)
	}
	ip := slices.Concat([]byte{0x45, 0, 0, byte(20 + length), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, src, dst)
	binary.BigEndian.PutUint16(ip[2:], 20+length)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, udp...)
}

// checksum is that of IP (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		if sum += uint32(b[i]) << 8; i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
