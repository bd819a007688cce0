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

// TestProgramLoads has the kernel's verifier look at the programs.
func TestProgramLoads(t *testing.T) {
	kerneltest.Netns(t)
	p := loadProgram(t)
	for _, prog := range p.programs() {
		info, err := (*prog).Info()
		if err != nil {
			t.Fatal(err)
		}
		n, _ := info.VerifiedInstructions() // since Linux 5.16
		size, _ := info.TranslatedSize()
		t.Logf("SCORE | verifier | %s | 1 | %d instructions looked at, %d bytes | loads |", info.Name, n, size)
	}
}

func loadProgram(t testing.TB) *Program {
	t.Helper()
	p := LoadProgram("")
	var why *ebpf.VerifierError
	if errors.As(p.Err(), &why) {
		t.Logf("%+v", why)
	}
	if p.Err() != nil {
		t.Fatal(p.Err())
	}
	t.Cleanup(p.Close)
	return p
}

// loopback is the link from which frames of a test run seem to come.
const loopback = 1

var (
	own    = kerneltest.Station{MAC: store.MAC{2, 0, 0, 0, 0, 1}, IPv4: netip.MustParseAddr("10.1.0.2"), IPv6: netip.MustParseAddr("fd00::2")}
	victim = kerneltest.Station{MAC: store.MAC{2, 0, 0, 0, 0, 2}, IPv4: netip.MustParseAddr("10.1.0.3"), IPv6: netip.MustParseAddr("fd00::3")}
)

// guarded returns the program with one endpoint, and what it says to a frame of that.
func guarded(t testing.TB, port dataplane.Port) (p *Program, run func(frame []byte) (verdict uint32, reason string)) {
	p = loadProgram(t)
	port.VNI, port.MAC, port.IPv4, port.IPv6 = 1, own.MAC, own.IPv4, own.IPv6
	count := make([]bpf.ProgramCounters, ebpf.MustPossibleCPU())
	if err := errors.Join(p.objects.WeftPorts.Put(uint32(loopback), portValue(port)), p.objects.WeftCounters.Put(uint32(loopback), count)); err != nil {
		t.Fatal(err)
	}
	var before [REASONS]uint64
	return p, func(frame []byte) (uint32, string) {
		verdict, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: frame})
		if errors.Is(err, unix.EINVAL) && len(frame) <= 54 {
			return unrun, "" // what is shorter than its headers comes to no program this way
		}
		if err != nil {
			t.Fatalf("%x: %v", frame, err)
		}
		if err := p.objects.WeftCounters.Lookup(uint32(loopback), &count); err != nil {
			t.Fatal(err)
		}
		reason := ""
		var now [REASONS]uint64
		for _, c := range count {
			for i, n := range c.Dropped {
				now[i] += n
			}
		}
		for i := range now {
			if now[i] != before[i] {
				reason = Reasons[i]
			}
		}
		before = now
		return verdict, reason
	}
}

const (
	// REASONS is the size of the array of reasons.
	REASONS = len(bpf.ProgramCounters{}.Dropped)

	unrun   = 1 << 16
	dropped = 2                 // TC_ACT_SHOT
	passed  = uint32(1<<32 - 1) // TC_ACT_UNSPEC
)

func TestGuard(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(1, 2))
	_, run := guarded(t, dataplane.Port{Guard: true})
	seen := map[string]bool{}
	for _, f := range kerneltest.Frames(rng, own, victim) {
		verdict, reason := run(f.Data)
		if verdict == unrun {
			continue
		}
		if want := map[bool]uint32{true: passed, false: dropped}[f.Reason == ""]; verdict != want || reason != f.Reason {
			t.Errorf("%s: verdict %d, reason %q; want %d, %q", f.Kind, int32(verdict), reason, int32(want), f.Reason)
		}
		seen[reason] = true
	}
	for _, reason := range Reasons {
		if !seen[reason] {
			t.Errorf("no frame is dropped for %q", reason)
		}
	}
	_, run = guarded(t, dataplane.Port{Guard: true, Other: true})
	for _, f := range kerneltest.Frames(rng, own, victim) {
		if verdict, _ := run(f.Data); verdict != unrun && (f.Reason == "ethertype" || f.Kind == "length" || f.Reason == "") != (verdict == passed) {
			t.Errorf("any ethertype, %s: verdict %d", f.Kind, int32(verdict))
		}
	}
	_, run = guarded(t, dataplane.Port{})
	for _, f := range kerneltest.Frames(rng, own, victim) {
		if verdict, _ := run(f.Data); verdict != passed && verdict != unrun {
			t.Errorf("without the guard, %s: verdict %d", f.Kind, int32(verdict))
		}
	}
}

