package kernel

import (
	"bytes"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// counted is what the program counted of a flow, by what names it.
type counted map[Flow]FlowTotal

// flows returns what the program has counted, and complains about the clock.
func (p *Program) counted(t *testing.T) counted {
	t.Helper()
	zero, err := monotonicZero()
	must(t, err)
	all, err := entries[bpf.ProgramPair, bpf.ProgramTally](p.objects.WeftPairs)
	must(t, err)
	out := counted{}
	for key, v := range all {
		f := flowObject(key, v, zero)
		if f.Last.Before(f.First) || time.Since(f.First).Abs() > time.Hour {
			t.Errorf("first seen %v, last %v", f.First, f.Last)
		}
		sum := FlowTotal{f.Packets, f.Bytes}
		f.First, f.Last, f.Packets, f.Bytes = time.Time{}, time.Time{}, 0, 0
		out[f] = sum
	}
	return out
}

func (p *Program) countFlows(t testing.TB, on bool) {
	t.Helper()
	must(t, p.objects.WeftSettings.Put(uint32(0), settingsValue(dataplane.Program{Flows: on})))
}

func same(t *testing.T, want, got counted) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// packet returns a frame of own to victim with other ports.
func packet(t testing.TB, kind string, src, dst uint16) []byte {
	t.Helper()
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 2)), own, victim) {
		if f.Kind == kind {
			at := map[string]int{"ipv4": 34, "ipv6": 54}[kind]
			data := bytes.Clone(f.Data)
			if at > 0 {
				binary.BigEndian.PutUint16(data[at:], src)
				binary.BigEndian.PutUint16(data[at+2:], dst)
			}
			return data
		}
	}
	t.Fatalf("no frame is called %s", kind)
	return nil
}

// TestFlowsAreCounted sends packets of all fates.
func TestFlowsAreCounted(t *testing.T) {
	kerneltest.Netns(t)
	p, run := guarded(t, dataplane.Port{Guard: true, Fast: true})
	run(packet(t, "ipv4", 40000, 80))
	same(t, counted{}, p.counted(t)) // nobody asked for it

	p.countFlows(t, true)
	want := counted{}
	send := func(times uint64, frame []byte, port uint16, src, dst netip.Addr, proto uint8, v Verdict) {
		t.Helper()
		for range times {
			run(frame)
		}
		f := Flow{VNI: 1, Source: src, Destination: dst, Protocol: proto, Port: port, Verdict: v}
		want[f] = FlowTotal{want[f].Packets + times, want[f].Bytes + times*uint64(len(frame))}
	}
	// Both directions, and all clients, have the server's port.
	for client := range uint16(5) {
		send(2, packet(t, "ipv4", 40000+client, 80), 80, own.IPv4, victim.IPv4, 17, "slow")
	}
	send(3, packet(t, "ipv4", 53, 40000), 53, own.IPv4, victim.IPv4, 17, "slow")
	send(4, packet(t, "ipv6", 40000, 443), 443, own.IPv6, victim.IPv6, 17, "slow")
	tcp := packet(t, "ipv4", 40000, 80)
	tcp[23] = 6
	send(1, tcp, 80, own.IPv4, victim.IPv4, 6, "slow")
	later := packet(t, "ipv4", 40000, 80)
	later[21] = 1 // a fragment that is not the first
	send(1, later, 0, own.IPv4, victim.IPv4, 17, "slow")
	options := packet(t, "ipv4", 40000, 80)
	options[14] = 0x46
	options = append(options[:34:34], append([]byte{1, 1, 1, 1}, options[34:]...)...)
	send(1, options, 80, own.IPv4, victim.IPv4, 17, "slow")
	// What is cut later is as many packets, with the bytes of one.
	whole := packet(t, "ipv4", 40000, 8080)
	_, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: whole, Context: segmented(3, 0)})
	must(t, err)
	want[Flow{VNI: 1, Source: own.IPv4, Destination: victim.IPv4, Protocol: 17, Port: 8080, Verdict: "slow"}] = FlowTotal{3, uint64(len(whole))}
	// What is neither IPv4 nor IPv6 is nobody's flow.
	run(packet(t, "arp request", 0, 0))
	// What the guard drops, by whom it says that it is.
	run(packet(t, "ipv4 loopback", 0, 0))
	d := dataplane.Dest{VNI: 1, MAC: victim.MAC}
	must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
	send(6, packet(t, "ipv4", 40000, 80), 80, own.IPv4, victim.IPv4, 17, "fast")

	got := p.counted(t)
	spoofed := 0
	for f := range maps.Keys(got) {
		if f.Source == netip.MustParseAddr("127.0.0.1") && f.Verdict == "dropped: ipv4" && f.VNI == 1 {
			spoofed++
			delete(got, f)
		}
	}
	if spoofed != 1 {
		t.Errorf("%d flows of what the guard dropped, want 1", spoofed)
	}
	same(t, want, got)

	k := &Kernel{program: p, cfg: Config{Flows: true}}
	known, sums, err := k.FlowTotals()
	must(t, err)
	wantSums := map[Verdict]FlowTotal{"dropped: ipv4": {1, uint64(len(packet(t, "ipv4 loopback", 0, 0)))}}
	for f, n := range want {
		sum := wantSums[f.Verdict]
		wantSums[f.Verdict] = FlowTotal{sum.Packets + n.Packets, sum.Bytes + n.Bytes}
	}
	if diff := cmp.Diff(wantSums, sums); diff != "" || known != len(want)+1 {
		t.Errorf("%d known, -want +got\n%s", known, diff)
	}

	p.countFlows(t, false)
	run(packet(t, "ipv4", 40000, 9999))
	if n := len(p.counted(t)); n != len(want)+1 {
		t.Errorf("%d flows after it was switched off, want %d", n, len(want)+1)
	}
}

