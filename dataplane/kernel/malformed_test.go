package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// What comes to the programs malformed, with services and flows on. That they read nothing
// out of bounds is what the verifier proves; here is what they let go on, and as what.

const redirected = 7 // TC_ACT_REDIRECT

var (
	self    = netip.MustParseAddr("192.0.2.1")
	peer    = netip.MustParseAddr("192.0.2.2")
	vip     = netip.MustParseAddr("10.1.0.200")
	far     = kerneltest.Station{MAC: store.MAC{2, 0, 0, 0, 0, 3}, IPv4: netip.MustParseAddr("10.1.0.4")} // of peer
	outside = store.MAC{2, 0, 0, 0, 0, 4}                                                                 // of another network on this host
)

// through runs a program on a frame, and returns its verdict and what the frame became.
func through(t testing.TB, p *ebpf.Program, frame []byte) (verdict uint32, out []byte) {
	t.Helper()
	r := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	verdict, err := p.Run(&r)
	if errors.Is(err, unix.EINVAL) && len(frame) <= 54 {
		return unrun, nil // what is shorter than its headers comes to no program this way
	}
	if err != nil {
		t.Fatalf("%x: %v", frame, err)
	}
	return verdict, r.DataOut
}

// served is guarded with all that the program may know: own asks a virtual address, behind
// which are victim, far and itself.
func served(t testing.TB) *Program {
	p, _ := guarded(t, dataplane.Port{Guard: true, Fast: true, Services: true})
	s := settingsValue(dataplane.Program{Address: self, Port: kerneltest.Port, Flows: true, Routed: true})
	s.Underlay = loopback
	must(t, p.objects.WeftSettings.Put(uint32(0), s))
	must(t, replaceKeys(p.objects.WeftPeers, []uint32{0, fromAddr4(peer)}))
	backends := victim.IPv4.String() + " " + victim.MAC.String() + "," + far.IPv4.String() + " " + far.MAC.String() + "," + own.IPv4.String() + " " + own.MAC.String()
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(dataplane.Service{VNI: 1, VIP: vip, Backends: backends})))
	for _, d := range []dataplane.Dest{{VNI: 1, MAC: own.MAC, Link: "lo", Services: true}, {VNI: 1, MAC: victim.MAC, Link: "lo", Services: true}, {VNI: 1, MAC: far.MAC, Peer: peer}, {VNI: 2, MAC: outside, Link: "lo"}} {
		index := uint32(0)
		if d.Link != "" {
			index = loopback
		}
		must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, index)))
	}
	return p
}

