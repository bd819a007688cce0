package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// Times of the loop.
const (
	// A change of records waits until nothing has changed for quiet, but at most
	// quantum, so that a burst becomes one pass. Calls of Docker do not wait.
	quiet   = 10 * time.Millisecond
	quantum = 100 * time.Millisecond
	// An outside change of the kernel is looked at after this, at most once in
	// the time: our own changes come back as events too, and a look costs a dump.
	lookAfter = 300 * time.Millisecond
	// After a pass that no call of Docker waits for, the next one waits as long as it
	// took, restMost at most: networks of thousands of endpoints that change all the
	// time must not take a core.
	restMost = 300 * time.Millisecond
	// auditEvery is how often everything is read again without any sign.
	auditEvery = 60 * time.Second
	// A failed pass is tried again after retryFirst, doubled up to retryLast.
	retryFirst = 500 * time.Millisecond
	retryLast  = 30 * time.Second
	passLimit  = 20 * time.Second
	// endLimit bounds what is done when the process was told to end: Docker waits
	// ten seconds for it.
	endLimit = 3 * time.Second
)

// Loop makes the kernel match the store. It is the only caller of Kernel.Apply.
//
// Use: Run in one goroutine; Sync from any. After a record was written, Sync
// returns when the kernel holds it.
//
// How: a pass takes a snapshot of one network, plans, reads, diffs and applies. A
// call of Docker uses what the last pass left in place of a new reading, for a
// dump costs more than the change (measured: 10 ms and more with a thousand links);
// events from the kernel, failures and a timer make the loop read again.
//
// Threads: passes is owned by Run's goroutine; the fields under mu are for all.
type Loop struct {
	db      *store.DB
	kernel  Kernel
	address func() netip.Addr
	asked   netip.Addr // what address last returned
	inSync  func() bool
	log     *slog.Logger

	requests chan request
	records  *store.Watch
	ready    chan struct{}

	networks map[store.VNI]*network // owned by Run
	rest     time.Time              // no pass before it, but for calls; owned by Run
	waiters  []waiter               // owned by Run

	mu       sync.Mutex
	underlay Underlay
	status   map[store.VNI]NetworkStatus
	missing  map[store.VNI][]store.EndpointID
	untaken  map[store.VNI][]store.EndpointID
	stats    Stats
}

// network is what the loop knows of one network, or of the host (HostVNI).
type network struct {
	have     Plan      // what the kernel held after the last pass; nil: read it
	due      time.Time // when the next pass is due; zero: nothing to do
	first    time.Time // first unserved change of records
	changed  bool      // records changed since the last pass
	behind   bool      // not known to do what the records say of tunnels
	lookedAt time.Time // last reading
	failures int
	full     map[Key]bool // for what the kernel had no room at the last try
}

// NetworkStatus tells how the last pass over a network went.
type NetworkStatus struct {
	VNI      store.VNI `json:"vni"`
	Err      string    `json:"err,omitempty"`  // of the last pass; "" is well
	Since    time.Time `json:"since,omitzero"` // since when it fails
	LastPass time.Time `json:"lastPass"`
	Objects  int       `json:"objects"`
	Held     string    `json:"held,omitempty"` // why deletions wait
	// Full counts by kind ("dest", "service") what the port program had no room for.
	Full map[string]int `json:"full,omitempty"`
	// Contests are the first of what two living hosts claim, Contested is how many.
	Contests  []Contest `json:"contests,omitempty"`
	Contested int       `json:"contested,omitempty"`
}

// Stats counts what the loop did since its start.
type Stats struct {
	Passes, Ops, Failures uint64
	Repaired              map[string]uint64 // by kind: changes that no record asked for
}

type request struct {
	vni      store.VNI
	endpoint store.EndpointID
	explain  bool
	settle   <-chan struct{} // see Settled; closed when nobody waits any more
	reply    chan<- reply
}

type reply struct {
	err        error
	want, have Plan
	ops        []Op
}