// TestFlowsOfServices sends to a virtual address.
func TestFlowsOfServices(t *testing.T) {
	kerneltest.Netns(t)
	p, run := guarded(t, dataplane.Port{Guard: true, Fast: true, Services: true})
	p.countFlows(t, true)
	vip := netip.MustParseAddr("10.1.0.200")
	ask := packet(t, "ipv4", 40000, 53)
	for i := range 6 {
		ask[i] = 0xee // RouterMAC
	}
	copy(ask[30:], vip.AsSlice())
	o := dataplane.Service{VNI: 1, VIP: vip}
	key := bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}
	must(t, p.objects.WeftServices.Put(key, serviceValue(o)))
	run(ask)
	o.Backends = victim.IPv4.String() + " " + victim.MAC.String()
	must(t, p.objects.WeftServices.Put(key, serviceValue(o)))
	run(ask)
	run(ask)
	n := uint64(len(ask))
	same(t, counted{
		{VNI: 1, Source: own.IPv4, Destination: vip, Protocol: 17, Port: 53, Verdict: "dropped: service"}:           {1, n},
		{VNI: 1, Source: own.IPv4, Destination: victim.IPv4, Service: vip, Protocol: 17, Port: 53, Verdict: "slow"}: {2, 2 * n},
	}, p.counted(t))
}

// TestFlowsAreBounded scans more addresses and ports than are kept.
func TestFlowsAreBounded(t *testing.T) {
	kerneltest.Netns(t)
	p, run := guarded(t, dataplane.Port{Guard: true})
	p.countFlows(t, true)
	most := int(p.objects.WeftPairs.MaxEntries())
	frame := packet(t, "ipv4", 65535, 0)
	for i := range most + most/4 {
		binary.BigEndian.PutUint32(frame[30:], uint32(i)>>10|10<<24)
		binary.BigEndian.PutUint16(frame[36:], uint16(2001+i&1023))
		run(frame)
	}
	got := p.counted(t)
	if len(got) > most || len(got) < most/2 {
		t.Errorf("%d flows are kept, of at most %d", len(got), most)
	}
	last := Flow{VNI: 1, Source: own.IPv4, Destination: netip.AddrFrom4([4]byte(frame[30:34])), Protocol: 17, Port: binary.BigEndian.Uint16(frame[36:]), Verdict: "slow"}
	if got[last] != (FlowTotal{1, uint64(len(frame))}) {
		t.Errorf("the last one is not among them: %+v", last)
	}
	_, sums, err := (&Kernel{program: p, cfg: Config{Flows: true}}).FlowTotals()
	must(t, err)
	if n := uint64(most + most/4); sums["slow"] != (FlowTotal{n, n * uint64(len(frame))}) {
		t.Errorf("the sum of %d is %+v", n, sums["slow"])
	}
}
