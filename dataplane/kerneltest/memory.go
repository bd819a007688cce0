// Package kerneltest has a kernel in memory for tests of logic, a suite that it
// and the real one both pass, and what tests in network namespaces need.
//
// Memory is a small working model: it refuses what Linux refuses, and what hangs
// on an object goes with it. It is not a mock; tests plant and break things in it
// as strangers do on a host.
package kerneltest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// ErrStopped is what Before returns to stop an Apply: this and all later
// operations are neither run nor reported, as if the process had died.
var ErrStopped = errors.New("stopped")

// Memory is a kernel in memory. Its methods may be called from any goroutine.
type Memory struct {
	// Before, if set, is called before each operation with its number since the
	// start, from 0. An error is the operation's result.
	Before func(n int, op dataplane.Op) error
	// ReadErr, if set, is the result of every Read and Networks.
	ReadErr func(store.VNI) error

	mu       sync.Mutex // guards what follows
	count    int
	objects  dataplane.Plan // ours and strangers'
	foreign  map[dataplane.Key]bool
	hardware map[string]bool // links that can be an underlay
	underlay dataplane.Underlay
	watchers []*watcher
}

// NewMemory returns a kernel that holds nothing but the underlay's link.
func NewMemory(u dataplane.Underlay) *Memory {
	return &Memory{objects: dataplane.Plan{}, foreign: map[dataplane.Key]bool{}, hardware: map[string]bool{u.Link: true}, underlay: u}
}

// Count returns the number of operations since the start.
func (m *Memory) Count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.count
}

// SetUnderlay changes what Underlay answers, and tells the watchers.
func (m *Memory) SetUnderlay(u dataplane.Underlay) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.underlay = u
	m.hardware[u.Link] = true
	m.tell(store.HostVNI)
}

// Plant puts a stranger's object there: a link without our alias, a set, chain or
// jump. Read does not return it, unless it has the place of one of ours.
func (m *Memory) Plant(o dataplane.Object) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.objects.Add(o)
	m.foreign[o.Key()] = true
}

// Planted reports whether a stranger's object is still as it was planted.
func (m *Memory) Planted(o dataplane.Object) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.foreign[o.Key()] && m.objects[o.Key()] == o
}

// Break does an operation as a stranger would: without Before, and watchers hear
// of it.
func (m *Memory) Break(op dataplane.Op) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.network(op.Object)
	err := m.run(op)
	m.tell(v)
	return err
}

// Lost tells the watchers of everything, as after an overflow.
func (m *Memory) Lost() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, v := range append(m.networks(), store.HostVNI) {
		m.tell(v)
	}
}

