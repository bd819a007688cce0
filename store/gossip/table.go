package gossip

import (
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// table is what this process knows of the hosts: who is a member, and which
// versions they are said to have. memberlist's callbacks write it, so nothing here
// blocks, and mu is never held while memberlist or the database is called.
type table struct {
	now     func() time.Time
	changed chan struct{} // cap 1: membership changed

	mu    sync.Mutex // guards what follows
	hosts map[store.HostID]*hostState
	alive int                   // how many of hosts are members; asked for with each packet
	own   claims                // this host's versions; epoch is that of the database
	runs  map[store.VNI]bool    // networks of this host
	twins map[string]record     // other members with this host's identity, by member name
	fresh map[store.HostID]bool // whose membership changed since it was last asked for
}

// hostState is one peer. Its fields belong to table.mu; wake is only sent on.
type hostState struct {
	rec    record            // with the highest counter ever seen; zero if only remembered
	name   string            // rec.memberName()
	names  map[string]record // under which memberlist holds it alive
	lost   time.Time         // since when it is not a member
	dead   bool              // memberlist said that it is dead, it is not only unseen
	stored uint64            // counter of the record that is in the database
	claims claims
	// doubt: only the host itself can say what it has. It came back, or runs a new
	// process, which may have an older database.
	doubt bool
	err   string        // of the last fetch
	cut   bool          // it found no way to the host
	wake  chan struct{} // cap 1: there may be something to fetch
}

func newTable(now func() time.Time, epoch uint64) *table {
	return &table{now: now, changed: make(chan struct{}, 1), hosts: map[store.HostID]*hostState{},
		own: claims{epoch: epoch, seq: map[store.VNI]uint64{}}, runs: map[store.VNI]bool{}, twins: map[string]record{},
		fresh: map[store.HostID]bool{}}
}

// alive reports whether the host is a member at the address of its newest record.
// A member at an older address does not count: the host is no longer there.
func (h *hostState) alive() bool {
	r, ok := h.names[h.name]
	return ok && r.Counter == h.rec.Counter
}

func (t *table) hostLocked(id store.HostID) *hostState {
	h := t.hosts[id]
	if h == nil {
		h = &hostState{names: map[string]record{}, lost: t.now(), wake: make(chan struct{}, 1)}
		t.hosts[id] = h
	}
	return h
}

// remember adds a peer from the database that nobody has seen yet.
func (t *table) remember(id store.HostID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hostLocked(id)
}

// admits reports whether a record may become a member's: not when a newer one of
// the same host is known for that address, and not when the table is full.
func (t *table) admits(r record) (ok bool, reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hosts[r.ID]
	switch {
	case h == nil && len(t.hosts) >= maxMembers:
		return false, "too-many-hosts"
	case h == nil:
		return true, ""
	case r.Counter < h.rec.Counter && r.memberName() == h.name:
		return false, "old-record"
	case len(h.names) >= 8 && h.names[r.memberName()].Counter == 0:
		return false, "too-many-addresses"
	}
	return true, ""
}

// joined notes that a member is alive with this record.
func (t *table) joined(r record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hostLocked(r.ID)
	was, seen := h.alive(), h.rec.ID != ""
	h.names[r.memberName()] = r
	if r.Counter >= h.rec.Counter {
		h.doubt = h.doubt || seen && r.Boot != h.rec.Boot
		h.rec, h.name = r, r.memberName()
	}
	switch is := h.alive(); {
	case is && !was:
		t.alive++
		h.lost, h.dead, h.err, h.cut = time.Time{}, false, "", false
		h.doubt = h.doubt || seen
	case was && !is:
		t.alive--
	}
	if h.claims.epoch != h.rec.Epoch {
		h.claims = claims{epoch: h.rec.Epoch, seq: map[store.VNI]uint64{}}
	}
	poke(h.wake)
	t.changedLocked(r.ID)
}

// changedLocked notes that the membership of a host changed.
func (t *table) changedLocked(id store.HostID) {
	t.fresh[id] = true
	poke(t.changed)
}

// left notes that memberlist lost a member.
func (t *table) left(id store.HostID, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.twins, name)
	h := t.hosts[id]
	if h == nil {
		return
	}
	was := h.alive()
	delete(h.names, name)
	if was && !h.alive() {
		t.alive--
		h.lost, h.dead = t.now(), true
	}
	t.changedLocked(id)
}

// reset forgets who is a member, for a new instance of memberlist. Nobody is said
// to be dead by that.
func (t *table) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, h := range t.hosts {
		if h.alive() {
			h.lost = t.now()
		}
		clear(h.names)
		t.changedLocked(id)
	}
	t.alive = 0
	clear(t.twins)
}

// forget drops a peer that is no member.
func (t *table) forget(id store.HostID) { t.forgetAfter(id, 0) }

// forgetAfter drops a peer that has been no member for so long.
func (t *table) forgetAfter(id store.HostID, d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.hosts[id]; h != nil && len(h.names) == 0 && t.now().Sub(h.lost) >= d {
		delete(t.hosts, id)
	}
}

