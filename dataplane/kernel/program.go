package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// Flags of the maps' values, as dataplane/kernel/bpf/maps.h has them.
const (
	hasRouted = 1
	hasFlows  = 2

	portGuard  = 1
	portOther  = 2
	portFast   = 4
	portRouted = 8
	portVIPs   = 16

	destStack  = 1
	destDirect = 2
	destVIPs   = 4
	destTunnel = 8
)

// settingsSet is in the flags of all settings that a process of ours wrote; the programs do
// not look at it. Without it the settings were cleared.
const settingsSet = 1 << 15

const (
	filterPriority = 4796
	filterPrefix   = "weft "
	// destsFor is how long one reading of the destinations serves the networks, of
	// which an audit reads one after the other.
	destsFor = 500 * time.Millisecond
)

// Program is the port program, loaded, or why it is not. Filters and maps outlive the
// process that loaded them; the maps are found again by their pins if the host has a
// place for those, else the filters are replaced by such with new maps.
type Program struct {
	objects bpf.ProgramObjects
	err     error  // nil: loaded
	pins    string // folder, or ""
	pinned  bool   // by this process
	// name of a filter: the same one has the same program and maps.
	name    [4]string   // by where it stands
	used    atomic.Bool // the host has networks
	cleared atomic.Bool // a map was; Watch tells of it

	mu     sync.Mutex
	dests  map[store.VNI][]dest
	readAt time.Time
}

// Where the program stands.
const (
	onEndpoint = iota
	onUnderlay
	onEgress // of an endpoint's link
	onTunnel // a WireGuard device
)

type dest struct {
	key   bpf.ProgramDestKey
	value bpf.ProgramDest
}

// NoProgram returns a port program that is not loaded, for a reason. What an earlier
// process has left of it is removed.
func NoProgram(reason, folder string) *Program {
	p := &Program{err: errors.New(reason)}
	p.place(folder)
	return p
}

// LoadProgram loads the port program into the kernel, which takes CAP_BPF, CAP_PERFMON
// and CAP_NET_ADMIN; to use it takes the first and the last. folder is of a bpf file
// system, or anything else if there is none. Networks work without the program.
func LoadProgram(folder string) *Program {
	p := &Program{err: kernelFloor()}
	p.place(folder)
	if p.err != nil {
		return p
	}
	if err := p.load(ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: p.pins}}); err != nil {
		p.err = fmt.Errorf("load the port program: %w", err)
	}
	return p
}

// place finds the folder for the pins: one for each network namespace.
func (p *Program) place(folder string) {
	var fs unix.Statfs_t
	var ns unix.Stat_t
	if unix.Statfs(folder, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC && unix.Stat("/proc/self/ns/net", &ns) == nil {
		p.pins = filepath.Join(folder, fmt.Sprintf("weft-%d", ns.Ino))
	}
}

func (p *Program) load(options ebpf.CollectionOptions) error {
	spec, err := bpf.LoadProgram()
	if err != nil {
		return err
	}
	return p.loadSpec(spec, options)
}

func (p *Program) loadSpec(spec *ebpf.CollectionSpec, options ebpf.CollectionOptions) error {
	if _, err := os.Stat(p.pins); err != nil { // nothing is pinned yet; pin does it
		for _, m := range spec.Maps {
			m.Pinning = ebpf.PinNone
		}
	} else if err := p.unpinOthers(spec); err != nil {
		return err
	}
	if err := spec.LoadAndAssign(&p.objects, &options); err != nil {
		return err
	}
	return p.identify()
}

// unpinOthers removes the pins of maps that are laid out in another way than this version
// has them. The filters of the other version keep such a map until they are replaced; the
// other maps, with what they know, are this version's too.
func (p *Program) unpinOthers(spec *ebpf.CollectionSpec) error {
	for name, m := range spec.Maps {
		path := filepath.Join(p.pins, name)
		pinned, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			continue // none is there, or the load says what is
		}
		err = m.Compatible(pinned)
		_ = pinned.Close()
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			err = os.Remove(path)
		}
		if err != nil {
			return fmt.Errorf("map %s of another version: %w", name, err)
		}
	}
	return nil
}

