package kernel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// fragment makes a fragment of an IPv4 frame: its number, where it begins in units of
// eight bytes, and whether others follow.
func fragment(frame []byte, id, offset uint16, more bool) []byte {
	b := bytes.Clone(frame)
	if more {
		offset |= 0x2000
	}
	binary.BigEndian.PutUint16(b[18:], id)
	binary.BigEndian.PutUint16(b[20:], offset)
	b[24], b[25] = 0, 0
	binary.BigEndian.PutUint16(b[24:], checksum(0, b[14:34]))
	return b
}

const protoICMP = 1

// portUnreachable makes of a frame the ICMP error about another one.
func portUnreachable(frame, about []byte) []byte {
	b := append(bytes.Clone(frame[:34]), 3, 3, 0, 0, 0, 0, 0, 0)
	b = append(b, about[14:42]...)
	b[23] = protoICMP
	binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
	binary.BigEndian.PutUint16(b[36:], checksum(0, b[34:]))
	return fragment(b, 1, 0, false)
}

// TestServicesTranslateOddities sends packets in pieces to a virtual address and back, and
// an error: what has no ports goes where the first piece went.
func TestServicesTranslateOddities(t *testing.T) {
	kerneltest.Netns(t)
	p, _ := guarded(t, dataplane.Port{Guard: true, Fast: true, Services: true})
	vip := netip.MustParseAddr("10.1.0.200")
	key := bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}
	o := dataplane.Service{VNI: 1, VIP: vip, Backends: victim.IPv4.String() + " " + victim.MAC.String()}
	must(t, p.objects.WeftServices.Put(key, serviceValue(o)))
	ask := packet(t, "ipv4", 40000, 53)
	for i := range 6 {
		ask[i] = 0xee // RouterMAC
	}
	copy(ask[30:], vip.AsSlice())
	answer := packet(t, "ipv4", 53, 40000)
	copy(answer, own.MAC[:])
	copy(answer[6:], victim.MAC[:])
	copy(answer[26:], victim.IPv4.AsSlice())
	copy(answer[30:], own.IPv4.AsSlice())
	asked := fragment(ask, 9, 0, false) // as the task got it
	copy(asked[30:], victim.IPv4.AsSlice())
	asked = fragment(asked, 9, 0, false)
	for _, step := range []struct {
		what     string
		program  *ebpf.Program
		frame    []byte
		src, dst netip.Addr
		to       store.MAC
	}{
		{"a next piece alone", p.objects.WeftFromContainer, fragment(ask, 7, 3, false), own.IPv4, vip, dataplane.RouterMAC},
		{"the first", p.objects.WeftFromContainer, fragment(ask, 7, 0, true), own.IPv4, victim.IPv4, victim.MAC},
		{"a next one", p.objects.WeftFromContainer, fragment(ask, 7, 3, true), own.IPv4, victim.IPv4, victim.MAC},
		{"the last", p.objects.WeftFromContainer, fragment(ask, 7, 6, false), own.IPv4, victim.IPv4, victim.MAC},
		{"one of another packet", p.objects.WeftFromContainer, fragment(ask, 8, 3, true), own.IPv4, vip, dataplane.RouterMAC},
		{"the first of the answer", p.objects.WeftToContainer, fragment(answer, 7, 0, true), vip, own.IPv4, own.MAC},
		{"the last of the answer", p.objects.WeftToContainer, fragment(answer, 7, 3, false), vip, own.IPv4, own.MAC},
		{"an error of the task", p.objects.WeftToContainer, portUnreachable(answer, asked), vip, own.IPv4, own.MAC},
		{"one of another answer", p.objects.WeftToContainer, fragment(answer, 8, 3, false), victim.IPv4, own.IPv4, own.MAC},
	} {
		out := make([]byte, len(step.frame)+256)
		run := ebpf.RunOptions{Data: step.frame, DataOut: out}
		if _, err := step.program.Run(&run); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		out = run.DataOut
		src, _ := netip.AddrFromSlice(out[26:30])
		dst, _ := netip.AddrFromSlice(out[30:34])
		if src != step.src || dst != step.dst || !bytes.Equal(out[:6], step.to[:]) {
			t.Errorf("%s: from %s to %s at %x, want %s, %s at %s", step.what, src, dst, out[:6], step.src, step.dst, step.to)
		}
		if checksum(0, out[14:34]) != 0 {
			t.Errorf("%s: the sum of the header is wrong", step.what)
		}
		if out[23] == protoICMP && (!bytes.Equal(out[58:62], vip.AsSlice()) || checksum(0, out[42:62]) != 0 || checksum(0, out[34:]) != 0) {
			t.Errorf("%s: the packet inside went to %v, with sums %x and %x", step.what, out[58:62], checksum(0, out[42:62]), checksum(0, out[34:]))
		}
	}
}

// TestFlowsLeftAreForgotten has flows to a task that is in no service any more, as a
// process leaves them that dies in mid-change.
func TestFlowsLeftAreForgotten(t *testing.T) {
	kerneltest.Netns(t)
	p, _ := guarded(t, dataplane.Port{Fast: true, Services: true})
	vip, gone := netip.MustParseAddr("10.1.0.200"), netip.MustParseAddr("10.1.0.77")
	o := dataplane.Service{VNI: 1, VIP: vip, Backends: victim.IPv4.String() + " " + victim.MAC.String()}
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(o)))
	flow := func(to, task netip.Addr, port uint16) bpf.ProgramFlow {
		f := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(own.IPv4), Dst: fromAddr4(to), Sport: port, Dport: 53, Proto: 6}
		must(t, p.objects.WeftFlowsTo.Put(f, bpf.ProgramFlowTo{Ip4: fromAddr4(task)}))
		return f
	}
	lives, left, other := flow(vip, victim.IPv4, 1), flow(vip, gone, 2), flow(netip.MustParseAddr("10.1.0.201"), gone, 3)
	k := &Kernel{program: p}
	must(t, k.forgetLeft())
	var to bpf.ProgramFlowTo
	for _, c := range []struct {
		what string
		flow bpf.ProgramFlow
		kept bool
	}{{"to a task of the service", lives, true}, {"to one that is gone", left, false}, {"of no service that is known", other, true}} {
		if err := p.objects.WeftFlowsTo.Lookup(c.flow, &to); (err == nil) != c.kept {
			t.Errorf("flow %s: %v", c.what, err)
		}
	}
}
