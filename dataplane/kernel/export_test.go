package kernel

import (
	"errors"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// ClearMap takes everything out of a map of the port program; of an array, which keeps its
// entries, their values.
func (k *Kernel) ClearMap(t *testing.T, name string) {
	t.Helper()
	names, maps := k.program.maps()
	m := *maps[slices.Index(names, name)]
	if m.Type() == ebpf.Array {
		if err := m.Put(uint32(0), make([]byte, m.ValueSize())); err != nil {
			t.Fatal(err)
		}
		return
	}
	for {
		key, err := m.NextKeyBytes(nil)
		if err == nil && key == nil {
			return
		}
		if err == nil {
			err = m.Delete(key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// LoadOlder loads a port program of another version: it does the same, in other words.
func LoadOlder(t *testing.T, folder string) *Program {
	t.Helper()
	spec, err := bpf.LoadProgram()
	if err != nil {
		t.Fatal(err)
	}
	for _, prog := range spec.Programs {
		nothing := asm.Mov.Imm(asm.R0, 0)
		nothing.Metadata, prog.Instructions[0].Metadata = prog.Instructions[0].Metadata, asm.Metadata{}
		prog.Instructions = append(asm.Instructions{nothing}, prog.Instructions...)
	}
	p := &Program{}
	p.place(folder)
	if err := p.loadSpec(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: p.pins}}); err != nil {
		t.Fatal(err)
	}
	return p
}

// BPFFolder mounts a bpf file system for the time of the test.
func BPFFolder(t *testing.T) string { return bpfFolder(t) }

// Names are the names of the program's filters.
func (p *Program) Names() [4]string { return p.name }

// FillMap fills a map of the port program with entries of others, which empty takes out.
func (k *Kernel) FillMap(t *testing.T, name string) (empty func()) {
	t.Helper()
	names, maps := k.program.maps()
	m := *maps[slices.Index(names, name)]
	var added []bpf.ProgramDestKey
	value := make([]byte, m.ValueSize())
	for i := uint32(1); ; i++ {
		key := bpf.ProgramDestKey{Vni: uint32(store.MaxVNI), At: bpf.ProgramAddr{W: [4]uint32{i}}}
		err := m.Put(key, value)
		if errors.Is(err, unix.E2BIG) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		added = append(added, key)
	}
	t.Logf("%s is full with %d entries of others", name, len(added))
	return func() {
		for _, key := range added {
			if err := m.Delete(key); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Configure changes a WireGuard device as wg(8) would.
func (k *Kernel) Configure(t *testing.T, device string, c wgtypes.Config) {
	t.Helper()
	if err := k.tunnels.configure(device, c); err != nil {
		t.Fatal(err)
	}
}

// Peer returns the state of a device's peer.
func (k *Kernel) Peer(t *testing.T, device string, key wgtypes.Key) wgtypes.Peer {
	t.Helper()
	d, err := k.tunnels.device(device)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range d.Peers {
		if p.PublicKey == key {
			return p
		}
	}
	t.Fatalf("device %s has no peer %s", device, key)
	return wgtypes.Peer{}
}
