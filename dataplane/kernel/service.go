package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/store"
)

// readServices adds the virtual addresses of a network that the program answers.
func (k *Kernel) readServices(p dataplane.Plan, v store.VNI) error {
	if k.program.err != nil {
		return nil
	}
	return k.eachService(func(key bpf.ProgramDestKey, value bpf.ProgramService) {
		if store.VNI(key.Vni) == v {
			p.Add(serviceObject(key, value))
		}
	})
}

// eachService calls fn for each service that the program has, one by one: a batch of
// values of this size would be 25 MB.
func (k *Kernel) eachService(fn func(bpf.ProgramDestKey, bpf.ProgramService)) error {
	var key bpf.ProgramDestKey
	var value bpf.ProgramService
	all := k.program.objects.WeftServices.Iterate()
	for all.Next(&key, &value) {
		fn(key, value)
	}
	if err := all.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read the program's services: %w", err)
	}
	return nil
}

// applyService changes the tasks behind a virtual address. Flows to tasks that are no
// longer there, or to an address that is not, are forgotten, so that the next packet of
// each is answered by a reset or, where it can be, begins a new one. Clients of TCP are
// made to send that packet.
func (k *Kernel) applyService(verb dataplane.Verb, o dataplane.Service) error {
	if k.program.err != nil {
		return nil
	}
	m := &k.program.objects
	key := bpf.ProgramDestKey{Vni: uint32(o.VNI), At: fromAddr(o.VIP)}
	if verb == dataplane.Delete {
		// With nobody behind it the address is still answered, by resets.
		if err := m.WeftServices.Update(key, bpf.ProgramService{}, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		streams, err := k.forgetFlows(func(f bpf.ProgramFlow, _ uint32) bool { return ofService(f, o) })
		if err := errors.Join(err, k.wake(streams)); err != nil {
			return err
		}
		if len(streams) > 0 {
			time.Sleep(wakeWait)
		}
		if err := m.WeftServices.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	}
	var old bpf.ProgramService
	_ = m.WeftServices.Lookup(key, &old)
	value := serviceValue(o)
	if err := m.WeftServices.Put(key, value); err != nil {
		return err
	}
	now := tasksOf(value)
	for task := range tasksOf(old) {
		if !now[task] {
			streams, err := k.forgetFlows(func(f bpf.ProgramFlow, task uint32) bool { return ofService(f, o) && !now[task] })
			return errors.Join(err, k.wake(streams))
		}
	}
	return nil
}

// wakeWait is what clients that were woken have for their segment, before the address is
// answered no more: theirs is the next thing that their host does.
const wakeWait = 20 * time.Millisecond

func ofService(f bpf.ProgramFlow, o dataplane.Service) bool {
	return f.Vni == uint32(o.VNI) && f.Dst == fromAddr4(o.VIP)
}

// forgetFlows forgets the flows to virtual addresses that lead to tasks that are gone, in
// both directions, and returns those of TCP. Of a flow either direction may be known alone.
func (k *Kernel) forgetFlows(gone func(f bpf.ProgramFlow, task uint32) bool) (streams []bpf.ProgramFlow, err error) {
	m := &k.program.objects
	// A flow goes from the brief ones to the lasting ones when its client acknowledges.
	for _, table := range []*ebpf.Map{m.WeftBriefTo, m.WeftFlowsTo} {
		all, err := entries[bpf.ProgramFlow, bpf.ProgramFlowTo](table)
		if err != nil {
			return streams, fmt.Errorf("read flows: %w", err)
		}
		for key, to := range all {
			if !gone(key, to.Ip4) {
				continue
			}
			if err := forgetKey(table, key); err != nil {
				return streams, err
			}
			if key.Proto == unix.IPPROTO_TCP {
				streams = append(streams, key)
			}
		}
	}
	for _, table := range []*ebpf.Map{m.WeftBriefFrom, m.WeftFlowsFrom} {
		answers, err := entries[bpf.ProgramFlow, uint32](table)
		if err != nil {
			return streams, fmt.Errorf("read flows of answers: %w", err)
		}
		for key, vip := range answers {
			asked := bpf.ProgramFlow{Vni: key.Vni, Src: key.Dst, Dst: vip, Sport: key.Dport, Dport: key.Sport, Proto: key.Proto}
			if !gone(asked, key.Src) {
				continue
			}
			if err := forgetKey(table, key); err != nil {
				return streams, err
			}
		}
	}
	return streams, nil
}

func forgetKey(m *ebpf.Map, key bpf.ProgramFlow) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget a flow: %w", err)
	}
	return nil
}

// forgetLeft forgets the flows that a former process did not come to, because it died
// after it had changed a service.
func (k *Kernel) forgetLeft() error {
	if k.program.err != nil {
		return nil
	}
	tasks := map[bpf.ProgramDestKey]map[uint32]bool{}
	err := k.eachService(func(key bpf.ProgramDestKey, value bpf.ProgramService) { tasks[key] = tasksOf(value) })
	if err != nil {
		return err
	}
	streams, err := k.forgetFlows(func(f bpf.ProgramFlow, task uint32) bool {
		service, ok := tasks[bpf.ProgramDestKey{Vni: f.Vni, At: fromAddr(toAddr4(f.Dst))}]
		return ok && !service[task]
	})
	return errors.Join(err, k.wake(streams))
}

func tasksOf(v bpf.ProgramService) map[uint32]bool {
	out := map[uint32]bool{}
	for _, b := range v.Backends[:min(v.N, dataplane.MaxBackends)] {
		out[b.Ip4] = true
	}
	return out
}

func serviceValue(o dataplane.Service) (v bpf.ProgramService) {
	for text := range strings.SplitSeq(o.Backends, ",") {
		ip, mac, _ := strings.Cut(text, " ")
		a, err := netip.ParseAddr(ip)
		m, err2 := store.ParseMAC(mac)
		if err != nil || err2 != nil || int(v.N) == len(v.Backends) {
			continue
		}
		v.Backends[v.N] = bpf.ProgramBackend{Ip4: fromAddr4(a), Mac: m}
		v.N++
	}
	return v
}

func serviceObject(key bpf.ProgramDestKey, v bpf.ProgramService) dataplane.Service {
	var all []string
	for _, b := range v.Backends[:min(int(v.N), len(v.Backends))] {
		all = append(all, toAddr4(b.Ip4).String()+" "+store.MAC(b.Mac).String())
	}
	return dataplane.Service{VNI: store.VNI(key.Vni), VIP: toAddr(key.At), Backends: strings.Join(all, ",")}
}
