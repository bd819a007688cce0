package gossip

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// The shape of a simulated cluster. Every host runs the wide network and smallNets
// others, each of which at most smallSize hosts run.
const (
	wideVNI      store.VNI = 5000
	smallVNI     store.VNI = 6000
	smallNets              = 4
	smallSize              = 25
	wideOnHost             = 2
	smallOnHost            = 12
	perHost                = wideOnHost + smallNets*smallOnHost // endpoints
	bootEvery              = 100 * time.Millisecond             // between the starts of two hosts, about
	simMost                = 10 * time.Minute                   // for any one thing to become true
	simJoinHosts           = 3                                  // in everybody's list
	simJoins               = 3                                  // hosts that come later
)

// party is what a simulated host runs: Cluster, or the naive variant beside which
// its figures stand.
type party interface {
	// run takes part until ctx ends.
	run(ctx context.Context) error
	// write makes or removes endpoints of a network in one go and returns the
	// version that others must hold to know of it.
	write(v store.VNI, names []string, gone bool) (seq uint64)
	// holds reports whether this host knew the version or a later one at the last
	// call of look; calls come one at a time.
	holds(version) bool
	look()
	// lost and found report whether another host is known to be dead, or alive.
	lost(owner int) bool
	found(owner int) bool
	// woken receives after something changed.
	woken() <-chan struct{}
	// endpoints returns what this host uses of the others' in a network, by name.
	endpoints(v store.VNI) map[string]int
	close() error
}

// version is what one host has in one network.
type version struct {
	owner int
	vni   store.VNI
	seq   uint64
	name  string // of the last endpoint that was changed
}

// simHost is a host of the simulation.
type simHost struct {
	i    int
	addr netip.Addr
	nets []store.VNI
	own  map[store.VNI]map[string]bool // what it has said to have
	p    party
	stop context.CancelFunc
	done chan error
	dead bool

	mu    sync.Mutex // guards waits
	waits []*wait
}

// wait is one thing that one host is to come to know.
type wait struct {
	of    *awaited
	check func(party) bool
}

// awaited collects when several hosts came to know something.
type awaited struct {
	start time.Time
	all   chan struct{}

	mu   sync.Mutex // guards what follows
	left int
	took []time.Duration
}

// sim is a cluster in one process, in virtual time.
type sim struct {
	t     *testing.T
	dir   string
	net   *memNet
	rnd   *rand.Rand
	hosts []*simHost
	runBy map[store.VNI][]int
	names int
	make  func(s *sim, h *simHost) party
	ids   []store.HostID
	index map[store.HostID]int
}

func newSim(t *testing.T, dir string, seed uint64, n int, make func(*sim, *simHost) party) *sim {
	s := &sim{t: t, dir: dir, rnd: rand.New(rand.NewPCG(seed, uint64(n))), runBy: map[store.VNI][]int{}, make: make, index: map[store.HostID]int{}}
	s.net = newMemNet(rand.New(rand.NewPCG(seed, uint64(n)+1)))
	for i := range n + simJoins {
		s.ids = append(s.ids, simIdentity(i).ID)
		s.index[s.ids[i]] = i
	}
	for range n {
		s.addHost()
	}
	v := smallVNI
	for range smallNets {
		for part := range slices.Chunk(s.rnd.Perm(n), smallSize) {
			for _, i := range part {
				s.give(s.hosts[i], v)
			}
			v++
		}
	}
	return s
}

// addHost makes a host that runs the wide network.
func (s *sim) addHost() *simHost {
	i := len(s.hosts)
	h := &simHost{i: i, addr: simAddr(i), own: map[store.VNI]map[string]bool{}}
	s.hosts = append(s.hosts, h)
	s.give(h, wideVNI)
	return h
}

func simAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(i%250 + 1)})
}

func (s *sim) give(h *simHost, v store.VNI) {
	h.nets = append(h.nets, v)
	h.own[v] = map[string]bool{}
	s.runBy[v] = append(s.runBy[v], h.i)
}

// start makes and runs a host with its first endpoints.
func (s *sim) start(h *simHost) {
	h.p = s.make(s, h)
	for _, v := range h.nets {
		n := smallOnHost
		if v == wideVNI {
			n = wideOnHost
		}
		h.write(v, s.fresh(n), false)
	}
	ctx, stop := context.WithCancel(context.Background())
	h.stop, h.done = stop, make(chan error, 1)
	go func() { h.done <- h.p.run(ctx) }()
	go h.observe(ctx)
}

