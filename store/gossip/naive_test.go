package gossip

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft/store"
)

// naive is the variant with which the simulation compares: memberlist with the
// configuration that Cluster has, but each endpoint is a gossip message, and all
// endpoints are the push/pull state. It is packed as tight as it can be, checks
// nothing, and keeps everything in memory.
type naive struct {
	s     *sim
	h     *simHost
	meta  []byte
	wake  chan struct{} // cap 1
	queue *memberlist.TransmitLimitedQueue
	size  atomic.Int32 // members

	mu    sync.Mutex // guards what follows
	seq   uint32
	known map[uint32]naiveRecord // by number of endpoint
	alive map[int]bool           // false: it was
}

type naiveRecord struct {
	owner uint32
	vni   store.VNI
	seq   uint32
	gone  bool
}

// naiveBytes is type, owner 16, VNI, version, endpoint 32, MAC, IPv4, gone.
const naiveBytes = 1 + 16 + 4 + 8 + 32 + 6 + 4 + 1

func (r naiveRecord) encode(endpoint uint32) []byte {
	b := make([]byte, naiveBytes)
	binary.BigEndian.PutUint32(b[1:], r.owner)
	binary.BigEndian.PutUint32(b[17:], uint32(r.vni))
	binary.BigEndian.PutUint32(b[21:], r.seq)
	binary.BigEndian.PutUint32(b[29:], endpoint)
	if r.gone {
		b[naiveBytes-1] = 1
	}
	// The rest is random in truth, and memberlist compresses.
	mix := uint64(endpoint)*0x9E3779B97F4A7C15 + uint64(r.owner)
	for at := 33; at+8 < naiveBytes; at += 8 {
		mix ^= mix << 13
		mix ^= mix >> 7
		mix ^= mix << 17
		binary.BigEndian.PutUint64(b[at:], mix)
	}
	return b
}

func parseNaive(b []byte) (endpoint uint32, r naiveRecord) {
	r = naiveRecord{owner: binary.BigEndian.Uint32(b[1:]), vni: store.VNI(binary.BigEndian.Uint32(b[17:])),
		seq: binary.BigEndian.Uint32(b[21:]), gone: b[naiveBytes-1] == 1}
	return binary.BigEndian.Uint32(b[29:]), r
}

func makeNaive(s *sim, h *simHost) party {
	n := &naive{s: s, h: h, wake: make(chan struct{}, 1), known: map[uint32]naiveRecord{}, alive: map[int]bool{}}
	n.queue = newQueue(func() int { return int(n.size.Load()) }) // it asks with its lock held
	n.size.Store(1)
	return n
}

func (n *naive) run(ctx context.Context) error {
	cfg := simConfig(n.h.i)
	keys, err := deriveKeys(cfg.Key)
	if err != nil {
		return err
	}
	r := record{Host: simRecord(cfg, n.h), Port: testPort, Boot: 1, Counter: 1}
	n.meta = r.sign(cfg.Identity)
	at := netip.AddrPortFrom(n.h.addr, testPort)
	port, err := memUnderlay{n.s.net}.gossip(at, nil)
	if err != nil {
		return err
	}
	c := &Cluster{cfg: cfg, keys: keys, under: memUnderlay{n.s.net}}
	conf := c.memberConfig(n.h.addr, &delegate{name: r.memberName()}, log.New(io.Discard, "", 0),
		&transport{NodeAwareTransport: port, c: c, ctx: ctx, local: n.h.addr})
	conf.Delegate, conf.Events, conf.Alive = n, n, nil
	list, err := memberlist.Create(conf)
	if err != nil {
		return err
	}
	for wait := joinFirst; ctx.Err() == nil; wait = min(2*wait, joinMost) {
		_ = joinAll(contacts{n.missing()}.pick(), list) // tried again
		select {
		case <-ctx.Done():
		case <-time.After(jitter(wait)):
		}
	}
	return list.Shutdown()
}

// missing are the hosts that should be members, as in Cluster.
func (n *naive) missing() (out []netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range n.s.ids {
		if alive, seen := n.alive[i]; i != n.h.i && !alive && (seen || i < simJoinHosts) {
			out = append(out, netip.AddrPortFrom(simAddr(i), testPort))
		}
	}
	return out
}

func (n *naive) close() error           { return nil }
func (n *naive) woken() <-chan struct{} { return n.wake }

func (n *naive) write(v store.VNI, names []string, gone bool) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, name := range names {
		n.seq++
		r := naiveRecord{owner: uint32(n.h.i), vni: v, seq: n.seq, gone: gone}
		n.known[simNumber(name)] = r
		n.broadcast(simNumber(name), r)
	}
	return uint64(n.seq)
}

func (n *naive) broadcast(endpoint uint32, r naiveRecord) {
	n.queue.QueueBroadcast(&broadcast{name: fmt.Sprint(endpoint), msg: r.encode(endpoint)})
}

func (n *naive) takeLocked(b []byte) (endpoint uint32, r naiveRecord, news bool) {
	endpoint, r = parseNaive(b)
	if old, ok := n.known[endpoint]; ok && old.seq >= r.seq {
		return endpoint, r, false
	}
	n.known[endpoint] = r
	poke(n.wake)
	return endpoint, r, true
}

func (n *naive) holds(w version) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return uint64(n.known[simNumber(w.name)].seq) >= w.seq
}

func (n *naive) look() {}

func (n *naive) found(owner int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.alive[owner]
}

func (n *naive) lost(owner int) bool { return !n.found(owner) }

func (n *naive) endpoints(v store.VNI) map[string]int {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[string]int{}
	for e, r := range n.known {
		if r.vni == v && !r.gone && n.alive[int(r.owner)] {
			out[simName(e)] = int(r.owner)
		}
	}
	return out
}

// NodeMeta implements memberlist.Delegate.
func (n *naive) NodeMeta(int) []byte { return n.meta }

// NotifyMsg implements memberlist.Delegate.
func (n *naive) NotifyMsg(b []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if endpoint, r, news := n.takeLocked(b); news {
		n.broadcast(endpoint, r)
	}
}

// GetBroadcasts implements memberlist.Delegate.
func (n *naive) GetBroadcasts(overhead, limit int) [][]byte {
	return n.queue.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (n *naive) LocalState(bool) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]byte, 0, naiveBytes*len(n.known))
	for e, r := range n.known {
		out = append(out, r.encode(e)...)
	}
	return out
}

// MergeRemoteState implements memberlist.Delegate.
func (n *naive) MergeRemoteState(b []byte, _ bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ; len(b) >= naiveBytes; b = b[naiveBytes:] {
		n.takeLocked(b)
	}
}

// NotifyJoin implements memberlist.EventDelegate.
func (n *naive) NotifyJoin(m *memberlist.Node) { n.note(m, true) }

// NotifyUpdate implements memberlist.EventDelegate.
func (n *naive) NotifyUpdate(*memberlist.Node) {}

// NotifyLeave implements memberlist.EventDelegate.
func (n *naive) NotifyLeave(m *memberlist.Node) { n.note(m, false) }

func (n *naive) note(m *memberlist.Node, alive bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if i, ok := n.s.index[store.HostID(m.Name[:2*hostIDBytes])]; ok && i != n.h.i {
		if n.alive[i] != alive {
			n.size.Add(map[bool]int32{true: 1, false: -1}[alive])
		}
		n.alive[i] = alive
		poke(n.wake)
	}
}