// identify names the filters, by the program and all its maps: any of those may be made
// anew and the others not.
func (p *Program) identify() error {
	sum := fnv.New64a()
	_, maps := p.maps()
	for _, m := range maps {
		info, err := (*m).Info()
		if err != nil {
			return err
		}
		id, _ := info.ID()
		_, _ = fmt.Fprintln(sum, id)
	}
	for i, prog := range p.programs() {
		info, err := (*prog).Info()
		if err != nil {
			return err
		}
		p.name[i] = fmt.Sprintf("%s%s maps %016x", filterPrefix, info.Tag, sum.Sum64())
	}
	return nil
}

// maps returns the maps by name, in a fixed order.
func (p *Program) maps() (names []string, all []**ebpf.Map) {
	m := &p.objects.ProgramMaps
	return []string{"weft_settings", "weft_ports", "weft_dests", "weft_peers", "weft_counters", "weft_services", "weft_flows_to", "weft_flows_from", "weft_brief_to", "weft_brief_from", "weft_parts", "weft_pairs", "weft_totals"},
		[]**ebpf.Map{&m.WeftSettings, &m.WeftPorts, &m.WeftDests, &m.WeftPeers, &m.WeftCounters, &m.WeftServices, &m.WeftFlowsTo, &m.WeftFlowsFrom, &m.WeftBriefTo, &m.WeftBriefFrom, &m.WeftParts, &m.WeftPairs, &m.WeftTotals}
}

// programs returns the programs in the order of where they stand.
func (p *Program) programs() []**ebpf.Program {
	return []**ebpf.Program{&p.objects.WeftFromContainer, &p.objects.WeftFromUnderlay, &p.objects.WeftToContainer, &p.objects.WeftFromTunnel}
}

// Files returns what InheritProgram in a child process needs, and Err is nil then.
func (p *Program) Files() []*os.File {
	if p.err != nil {
		return nil
	}
	var out []*os.File
	_, maps := p.maps()
	for _, m := range maps {
		out = append(out, os.NewFile(uintptr((*m).FD()), "map"))
	}
	for _, prog := range p.programs() {
		out = append(out, os.NewFile(uintptr((*prog).FD()), "program"))
	}
	return out
}

// InheritProgram returns the program that a parent loaded, of which the Files begin at
// file descriptor first.
func InheritProgram(first int, folder string) *Program {
	p := &Program{}
	p.place(folder)
	next := first
	_, maps := p.maps()
	for _, m := range maps {
		if *m, p.err = ebpf.NewMapFromFD(next); p.err != nil {
			return p
		}
		next++
	}
	for _, prog := range p.programs() {
		if *prog, p.err = ebpf.NewProgramFromFD(next); p.err != nil {
			return p
		}
		next++
	}
	p.err = p.identify()
	return p
}

// Err returns why the program is not loaded, or nil.
func (p *Program) Err() error { return p.err }

// Close lets go of the program; what stands on links goes on.
func (p *Program) Close() {
	if p.err == nil {
		_ = p.objects.Close()
	}
}

// kernelFloor refuses kernels that lack what the program calls.
func kernelFloor() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && cmp.Or(major-5, minor-15) < 0 {
		return fmt.Errorf("Linux %s is older than 5.15, which the port program needs", release)
	}
	return nil
}

// pin lets the maps outlive the process. There is no moment without a pin: who dies in it
// would leave connections through virtual addresses without what is known of them.
func (p *Program) pin() error {
	if p.pins == "" {
		return nil
	}
	if _, err := os.Stat(p.pins); err == nil && p.pinned {
		return nil
	}
	if err := os.MkdirAll(p.pins, 0o700); err != nil {
		return err
	}
	names, maps := p.maps()
	for i, name := range names {
		path := filepath.Join(p.pins, name)
		if err := pinAs(*maps[i], path); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	p.pinned = true
	return nil
}

// pinAs pins a map in place of what is pinned there, which may be another.
func pinAs(m *ebpf.Map, path string) error {
	fresh := path + "_new"  // the file system wants no dots
	_ = os.Remove(fresh)    // a former process died on the next lines
	again, err := m.Clone() // which is pinned nowhere
	if err != nil {
		return err
	}
	defer func() { _ = again.Close() }()
	if err := again.Pin(fresh); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

// unpin lets the maps end with the process.
func (p *Program) unpin() error {
	p.pinned = false
	if p.pins == "" {
		return nil
	}
	return os.RemoveAll(p.pins)
}
