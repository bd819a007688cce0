package kernel

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
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
	self, peer := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	must(t, p.objects.WeftSettings.Put(uint32(0), settingsValue(dataplane.Program{Address: self, Port: kerneltest.Port})))
	must(t, replaceKeys(p.objects.WeftPeers, []uint32{0, fromAddr4(peer)}))
	must(t, p.objects.WeftDests.Put(canaryDest, bpf.ProgramDest{}))
	d := dataplane.Dest{VNI: 1, MAC: victim.MAC, Link: "lo"}
	must(t, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
	const redirected = 7 // TC_ACT_REDIRECT
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
