package kernel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// lengthened returns a frame whose IP packet has so many bytes.
func lengthened(t *testing.T, kind string, size int) []byte {
	t.Helper()
	b := packet(t, kind, 40000, 53)
	b = append(b, make([]byte, 14+size-len(b))...)
	if kind == "ipv6" {
		binary.BigEndian.PutUint16(b[18:], uint16(size-40))
	} else {
		binary.BigEndian.PutUint16(b[16:], uint16(size))
	}
	return b
}

// TestTooLongIsAnswered: the sender of a packet that is longer than the MTU gets the ICMP
// message that a router would send, and nobody anything else.
func TestTooLongIsAnswered(t *testing.T) {
	kerneltest.Netns(t)
	const df, first, next = 0x4000, 0x2000, 0x2010 // in the field of fragments
	for _, c := range []struct {
		what      string
		port      dataplane.Port
		kind      string
		size      int
		change    func(b []byte) []byte
		mtu, flag uint16 // told; 0: nothing
	}{
		{"fits", dataplane.Port{MTU: 1350}, "ipv4", 1350, nil, 0, df},
		{"too long", dataplane.Port{MTU: 1350}, "ipv4", 1351, nil, 1350, df},
		{"too long, and the destination is known", dataplane.Port{MTU: 1350, Fast: true, Services: true}, "ipv4", 1351, nil, 1350, df},
		{"any length", dataplane.Port{}, "ipv4", 3000, nil, 0, df},
		{"may be fragmented, by nobody", dataplane.Port{MTU: 1350}, "ipv4", 1351, nil, 1350, 0},
		{"may be fragmented, by the host", dataplane.Port{MTU: 1350, Routed: true}, "ipv4", 1351, nil, 0, 0},
		{"must not be, by the host", dataplane.Port{MTU: 1350, Routed: true}, "ipv4", 1351, nil, 1350, df},
		{"first fragment", dataplane.Port{MTU: 1350}, "ipv4", 1351, nil, 1350, first},
		{"next fragment", dataplane.Port{MTU: 1350}, "ipv4", 1351, nil, 0, next},
		{"to many", dataplane.Port{MTU: 1350}, "ipv4", 1351, func(b []byte) []byte { b[0] = 1; return b }, 0, df},
		{"an error", dataplane.Port{MTU: 1350}, "ipv4", 1351, func(b []byte) []byte { b[23], b[34] = protoICMP, 3; return b }, 0, df},
		{"ping", dataplane.Port{MTU: 1350}, "ipv4", 1351, func(b []byte) []byte { b[23], b[34] = protoICMP, 8; return b }, 1350, df},
		{"IPv6 fits", dataplane.Port{MTU: 1350}, "ipv6", 1350, nil, 0, 0},
		{"IPv6 too long", dataplane.Port{MTU: 1350}, "ipv6", 1351, nil, 1350, 0},
		{"IPv6 too long, and the host routes", dataplane.Port{MTU: 1350, Routed: true, Fast: true}, "ipv6", 1351, nil, 1350, 0},
		{"IPv6 of the least size", dataplane.Port{MTU: 1240}, "ipv6", 1280, nil, 0, 0},
		{"IPv6 above the least size", dataplane.Port{MTU: 1240}, "ipv6", 1281, nil, 1280, 0},
		{"IPv6 error", dataplane.Port{MTU: 1350}, "ipv6", 1351, func(b []byte) []byte { b[20], b[54] = 58, 3; return b }, 0, 0},
	} {
		c.port.Guard = true
		p, _ := guarded(t, c.port)
		p.countFlows(t, true)
		frame := lengthened(t, c.kind, c.size)
		if c.kind == "ipv4" {
			binary.BigEndian.PutUint16(frame[20:], c.flag)
		}
		if c.change != nil {
			frame = c.change(frame)
		}
		verdict, out := through(t, p.objects.WeftFromContainer, frame)
		counted := p.counted(t)
		told := false
		for k := range counted {
			told = told || k.Verdict == droppedVerdict+"mtu"
		}
		switch {
		case told != (c.mtu != 0):
			t.Errorf("%s: counted %v", c.what, counted)
		case c.mtu == 0 && (verdict != passed || !bytes.Equal(out, frame)):
			t.Errorf("%s: verdict %d, and the frame became %x", c.what, int32(verdict), out)
		case c.mtu != 0 && verdict != redirected:
			t.Errorf("%s: verdict %d", c.what, int32(verdict))
		case c.mtu != 0:
			if why := noAnswer(frame, out, c.kind == "ipv6", uint32(c.mtu)); why != "" {
				t.Errorf("%s: %s: %x", c.what, why, out)
			}
		}
	}
}

