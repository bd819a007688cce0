package kernel

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// inVXLAN puts a frame into VXLAN from one host to another (RFC 7348).
func inVXLAN(from, to netip.Addr, port uint16, vni uint32, frame []byte) []byte {
	b := append(make([]byte, 12), 8, 0)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+8+8+len(frame)))
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], checksum(0, ip))
	b = append(b, ip...)
	b = binary.BigEndian.AppendUint16(b, 50000)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, uint16(8+8+len(frame)))
	b = append(b, 0, 0, 8, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, vni<<8)
	return append(b, frame...)
}

// TestVXLANOfPeersAlone: the entry that belongs to nobody in the map of peers, number 0, is
// no peer without an address.
func TestVXLANOfPeersAlone(t *testing.T) {
	kerneltest.Netns(t)
	p := loadProgram(t)
	must(t, p.objects.WeftSettings.Put(uint32(0), settingsValue(dataplane.Program{Address: self, Port: kerneltest.Port})))
	must(t, replaceKeys(p.objects.WeftPeers, []uint32{0, fromAddr4(peer)}))
	must(t, p.objects.WeftDests.Put(canaryDest, bpf.ProgramDest{}))
	d := dataplane.Dest{VNI: 1, MAC: victim.MAC, Link: "lo"}
	must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
	for _, c := range []struct {
		what string
		from netip.Addr
		want uint32
	}{{"a peer", peer, redirected}, {"a stranger", netip.MustParseAddr("192.0.2.3"), passed}, {"nobody", netip.IPv4Unspecified(), passed}} {
		got, err := p.objects.WeftFromUnderlay.Run(&ebpf.RunOptions{Data: inVXLAN(c.from, self, kerneltest.Port, 1, packet(t, "ipv4", 40000, 53))})
		if err != nil || got != c.want {
			t.Errorf("VXLAN from %s: verdict %d, %v; want %d", c.what, int32(got), err, int32(c.want))
		}
	}
}

// misfit returns why what comes to this host as VXLAN must not be handed to an endpoint by
// the program, as a parser of another kind sees it; "" if it may be.
func misfit(b []byte) string {
	if len(b) < 50+14+20 {
		return "too short"
	}
	length, inner := int(binary.BigEndian.Uint16(b[16:])), b[50:]
	vni := binary.BigEndian.Uint32(b[46:]) >> 8
	to := store.MAC(inner[:6])
	switch {
	case b[12] != 8 || b[13] != 0 || b[14] != 0x45 || b[23] != 17 || binary.BigEndian.Uint16(b[20:])&0x3fff != 0:
		return "no plain UDP over IPv4"
	case source(b) != peer:
		return "from a stranger"
	case destination(b) != self || binary.BigEndian.Uint16(b[36:]) != kerneltest.Port:
		return "for another"
	case length != len(b)-14 || int(binary.BigEndian.Uint16(b[38:])) != length-20:
		return "a wrong length"
	case b[42] != 8:
		return "wrong flags"
	case b[15]&3 == 3:
		return "congestion has to be told on"
	case inner[12] != 8 && inner[12] != 0x86 || binary.BigEndian.Uint16(inner[12:]) != 0x0800 && binary.BigEndian.Uint16(inner[12:]) != 0x86dd:
		return "no IP inside"
	case !(vni == 1 && (to == own.MAC || to == victim.MAC) || vni == 2 && to == outside):
		return "no endpoint of the network"
	}
	return ""
}

// TestVXLANHoldsAgainstNonsense changes VXLAN at random, and each field of its headers by
// itself: what is handed over is for an endpoint of the network, from a peer, as long as it
// says, and is the frame that was inside.
func TestVXLANHoldsAgainstNonsense(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(9, 10))
	p := served(t)
	p.expectAnswers(t)
	came, misfits := 0, map[string]int{}
	try := func(what string, data []byte) {
		t.Helper()
		verdict, out := through(t, p.objects.WeftFromUnderlay, data)
		why := misfit(data)
		misfits[why]++
		switch {
		case verdict == unrun:
		case why != "" && verdict != passed:
			t.Fatalf("%s: %x: %s, and the verdict is %d", what, data, why, int32(verdict))
		case verdict == redirected:
			came++
			if inner := data[50:]; !bytes.Equal(inner, out) {
				if why := answerBecomes(inner, out); why != "" {
					t.Fatalf("%s: %x arrives as %x: %s", what, data, out, why)
				}
			}
		case why != "" && !bytes.Equal(data, out):
			t.Fatalf("%s: %x goes to the stack as %x", what, data, out)
		case why == "" && verdict == passed && data[62] == 8: // IPv6 takes Linux 6.3
			t.Fatalf("%s: %x is left to the stack", what, data)
		}
	}
	inner := append(answers(), packet(t, "ipv4", 40000, 53), packet(t, "ipv6", 40000, 53))
	for _, frame := range inner {
		whole := inVXLAN(peer, self, kerneltest.Port, 1, frame)
		try("as it is", whole)
		for at := range 50 + 14 {
			for range 20 {
				data := bytes.Clone(whole)
				data[at] ^= byte(1 + rng.IntN(255))
				try("one byte", data)
			}
		}
		for n := 14; n < len(whole); n++ {
			try("cut", whole[:n])
			try("cut inside", inVXLAN(peer, self, kerneltest.Port, 1, whole[50:max(n, 50)]))
		}
		for range 1000 {
			try("at random", mutated(rng, whole))
			try("at random inside", inVXLAN(peer, self, kerneltest.Port, 1, mutated(rng, frame)))
		}
		for vni := range uint32(4) {
			for _, to := range []store.MAC{own.MAC, victim.MAC, outside, far.MAC, {1, 0, 0x5e}} {
				data := inVXLAN(peer, self, kerneltest.Port, vni, frame)
				copy(data[50:], to[:])
				try("networks", data)
			}
		}
	}
	if len(misfits) != 10 || came == 0 {
		t.Errorf("%d frames came, and others did not for %v", came, misfits)
	}
	t.Logf("SCORE | changed VXLAN | program | %d | handed over, of all others none | 0 |", came)
}