// TestGuardHoldsAgainstNonsense changes frames at random: what passes is of the
// endpoint's own addresses, as a parser of another kind sees it.
func TestGuardHoldsAgainstNonsense(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(3, 4))
	_, run := guarded(t, dataplane.Port{Guard: true, Fast: true})
	through, runs := 0, 0
	for range 1000 {
		for _, f := range kerneltest.Frames(rng, own, victim) {
			data := mutated(rng, f.Data)
			runs++
			if verdict, _ := run(data); verdict != dropped && verdict != unrun {
				through++
				if why := forbidden(data); why != "" {
					t.Fatalf("%s, changed to %x, passes: %s", f.Kind, data, why)
				}
			}
		}
	}
	if through == 0 {
		t.Error("nothing passes")
	}
	t.Logf("SCORE | guard against changed frames | program | %d | %d pass, 0 of them forbidden | 0 |", runs, through)
}

// mutated returns the frame changed at random: cut, padded, or with other bytes.
func mutated(rng *rand.Rand, frame []byte) []byte {
	data := bytes.Clone(frame)
	for range 1 + rng.IntN(3) {
		switch rng.IntN(4) {
		case 0:
			data = data[:14+rng.IntN(len(data)-13)]
		case 1:
			data = append(data, make([]byte, rng.IntN(64))...)
		default:
			data[rng.IntN(len(data))] = byte(rng.Uint32())
		}
	}
	return data
}

// forbidden returns why the endpoint may not send a frame, "" if it may.
func forbidden(b []byte) string {
	if !bytes.Equal(b[6:12], own.MAC[:]) {
		return "another's MAC"
	}
	switch kind := binary.BigEndian.Uint16(b[12:]); kind {
	case 0x0800:
		if len(b) < 34 || netip.AddrFrom4([4]byte(b[26:30])) != own.IPv4 {
			return "another's IPv4 address"
		}
		at := 14 + int(b[14]&15)*4
		if b[23] == 1 && b[20]&0x1f == 0 && b[21] == 0 && (len(b) < at+1 || b[at] == 5 || b[at] == 9) {
			return "a router's message"
		}
		if b[23] == 17 && b[20]&0x1f == 0 && b[21] == 0 && (len(b) < at+4 || binary.BigEndian.Uint16(b[at:]) == 67 || binary.BigEndian.Uint16(b[at+2:]) == 68) {
			return "a DHCP server"
		}
	case 0x86dd:
		return forbidden6(b[14:])
	case 0x0806:
		if len(b) < 42 || !bytes.Equal(b[22:28], own.MAC[:]) {
			return "ARP with another's MAC"
		}
		asked := netip.AddrFrom4([4]byte(b[38:42]))
		if a := netip.AddrFrom4([4]byte(b[28:32])); a != own.IPv4 && !(a.IsUnspecified() && b[21] == 1 && asked == own.IPv4) {
			return "ARP with another's address"
		}
	default:
		return "ethertype"
	}
	return ""
}

func forbidden6(b []byte) string {
	if len(b) < 40 {
		return "too short"
	}
	src := netip.AddrFrom16([16]byte(b[8:24]))
	next, rest := b[6], b[40:]
	for n := 0; next == 0 || next == 43 || next == 60 || next == 44 || next == 51; n++ {
		if len(rest) < 8 {
			return "headers without an end"
		}
		if next == 44 && binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
			next, rest = 59, nil
			break
		}
		size := (int(rest[1]) + 1) * 8
		if next == 44 {
			size = 8
		} else if next == 51 {
			size = (int(rest[1]) + 2) * 4
		}
		next, rest = rest[0], rest[min(size, len(rest)):]
	}
	if next == 58 && len(rest) > 0 && (rest[0] == 134 || rest[0] == 137) {
		return "a router's message"
	}
	if next == 58 && len(rest) >= 24 && rest[0] == 136 {
		if target := netip.AddrFrom16([16]byte(rest[8:24])); target != own.IPv6 && target != own.LinkLocal() {
			return "an advertisement of another's address"
		}
	}
	if next == 58 && len(rest) >= 24 && rest[0] == 135 && src.IsUnspecified() {
		if target := netip.AddrFrom16([16]byte(rest[8:24])); target != own.IPv6 && target != own.LinkLocal() {
			return "a question that takes another's address away"
		}
	}
	if next == 17 && len(rest) >= 4 && (binary.BigEndian.Uint16(rest) == 547 || binary.BigEndian.Uint16(rest[2:]) == 546) {
		return "a DHCPv6 server"
	}
	asks := next == 58 && len(rest) > 0 && (rest[0] == 133 || rest[0] == 135 || rest[0] == 143 || rest[0] == 131 || rest[0] == 132)
	if src != own.IPv6 && src != own.LinkLocal() && !(src.IsUnspecified() && asks) {
		return "another's IPv6 address"
	}
	return ""
}