// asks are frames of own to the virtual address, of each kind, with right sums.
func asks() (all [][]byte) {
	const fin, syn, rst, ack = 1, 2, 4, 16
	to := func(proto byte, content []byte) []byte {
		return summed(ipv4(own.MAC, dataplane.RouterMAC, own.IPv4, vip, proto, content))
	}
	for _, flags := range []byte{syn, ack, fin | ack, rst, syn | ack} {
		all = append(all, to(6, append(segment(40000, 80, flags), "content"...)), to(6, segment(40001, 80, flags)))
	}
	datagram := to(17, segment(40000, 53, 0))
	all = append(all, datagram, fragment(datagram, 7, 0, true), fragment(datagram, 7, 3, true), fragment(datagram, 7, 6, false))
	all = append(all, to(protoICMP, []byte{8, 0, 0, 0, 0, 7, 0, 1}), to(protoICMP, []byte{0, 0, 0, 0, 0, 7, 0, 1}), portUnreachable(datagram, datagram))
	arp := append(bytes.Repeat([]byte{0xff}, 6), own.MAC[:]...)
	arp = append(arp, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	arp = append(append(append(append(arp, own.MAC[:]...), own.IPv4.AsSlice()...), 0, 0, 0, 0, 0, 0), vip.AsSlice()...)
	return append(all, arp)
}

// summed puts the right sum into a frame's TCP, UDP or ICMP header.
func summed(frame []byte) []byte {
	at, ok := map[byte]int{6: 16, 17: 6, protoICMP: 2}[frame[23]]
	if ok {
		binary.BigEndian.PutUint16(frame[34+at:], 0)
		binary.BigEndian.PutUint16(frame[34+at:], sumBehind(frame))
	}
	return frame
}

// sumBehind is the sum over what lies behind an IPv4 header of 20 bytes, with the pseudo
// header if there is one; zero: it is right.
func sumBehind(frame []byte) uint16 {
	b := bytes.Clone(frame[34:])
	if frame[23] != protoICMP {
		b = append(append(b, make([]byte, len(b)&1)...), frame[26:34]...)
		b = append(b, 0, frame[23])
		b = binary.BigEndian.AppendUint16(b, uint16(len(frame)-34))
	}
	return checksum(0, append(b, make([]byte, len(b)&1)...))
}

func source(frame []byte) netip.Addr      { return netip.AddrFrom4([4]byte(frame[26:30])) }
func destination(frame []byte) netip.Addr { return netip.AddrFrom4([4]byte(frame[30:34])) }

// otherwise returns what differs between two frames of one length beside the addresses, the
// destination's MAC and sums; and whether right sums have become wrong.
func otherwise(in, out []byte) string {
	if len(in) != len(out) {
		return "another length"
	}
	if !bytes.Equal(in[6:24], out[6:24]) {
		return "another header"
	}
	if checksum(0, in[14:34]) == 0 && checksum(0, out[14:34]) != 0 {
		return "the sum of the header is wrong"
	}
	whole := int(binary.BigEndian.Uint16(in[16:])) == len(in)-14 && binary.BigEndian.Uint16(in[20:])&0x3fff == 0
	if in[23] == protoICMP && whole && sumBehind(in) == 0 && sumBehind(out) != 0 { // of an error too, whose content changes
		return "the sum is wrong"
	}
	if sum, ok := map[byte]int{6: 16, 17: 6}[in[23]]; whole && ok && len(in) >= 36+sum {
		if sumBehind(in) == 0 && sumBehind(out) != 0 {
			return "the sum is wrong"
		}
		a, b := bytes.Clone(in[34:]), bytes.Clone(out[34:])
		copy(a[sum:], []byte{0, 0})
		copy(b[sum:], []byte{0, 0})
		if !bytes.Equal(a, b) {
			return "another content"
		}
	}
	return ""
}

// becomes returns why what own sent must not go on as out: it is as it was, or what was for
// the virtual address is for one of its tasks, or it is the answer of that address.
func becomes(in, out []byte) string {
	if len(out) == len(in)+50 { // to the peer
		wrapped := inVXLAN(self, peer, kerneltest.Port, 1, out[50:])
		for _, free := range []int{14 + 4, 14 + 5, 14 + 10, 14 + 11, 34, 35, 15} { // id, sum, source port, class
			wrapped[free] = out[free]
		}
		if !bytes.Equal(wrapped[12:], out[12:]) || checksum(0, out[14:34]) != 0 {
			return "wrong VXLAN"
		}
		if out = out[50:]; !bytes.Equal(out[:6], far.MAC[:]) {
			return "not for the peer"
		}
	}
	switch kind := binary.BigEndian.Uint16(in[12:]); {
	case bytes.Equal(in, out):
		return ""
	case binary.BigEndian.Uint16(out[12:]) != kind:
		return "another ethertype"
	case kind == 0x0806:
		if len(out) != len(in) || !bytes.Equal(out[:6], own.MAC[:]) || out[21] != 2 || netip.AddrFrom4([4]byte(out[28:32])) != vip || netip.AddrFrom4([4]byte(out[38:42])) != own.IPv4 {
			return "no answer of the virtual address"
		}
		return ""
	case kind != 0x0800 || destination(in) != vip || in[0] != 0xee || in[5] != 0xee:
		return "changed, and was not for the virtual address"
	case source(out) == vip && destination(out) == own.IPv4: // a reset, or own itself is the task
		if !bytes.Equal(out[:6], own.MAC[:]) {
			return "an answer to another"
		}
		if why := otherwise(in, out); why == "" || !resets(in, out) {
			return why
		}
		if checksum(0, out[14:34]) != 0 || sumBehind(out) != 0 {
			return "a reset with wrong sums"
		}
		return ""
	}
	task := map[netip.Addr]store.MAC{victim.IPv4: victim.MAC, far.IPv4: far.MAC}[destination(out)]
	if source(out) != own.IPv4 || task.IsZero() || !bytes.Equal(out[:6], task[:]) {
		return "for none of the tasks"
	}
	return otherwise(in, out)
}

// resets reports whether a frame may be the reset that answers another.
func resets(in, out []byte) bool {
	const rst = 4
	return len(out) == 54 && in[23] == 6 && out[23] == 6 && out[47]&rst != 0 && in[47]&rst == 0
}

// TestServicesHoldAgainstNonsense changes at random what an endpoint sends to a virtual
// address and to others.
func TestServicesHoldAgainstNonsense(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(5, 6))
	p := served(t)
	kinds, runs := map[string]int{}, 0
	for range 500 {
		frames := asks()
		for _, f := range kerneltest.Frames(rng, own, victim) {
			frames = append(frames, f.Data)
		}
		for _, frame := range frames {
			data := mutated(rng, frame)
			runs++
			verdict, out := through(t, p.objects.WeftFromContainer, data)
			if verdict == dropped || verdict == unrun {
				continue
			}
			if why := forbidden(data); why != "" {
				t.Fatalf("%x, changed to %x, passes: %s", frame, data, why)
			}
			if why := becomes(data, out); why != "" || verdict != passed && verdict != redirected {
				t.Fatalf("%x, changed to %x, leaves as %x, verdict %d: %s", frame, data, out, int32(verdict), why)
			}
			switch {
			case len(out) == len(data)+50:
				kinds["to the peer"]++
			case bytes.Equal(data, out) && verdict == passed:
				kinds["to the stack"]++
			case bytes.Equal(data, out):
				kinds["to the neighbour"]++
			case out[13] == 6:
				kinds["ARP answered"]++
			case source(out) == vip && resets(data, out):
				kinds["reset"]++
			default:
				kinds["translated"]++
			}
		}
	}
	if len(kinds) != 6 {
		t.Errorf("not all ways are taken: %v", kinds)
	}
	t.Logf("SCORE | services against changed frames | program | %d | %v, 0 of them forbidden | 0 |", runs, kinds)
}

