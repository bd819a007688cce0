package kerneltest

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"github.com/weftnet/weft/store"
)

// Station is an endpoint as frames tell of it.
type Station struct {
	MAC  store.MAC
	IPv4 netip.Addr
	IPv6 netip.Addr
}

// LinkLocal returns the address that follows from the MAC (RFC 4291, appendix A).
func (s Station) LinkLocal() netip.Addr {
	m := s.MAC
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// Frame is an Ethernet frame that an endpoint sends.
type Frame struct {
	Kind   string
	Data   []byte
	Reason string // for which the guard drops it; "": it passes
}

// Marker is in every frame of Frames that has room for it.
const Marker = "weft-hostile"

const (
	typeIPv4, typeIPv6, typeARP = 0x0800, 0x86dd, 0x0806
	protoICMP, protoUDP         = 1, 17
	protoICMP6                  = 58
)

// Frames returns one frame of each kind that an endpoint may send to another, and of
// each that it may not; rng fills what does not matter.
func Frames(rng *rand.Rand, own, victim Station) []Frame {
	other := own
	other.MAC = store.DeriveMAC("hostile", string(rune(rng.Uint32()&0xffff)))
	stranger4 := victim.IPv4
	if rng.Uint32()&1 == 0 {
		stranger4 = netip.AddrFrom4([4]byte{10, byte(rng.Uint32()), byte(rng.Uint32()), 254})
	}
	udp := func(src, dst uint16) []byte { return udpPacket(src, dst) }
	sport := uint16(1024 + rng.Uint32()%60000)
	all := []Frame{
		{"ipv4", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9))), ""},
		{"ipv6", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoUDP, udp(sport, 9))), ""},
		{"ipv6 link-local", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, protoUDP, udp(sport, 9))), ""},
		{"arp request", ethernet(broadcast, own.MAC, typeARP, arp(1, own.MAC, own.IPv4, victim.IPv4)), ""},
		{"arp probe", ethernet(broadcast, own.MAC, typeARP, arp(1, own.MAC, netip.IPv4Unspecified(), own.IPv4)), ""},
		{"ns", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(135, victim.IPv6, 1, own.MAC))), ""},
		{"na", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(136, own.IPv6, 2, own.MAC))), ""},
		{"dad", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(netip.IPv6Unspecified(), victim.IPv6, protoICMP6, nd(135, own.IPv6, 0, own.MAC))), ""},
		{"ns with padding", ethernet(victim.MAC, own.MAC, typeIPv6, append(ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(135, victim.IPv6, 1, own.MAC)), Marker...)), ""},
		{"ipv6 behind headers", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 60, chain(3))), ""},
		{"ipv4 fragment", ethernet(victim.MAC, own.MAC, typeIPv4, part(ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9)), 0x2000)), ""},
		{"ipv4 next fragment", ethernet(victim.MAC, own.MAC, typeIPv4, part(ipv4(own.IPv4, victim.IPv4, protoUDP, udp(67, 68)), 1)), ""},
		{"ipv6 fragment", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 44, fragment(protoUDP, 1, udp(sport, 9)))), ""},
		{"ipv6 next fragment", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 44, fragment(protoUDP, 8, udp(547, 546)))), ""},

		{"mac", ethernet(victim.MAC, other.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9))), "mac"},
		{"victim's mac", ethernet(broadcast, victim.MAC, typeARP, arp(1, victim.MAC, own.IPv4, victim.IPv4)), "mac"},
		{"ipv4 of another", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(stranger4, victim.IPv4, protoUDP, udp(sport, 9))), "ipv4"},
		{"ipv4 of none", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(netip.IPv4Unspecified(), victim.IPv4, protoUDP, udp(68, 67))), "ipv4"},
		{"ipv4 loopback", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(netip.MustParseAddr("127.0.0.1"), victim.IPv4, protoUDP, udp(sport, 9))), "ipv4"},
		{"ipv6 of another", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(victim.IPv6, victim.IPv6, protoUDP, udp(sport, 9))), "ipv6"},
		{"ipv6 link-local of another", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(victim.LinkLocal(), victim.IPv6, protoUDP, udp(sport, 9))), "ipv6"},
		{"ipv6 of none", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(netip.IPv6Unspecified(), victim.IPv6, protoUDP, udp(sport, 9))), "ipv6"},
		{"arp for victim", ethernet(broadcast, own.MAC, typeARP, arp(2, own.MAC, victim.IPv4, own.IPv4)), "arp"},
		{"gratuitous arp", ethernet(broadcast, own.MAC, typeARP, arp(1, own.MAC, stranger4, stranger4)), "arp"},
		{"arp with another mac", ethernet(victim.MAC, own.MAC, typeARP, arp(2, other.MAC, own.IPv4, victim.IPv4)), "arp"},
		{"arp answer of none", ethernet(broadcast, own.MAC, typeARP, arp(2, own.MAC, netip.IPv4Unspecified(), victim.IPv4)), "arp"},
		{"arp probe for victim", ethernet(broadcast, own.MAC, typeARP, arp(1, own.MAC, netip.IPv4Unspecified(), victim.IPv4)), "arp"},
		{"dad for victim", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(netip.IPv6Unspecified(), victim.IPv6, protoICMP6, nd(135, victim.IPv6, 0, own.MAC))), "nd"},
		{"na for victim", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(136, victim.IPv6, 2, own.MAC))), "nd"},
		{"na with another mac", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(136, own.IPv6, 2, other.MAC))), "nd"},
		{"ns with another mac", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoICMP6, nd(135, victim.IPv6, 1, other.MAC))), "nd"},
		{"na of none", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(netip.IPv6Unspecified(), victim.IPv6, protoICMP6, nd(136, own.IPv6, 2, own.MAC))), "nd"},
		{"na behind a header", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 60, extension(protoICMP6, nd(136, victim.IPv6, 2, own.MAC)))), "nd"},
		{"ra", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, protoICMP6, advertisement())), "ra"},
		{"ra behind a header", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, 0, extension(protoICMP6, advertisement()))), "nd"},
		{"redirect", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, protoICMP6, nd(137, victim.IPv6, 2, own.MAC))), "ra"},
		{"ipv4 redirect", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoICMP, icmp(5, own.IPv4))), "ra"},
		{"ipv4 router", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoICMP, icmp(9, own.IPv4))), "ra"},
		{"too many headers", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 60, chain(7))), "headers"},
		{"dhcp server", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(67, 68))), "dhcp"},
		{"dhcpv6 server", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, protoUDP, udp(547, 546))), "dhcp"},
		{"dhcp server on another port", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 68))), "dhcp"},
		{"dhcpv6 server on another port", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, protoUDP, udp(sport, 546))), "dhcp"},
		{"dhcp server in a fragment", ethernet(victim.MAC, own.MAC, typeIPv4, part(ipv4(own.IPv4, victim.IPv4, protoUDP, udp(67, 68)), 0x2000)), "dhcp"},
		{"dhcpv6 server in a fragment", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, 44, fragment(protoUDP, 1, udp(547, 546)))), "dhcp"},
		{"fragment of another", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(victim.IPv6, victim.IPv6, 44, fragment(protoUDP, 8, udp(sport, 9)))), "ipv6"},
		{"ra in a fragment", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.LinkLocal(), victim.IPv6, 44, fragment(protoICMP6, 1, advertisement()))), "nd"},
		{"ra behind padding", ethernet(victim.MAC, own.MAC, typeIPv6, append(ipv6(own.LinkLocal(), victim.IPv6, 44, fragment(60, 1, extension(protoICMP6, nil))), padding...)), "short"},
		{"dhcp server behind padding", ethernet(victim.MAC, own.MAC, typeIPv4, append(part(ipv4(own.IPv4, victim.IPv4, protoUDP, nil), 0x2000), padding...)), "short"},
		{"vlan", ethernet(victim.MAC, own.MAC, 0x8100, append([]byte{0, 5, 8, 0}, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9))...)), "vlan"},
		{"vlan in vlan", ethernet(victim.MAC, own.MAC, 0x88a8, append([]byte{0, 5, 0x81, 0, 0, 6, 8, 0}, ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9))...)), "vlan"},
		{"stp", ethernet(store.MAC{1, 0x80, 0xc2, 0, 0, 0}, own.MAC, 0x26, append([]byte{0x42, 0x42, 3}, Marker...)), "bridge"},
		{"lldp", ethernet(store.MAC{1, 0x80, 0xc2, 0, 0, 0xe}, own.MAC, 0x88cc, []byte(Marker)), "bridge"},
		{"length", ethernet(broadcast, own.MAC, 0x0040, []byte(Marker)), "bridge"},
		{"ethertype", ethernet(victim.MAC, own.MAC, 0x88b5, []byte(Marker)), "ethertype"},
		{"ipv4 too short", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, nil)[:12]), "short"},
		{"ipv4 longer than its frame", ethernet(victim.MAC, own.MAC, typeIPv4, cut(ipv4(own.IPv4, victim.IPv4, protoUDP, append(udp(sport, 9), 0)))), "short"},
		{"ipv6 longer than its frame", ethernet(victim.MAC, own.MAC, typeIPv6, cut(ipv6(own.IPv6, victim.IPv6, protoUDP, append(udp(sport, 9), 0)))), "short"},
		{"udp too short", ethernet(victim.MAC, own.MAC, typeIPv4, ipv4(own.IPv4, victim.IPv4, protoUDP, []byte{0})), "short"},
		{"ipv6 too short", ethernet(victim.MAC, own.MAC, typeIPv6, ipv6(own.IPv6, victim.IPv6, protoUDP, nil)[:30]), "short"},
	}
	bad := ipv4(own.IPv4, victim.IPv4, protoUDP, udp(sport, 9))
	bad[0] = 0x44 // a header of 16 bytes
	all = append(all, Frame{"ipv4 header length", ethernet(victim.MAC, own.MAC, typeIPv4, bad), "headers"})
	bad = ipv6(own.IPv6, victim.IPv6, protoUDP, udp(sport, 9))
	bad[0] = 0x40
	return append(all, Frame{"ipv6 version", ethernet(victim.MAC, own.MAC, typeIPv6, bad), "headers"})
}

