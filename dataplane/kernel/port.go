package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
)

// canaryDest, like number 0 of the other maps, is an entry that belongs to nobody: while
// it is there, nobody has cleared the map. Maps of what passes by (flows, pieces, sums) have
// none: nobody could bring that back.
var canaryDest = bpf.ProgramDestKey{Vni: 1<<32 - 1}

// canaries reports whether all maps that hold what is to be still have theirs. The settings,
// one value that is always there, have a mark.
func (p *Program) canaries() bool {
	var port bpf.ProgramPort
	var d bpf.ProgramDest
	var peer uint32
	var service bpf.ProgramService
	var settings bpf.ProgramSettings
	m := &p.objects
	return m.WeftSettings.Lookup(uint32(0), &settings) == nil && settings.Flags&settingsSet != 0 && hasCounters(m.WeftCounters, 0) &&
		m.WeftPeers.Lookup(uint32(0), &peer) == nil && m.WeftPorts.Lookup(uint32(0), &port) == nil && m.WeftDests.Lookup(canaryDest, &d) == nil &&
		m.WeftServices.Lookup(canaryDest, &service) == nil
}

// readProgram adds what of the program stands on the underlay's link to p.
func (k *Kernel) readProgram(p dataplane.Plan) error {
	if k.program.err != nil {
		return k.readLeft(p)
	}
	m := &k.program.objects
	var s bpf.ProgramSettings
	if err := m.WeftSettings.Lookup(uint32(0), &s); err != nil {
		return fmt.Errorf("read the program's settings: %w", err)
	}
	ports, err := entries[uint32, bpf.ProgramPort](m.WeftPorts)
	if err != nil {
		return fmt.Errorf("read the program's endpoints: %w", err)
	}
	peers, err := entries[uint32, uint32](m.WeftPeers)
	if err != nil {
		return fmt.Errorf("read the program's peers: %w", err)
	}
	if s == (bpf.ProgramSettings{}) && len(ports)+len(peers) == 0 {
		return nil
	}
	links, err := k.links()
	if err != nil {
		return err
	}
	o := settingsObject(s)
	o.Stray = len(lostPorts(ports, links))
	for _, l := range links {
		if uint32(l.index) == s.Underlay {
			if there, err := k.stands(l.index, onUnderlay); err != nil {
				return err
			} else if there {
				o.Underlay = l.name
			}
		}
	}
	if !k.program.canaries() {
		k.program.cleared.Store(true)
		o.Stray++
	}
	var all []string
	delete(peers, 0) // the canary
	for a := range peers {
		all = append(all, toAddr4(a).String())
	}
	o.Peers = joinSorted(all)
	p.Add(o)
	return nil
}

// readLeft adds what an earlier process has left of the program, for none is wanted.
func (k *Kernel) readLeft(p dataplane.Plan) error {
	_, err := os.Stat(k.program.pins)
	left, err2 := k.left(k.underlay.Load())
	if k.program.pins != "" && err == nil || left {
		p.Add(dataplane.Program{Stray: 1})
	}
	return err2
}

// left reports whether a filter of ours, of whatever process, stands on the link.
func (k *Kernel) left(index int32) (bool, error) {
	all, err := k.filters(index, netlink.HANDLE_MIN_INGRESS)
	return slices.ContainsFunc(all, func(f filter) bool { return f.ours }), err
}

func (k *Kernel) putProgram(o dataplane.Program) error {
	if k.program.err != nil {
		return k.program.err
	}
	m := &k.program.objects
	s := settingsValue(o)
	s.Flags |= settingsSet
	var old bpf.ProgramSettings
	_ = m.WeftSettings.Lookup(uint32(0), &old)
	if o.Underlay != "" {
		l, err := k.link(o.Underlay)
		if err != nil {
			return err
		}
		s.Underlay = uint32(l.index)
	}
	if old.Underlay != 0 && old.Underlay != s.Underlay {
		if err := k.detach(int32(old.Underlay)); err != nil {
			return err
		}
	}
	want := []uint32{0} // the canary
	for text := range strings.SplitSeq(o.Peers, ",") {
		if a, err := netip.ParseAddr(text); err == nil {
			want = append(want, fromAddr4(a))
		}
	}
	if err := replaceKeys(m.WeftPeers, want); err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	if err := m.WeftSettings.Put(uint32(0), s); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	if err := errors.Join(m.WeftPorts.Put(uint32(0), bpf.ProgramPort{}), makeCounters(m.WeftCounters, 0), m.WeftDests.Put(canaryDest, bpf.ProgramDest{}), m.WeftServices.Put(canaryDest, bpf.ProgramService{})); err != nil {
		return err
	}
	k.program.used.Store(true)
	if err := errors.Join(k.forgetStray(), k.program.pin()); err != nil {
		return err
	}
	if s.Underlay == 0 {
		return nil
	}
	return k.attach(int32(s.Underlay), onUnderlay)
}