// TestTunnelHoldsAgainstNonsense does the same to what a WireGuard device decrypted. A test
// run takes the protocol from where a frame has it: here two bytes of the sender's address.
func TestTunnelHoldsAgainstNonsense(t *testing.T) {
	kerneltest.Netns(t)
	rng := rand.New(rand.NewPCG(11, 12))
	p := served(t)
	from := map[string]netip.Addr{}
	for name, d := range map[string]dataplane.Dest{
		"peer": {VNI: 1, Link: "weftw0", Tunnel: true}, "other network": {VNI: 2, Link: "weftw0", Tunnel: true}, "in the clear": {VNI: 1, Peer: peer, Direct: true}, "here": {VNI: 1, Link: "lo"},
	} {
		last := byte(len(from) + 1)
		for suffix, ip := range map[string]netip.Addr{"4": netip.AddrFrom4([4]byte{8, 0, 0, last}), "6": netip.AddrFrom16([16]byte{0: 0xfd, 4: 0x86, 5: 0xdd, 15: last})} {
			d.IP = ip
			must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
			from[name+suffix] = ip
		}
	}
	for _, ip := range []netip.Addr{own.IPv4, own.IPv6} {
		d := dataplane.Dest{VNI: 1, IP: ip, MAC: own.MAC, Link: "lo"}
		must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
	}
	fits := func(b []byte) bool {
		switch {
		case len(b) >= 20 && b[12] == 8 && b[13] == 0:
			return b[0] == 0x45 && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 && b[8] > 1 && netip.AddrFrom4([4]byte(b[12:16])) == from["peer4"] && netip.AddrFrom4([4]byte(b[16:20])) == own.IPv4
		case len(b) >= 40 && b[12] == 0x86 && b[13] == 0xdd:
			return (b[6] == 6 || b[6] == 17 || b[6] == 58) && b[7] > 1 && netip.AddrFrom16([16]byte(b[8:24])) == from["peer6"] && netip.AddrFrom16([16]byte(b[24:40])) == own.IPv6
		}
		return false
	}
	came, not := map[byte]int{}, 0
	try := func(what string, data []byte) {
		t.Helper()
		verdict, out := through(t, p.objects.WeftFromTunnel, data)
		if verdict == unrun {
			return
		}
		if (verdict == redirected) != fits(data) || verdict != redirected && verdict != passed {
			t.Fatalf("%s: %x: verdict %d", what, data, int32(verdict))
		}
		if verdict == passed {
			if !bytes.Equal(out, data) {
				t.Fatalf("%s: %x is left to the stack as %x", what, data, out)
			}
			not++
			return
		}
		came[data[12]]++
		want := append(append(append([]byte{}, own.MAC[:]...), dataplane.RouterMAC[:]...), data[12:14]...)
		want = append(want, data...)
		if data[12] == 8 { // a router takes one from the time to live
			want[14+8]--
			copy(want[14+10:], out[14+10:14+12])
			if checksum(0, data[:20]) == 0 && checksum(0, out[14:34]) != 0 {
				t.Fatalf("%s: %x has a wrong sum as %x", what, data, out)
			}
		} else {
			want[14+7]--
		}
		if !bytes.Equal(want, out) {
			t.Fatalf("%s: %x arrives as %x", what, data, out)
		}
	}
	for name, sender := range from {
		data := ipv4(own.MAC, own.MAC, sender, own.IPv4, 17, segment(40000, 53, 0))[14:]
		if sender.Is6() {
			data = packet(t, "ipv6", 40000, 53)[14:]
			copy(data[8:], sender.AsSlice())
			ip := own.IPv6.As16()
			copy(data[24:], ip[:])
		}
		try(name, data)
		for at := range data {
			for _, b := range []byte{0, 1, 2, 255} {
				one := bytes.Clone(data)
				one[at] = b
				try(name+", one byte", one)
			}
		}
		for range 3000 {
			try(name+", at random", mutated(rng, data))
		}
	}
	if came[8] == 0 || came[0x86] == 0 || not == 0 {
		t.Errorf("%v came, %d did not", came, not)
	}
}
