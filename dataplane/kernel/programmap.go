package kernel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// The maps hold addresses in network order, whatever the machine's.

func fromAddr4(a netip.Addr) uint32 {
	if !a.Is4() {
		return 0
	}
	return binary.NativeEndian.Uint32(a.AsSlice())
}

func toAddr4(v uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b)
}

// fromBytes returns up to 16 bytes as the maps have them.
func fromBytes(b []byte) (out bpf.ProgramAddr) {
	var all [16]byte
	copy(all[:], b)
	for i := range out.W {
		out.W[i] = binary.NativeEndian.Uint32(all[4*i:])
	}
	return out
}

func toBytes(a bpf.ProgramAddr) (out [16]byte) {
	for i, w := range a.W {
		binary.NativeEndian.PutUint32(out[4*i:], w)
	}
	return out
}

func toAddr(a bpf.ProgramAddr) netip.Addr { return netip.AddrFrom16(toBytes(a)).Unmap() }

// fromAddr returns an address, of IPv4 mapped into IPv6; zero for none.
func fromAddr(a netip.Addr) bpf.ProgramAddr {
	if !a.IsValid() {
		return bpf.ProgramAddr{}
	}
	b := a.As16()
	return fromBytes(b[:])
}

// settingsValue lacks the index of the underlay's link.
func settingsValue(o dataplane.Program) bpf.ProgramSettings {
	v := bpf.ProgramSettings{Port: swap(o.Port), Self: fromAddr4(o.Address)}
	if o.Routed {
		v.Flags |= hasRouted
	}
	if o.Flows {
		v.Flags |= hasFlows
	}
	return v
}

// settingsObject lacks the underlay's link and the peers.
func settingsObject(v bpf.ProgramSettings) dataplane.Program {
	o := dataplane.Program{Port: swap(v.Port), Routed: v.Flags&hasRouted != 0, Flows: v.Flags&hasFlows != 0}
	if v.Self != 0 {
		o.Address = toAddr4(v.Self)
	}
	return o
}

// swap changes a port from the machine's order into that of the network, or back.
func swap(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

func portValue(o dataplane.Port) bpf.ProgramPort {
	return bpf.ProgramPort{Vni: uint32(o.VNI), Ip4: fromAddr4(o.IPv4), Ip6: fromAddr(o.IPv6), Mac: o.MAC, Flags: bitsOf(portFlags(&o)), Mtu: uint32(o.MTU)}
}

func portObject(v bpf.ProgramPort) dataplane.Port {
	o := dataplane.Port{VNI: store.VNI(v.Vni), MAC: v.Mac, MTU: int(v.Mtu)}
	if v.Ip4 != 0 {
		o.IPv4 = toAddr4(v.Ip4)
	}
	if v.Ip6 != (bpf.ProgramAddr{}) {
		o.IPv6 = netip.AddrFrom16(toBytes(v.Ip6))
	}
	setFlags(portFlags(&o), v.Flags)
	return o
}

type flagBit struct {
	on  *bool
	bit uint16
}

func bitsOf(all []flagBit) (bits uint16) {
	for _, f := range all {
		if *f.on {
			bits |= f.bit
		}
	}
	return bits
}

func setFlags(all []flagBit, bits uint16) {
	for _, f := range all {
		*f.on = bits&f.bit != 0
	}
}

func destFlags(o *dataplane.Dest) []flagBit {
	return []flagBit{{&o.Stack, destStack}, {&o.Direct, destDirect}, {&o.Services, destVIPs}, {&o.Tunnel, destTunnel}}
}

func portFlags(o *dataplane.Port) []flagBit {
	return []flagBit{{&o.Guard, portGuard}, {&o.Other, portOther}, {&o.Fast, portFast}, {&o.Routed, portRouted}, {&o.Services, portVIPs}}
}

// destKey is the key of a destination: a MAC of a bridged network by its number, an
// address of a routed one under number 0.
func destKey(o dataplane.Dest) bpf.ProgramDestKey {
	if o.IP.IsValid() {
		return bpf.ProgramDestKey{At: fromAddr(o.IP)}
	}
	return bpf.ProgramDestKey{Vni: uint32(o.VNI), At: fromBytes(o.MAC[:])}
}

func destValue(o dataplane.Dest, link uint32) bpf.ProgramDest {
	return bpf.ProgramDest{Vni: uint32(o.VNI), Link: link, Peer: fromAddr4(o.Peer), Mac: o.MAC, Flags: bitsOf(destFlags(&o))}
}

// destObject returns a destination; that of a link without a name is none that anybody
// wants.
func destObject(d dest, names map[int32]string) dataplane.Dest {
	o := dataplane.Dest{VNI: store.VNI(d.value.Vni), MAC: d.value.Mac}
	setFlags(destFlags(&o), d.value.Flags)
	if d.key.Vni == 0 {
		o.IP = toAddr(d.key.At)
	}
	if d.value.Link != 0 {
		o.Link = names[int32(d.value.Link)]
	}
	if d.value.Peer != 0 {
		o.Peer = toAddr4(d.value.Peer)
	}
	return o
}

// entries returns all entries of a map. Entries that come or go meanwhile may be there
// or not.
func entries[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	out := map[K]V{}
	var cursor ebpf.MapBatchCursor
	const batch = 4096
	keys, values := make([]K, batch), make([]V, batch)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			out[keys[i]] = values[i]
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func clearMap[K comparable, V any](m *ebpf.Map) error {
	all, err := entries[K, V](m)
	if err != nil {
		return err
	}
	for key := range all {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// replaceKeys makes the map hold the keys alone.
func replaceKeys(m *ebpf.Map, want []uint32) error {
	have, err := entries[uint32, uint32](m)
	if err != nil {
		return err
	}
	for _, key := range want {
		if _, ok := have[key]; !ok {
			if err := m.Put(key, uint32(1)); err != nil {
				return err
			}
		}
		delete(have, key)
	}
	for key := range have {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

func joinSorted(all []string) string {
	slices.Sort(all)
	return strings.Join(all, ",")
}
