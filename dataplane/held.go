package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// What peers own stays in the kernel while it is this host that may hear nobody. Records
// of many peers that fall silent at once stay in the plan (store.Deaf), so all works in
// both directions, and what is removed by somebody's will still goes.

// silence says that peers have their entries although they are silent for long, or "".
func silence(peers []store.Peer) string {
	hidden, silent := false, 0
	for _, p := range peers {
		hidden = hidden || p.Hidden
		if !p.DeadSince.IsZero() {
			silent++
		}
	}
	if !hidden {
		return ""
	}
	return fmt.Sprintf("%d of %d peers are silent at once; their entries stay until they are back or forgotten", silent, len(peers))
}

// withhold changes what would take away entries of peers while the hosts have not been
// heard: a host that lost its database knows none of them. What is not wanted at all any
// more was removed here.
func (l *Loop) withhold(want Plan, ops []Op) (_ []Op, held string) {
	if len(want) == 0 || len(ops) == 0 || l.inSync() {
		return ops, ""
	}
	gone := l.outcasts()
	for _, op := range ops { // nor are tasks kept that this host itself removes
		if o, ok := op.Object.(Veth); ok && op.Verb == Delete {
			e, _ := ParseEndpointAlias(o.Alias)
			gone.addresses[e.IPv4.Addr()] = true
		}
	}
	var out []Op
	for _, op := range ops {
		if o, ok := op.Object.(Service); ok && op.Verb == Delete { // as one without tasks
			op = Op{Verb: Put, Object: Service{VNI: o.VNI, VIP: o.VIP}, Old: o}
		}
		switch {
		case op.Verb == Delete && gone.keep(op.Object):
			held = unheard
			continue
		case op.Verb == Put && op.Old != nil:
			o := gone.merge(op.Object, op.Old)
			if o != op.Object {
				held = unheard
			}
			if same(op.Old, o) {
				continue
			}
			op.Object = o
		}
		out = append(out, op)
	}
	return out, held
}

const unheard = "the hosts have not been heard yet; entries of unknown peers stay until then"

// outcasts are revoked peers, and tasks removed here: theirs goes at once.
type outcasts struct {
	addresses map[netip.Addr]bool
	keys      map[store.WGKey]bool
}

func (l *Loop) outcasts() outcasts {
	out := outcasts{map[netip.Addr]bool{}, map[store.WGKey]bool{}}
	// If they cannot be read, they go with the rest.
	_ = l.db.View(func(tx *store.Tx) error {
		all, err := tx.RevokedPeers()
		for _, p := range all {
			out.addresses[p.Address] = true
			for _, k := range p.Tunnel.Keys {
				out.keys[k] = true
			}
		}
		return err
	})
	return out
}

// keep reports whether an object is a peer's, or there for peers.
func (out outcasts) keep(o Object) bool {
	switch o := o.(type) {
	case FDB:
		return o.Dst.IsValid() && !out.addresses[o.Dst] || o.Master && strings.HasPrefix(o.Link, vxlanPrefix)
	case Dest:
		return o.Peer.IsValid() && !out.addresses[o.Peer] || o.Tunnel
	case Neigh:
		return !strings.HasPrefix(o.Link, vethPrefix)
	case Route:
		return o.Via.IsValid() && !out.addresses[o.Via] || strings.HasPrefix(o.Link, tunnelPrefix)
	case TunnelPeer:
		return !out.keys[o.Public]
	case WireGuard:
		return true
	}
	return false
}

// merge returns the object with what the old one has for peers.
func (out outcasts) merge(now, old Object) Object {
	switch now := now.(type) {
	case Set:
		if old, ok := old.(Set); ok {
			now.Members = joinMembers(out.union(now.Members, old.Members))
		}
		return now
	case Program:
		if old, ok := old.(Program); ok && now.Underlay != "" {
			now.Peers = joinMembers(out.union(now.Peers, old.Peers))
		}
		return now
	case Service:
		if old, ok := old.(Service); ok {
			all := out.union(now.Backends, old.Backends)
			slices.SortFunc(all, func(a, b string) int { return addressOf(a).Compare(addressOf(b)) })
			now.Backends = strings.Join(all[:min(len(all), MaxBackends)], ",")
		}
		return now
	case Veth: // it may have asked a virtual address, or reach somebody over a smaller link
		if old, ok := old.(Veth); ok && now.Program != (Port{}) {
			now.Program.Services = now.Program.Services || old.Program.Services
			if old.Program.MTU != 0 {
				now.Program.MTU = min(now.Program.MTU, old.Program.MTU)
			}
		}
		return now
	case Dest:
		old, ok := old.(Dest)
		now.Services = now.Services || ok && old.Services && now.Link == old.Link
		return now
	}
	return now
}

// union returns the elements of a list, and those of the old one with other addresses.
func (out outcasts) union(list, old string) []string {
	all := strings.FieldsFunc(list, func(c rune) bool { return c == ',' })
	known := map[netip.Addr]bool{}
	for _, text := range all {
		known[addressOf(text)] = true
	}
	for text := range strings.SplitSeq(old, ",") {
		if a := addressOf(text); a.IsValid() && !known[a] && !out.addresses[a] {
			all = append(all, text)
		}
	}
	return all
}

// addressOf returns the address that an element of a list begins with.
func addressOf(text string) netip.Addr {
	text, _, _ = strings.Cut(text, " ")
	a, _ := netip.ParseAddr(text) // a set of another type has none
	return a
}