// Read implements dataplane.Kernel.
func (m *Memory) Read(ctx context.Context, v store.VNI) (dataplane.Plan, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if m.ReadErr != nil {
		if err := m.ReadErr(v); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := dataplane.Plan{}
	for k, o := range m.objects {
		if m.foreign[k] || m.network(o) != v {
			continue
		}
		if c, ok := o.(dataplane.Chain); ok {
			c.Rules = ""
			o = c
		}
		p.Add(o)
	}
	return p, nil
}

// Networks implements dataplane.Kernel.
func (m *Memory) Networks(ctx context.Context) ([]store.VNI, error) {
	if m.ReadErr != nil {
		if err := m.ReadErr(store.HostVNI); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.networks(), ctx.Err()
}

func (m *Memory) networks() []store.VNI {
	all := map[store.VNI]bool{}
	for k, o := range m.objects {
		_, route := o.(dataplane.Route)
		_, dest := o.(dataplane.Dest)
		if _, ok := o.(dataplane.Service); ok {
			dest = true
		}
		if (isLink(k.Kind) && k.Kind != dataplane.KindWireGuard || route || dest) && !m.foreign[k] {
			all[m.network(o)] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// Underlay implements dataplane.Kernel.
func (m *Memory) Underlay(ctx context.Context, want netip.Addr) (dataplane.Underlay, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if want.IsValid() && want != m.underlay.Address {
		return dataplane.Underlay{Reason: fmt.Sprintf("this host has no address %s", want)}, ctx.Err()
	}
	return m.underlay, ctx.Err()
}

// Apply implements dataplane.Kernel.
func (m *Memory) Apply(ctx context.Context, ops []dataplane.Op) []*dataplane.OpError {
	var failed []*dataplane.OpError
	for _, op := range ops {
		err := m.step(ctx, op)
		if errors.Is(err, ErrStopped) {
			return failed
		}
		if err != nil {
			failed = append(failed, &dataplane.OpError{Op: op, Err: err})
		}
	}
	return failed
}

func (m *Memory) step(ctx context.Context, op dataplane.Op) error {
	m.mu.Lock()
	n := m.count
	m.count++
	m.mu.Unlock()
	if m.Before != nil {
		if err := m.Before(n, op); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run(op)
}

// run does one operation.
func (m *Memory) run(op dataplane.Op) error {
	k := op.Object.Key()
	if m.foreign[k] && isLink(k.Kind) {
		if op.Verb == dataplane.Delete {
			return nil
		}
		return fmt.Errorf("link %s exists but is not Weft's", k.Name)
	}
	if op.Verb == dataplane.Delete {
		return m.remove(k)
	}
	if err := m.refuse(op.Object); err != nil {
		return err
	}
	if c, ok := op.Object.(dataplane.Chain); ok && c.Rules == "" {
		op.Object = dataplane.NewChain(c.Table, c.V6, c.Name) // an empty chain has the hash of nothing
	}
	if v, ok := op.Object.(dataplane.Veth); ok && !v.Joined {
		v.Waits = true // the container's side is taken with the join
		op.Object = v
	}
	m.objects.Add(op.Object)
	return nil
}

// refuse returns why Linux would not make the object.
func (m *Memory) refuse(o dataplane.Object) error {
	switch o := o.(type) {
	case dataplane.VXLAN:
		if !m.hardware[o.Underlay] {
			return fmt.Errorf("underlay: link %s: no such link", o.Underlay)
		}
		for _, other := range m.objects {
			if x, ok := other.(dataplane.VXLAN); ok && x.Name != o.Name && x.VNI == o.VNI && x.Port == o.Port {
				return fmt.Errorf("vni %d on port %d is used by link %s", o.VNI, o.Port, x.Name)
			}
		}
		return m.needBridge(o.Bridge)
	case dataplane.Veth:
		if _, there := m.objects[o.Key()]; o.Joined && !there {
			return fmt.Errorf("link %s cannot be made again", o.Name)
		}
		return m.needBridge(o.Bridge)
	case dataplane.Route:
		if _, there := m.port(o.Link); o.Link != "" && !m.hardware[o.Link] && !there && !m.tunnel(o.Link) && m.needBridge(o.Link) != nil {
			return fmt.Errorf("link %s: no such link", o.Link)
		}
		for i, k := range o.Peers {
			if !k.IsZero() && !m.tunnel(dataplane.TunnelNames[i]) {
				return fmt.Errorf("WireGuard device %s: no such link", dataplane.TunnelNames[i])
			}
		}
	case dataplane.TunnelPeer:
		if !m.tunnel(o.Device) {
			return fmt.Errorf("WireGuard device %s: no such link", o.Device)
		}
	case dataplane.Neigh:
		if _, there := m.port(o.Link); there {
			return nil
		}
		if err := m.needBridge(o.Link); err != nil {
			return err
		}
		if b := m.objects[dataplane.Key{Kind: dataplane.KindBridge, Name: o.Link}].(dataplane.Bridge); b.Closed && o.IP.Is6() {
			return fmt.Errorf("neighbour %s: IPv6 is disabled on %s", o.IP, o.Link)
		}
	case dataplane.FDB:
		bridge, there := m.port(o.Link)
		if !there {
			return fmt.Errorf("link %s: no such link", o.Link)
		}
		if o.Master && bridge == "" {
			return fmt.Errorf("link %s is no port of a bridge", o.Link)
		}
	case dataplane.Dest:
		if _, there := m.port(o.Link); o.Link != "" && !there && !m.tunnel(o.Link) {
			return fmt.Errorf("link %s: no such link", o.Link)
		}
	case dataplane.Chain:
		for _, set := range setsOf(o) {
			if _, there := m.objects[dataplane.Key{Kind: dataplane.KindSet, Name: set}]; !there {
				return fmt.Errorf("set %s does not exist", set)
			}
		}
	case dataplane.Jump:
		if _, there := m.objects[dataplane.Chain{Table: o.Table, V6: o.V6, Name: o.To}.Key()]; !there {
			return fmt.Errorf("chain %s does not exist", o.To)
		}
	}
	return nil
}

func (m *Memory) tunnel(name string) bool {
	k := dataplane.Key{Kind: dataplane.KindWireGuard, Name: name}
	_, there := m.objects[k]
	return there && !m.foreign[k]
}

func (m *Memory) needBridge(name string) error {
	if name == "" {
		return nil
	}
	k := dataplane.Key{Kind: dataplane.KindBridge, Name: name}
	if _, there := m.objects[k]; !there || m.foreign[k] {
		return fmt.Errorf("bridge %s: no such link", name)
	}
	return nil
}

// port returns the bridge of a VXLAN device or endpoint's link, "" without one.
func (m *Memory) port(name string) (bridge string, there bool) {
	if x, ok := m.objects[dataplane.Key{Kind: dataplane.KindVXLAN, Name: name}].(dataplane.VXLAN); ok {
		return x.Bridge, true
	}
	v, ok := m.objects[dataplane.Key{Kind: dataplane.KindVeth, Name: name}].(dataplane.Veth)
	return v.Bridge, ok
}

// setsOf returns the sets that the rules of a chain name.
func setsOf(c dataplane.Chain) []string {
	var out []string
	words := strings.Fields(c.Rules)
	for i, w := range words[:max(len(words)-1, 0)] {
		if w == "--match-set" {
			out = append(out, words[i+1])
		}
	}
	return out
}

// remove deletes an object and what hangs on it.
func (m *Memory) remove(k dataplane.Key) error {
	o, there := m.objects[k]
	if !there {
		return nil
	}
	if k.Kind == dataplane.KindSet {
		for _, other := range m.objects {
			if c, ok := other.(dataplane.Chain); ok && slices.Contains(setsOf(c), k.Name) {
				return fmt.Errorf("set %s is used by chain %s", k.Name, c.Name)
			}
		}
	}
	delete(m.objects, k)
	delete(m.foreign, k)
	for key, other := range m.objects {
		switch other := other.(type) {
		case dataplane.FDB:
			bridge, _ := m.port(other.Link)
			if isLink(k.Kind) && (other.Link == k.Name || other.Master && bridge == k.Name) {
				delete(m.objects, key)
			}
		case dataplane.Neigh:
			if isLink(k.Kind) && other.Link == k.Name {
				delete(m.objects, key)
			}
		case dataplane.Route:
			if isLink(k.Kind) && other.Link == k.Name {
				delete(m.objects, key)
				continue
			}
			for i, peer := range other.Peers { // who is gone may send nothing
				if p, ok := o.(dataplane.TunnelPeer); k.Name == dataplane.TunnelNames[i] || ok && p.Device == dataplane.TunnelNames[i] && p.Public == peer {
					other.Peers[i] = store.WGKey{}
				}
			}
			m.objects[key] = other
		case dataplane.Dest:
			if k.Kind == dataplane.KindVeth && other.Link == k.Name {
				other.Link = ""
				m.objects[key] = other
			}
		case dataplane.TunnelPeer:
			if k.Kind == dataplane.KindWireGuard && other.Device == k.Name {
				delete(m.objects, key)
			}
		case dataplane.Jump:
			if c, ok := o.(dataplane.Chain); ok && c.Table == other.Table && c.V6 == other.V6 && c.Name == other.To {
				delete(m.objects, key)
			}
		}
	}
	if k.Kind == dataplane.KindBridge {
		m.orphan(k.Name)
	}
	return nil
}

// orphan takes the ports of a bridge that is gone away from it.
func (m *Memory) orphan(bridge string) {
	for key, o := range m.objects {
		switch o := o.(type) {
		case dataplane.VXLAN:
			if o.Bridge == bridge {
				o.Bridge, o.Suppress = "", false
				m.objects[key] = o
			}
		case dataplane.Veth:
			if o.Bridge == bridge {
				o.Bridge = ""
				m.objects[key] = o
			}
		}
	}
}

func isLink(k dataplane.Kind) bool {
	return k == dataplane.KindBridge || k == dataplane.KindVXLAN || k == dataplane.KindVeth || k == dataplane.KindWireGuard
}

// network returns the network of an object: what its link's alias says.
func (m *Memory) network(o dataplane.Object) store.VNI {
	alias := ""
	switch o := o.(type) {
	case dataplane.Bridge:
		alias = o.Alias
	case dataplane.VXLAN:
		alias = o.Alias
	case dataplane.Veth:
		alias = o.Alias
	case dataplane.Route:
		return o.VNI
	case dataplane.Dest:
		return o.VNI
	case dataplane.Service:
		return o.VNI
	case dataplane.Neigh:
		return m.networkOf(o.Link)
	case dataplane.FDB:
		return m.networkOf(o.Link)
	}
	v, _ := dataplane.AliasVNI(alias)
	return v
}

func (m *Memory) networkOf(link string) store.VNI {
	for _, kind := range []dataplane.Kind{dataplane.KindBridge, dataplane.KindVXLAN, dataplane.KindVeth} {
		if o, ok := m.objects[dataplane.Key{Kind: kind, Name: link}]; ok {
			return m.network(o)
		}
	}
	return 0
}
