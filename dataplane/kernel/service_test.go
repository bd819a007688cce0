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
	m := &p.objects
	for kind, tables := range map[string]struct{ to, from *ebpf.Map }{"lasting": {m.WeftFlowsTo, m.WeftFlowsFrom}, "brief": {m.WeftBriefTo, m.WeftBriefFrom}} {
		t.Run(kind, func(t *testing.T) { flowsAreForgotten(t, p, tables.to, tables.from) })
	}
}

func flowsAreForgotten(t *testing.T, p *Program, to, from *ebpf.Map) {
	vip, gone := netip.MustParseAddr("10.1.0.200"), netip.MustParseAddr("10.1.0.77")
	o := dataplane.Service{VNI: 1, VIP: vip, Backends: victim.IPv4.String() + " " + victim.MAC.String()}
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(o)))
	var flows, answers []bpf.ProgramFlow
	flow := func(vip, task netip.Addr, port uint16) {
		f := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(own.IPv4), Dst: fromAddr4(vip), Sport: port, Dport: 53, Proto: 6}
		back := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(task), Dst: f.Src, Sport: 53, Dport: port, Proto: 6}
		must(t, to.Put(f, bpf.ProgramFlowTo{Ip4: fromAddr4(task)}))
		must(t, from.Put(back, f.Dst))
		flows, answers = append(flows, f), append(answers, back)
	}
	kept := func(what string, want ...bool) {
		t.Helper()
		var task bpf.ProgramFlowTo
		var address uint32
		for i := range want {
			if err := to.Lookup(flows[i], &task); (err == nil) != want[i] {
				t.Errorf("%s: flow %d: %v", what, i, err)
			}
			if err := from.Lookup(answers[i], &address); (err == nil) != want[i] {
				t.Errorf("%s: answers of flow %d: %v", what, i, err)
			}
		}
	}
	flow(vip, victim.IPv4, 1)
	flow(vip, gone, 2)
	flow(netip.MustParseAddr("10.1.0.201"), gone, 3) // of no service that is known
	k := &Kernel{program: p}
	must(t, k.forgetLeft())
	kept("at the start", true, false, true)
	// What leads to the task is no longer in its table, which is full now and then.
	must(t, to.Delete(flows[0]))
	must(t, k.applyService(dataplane.Delete, o))
	kept("without the service", false, false, true)
}

// TestDirectAnswersComeFromTheTask: a client asks a virtual address and then, from the same
// port, its task, and again the other way round. Answers come from where the last question
// went.
func TestDirectAnswersComeFromTheTask(t *testing.T) {
	kerneltest.Netns(t)
	p, run := guarded(t, dataplane.Port{Guard: true, Fast: true, Services: true})
	vip := netip.MustParseAddr("10.1.0.200")
	o := dataplane.Service{VNI: 1, VIP: vip, Backends: victim.IPv4.String() + " " + victim.MAC.String()}
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(o)))
	const syn, ack = 2, 16
	for _, c := range []struct {
		name              string
		proto             byte
		open, goes, reply []byte
	}{
		{"tcp", 6, segment(40000, 80, syn), segment(40000, 80, ack), segment(80, 40000, syn|ack)},
		{"udp", 17, segment(40000, 80, 0), nil, segment(80, 40000, 0)},
		{"echo", protoICMP, []byte{8, 0, 0, 0, 0, 7, 0, 1}, nil, []byte{0, 0, 0, 0, 0, 7, 0, 1}},
	} {
		answered := func(what string, want netip.Addr) {
			t.Helper()
			frame := ipv4(victim.MAC, own.MAC, victim.IPv4, own.IPv4, c.proto, c.reply)
			r := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
			_, err := p.objects.WeftToContainer.Run(&r)
			must(t, err)
			if src, _ := netip.AddrFromSlice(r.DataOut[26:30]); src != want {
				t.Errorf("%s: the answer %s comes from %s, want %s", c.name, what, src, want)
			}
		}
		ask := func(mac store.MAC, to netip.Addr, content []byte) {
			t.Helper()
			run(ipv4(own.MAC, mac, own.IPv4, to, c.proto, content))
		}
		for what, mac := range map[string]store.MAC{"on the bridge": victim.MAC, "through the router": dataplane.RouterMAC} {
			ask(dataplane.RouterMAC, vip, c.open)
			answered("of the virtual address", vip)
			if c.goes != nil { // what opens nothing changes nothing
				ask(mac, victim.IPv4, c.goes)
				answered("of an old flow, "+what, vip)
			}
			ask(mac, victim.IPv4, c.open)
			answered("of the task, "+what, victim.IPv4)
		}
		// The flow is known, and its answers are not any more.
		must(t, clearMap[bpf.ProgramFlow, uint32](p.objects.WeftFlowsFrom))
		ask(dataplane.RouterMAC, vip, c.open)
		answered("after the table lost it", vip)
	}
}