var broadcast = store.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func ethernet(dst, src store.MAC, kind uint16, payload []byte) []byte {
	b := append(dst[:], src[:]...)
	b = binary.BigEndian.AppendUint16(b, kind)
	return append(b, payload...)
}

func ipv4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b))
	return append(b, payload...)
}

func ipv6(src, dst netip.Addr, next byte, payload []byte) []byte {
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	if next == protoICMP6 && len(payload) >= 4 {
		pseudo := append(append([]byte{}, b[8:40]...), 0, 0, byte(len(payload)>>8), byte(len(payload)), 0, 0, 0, next)
		binary.BigEndian.PutUint16(payload[2:], ^sum(sum(0, pseudo), payload))
	}
	return append(b, payload...)
}

// udpPacket has no checksum, which IPv6 does not accept: it only has to pass.
func udpPacket(src, dst uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(Marker)))
	return append(append(b, 0, 0), Marker...)
}

// icmp is a message that names a router.
func icmp(kind byte, router netip.Addr) []byte {
	b := append([]byte{kind, 1, 0, 0}, router.AsSlice()...)
	b = append(b, Marker...)
	binary.BigEndian.PutUint16(b[2:], ^sum(0, b))
	return b
}

func arp(op byte, sender store.MAC, senderIP, target netip.Addr) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, op}, sender[:]...)
	b = append(b, senderIP.AsSlice()...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(append(b, target.AsSlice()...), Marker...)
}