// fresh returns new names of endpoints.
func (s *sim) fresh(n int) []string {
	out := make([]string, n)
	for i := range out {
		s.names++
		out[i] = simName(uint32(s.names))
	}
	return out
}

// simName is the name of an endpoint, as long as Docker's ids; simNumber its number.
func simName(n uint32) string { return fmt.Sprintf("%064x", n) }

func simNumber(name string) (n uint32) {
	_, _ = fmt.Sscanf(name[len(name)-8:], "%x", &n) // of our own making
	return n
}

func (h *simHost) write(v store.VNI, names []string, gone bool) version {
	for _, n := range names {
		if gone {
			delete(h.own[v], n)
		} else {
			h.own[v][n] = true
		}
	}
	return version{h.i, v, h.p.write(v, names, gone), names[len(names)-1]}
}

// halt stops the host and waits for its end.
func (s *sim) halt(h *simHost) {
	if h.dead {
		return
	}
	h.dead = true
	h.stop()
	if err := errors.Join(<-h.done, h.p.close()); err != nil {
		s.t.Errorf("host %d: %v", h.i, err)
	}
}

func (h *simHost) observe(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.p.woken():
			h.look()
		}
	}
}

func (h *simHost) look() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.p.look()
	h.waits = slices.DeleteFunc(h.waits, func(w *wait) bool {
		if !w.check(h.p) {
			return false
		}
		w.of.reached()
		return true
	})
}

func (a *awaited) reached() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.took = append(a.took, time.Since(a.start))
	if a.left--; a.left == 0 {
		close(a.all)
	}
}

// await asks the hosts when check becomes true on them, from now on.
func await(hosts []*simHost, check func(party) bool) *awaited {
	a := &awaited{start: time.Now(), all: make(chan struct{}), left: len(hosts)}
	if a.left == 0 {
		close(a.all)
	}
	for _, h := range hosts {
		h.mu.Lock()
		h.p.look()
		if check(h.p) {
			a.reached()
		} else {
			h.waits = append(h.waits, &wait{of: a, check: check})
		}
		h.mu.Unlock()
	}
	return a
}

// wait returns how long it took each host; one that does not know it after simMost
// fails the test.
func (s *sim) wait(what string, all ...*awaited) (took []time.Duration) {
	late := time.After(simMost)
	for _, a := range all {
		select {
		case <-a.all:
		case <-late:
			a.mu.Lock()
			s.t.Errorf("%s: %d hosts do not know it after %v", what, a.left, simMost)
			a.mu.Unlock()
			return took
		}
		took = append(took, a.took...)
	}
	return took
}

func (s *sim) living() []*simHost {
	return slices.DeleteFunc(slices.Clone(s.hosts), func(h *simHost) bool { return h.dead || h.p == nil })
}

// others are the living hosts that run the network, without one.
func (s *sim) others(v store.VNI, but int) (out []*simHost) {
	for _, i := range s.runBy[v] {
		if h := s.hosts[i]; i != but && !h.dead && h.p != nil {
			out = append(out, h)
		}
	}
	return out
}

// change makes a new endpoint on a host, or removes one, and asks all that run the
// network when they know it.
func (s *sim) change(h *simHost, v store.VNI) *awaited {
	var names []string
	gone := s.rnd.IntN(2) == 0 && len(h.own[v]) > 1
	if gone {
		all := slices.Sorted(maps.Keys(h.own[v]))
		names = []string{all[s.rnd.IntN(len(all))]}
	} else {
		names = s.fresh(1)
	}
	start := time.Now()
	want := h.write(v, names, gone)
	a := await(s.others(v, h.i), func(p party) bool { return p.holds(want) })
	a.start = start
	return a
}

// wrong counts endpoints that hosts lack or have too many.
func (s *sim) wrong(hosts ...*simHost) (n int) {
	for _, h := range hosts {
		for _, v := range h.nets {
			has := h.p.endpoints(v)
			for _, o := range s.others(v, h.i) {
				for name := range o.own[v] {
					if has[name] != o.i {
						n++
					}
					delete(has, name)
				}
			}
			for _, owner := range has {
				if !s.hosts[owner].dead { // of a dead host they stay for a while
					n++
				}
			}
		}
	}
	return n
}

// spent is the processor time of this process.
func spent() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
