package kernel

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// What the plan wants is what is read back from the maps, whatever the values: else each
// pass would write it again.

// material makes values of the bytes of a fuzzer; where those end, zeros follow.
type material []byte

func (m *material) take(n int) []byte {
	out := make([]byte, n)
	*m = (*m)[copy(out, *m):]
	return out
}

func (m *material) mac() store.MAC { return store.MAC(m.take(6)) }
func (m *material) bit() bool      { return m.take(1)[0]&1 != 0 }
func (m *material) port() uint16   { b := m.take(2); return uint16(b[0])<<8 | uint16(b[1]) }
func (m *material) vni() store.VNI {
	return store.VNI(1 + (uint32(m.port())<<8|uint32(m.take(1)[0]))%(1<<24-1))
}
func (m *material) ip6() netip.Addr  { return orNone(netip.AddrFrom16([16]byte(m.take(16)))) }
func (m *material) ip4() netip.Addr  { return orNone(netip.AddrFrom4([4]byte(m.take(4)))) }
func (m *material) addr() netip.Addr { return netip.AddrFrom16([16]byte(m.take(16))).Unmap() }

// orNone takes the address that nobody has for none.
func orNone(a netip.Addr) netip.Addr {
	if a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

func fuzz(f *testing.F, law func(t *testing.T, m *material)) {
	f.Add([]byte(nil))
	f.Add([]byte(strings.Repeat("\xff", 200)))
	f.Add([]byte("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz"))
	f.Fuzz(func(t *testing.T, b []byte) { m := material(b); law(t, &m) })
}

func comesBack[T comparable](t *testing.T, want, got T) {
	t.Helper()
	if got != want {
		t.Errorf("%+v comes back as %+v", want, got)
	}
}

func FuzzSettingsValue(f *testing.F) {
	fuzz(f, func(t *testing.T, m *material) {
		o := dataplane.Program{Address: m.ip4(), Port: m.port(), Routed: m.bit(), Flows: m.bit()}
		comesBack(t, o, settingsObject(settingsValue(o)))
	})
}

func FuzzPortValue(f *testing.F) {
	fuzz(f, func(t *testing.T, m *material) {
		o := dataplane.Port{VNI: m.vni(), MAC: m.mac(), IPv4: m.ip4(), IPv6: m.ip6(),
			Guard: m.bit(), Other: m.bit(), Fast: m.bit(), Routed: m.bit(), Services: m.bit(), MTU: int(m.port())}
		comesBack(t, o, portObject(portValue(o)))
	})
}

func FuzzDestValue(f *testing.F) {
	fuzz(f, func(t *testing.T, m *material) {
		o := dataplane.Dest{VNI: m.vni(), MAC: m.mac(), Peer: m.ip4(), Stack: m.bit(), Direct: m.bit(), Services: m.bit(), Tunnel: m.bit()}
		if m.bit() {
			o.IP = m.addr()
		}
		const index = 7
		link := uint32(0)
		if m.bit() {
			o.Link, link = "weftv", index
		}
		comesBack(t, o, destObject(dest{destKey(o), destValue(o, link)}, map[int32]string{index: "weftv"}))
	})
}

func FuzzServiceValue(f *testing.F) {
	fuzz(f, func(t *testing.T, m *material) {
		o := dataplane.Service{VNI: m.vni(), VIP: m.addr()}
		var all []string
		for len(*m) > 0 && len(all) < dataplane.MaxBackends {
			ip, mac := netip.AddrFrom4([4]byte(m.take(4))), m.mac()
			mac[0] = mac[0]&^1 | 2 // nobody has one of a group, or none
			all = append(all, ip.String()+" "+mac.String())
		}
		o.Backends = strings.Join(all, ",")
		key := bpf.ProgramDestKey{Vni: uint32(o.VNI), At: fromAddr(o.VIP)}
		comesBack(t, o, serviceObject(key, serviceValue(o)))
	})
}

func FuzzFlowValue(f *testing.F) {
	fuzz(f, func(t *testing.T, m *material) {
		zero := time.Unix(1_700_000_000, 0)
		since := func() uint64 { return uint64(m.port())<<32 | uint64(m.port())<<16 | uint64(m.port()) }
		first, last := since(), since()
		want := Flow{VNI: m.vni(), Source: m.addr(), Destination: m.addr(), Service: m.ip4(), Protocol: m.take(1)[0], Port: m.port(),
			Packets: since(), Bytes: since(), First: zero.Add(time.Duration(first)), Last: zero.Add(time.Duration(last))}
		verdict := m.take(1)[0]
		want.Verdict = verdictOf(verdict)
		key := bpf.ProgramPair{Src: fromAddr(want.Source), Dst: fromAddr(want.Destination), Vip: fromAddr4(want.Service), Port: swap(want.Port), Protocol: want.Protocol, Verdict: verdict}
		comesBack(t, want, flowObject(key, bpf.ProgramTally{Packets: want.Packets, Bytes: want.Bytes, First: first, Last: last, Vni: uint32(want.VNI)}, zero))
	})
}

// TestVerdictsDiffer: each number that the program may write has a word of its own.
func TestVerdictsDiffer(t *testing.T) {
	var words []Verdict
	for v := range uint8(16 + 3) {
		if w := verdictOf(v); !strings.HasPrefix(string(w), "unknown") {
			words = append(words, w)
		}
	}
	if n := len(Reasons) - 1 + 3; len(words) != n || len(slices.Compact(slices.Sorted(slices.Values(words)))) != n {
		t.Errorf("%d verdicts, want %d: %v", len(words), n, words)
	}
}
