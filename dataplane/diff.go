package dataplane

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// Verb says what an Op does to its object.
type Verb int

// The verbs. Put makes the object or changes what is there (Old) into it; it has
// replace semantics and succeeds when the object is already so. Delete succeeds
// when there is nothing.
const (
	Put Verb = iota
	Delete
)

// Op is one change to the kernel.
type Op struct {
	Verb   Verb
	Object Object
	Old    Object // what Put found in place, or nil
}

func (o Op) String() string {
	switch {
	case o.Verb == Delete:
		return "- " + o.Object.String()
	case o.Old != nil:
		return "~ " + o.Object.String()
	}
	return "+ " + o.Object.String()
}

// Diff returns the operations that turn have into want: what is to be made or
// changed in order of kind, then what is to go in reverse order. Services go before all:
// links reset their clients, and with the last one of a network they stop to. A joined
// Veth that is not there is left out, since nobody can make it again.
func Diff(want, have Plan) []Op {
	var ops, gone []Op
	for k, w := range want {
		h, ok := have[k]
		switch {
		case ok && same(h, w):
		case lost(w, want, have):
			if ok { // what does not go with its link, in a map of the program
				gone = append(gone, Op{Verb: Delete, Object: h})
			}
		case ok:
			ops = append(ops, Op{Verb: Put, Object: w, Old: h})
		default:
			ops = append(ops, Op{Verb: Put, Object: w})
		}
	}
	for k, h := range have {
		if _, ok := want[k]; !ok {
			gone = append(gone, Op{Verb: Delete, Object: h})
		}
	}
	byKey := func(a, b Op) int { return compareKeys(a.Object.Key(), b.Object.Key()) }
	slices.SortFunc(ops, byKey)
	slices.SortFunc(gone, func(a, b Op) int { return -byKey(a, b) })
	services := 0 // the last kind
	for services < len(gone) && gone[services].Object.Key().Kind == KindService {
		services++
	}
	return slices.Concat(gone[:services], ops, gone[services:])
}

// lost reports whether w is a joined link, or belongs to one, that is not there.
func lost(w Object, want, have Plan) bool {
	name := ""
	switch o := w.(type) {
	case Veth:
		name = o.Name
	case FDB:
		name = o.Link
	case Neigh:
		name = o.Link
	case Route:
		name = o.Link
	case Dest:
		name = o.Link
	default:
		return false
	}
	key := Key{Kind: KindVeth, Name: name}
	v, ok := want[key].(Veth)
	_, there := have[key]
	return ok && v.Joined && !there
}

// same reports whether the kernel need not be changed to have want.
func same(have, want Object) bool {
	if h, ok := have.(Veth); ok && !h.Waits {
		if w, ok := want.(Veth); ok { // both sides keep what the container got
			h.MTU = w.MTU
			return compared(h) == compared(w)
		}
	}
	h, ok := have.(TunnelPeer)
	if w, peer := want.(TunnelPeer); ok && peer && h.Talks {
		h.Endpoints, h.Talks = w.Endpoints, w.Talks
		return h == w
	}
	return compared(have) == compared(want)
}

// compared returns the object without what is not compared: of chains only the hash is
// read back, and whether Docker has taken a link is for nobody here to change.
func compared(o Object) Object {
	switch o := o.(type) {
	case Chain:
		o.Rules = ""
		return o
	case Veth:
		o.Waits = false
		return o
	}
	return o
}

// Underlay is the host's own network, as the kernel has it.
type Underlay struct {
	Address netip.Addr   // zero: none found; networks then work on this host only
	Prefix  netip.Prefix // of Address: peers in it are on the same link
	Link    string
	MTU     int // bytes
	// NoChecksum: this kernel or the link's driver computes wrong inner checksums
	// for VXLAN, with the reason.
	NoChecksum bool
	Reason     string
	// Program: this kernel runs the port program.
	Program bool
	Flows   bool // it counts them
	// Ethernet: the program can stand on the link.
	Ethernet bool
}

// Near reports whether a peer is on the host's own link.
func (u Underlay) Near(p store.Peer) bool { return u.Prefix.Contains(p.Address) && !p.Away }

// OpError is the failure of one operation.
type OpError struct {
	Op  Op
	Err error
}

func (e *OpError) Error() string { return e.Op.String() + ": " + e.Err.Error() }
func (e *OpError) Unwrap() error { return e.Err }

// ErrFull is the failure of an operation on a Dest or Service for which the port program's
// map has no room: a limit, and no fault that goes away when it is tried again.
var ErrFull = errors.New("the port program's map is full")

// Kernel is the kernel as the loop uses it: dataplane/kernel, and for tests of
// logic dataplane/kerneltest.
type Kernel interface {
	// Read returns what is ours for a network, or with store.HostVNI for the
	// host (sets, chains, jumps). An error means "could not read", never
	// "nothing there".
	Read(ctx context.Context, v store.VNI) (Plan, error)
	// Apply runs the operations in order and goes on after a failure. It returns
	// one *OpError per failed operation.
	Apply(ctx context.Context, ops []Op) []*OpError
	// Networks returns the networks of which the kernel holds a link of ours.
	Networks(ctx context.Context) ([]store.VNI, error)
	// Underlay returns the link and address to reach other hosts by: want if the
	// host has it, else (zero want) the source address of the default route.
	Underlay(ctx context.Context, want netip.Addr) (Underlay, error)
	// Watch sends the network that an outside change touched, or store.HostVNI
	// for rules, sets, addresses and routes, until ctx ends. It coalesces, and it
	// may repeat our own changes. After an overflow it sends every network.
	Watch(ctx context.Context) <-chan store.VNI
}