// noAnswer returns why out is not the message to the sender of a packet that so many bytes
// fit, "" if it is.
func noAnswer(frame, out []byte, v6 bool, mtu uint32) string {
	if !bytes.Equal(out[:12], append(bytes.Clone(frame[6:12]), frame[:6]...)) || !bytes.Equal(out[12:14], frame[12:14]) {
		return "another Ethernet header"
	}
	icmp, quoted, kind, src, dst := 34, 28, []byte{3, 4}, out[26:30], out[30:34]
	asked, asker := frame[30:34], frame[26:30]
	if v6 {
		icmp, quoted, kind, src, dst = 54, 56, []byte{2, 0}, out[22:38], out[38:54]
		asked, asker = frame[38:54], frame[22:38]
	}
	sum := bytes.Clone(out[icmp:])
	if v6 {
		sum = append(append(append(sum, src...), dst...), 0, 58)
		sum = binary.BigEndian.AppendUint16(sum, uint16(len(out)-icmp))
	}
	length := int(binary.BigEndian.Uint16(out[16:])) + 14
	if v6 {
		length = int(binary.BigEndian.Uint16(out[18:])) + 54
	}
	switch {
	case !bytes.Equal(src, asked) || !bytes.Equal(dst, asker):
		return "not from the destination to the sender"
	case length != len(out) || len(out) != icmp+8+quoted:
		return "another length"
	case !v6 && (out[14] != 0x45 || out[23] != protoICMP || checksum(0, out[14:34]) != 0):
		return "no right IPv4 header"
	case v6 && (out[14] != 0x60 || out[20] != 58 || netip.AddrFrom16([16]byte(src)).IsUnspecified()):
		return "no right IPv6 header"
	case !bytes.Equal(out[icmp:icmp+2], kind) || binary.BigEndian.Uint32(out[icmp+4:]) != mtu:
		return "another message"
	case checksum(0, sum) != 0:
		return "a wrong sum"
	case !bytes.Equal(out[icmp+8:], frame[14:14+quoted]):
		return "about another packet"
	}
	return ""
}

// TestTooLongSegments: of what is cut on the way each piece must fit. Those of SCTP are as
// long as its chunks are, which the program does not see.
func TestTooLongSegments(t *testing.T) {
	kerneltest.Netns(t)
	p, _ := guarded(t, dataplane.Port{MTU: 1350, Guard: true})
	for _, c := range []struct {
		what  string
		proto byte
		size  uint32 // of a piece, without its headers
		want  uint32
	}{
		{"TCP fits", 6, 1350 - 20 - 20, passed},
		{"TCP is too long", 6, 1350 - 20 - 20 + 1, redirected},
		{"UDP fits", 17, 1350 - 20 - 8, passed},
		{"UDP is too long", 17, 1350 - 20 - 8 + 1, redirected},
		{"SCTP", 132, 0xffff, passed},
	} {
		frame := lengthened(t, "ipv4", 3000)
		binary.BigEndian.PutUint16(frame[20:], 0x4000)
		frame[23], frame[46] = c.proto, 5<<4
		got, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: segmented(3, c.size)})
		must(t, err)
		if got != c.want {
			t.Errorf("%s: verdict %d, want %d", c.what, int32(got), int32(c.want))
		}
	}
}

// segmented is what a program sees of a packet that is cut later, into so many pieces with
// so many bytes behind their headers (struct __sk_buff, linux/bpf.h).
func segmented(pieces, size uint32) (context [192]byte) {
	binary.NativeEndian.PutUint32(context[164:], pieces)
	binary.NativeEndian.PutUint32(context[176:], size)
	return context
}