// TestIdleConnectionsOutlastOthers: a connection that is silent keeps its place while more
// flows come and go than the tables hold, of each kind, and loses it when it is closed.
func TestIdleConnectionsOutlastOthers(t *testing.T) {
	t.Parallel()
	kerneltest.Netns(t)
	p, _ := guarded(t, dataplane.Port{Guard: true, Fast: true, Services: true})
	vip := netip.MustParseAddr("10.1.0.200")
	o := dataplane.Service{VNI: 1, VIP: vip, Backends: victim.IPv4.String() + " " + victim.MAC.String()}
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(o)))
	const fin, syn, rst, ack = 1, 2, 4, 16
	out := make([]byte, 256)
	ask := func(proto byte, content []byte) {
		t.Helper()
		frame := ipv4(own.MAC, dataplane.RouterMAC, own.IPv4, vip, proto, content)
		_, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: frame})
		must(t, err)
	}
	// answer returns from where the client sees a segment of the task.
	answer := func(src, dst uint16, flags byte) netip.Addr {
		t.Helper()
		frame := ipv4(victim.MAC, own.MAC, victim.IPv4, own.IPv4, 6, segment(src, dst, flags))
		r := ebpf.RunOptions{Data: frame, DataOut: out}
		_, err := p.objects.WeftToContainer.Run(&r)
		must(t, err)
		src4, _ := netip.AddrFromSlice(r.DataOut[26:30])
		return src4
	}
	lasts := func(port, at uint16) bool {
		f := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(own.IPv4), Dst: fromAddr4(vip), Sport: swap(port), Dport: swap(at), Proto: 6}
		back := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(victim.IPv4), Dst: f.Src, Sport: f.Dport, Dport: f.Sport, Proto: 6}
		var to bpf.ProgramFlowTo
		var from uint32
		known, answered := p.objects.WeftFlowsTo.Lookup(f, &to) == nil, p.objects.WeftFlowsFrom.Lookup(back, &from) == nil
		if known != answered {
			t.Errorf("port %d: known %v, its answers %v", port, known, answered)
		}
		return known
	}
	open := func(port, at uint16) {
		t.Helper()
		ask(6, segment(port, at, syn))
		if lasts(port, at) {
			t.Errorf("port %d has the place of a connection before it is one", port)
		}
		answer(at, port, syn|ack)
		ask(6, segment(port, at, ack))
	}
	const idle, room = 50000, 65536 // MAX_FLOWS
	open(idle, 80)
	// A connection of the task to itself is a flow to the address in either direction.
	selfLasts := func() bool {
		var to bpf.ProgramFlowTo
		f := bpf.ProgramFlow{Vni: 1, Src: fromAddr4(own.IPv4), Dst: fromAddr4(vip), Sport: swap(idle), Dport: swap(81), Proto: 6}
		back := f
		back.Sport, back.Dport = f.Dport, f.Sport
		return p.objects.WeftFlowsTo.Lookup(f, &to) == nil && p.objects.WeftFlowsTo.Lookup(back, &to) == nil
	}
	toSelf := o
	toSelf.Backends = own.IPv4.String() + " " + own.MAC.String()
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(toSelf)))
	ask(6, segment(idle, 81, syn))
	ask(6, segment(81, idle, syn|ack))
	ask(6, segment(idle, 81, ack))
	ask(6, segment(81, idle, ack))
	if !selfLasts() {
		t.Error("a connection of a task to itself has not the place of a connection")
	}
	must(t, p.objects.WeftServices.Put(bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}, serviceValue(o)))
	for what, flow := range map[string]func(port, at uint16){
		"datagrams":                       func(port, at uint16) { ask(17, segment(port, at, 0)) },
		"connections that nobody answers": func(port, at uint16) { ask(6, segment(port, at, syn)) },
		"connections that the client closes first": func(port, at uint16) {
			open(port, at)
			ask(6, segment(port, at, fin|ack))
			answer(at, port, fin|ack)
			ask(6, segment(port, at, ack))
		},
		"connections that the task closes first": func(port, at uint16) {
			open(port, at)
			answer(at, port, fin|ack)
			ask(6, segment(port, at, fin|ack))
			if from := answer(at, port, ack); from != vip {
				t.Errorf("the last acknowledgement comes from %s", from)
			}
		},
		"connections that the client resets": func(port, at uint16) {
			open(port, at)
			ask(6, segment(port, at, rst))
		},
		"connections that the task resets": func(port, at uint16) {
			open(port, at)
			answer(at, port, rst|ack)
		},
	} {
		for i := range room + room/4 {
			port, at := uint16(1000+i%room/2), uint16(1+i/(room/2))
			flow(port, at)
			if lasts(port, at) {
				t.Errorf("%s: one that is over has the place of a connection", what)
			}
			if t.Failed() {
				t.Fatalf("after %d %s", i, what)
			}
		}
		if from := answer(80, idle, ack); from != vip || !lasts(idle, 80) {
			t.Errorf("after %s: the answer to the idle connection comes from %s, want %s", what, from, vip)
		}
		if !selfLasts() {
			t.Errorf("after %s the connection of a task to itself is forgotten", what)
		}
	}
	ask(6, segment(idle, 81, fin|ack))
	ask(6, segment(81, idle, fin|ack))
	if selfLasts() {
		t.Error("a connection of a task to itself lasts when it is over")
	}
}