// claim takes over a digest from gossip. It reports whether that was news.
func (t *table) claim(d digest) (news bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hosts[d.Host]
	if h == nil || len(h.names) == 0 || h.claims.epoch != d.Epoch || h.claims.seq[d.VNI] >= d.Seq {
		return false
	}
	if _, ok := h.claims.seq[d.VNI]; !ok && len(h.claims.seq) > maxNetworks {
		return false
	}
	h.claims.seq[d.VNI] = d.Seq
	if d.VNI == store.HostVNI || t.runs[d.VNI] {
		poke(h.wake)
	}
	return true
}

// told takes over versions from the owner, whose word replaces what gossip claimed
// before the question was asked (before); a digest that came since then stands.
// whole means that c is the list of all networks.
func (t *table) told(id store.HostID, before, c claims, whole bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hosts[id]
	if h == nil || !whole && h.claims.epoch != c.epoch {
		return
	}
	for v, seq := range h.claims.seq {
		_, asked := c.seq[v]
		news := h.claims.epoch == c.epoch && (before.epoch != c.epoch || before.seq[v] != seq)
		if (asked || whole) && news && seq > c.seq[v] || !asked && !whole {
			c.seq[v] = seq
		}
	}
	h.claims = c
	h.doubt = h.doubt && !whole
}

// fetched notes how the last fetch from a peer ended.
func (t *table) fetched(id store.HostID, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.hosts[id]; h != nil {
		h.err = ""
		if err != nil {
			h.err = err.Error()
		}
		var dial *net.OpError
		h.cut = errors.As(err, &dial) && dial.Op == "dial"
	}
}

// publish replaces this host's versions and returns digests of those that changed.
// Peers are looked at again when this host runs a network that it did not run, or has
// changed the list of its networks: one of them may have been made anew under its VNI.
func (t *table) publish(id store.HostID, seq map[store.VNI]uint64) []digest {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []digest
	more := false
	for v, s := range seq {
		if t.own.seq[v] != s {
			out = append(out, digest{Host: id, VNI: v, Epoch: t.own.epoch, Seq: s})
			more = more || v == store.HostVNI
		}
		more = more || v != store.HostVNI && !t.runs[v]
	}
	t.own.seq = seq
	clear(t.runs)
	for v := range seq {
		if v != store.HostVNI {
			t.runs[v] = true
		}
	}
	if more {
		for _, h := range t.hosts {
			poke(h.wake)
		}
	}
	return out
}

// state returns the versions of this host and of all members for push/pull.
func (t *table) state(id store.HostID) []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := appendClaims(nil, id, t.own)
	for id, h := range t.hosts {
		if h.alive() && len(h.claims.seq) > 0 && len(out) < maxState/2 {
			out = appendClaims(out, id, h.claims)
		}
	}
	return out
}

// sight is a copy of what the table holds of one peer. Table.sights leaves claims
// out.
type sight struct {
	rec    record
	alive  bool
	lost   time.Time
	dead   bool
	stored uint64
	claims claims
	doubt  bool
	err    string
	cut    bool
	wake   <-chan struct{}
}

// heard reports whether somebody has said which networks the peer has.
func (s sight) heard() bool {
	_, ok := s.claims.seq[store.HostVNI]
	return ok
}

func (h *hostState) sight() sight {
	return sight{rec: h.rec, alive: h.alive(), lost: h.lost, dead: h.dead, stored: h.stored,
		doubt: h.doubt, err: h.err, cut: h.cut, wake: h.wake}
}

func (t *table) sights() map[store.HostID]sight {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[store.HostID]sight, len(t.hosts))
	for id, h := range t.hosts {
		out[id] = h.sight()
	}
	return out
}

// news returns those of sights whose membership changed since the last call.
func (t *table) news() map[store.HostID]sight {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[store.HostID]sight, len(t.fresh))
	for id := range t.fresh {
		if h := t.hosts[id]; h != nil {
			out[id] = h.sight()
		}
	}
	clear(t.fresh)
	return out
}

func (t *table) sight(id store.HostID) (sight, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hosts[id]
	if h == nil {
		return sight{}, false
	}
	s := h.sight()
	s.claims = claims{epoch: h.claims.epoch, seq: maps.Clone(h.claims.seq)}
	return s, true
}

// saved notes that the record with this counter is in the database.
func (t *table) saved(id store.HostID, counter uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.hosts[id]; h != nil {
		h.stored = counter
	}
}

// networks returns the VNIs that this host runs.
func (t *table) networks() []store.VNI {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Sorted(maps.Keys(t.runs))
}

// size returns the number of members with this host.
func (t *table) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.alive + 1
}

// twin notes another member with this host's identity.
func (t *table) twin(r record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.twins) < 8 {
		t.twins[r.memberName()] = r
	}
	poke(t.changed)
}

func (t *table) twinList() []record {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Values(t.twins))
}

// poke sends on a channel of capacity 1 without waiting.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
