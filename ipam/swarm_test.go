package ipam

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

const swarmPool = "10.90.0.0/22"

// swarm is a model of Docker's Swarm: three managers that are also hosts, of which
// one leads. What is live is what Docker's own log holds.
type swarm struct {
	t      *testing.T
	rnd    *rand.Rand
	beds   [3]*bed
	terms  [3]uint64
	leader int
	live   map[string]int // address → host of its task
	order  []string       // of live, for a reproducible choice
	here   [3]int         // tasks of a host
	lost   int            // releases that the dead leader did not hear
}

// manager is the process of a manager: its plugin survives dockerd's end.
func (s *swarm) manager(i int) *bed { return s.beds[i] }

func (s *swarm) pool(i int, space string) string {
	s.t.Helper()
	var options map[string]string
	if space == LocalSpace { // the leader's allocator makes the mark after it asked for the pool
		options = map[string]string{optSerial: "true"}
	}
	r, err := s.manager(i).RequestPool(s.t.Context(), api.RequestPoolRequest{AddressSpace: space, Pool: swarmPool, Options: options})
	if err != nil {
		s.t.Fatal(err)
	}
	return r.PoolID
}

// lead makes a manager the leader: it asks for all that Docker has, as swarmkit's
// allocator does.
func (s *swarm) lead(i int) {
	s.t.Helper()
	s.leader, s.terms[i] = i, s.rnd.Uint64()
	id := s.pool(i, GlobalSpace)
	s.beds[i].must(s.t, id, "10.90.0.1", optSerial, "true", optType, typeGateway)
	s.beds[i].write(s.t, func(tx *store.Tx) error {
		return tx.PutAllocation(store.Allocation{ID: "net", VNI: 5000, Prefixes: []netip.Prefix{netip.MustParsePrefix(swarmPool)}, Term: s.terms[i]})
	})
	for _, a := range s.order {
		if got := s.beds[i].must(s.t, id, a[:len(a)-len("/22")], optSerial, "true"); got != a {
			s.t.Fatalf("the new leader is answered %s for %s", got, a)
		}
	}
}

func (s *swarm) start() {
	s.t.Helper()
	a := s.beds[s.leader].must(s.t, GlobalSpace+"/"+swarmPool, "", optSerial, "true")
	if host, twice := s.live[a]; twice {
		s.t.Fatalf("%s is given out, and lives on host %d", a, host)
	}
	host := s.rnd.IntN(len(s.beds))
	s.live[a] = host
	s.order = append(s.order, a)
	if s.here[host]++; s.here[host] == 1 {
		s.beds[host].must(s.t, s.pool(host, LocalSpace), "10.90.0.1", optSerial, "true", optType, typeGateway)
	}
	if got := s.beds[host].must(s.t, LocalSpace+"/"+swarmPool, a[:len(a)-len("/22")], optSerial, "true", optName, "task"); got != a {
		s.t.Fatalf("the host is answered %s for %s", got, a)
	}
}

func (s *swarm) stop(heard bool) {
	s.t.Helper()
	n := s.rnd.IntN(len(s.order))
	a := s.order[n]
	host := s.live[a]
	delete(s.live, a)
	s.order = append(s.order[:n], s.order[n+1:]...)
	s.beds[host].release(s.t, LocalSpace+"/"+swarmPool, a)
	if s.here[host]--; s.here[host] == 0 {
		s.beds[host].release(s.t, LocalSpace+"/"+swarmPool, "10.90.0.1")
		s.beds[host].releasePool(s.t, LocalSpace+"/"+swarmPool)
	}
	if !heard {
		s.lost++
		return
	}
	s.beds[s.leader].release(s.t, GlobalSpace+"/"+swarmPool, a)
}

// held returns how many addresses a manager takes for used in the global space.
func (s *swarm) held(i int) (n int) {
	s.t.Helper()
	pools, err := s.beds[i].Status()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range pools {
		if p.Space == GlobalSpace {
			n = p.Used
		}
	}
	return n
}