// TestPiecesOfAnswersGoToTheClient: on a routed network all packets have the router's MAC,
// those of a task too, whose answer's first piece has left its mark.
func TestPiecesOfAnswersGoToTheClient(t *testing.T) {
	kerneltest.Netns(t)
	p, _ := guarded(t, dataplane.Port{Fast: true, Routed: true, Services: true})
	piece := fragment(ipv4(own.MAC, dataplane.RouterMAC, own.IPv4, victim.IPv4, 17, segment(53, 40000, 0)), 7, 3, false)
	part := bpf.ProgramPart{Vni: 1, Src: fromAddr4(own.IPv4), Dst: fromAddr4(victim.IPv4), Id: swap(7), Proto: 17}
	must(t, p.objects.WeftParts.Put(part, bpf.ProgramFlowTo{Ip4: fromAddr4(netip.MustParseAddr("10.1.0.200"))}))
	r := ebpf.RunOptions{Data: piece, DataOut: make([]byte, len(piece)+256)}
	verdict, err := p.objects.WeftFromContainer.Run(&r)
	if err != nil || verdict != passed || !bytes.Equal(r.DataOut, piece) {
		t.Errorf("verdict %d, %v; the piece %x became %x", int32(verdict), err, piece, r.DataOut)
	}
}

// ipv4 makes a frame with an IPv4 packet in it.
func ipv4(from, to store.MAC, src, dst netip.Addr, proto byte, content []byte) []byte {
	b := append(append(append([]byte{}, to[:]...), from[:]...), 8, 0)
	b = append(b, 0x45, 0, 0, byte(20+len(content)), 0, 0, 0, 0, 64, proto, 0, 0)
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[24:], checksum(0, b[14:34]))
	return append(b, content...)
}

// segment is one of TCP without sums, or with flags 0 a packet of UDP.
func segment(src, dst uint16, flags byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	if flags == 0 {
		return append(b, 0, 20, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
	}
	return append(b, 0, 0, 0, 1, 0, 0, 0, 1, 5<<4, flags, 1, 0, 0, 0, 0, 0)
}