// TestAnswersHoldAgainstNonsense changes at random what comes to a client of a virtual
// address by the host's stack.
func TestAnswersHoldAgainstNonsense(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(7, 8))
	p := served(t)
	p.expectAnswers(t)
	translated, errorsBack := 0, 0
	for range 2000 {
		for _, frame := range answers() {
			data := mutated(rng, frame)
			verdict, out := through(t, p.objects.WeftToContainer, data)
			if verdict == dropped || verdict == unrun || bytes.Equal(data, out) && verdict == passed {
				continue
			}
			if verdict != passed {
				t.Fatalf("%x: verdict %d", data, int32(verdict))
			}
			if why := answerBecomes(data, out); why != "" {
				t.Fatalf("%x, changed to %x, arrives as %x: %s", frame, data, out, why)
			}
			if translated++; out[23] == protoICMP && out[34] == 3 {
				errorsBack++
			}
		}
	}
	if translated == 0 || errorsBack == 0 {
		t.Errorf("%d answers and %d errors were translated", translated, errorsBack)
	}
}

// answers are frames of the task victim to own, which had asked the virtual address.
func answers() [][]byte {
	from := func(proto byte, content []byte) []byte {
		return summed(ipv4(victim.MAC, own.MAC, victim.IPv4, own.IPv4, proto, content))
	}
	datagram := from(17, segment(53, 40000, 0))
	asked := ipv4(own.MAC, victim.MAC, own.IPv4, victim.IPv4, 17, segment(40000, 53, 0))
	return [][]byte{from(6, segment(80, 40000, 16)), from(6, segment(80, 40000, 17)), from(6, segment(80, 40000, 4)), datagram, from(protoICMP, []byte{0, 0, 0, 0, 0, 7, 0, 1}),
		fragment(datagram, 9, 0, true), fragment(datagram, 9, 3, false), portUnreachable(datagram, asked)}
}

// expectAnswers has own wait for them.
func (p *Program) expectAnswers(t testing.TB) {
	t.Helper()
	for _, back := range []bpf.ProgramFlow{{Sport: 80, Dport: 40000, Proto: 6}, {Sport: 53, Dport: 40000, Proto: 17}, {Sport: 7, Proto: protoICMP}} {
		back.Vni, back.Src, back.Dst, back.Sport, back.Dport = 1, fromAddr4(victim.IPv4), fromAddr4(own.IPv4), swap(back.Sport), swap(back.Dport)
		must(t, p.objects.WeftBriefFrom.Put(back, fromAddr4(vip)))
	}
}

// answerBecomes returns why what came to own must not arrive as out: what a task says, the
// virtual address says, and nothing else changes.
func answerBecomes(in, out []byte) string {
	if binary.BigEndian.Uint16(in[12:]) != 0x0800 || !bytes.Equal(in[:6], out[:6]) || destination(in) != destination(out) {
		return "for another"
	}
	if source(out) != source(in) && (source(in) != victim.IPv4 || source(out) != vip) {
		return "from another"
	}
	return otherwise(in, out)
}