// TestLeadersComeAndGo demands, through fifty deaths of the leader while tasks start
// and stop: no live address is given out again, none is lost.
func TestLeadersComeAndGo(t *testing.T) {
	const seed, kills, steps = 7, 50, 40
	s := &swarm{t: t, rnd: rand.New(rand.NewPCG(seed, 0)), live: map[string]int{}}
	for i := range s.beds {
		b := newBed(t)
		b.cfg.Term = func() uint64 { return s.terms[i] }
		s.beds[i] = b
	}
	s.lead(0)
	started := 0
	for range kills {
		for range steps {
			switch n := s.rnd.IntN(10); {
			case len(s.order) > 0 && (n < 4 || len(s.order) > 600):
				s.stop(true)
			case n < 9:
				s.start()
				started++
			default:
				for _, b := range s.beds {
					b.now = b.now.Add(time.Duration(s.rnd.IntN(120)) * time.Second)
					if _, err := b.Audit(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		// The leader dies; its plugin has not heard of what stopped at that moment, and
		// may be killed with it.
		for range min(len(s.order), s.rnd.IntN(4)) {
			s.stop(false)
		}
		if dead := s.leader; s.rnd.IntN(2) == 0 {
			if err := s.beds[dead].db.Close(); err != nil {
				t.Fatal(err)
			}
			now := s.beds[dead].now
			s.beds[dead].open(t)
			s.beds[dead].now = now
			s.beds[dead].cfg.Term = func() uint64 { return s.terms[dead] }
		}
		s.lead((s.leader + 1 + s.rnd.IntN(2)) % len(s.beds))
	}
	// Grace times pass, and the last leader looks twice.
	for range 3 {
		s.beds[s.leader].now = s.beds[s.leader].now.Add(11 * time.Minute)
		if _, err := s.beds[s.leader].Audit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := s.held(s.leader), len(s.live)+1; got != want {
		t.Errorf("the leader holds %d addresses, want %d", got, want)
	}
	// The network is removed; the other managers do not hear of it.
	id := GlobalSpace + "/" + swarmPool
	s.beds[s.leader].write(t, func(tx *store.Tx) error { return tx.DeleteAllocation("net") })
	s.beds[s.leader].releasePool(t, id)
	if got := s.held(s.leader); got != 0 {
		t.Errorf("the leader holds %d addresses of a network that is removed", got)
	}
	t.Logf("SCORE addresses of a Swarm through deaths of its leader | runs %d | %d tasks, %d releases lost: 0 addresses twice, 0 lost", kills, started, s.lost)
}

// Without an --ipam-opt Docker does not mark what a host asks for as Swarm's. After
// a kill it asks for the pool again, releases it once, and may give an address that
// the host still holds to another task there.
func TestKilledHostOfSwarmAsksAgain(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, swarmPool, "")
	b.must(t, id, "10.90.0.1", optType, typeGateway)
	b.write(t, func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: "py3nh9xxgh2f5qv9czpsgmk37", VNI: 5000, Mode: "vxlan", Key: make([]byte, 32),
			Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(swarmPool)}}})
	})
	b.must(t, id, "10.90.0.9")

	if got := b.pool(t, swarmPool, ""); got != id {
		t.Fatalf("the pool is %s, was %s", got, id)
	}
	b.must(t, id, "10.90.0.1", optType, typeGateway)
	if got := b.must(t, id, "10.90.0.9"); got != "10.90.0.9/22" {
		t.Errorf("the host is answered %s for what Swarm chose", got)
	}
	b.releasePool(t, id)
	pools, err := b.Status()
	if err != nil || len(pools) > 0 {
		t.Errorf("%v: after the network's end these pools are left: %+v", err, pools)
	}
}

// A second network with the subnet of the first is refused by AllocateNetwork; what
// Docker then gives back must not be the first one's.
func TestRefusedNetworkKeepsTheFirstOnesPool(t *testing.T) {
	s := &swarm{t: t, rnd: rand.New(rand.NewPCG(1, 0)), live: map[string]int{}}
	for i := range s.beds {
		s.beds[i] = newBed(t)
	}
	s.lead(0)
	s.start()
	b, id := s.beds[0], s.pool(0, GlobalSpace)
	b.must(t, id, "10.90.0.1", optSerial, "true", optType, typeGateway)
	b.release(t, id, "10.90.0.1")
	b.releasePool(t, id)
	for range 3 {
		b.now = b.now.Add(11 * time.Minute)
		if _, err := b.Audit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.held(0); got != 2 {
		t.Errorf("%d addresses are held, want the gateway and the task's", got)
	}
	// When the first is freed too, its pool goes.
	b.write(t, func(tx *store.Tx) error { return tx.DeleteAllocation("net") })
	b.release(t, id, "10.90.0.1")
	b.releasePool(t, id)
	if got := s.held(0); got != 0 {
		t.Errorf("%d addresses are held after the end of the network", got)
	}
}

// A manager that leads again does not refuse a subnet for a pool whose end it
// missed.
func TestPoolOfAnEarlierTermDoesNotClash(t *testing.T) {
	b := newBed(t)
	term := uint64(1)
	b.cfg.Term = func() uint64 { return term }
	ask := func(pool string) error {
		_, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: pool, Options: map[string]string{optSerial: "true"}})
		return err
	}
	if err := ask("10.90.0.0/24"); err != nil {
		t.Fatal(err)
	}
	for _, off := range []time.Duration{0, 365 * 24 * time.Hour, -365 * 24 * time.Hour} { // the clock is set
		b.now = b.now.Add(off)
		if err := ask("10.90.0.0/25"); err == nil {
			t.Error("an overlapping pool is given out in the same term")
		}
	}
	term = 2
	repeats := false
	b.cfg.Repeats = func() bool { return repeats }
	if err := ask("10.90.0.0/25"); err == nil {
		t.Error("only the plugin is new, and an overlapping pool is given out")
	}
	repeats = true
	if err := ask("10.90.0.0/25"); err != nil {
		t.Errorf("in a later term: %v", err)
	}
}

