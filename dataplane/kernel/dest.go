package kernel

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// readDests adds the destinations of a network that the program knows.
func (k *Kernel) readDests(p dataplane.Plan, names map[int32]string, v store.VNI) error {
	if k.program.err != nil {
		return nil
	}
	all, err := k.program.destsOf(v)
	if err != nil {
		return err
	}
	for _, d := range all {
		p.Add(destObject(d, names))
	}
	return nil
}

// destsOf returns the destinations of a network. One reading of the map, which has no
// order, serves all networks for a moment.
func (p *Program) destsOf(v store.VNI) ([]dest, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.readDests()
	return p.dests[v], err
}

// networks returns the networks of which the program knows destinations.
func (p *Program) networks() ([]store.VNI, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.readDests()
	return slices.Collect(maps.Keys(p.dests)), err
}

// readDests reads all destinations, unless that was done a moment ago.
func (p *Program) readDests() error {
	if p.dests == nil || time.Since(p.readAt) > destsFor {
		all, err := entries[bpf.ProgramDestKey, bpf.ProgramDest](p.objects.WeftDests)
		if err != nil {
			return fmt.Errorf("read the program's destinations: %w", err)
		}
		p.dests, p.readAt = map[store.VNI][]dest{}, time.Now()
		for key, value := range all {
			if key != canaryDest {
				p.dests[store.VNI(value.Vni)] = append(p.dests[store.VNI(value.Vni)], dest{key, value})
			}
		}
	}
	return nil
}

// applyDests runs operations on destinations.
func (k *Kernel) applyDests(ops []dataplane.Op) []error {
	errs := make([]error, len(ops))
	p := k.program
	if p.err != nil {
		return errs
	}
	p.mu.Lock()
	p.dests = nil
	p.mu.Unlock()
	index := map[string]uint32{}
	for i, op := range ops {
		o := op.Object.(dataplane.Dest)
		key := destKey(o)
		if op.Verb == dataplane.Delete {
			if err := p.objects.WeftDests.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs[i] = err
			}
			continue
		}
		if _, known := index[o.Link]; !known && o.Link != "" {
			l, err := k.link(o.Link)
			if err != nil {
				errs[i] = err
				continue
			}
			index[o.Link] = uint32(l.index)
		}
		errs[i] = orFull(p.objects.WeftDests.Put(key, destValue(o, index[o.Link])))
	}
	return errs
}

// orFull tells of a map that is full in the loop's words.
func orFull(err error) error {
	if errors.Is(err, unix.E2BIG) {
		return dataplane.ErrFull
	}
	return err
}