// NewLoop returns a loop over the database and the kernel. address returns the
// underlay address to use, the zero Addr for that of the default route. While
// inSync returns false, what peers own is not deleted; nil means always in sync.
func NewLoop(db *store.DB, k Kernel, address func() netip.Addr, inSync func() bool, log *slog.Logger) *Loop {
	if inSync == nil {
		inSync = func() bool { return true }
	}
	return &Loop{
		db: db, kernel: k, address: address, inSync: inSync, log: log,
		requests: make(chan request, 64), records: db.Watch(), ready: make(chan struct{}),
		networks: map[store.VNI]*network{},
		status:   map[store.VNI]NetworkStatus{}, missing: map[store.VNI][]store.EndpointID{}, untaken: map[store.VNI][]store.EndpointID{},
		stats: Stats{Repaired: map[string]uint64{}},
	}
}

// Ready is closed after the first pass over everything.
func (l *Loop) Ready() <-chan struct{} { return l.ready }

// Run works until ctx ends, and then on what the records already ask for, for endLimit
// at most. It returns nil.
func (l *Loop) Run(ctx context.Context) error {
	events := l.kernel.Watch(ctx)
	audit := time.NewTicker(auditEvery)
	defer audit.Stop()
	l.markAll(ctx)
	first := true
	for ctx.Err() == nil {
		select { // calls of Docker overtake passes
		case r := <-l.requests:
			l.serve(ctx, r)
			continue
		case v := <-events:
			l.look(v)
			continue
		default:
		}
		v, wait, due := l.next(time.Now())
		if due {
			begun := time.Now()
			_, _ = l.pass(ctx, v) // recorded in the status and tried again
			if took := time.Since(begun); !first {
				l.rest = time.Now().Add(min(took, restMost))
			}
			continue
		}
		if first {
			first = false
			close(l.ready)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case r := <-l.requests:
			l.serve(ctx, r)
		case v := <-events:
			l.look(v)
		case <-l.records.C:
			l.takeRecords()
		case <-audit.C:
			l.markAll(ctx)
		case <-timer.C:
		}
		timer.Stop()
	}
	l.finish(context.WithoutCancel(ctx))
	return nil
}

// finish does what no call of Docker waits for, the removal of networks above all:
// nobody does it later if the plugin is removed now.
func (l *Loop) finish(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	l.takeRecords()
	for v, n := range l.networks {
		if n.changed && v != store.HostVNI {
			_, _ = l.pass(ctx, v) // the next process finds what fails
		}
	}
	if l.network(store.HostVNI).changed {
		_, _ = l.pass(ctx, store.HostVNI)
	}
}

func (l *Loop) network(v store.VNI) *network {
	n, ok := l.networks[v]
	if !ok {
		n = &network{}
		l.networks[v] = n
	}
	return n
}

// takeRecords marks the networks whose records changed.
func (l *Loop) takeRecords() {
	for _, v := range l.records.Take() {
		l.mark(v)
	}
}

// mark notes that records of a network changed.
func (l *Loop) mark(v store.VNI) {
	n, now := l.network(v), time.Now()
	n.behind = true
	if !n.changed {
		n.changed, n.first = true, now
	}
	at := now.Add(quiet)
	if last := n.first.Add(quantum); last.Before(at) {
		at = last
	}
	n.dueAt(at)
}

// look notes that the kernel may differ from what the last pass left.
func (l *Loop) look(v store.VNI) {
	n, now := l.network(v), time.Now()
	at := now.Add(lookAfter / 3)
	if next := n.lookedAt.Add(lookAfter); next.After(at) {
		at = next
	}
	n.have = nil
	n.dueAt(at)
}

func (n *network) dueAt(at time.Time) {
	if n.due.IsZero() || at.Before(n.due) {
		n.due = at
	}
}

// markAll makes the loop read and compare everything: what is recorded, what the
// kernel holds, and the host.
func (l *Loop) markAll(ctx context.Context) {
	seen := map[store.VNI]bool{store.HostVNI: true}
	if s, err := l.db.HostSnapshot(); err == nil {
		for _, n := range s.Networks {
			seen[n.VNI] = true
		}
	}
	if found, err := l.kernel.Networks(ctx); err == nil {
		for _, v := range found {
			seen[v] = true
		}
	}
	for v := range l.networks {
		seen[v] = true
	}
	now := time.Now()
	for v := range seen {
		n := l.network(v)
		n.have, n.behind = nil, true
		n.dueAt(now)
	}
}

// next returns a network whose pass is due, the host before others, which need its
// devices, or how long to wait for one.
func (l *Loop) next(now time.Time) (v store.VNI, wait time.Duration, due bool) {
	wait = auditEvery
	for id, n := range l.networks {
		if n.due.IsZero() {
			continue
		}
		at := n.due
		if at.Before(l.rest) {
			at = l.rest
		}
		d := at.Sub(now)
		if d <= 0 && (!due || id == store.HostVNI) {
			v, due = id, true
		}
		wait = min(wait, max(0, d))
	}
	return v, wait, due
}