// forgetStray removes what the program knows of links that are gone.
func (k *Kernel) forgetStray() error {
	links, err := k.links()
	if err != nil {
		return err
	}
	ports, err := entries[uint32, bpf.ProgramPort](k.program.objects.WeftPorts)
	if err != nil {
		return err
	}
	for _, i := range lostPorts(ports, links) {
		k.forgetPort(int32(i))
	}
	return nil
}

// lostPorts returns the endpoints whose links are gone.
func lostPorts(ports map[uint32]bpf.ProgramPort, links []*link) (out []uint32) {
	there := map[uint32]bool{0: true} // the canary
	for _, l := range links {
		there[uint32(l.index)] = true
	}
	for i := range ports {
		if !there[i] {
			out = append(out, i)
		}
	}
	return out
}

// deleteProgram takes the program off the underlay's link and empties its maps.
func (k *Kernel) deleteProgram() error {
	if k.program.err != nil {
		return errors.Join(k.detach(k.underlay.Load()), k.program.unpin())
	}
	m := &k.program.objects
	k.program.used.Store(false)
	var s bpf.ProgramSettings
	_ = m.WeftSettings.Lookup(uint32(0), &s)
	if s.Underlay != 0 {
		if err := k.detach(int32(s.Underlay)); err != nil {
			return err
		}
	}
	return errors.Join(
		m.WeftSettings.Put(uint32(0), bpf.ProgramSettings{}),
		clearMap[uint32, bpf.ProgramPort](m.WeftPorts), clearMap[bpf.ProgramDestKey, bpf.ProgramDest](m.WeftDests), clearMap[bpf.ProgramDestKey, bpf.ProgramService](m.WeftServices),
		clearMap[bpf.ProgramFlow, bpf.ProgramFlowTo](m.WeftFlowsTo), clearMap[bpf.ProgramFlow, uint32](m.WeftFlowsFrom), clearMap[bpf.ProgramFlow, bpf.ProgramFlowTo](m.WeftBriefTo), clearMap[bpf.ProgramFlow, uint32](m.WeftBriefFrom),
		clearMap[bpf.ProgramPart, bpf.ProgramFlowTo](m.WeftParts), clearMap[bpf.ProgramPair, bpf.ProgramTally](m.WeftPairs),
		replaceKeys(m.WeftPeers, nil), k.program.unpin())
}

// readPort returns what the program knows of an endpoint's link, the zero value where it
// does not stand on the link as this process would set it up.
func (k *Kernel) readPort(l *link) (dataplane.Port, error) {
	if k.program.err != nil {
		left, err := k.left(l.index)
		return dataplane.Port{Other: left}, err // nobody wants that alone
	}
	var v bpf.ProgramPort
	err := k.program.objects.WeftPorts.Lookup(uint32(l.index), &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return dataplane.Port{}, nil
	}
	if err != nil {
		return dataplane.Port{}, fmt.Errorf("read the program's endpoint %s: %w", l.name, err)
	}
	if !hasCounters(k.program.objects.WeftCounters, uint32(l.index)) {
		return dataplane.Port{}, nil
	}
	if there, err := k.stands(l.index, onEndpoint); err != nil || !there {
		return dataplane.Port{}, err
	}
	o := portObject(v)
	if o.Services { // a filter more does no harm
		there, err := k.stands(l.index, onEgress)
		o.Services = there
		return o, err
	}
	return o, nil
}

// putPort makes the program stand on the endpoint's link, before that is set up.
func (k *Kernel) putPort(index int32, o dataplane.Port) error {
	if k.program.err != nil || o == (dataplane.Port{}) {
		k.forgetPort(index)
		return k.detach(index)
	}
	m := &k.program.objects
	if err := m.WeftPorts.Put(uint32(index), portValue(o)); err != nil {
		return fmt.Errorf("tell the port program of the endpoint: %w", err)
	}
	if err := makeCounters(m.WeftCounters, uint32(index)); err != nil {
		return err
	}
	if o.Services {
		if err := k.attach(index, onEgress); err != nil {
			return err
		}
	}
	return k.attach(index, onEndpoint)
}

func (k *Kernel) forgetPort(index int32) {
	if k.program.err == nil {
		_ = k.program.objects.WeftPorts.Delete(uint32(index))
		_ = k.program.objects.WeftCounters.Delete(uint32(index))
	}
}