// A pool of another driver's network has no allocation of ours. That only the plugin is
// new is no reason to take it away.
func TestPoolStaysWhenOnlyThePluginIsNew(t *testing.T) {
	b := newBed(t)
	term, repeats := uint64(1), true
	b.cfg.Term, b.cfg.Repeats = func() uint64 { return term }, func() bool { return repeats }
	if _, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: swarmPool}); err != nil {
		t.Fatal(err)
	}
	term, repeats = 2, false
	for range 3 {
		if b.poolsAfter(t, time.Hour) != 1 {
			t.Fatal("the pool is removed")
		}
	}
	repeats = true
	b.poolsAfter(t, 0)
	if b.poolsAfter(t, time.Hour) != 0 {
		t.Error("the pool stays though Docker has not asked for it again")
	}
}

// poolsAfter audits at a later time and returns how many pools are left.
func (b *bed) poolsAfter(t *testing.T, later time.Duration) int {
	t.Helper()
	b.now = b.now.Add(later)
	if _, err := b.Audit(t.Context()); err != nil {
		t.Fatal(err)
	}
	pools, err := b.Status()
	if err != nil {
		t.Fatal(err)
	}
	return len(pools)
}

// The pool of a network that was removed while another manager led goes once its
// allocation is forgotten, and not before: it may only be this plugin that is new.
func TestPoolOfAnEarlierTermGoesWithItsAllocation(t *testing.T) {
	b := newBed(t)
	term := uint64(1)
	b.cfg.Term = func() uint64 { return term }
	if _, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: swarmPool}); err != nil {
		t.Fatal(err)
	}
	b.write(t, func(tx *store.Tx) error {
		return tx.PutAllocation(store.Allocation{ID: "net", VNI: 5000, Prefixes: []netip.Prefix{netip.MustParsePrefix(swarmPool)}, Term: term})
	})
	left := func() (n int) {
		t.Helper()
		for range 3 {
			n = b.poolsAfter(t, time.Hour)
		}
		return n
	}
	term = 2
	if left() != 1 {
		t.Error("the pool of an allocation is removed")
	}
	b.write(t, func(tx *store.Tx) error { return tx.DeleteAllocation("net") })
	if left() != 0 {
		t.Error("the pool stays without its allocation")
	}
}

// A host was killed and no task of the network came back: Docker never releases the
// pool.
func TestPoolGoesWithItsNetworkOfSwarm(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, swarmPool, "")
	audit := func(later time.Duration) int {
		t.Helper()
		return b.poolsAfter(t, later)
	}
	for range 3 {
		if n := audit(time.Hour); n != 1 {
			t.Fatal("a pool without a network yet is removed")
		}
	}
	const network = store.NetworkID("py3nh9xxgh2f5qv9czpsgmk37")
	b.write(t, func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: network, VNI: 5000, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(swarmPool)}}})
	})
	for range 3 {
		if n := audit(time.Hour); n != 1 {
			t.Fatal("the pool of a network is removed")
		}
	}
	b.write(t, func(tx *store.Tx) error { return tx.DeleteNetwork(network) })
	audit(time.Second)
	if n := audit(9 * time.Minute); n != 1 {
		t.Fatal("removed too early")
	}
	if got := b.pool(t, swarmPool, ""); got != id || audit(5*time.Minute) != 1 {
		t.Fatal("removed though Docker asked again")
	}
	if n := audit(11 * time.Minute); n != 0 {
		t.Errorf("%d pools are left", n)
	}
}

// Swarm's leader leaves an option of the first subnet's gateway in the requests for
// the other subnets of a network.
func TestLeaderRequestsSeveralSubnets(t *testing.T) {
	b := newBed(t)
	for _, c := range []struct{ pool, gateway string }{{"10.90.0.0/24", "10.90.0.1/24"}, {"10.91.0.0/24", "10.91.0.1/24"}} {
		r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: c.pool, Options: map[string]string{optSerial: "true", optType: typeGateway}})
		if err != nil {
			t.Fatal(err)
		}
		if got := b.must(t, r.PoolID, "", optSerial, "true", optType, typeGateway); got != c.gateway {
			t.Errorf("the gateway of %s is %s", c.pool, got)
		}
		if got := b.must(t, r.PoolID, "", optSerial, "true"); got == c.gateway {
			t.Errorf("a task of %s has the gateway's address", c.pool)
		}
	}
}