// Sync returns nil when the kernel holds the endpoint of the network; with no
// endpoint, when it holds the network's own links and rules. A failure that
// concerns only peers or other endpoints is not returned.
func (l *Loop) Sync(ctx context.Context, v store.VNI, e store.EndpointID) error {
	r, err := l.ask(ctx, request{vni: v, endpoint: e})
	if err != nil {
		return err
	}
	return r.err
}

// Explain reads the kernel anew and returns what it should hold for a network,
// what it holds, and the difference. It repairs nothing: that a difference is found
// without being asked for is what the tests look at.
func (l *Loop) Explain(ctx context.Context, v store.VNI) (want, have Plan, ops []Op, err error) {
	r, err := l.ask(ctx, request{vni: v, explain: true})
	if err != nil {
		return nil, nil, nil, err
	}
	return r.want, r.have, r.ops, r.err
}

func (l *Loop) ask(ctx context.Context, r request) (reply, error) {
	c := make(chan reply, 1)
	r.reply = c
	select {
	case l.requests <- r:
	case <-ctx.Done():
		return reply{}, fmt.Errorf("the data plane is busy: %w", ctx.Err())
	}
	select {
	case out := <-c:
		return out, nil
	case <-ctx.Done():
		return reply{}, fmt.Errorf("waiting for the kernel: %w", ctx.Err())
	}
}

// serve answers a request and all that wait behind it.
func (l *Loop) serve(ctx context.Context, r request) {
	batch := []request{r}
	for len(l.requests) > 0 {
		batch = append(batch, <-l.requests)
	}
	// One full pass serves all calls for the same network.
	done := map[store.VNI][]*OpError{}
	failed := map[store.VNI]error{}
	for _, r := range batch {
		if r.settle != nil {
			l.await(r)
			continue
		}
		if r.explain {
			c, err := l.compare(ctx, r.vni, true)
			r.reply <- reply{err: err, want: c.want, have: c.have, ops: l.network(r.vni).possible(Diff(c.want, c.have))}
			continue
		}
		_, passed := failed[r.vni]
		if !passed && l.passEndpoint(ctx, r.vni, r.endpoint) {
			r.reply <- reply{}
			continue
		}
		if !passed {
			done[r.vni], failed[r.vni] = l.pass(ctx, r.vni)
		}
		err := failed[r.vni]
		if err == nil {
			err = concerning(done[r.vni], r.endpoint, l.encrypts(r.vni))
		}
		if err == nil && r.endpoint != "" && l.lost(r.vni, r.endpoint) {
			err = errors.New("its link is gone from this host; remove the endpoint and make it again")
		}
		r.reply <- reply{err: err}
	}
}

// lost reports whether the endpoint's link should be there and is not.
func (l *Loop) lost(v store.VNI, e store.EndpointID) bool {
	have := l.network(v).have
	if have == nil {
		return false
	}
	_, there := have[Key{Kind: KindVeth, Name: VethName(e)}]
	return !there
}

// encrypts reports whether the network is an encrypted one.
func (l *Loop) encrypts(v store.VNI) bool {
	s, err := l.db.Snapshot(v)
	return err == nil && s.Network != nil && s.Network.Encrypted
}

// concerning returns the first failure that an endpoint depends on: of its own
// objects, or of the network's base.
func concerning(errs []*OpError, e store.EndpointID, encrypted bool) error {
	for _, err := range errs {
		if err.Op.Verb == Delete {
			continue
		}
		switch o := err.Op.Object.(type) {
		case Veth:
			if e != "" && o.Name == VethName(e) {
				return err
			}
		case FDB:
			if e != "" && o.Link == VethName(e) {
				return err
			}
		case Route:
			if o.Link == "" || e != "" && o.Link == VethName(e) {
				return err
			}
		case Neigh, TunnelPeer, Program, Dest, Service: // it works without them
		case WireGuard:
			if encrypted {
				return err
			}
		default:
			return err
		}
	}
	return nil
}

// Underlay returns the host's own network as the last pass found it.
func (l *Loop) Underlay() Underlay {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.underlay
}