// nd is a message of neighbour discovery with one option, or none.
func nd(kind byte, target netip.Addr, option byte, mac store.MAC) []byte {
	b := append([]byte{kind, 0, 0, 0, 0x60, 0, 0, 0}, target.AsSlice()...)
	if kind == 137 {
		b = append(b, target.AsSlice()...)
	}
	if option != 0 {
		b = append(append(b, option, 1), mac[:]...)
	}
	return b
}

// advertisement is a router's, of a lifetime and a prefix.
func advertisement() []byte {
	b := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	return append(b, netip.MustParseAddr("2001:db8:bad::").AsSlice()...)
}

// extension puts a header of options before a payload.
func extension(next byte, payload []byte) []byte {
	return append([]byte{next, 0, 1, 4, 0, 0, 0, 0}, payload...)
}

// chain is n such headers and a UDP packet.
func chain(n int) []byte {
	b := udpPacket(9, 9)
	next := byte(protoUDP)
	for range n {
		b, next = extension(next, b), 60
	}
	return b
}

// padding lies behind a packet whose next fragment has the header that it seems to be: an
// echo request, or a source port of nobody's.
var padding = append([]byte{128, 0, 0, 0, 0, 0, 0, 0}, Marker...)

// cut takes the last byte off.
func cut(b []byte) []byte { return b[:len(b)-1] }

// part makes an IPv4 packet a fragment, by its flags and offset.
func part(b []byte, flags uint16) []byte {
	binary.BigEndian.PutUint16(b[6:], flags)
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:20]))
	return b
}

// fragment puts IPv6's header of one before a payload; 1 in flags: more follow.
func fragment(next byte, flags uint16, payload []byte) []byte {
	return append([]byte{next, 0, byte(flags >> 8), byte(flags), 0, 0, 0, 7}, payload...)
}

// sum is the ones' complement sum of RFC 1071.
func sum(start uint16, b []byte) uint16 {
	s := uint32(start)
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
