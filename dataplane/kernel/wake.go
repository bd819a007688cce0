package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
)

// wake makes the clients of flows of TCP that were forgotten say something, for the
// program answers that with a reset: who only waits for data would wait for ever when the
// task's host died. Each is sent a segment that its TCP does not expect, from the virtual
// address, and so acknowledges what it has (RFC 9293, 3.10.7.4).
func (k *Kernel) wake(flows []bpf.ProgramFlow) error {
	if len(flows) == 0 {
		return nil
	}
	ports, err := entries[uint32, bpf.ProgramPort](k.program.objects.WeftPorts)
	if err != nil {
		return fmt.Errorf("read ports: %w", err)
	}
	type client struct{ vni, ip4 uint32 }
	links := map[client]uint32{}
	for index, p := range ports {
		links[client{p.Vni, p.Ip4}] = index
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket for resets: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, f := range flows {
		link, ok := links[client{f.Vni, f.Src}]
		if !ok {
			continue
		}
		to := unix.SockaddrLinklayer{Ifindex: int(link)}
		err := unix.Sendto(fd, wakeFrame(f, ports[link].Mac), 0, &to)
		// A client that went meanwhile, or a full queue: nobody waits, or goes on waiting.
		if err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("wake a client: %w", err)
		}
	}
	return nil
}

// wakeFrame is an ACK from a flow's virtual address to its client, with sequence number
// zero, which is outside of nearly every window; inside it is an ACK of old data.
func wakeFrame(f bpf.ProgramFlow, client [6]byte) []byte {
	const l3, l4, all = 14, 34, 54
	b := make([]byte, all)
	copy(b, client[:])
	copy(b[6:], dataplane.RouterMAC[:])
	binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
	b[l3], b[l3+8], b[l3+9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[l3+2:], all-l3)
	vip, src := toAddr4(f.Dst), toAddr4(f.Src)
	copy(b[l3+12:], vip.AsSlice())
	copy(b[l3+16:], src.AsSlice())
	binary.BigEndian.PutUint16(b[l3+10:], checksum(0, b[l3:l4]))
	binary.NativeEndian.PutUint16(b[l4:], f.Dport) // both in network order
	binary.NativeEndian.PutUint16(b[l4+2:], f.Sport)
	b[l4+12], b[l4+13] = 5<<4, 0x10
	binary.BigEndian.PutUint16(b[l4+16:], checksum(pseudo(vip, src, all-l4), b[l4:]))
	return b
}

// pseudo is the sum of the pseudo header of TCP (RFC 9293, 3.1).
func pseudo(from, to netip.Addr, length uint32) uint32 {
	sum := unix.IPPROTO_TCP + length
	for _, a := range []netip.Addr{from, to} {
		raw := a.As4()
		sum += uint32(binary.BigEndian.Uint16(raw[:])) + uint32(binary.BigEndian.Uint16(raw[2:]))
	}
	return sum
}

// checksum is that of the Internet (RFC 1071) of an even number of bytes.
func checksum(sum uint32, b []byte) uint16 {
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
