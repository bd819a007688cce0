// Package ipam is Docker's IpamDriver on top of store.DB: pools, and the leases
// of their addresses.
//
// Every call is one transaction: it has happened entirely when it answers, and
// not at all when it fails. Decisions are pure (alloc.go, pool.go); the calls
// read the database, decide and write.
//
// The package alone writes pools and leases. Beside the database it keeps two
// things in memory, both only to be fast and both checked against the database:
// an index of each pool's leases (book) and the addresses of peers (holders).
//
// An automatic address is one without a lease, which no endpoint of this host or
// of a peer has, and which was not freed within the last minute. Two hosts begin
// their search at different places, because one cannot know what the other gave
// out an instant ago.
package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// Address spaces. Docker uses the local one for networks of one host and for what
// a Swarm host runs, the global one for what a Swarm leader allocates; the pools
// of one subnet in both are two pools.
const (
	LocalSpace  = "WeftLocal"
	GlobalSpace = "WeftGlobal"
)

// Kinds of leases.
const (
	kindGateway = "gateway"
	kindFixed   = "fixed"
	kindAuto    = "auto"
)

// cooling is how long a freed address is not given out again while others are
// left: flows and neighbour entries of the former owner end meanwhile.
const cooling = time.Minute

// Config is what an IPAM needs beside the database. The zero value works.
type Config struct {
	// Defaults are cut into the pools that are given out when none is asked for:
	// IPv4 into /20s, IPv6 into /64s; a smaller one is one pool. A family without
	// any uses the built-in default.
	Defaults []netip.Prefix
	// Routes returns the host's routes; nil means that there are none.
	Routes func(context.Context) ([]netip.Prefix, error)
	// Swarm: pools that are asked for by subnet are, as a rule, those of networks of
	// Swarm, also where Docker does not mark them. The host's routes do not count then;
	// our driver refuses such a network, and says so.
	Swarm bool
	// Grace is how long Audit waits before it frees a leaked lease; 0 means 10
	// minutes.
	Grace time.Duration
	// AuditEvery is how often Run audits; 0 means every minute.
	AuditEvery time.Duration
	// Term returns a number: a pool of the global space that Docker requested under
	// another one is not known to be in use. See driver.Config.
	Term func() uint64
	// Repeats reports whether Docker is known to request in this term all that it has.
	// nil: it does.
	Repeats func() bool
	Now     func() time.Time // nil means time.Now
	Log     *slog.Logger     // nil means none
}

// IPAM serves the calls. All methods may be called from any goroutine.
type IPAM struct {
	db  *store.DB
	cfg Config

	mu      sync.Mutex               // guards what follows and orders the writes
	books   map[string]*book         // by pool id
	remotes map[store.VNI]remoteView // addresses of peers' endpoints

	auditMu  sync.Mutex // guards what follows
	sighted  map[sighting]time.Time
	auditErr bool
}

// New returns an IPAM on the database.
func New(db *store.DB, cfg Config) *IPAM {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Grace == 0 {
		cfg.Grace = 10 * time.Minute
	}
	return &IPAM{db: db, cfg: cfg, books: map[string]*book{}, remotes: map[store.VNI]remoteView{},
		sighted: map[sighting]time.Time{}}
}

// Capabilities is the answer to GetCapabilities. The type of go-plugins-helpers
// lacks the second field.
type Capabilities struct {
	RequiresMACAddress    bool
	RequiresRequestReplay bool
}

// GetCapabilities says that Docker need not send MAC addresses, nor repeat its
// requests after a start: the database outlives it.
func (i *IPAM) GetCapabilities(context.Context, struct{}) (Capabilities, error) {
	return Capabilities{}, nil
}

// GetDefaultAddressSpaces names the two address spaces.
func (i *IPAM) GetDefaultAddressSpaces(context.Context, struct{}) (api.AddressSpacesResponse, error) {
	return api.AddressSpacesResponse{LocalDefaultAddressSpace: LocalSpace, GlobalDefaultAddressSpace: GlobalSpace}, nil
}

// FailPoints returns the steps at which a test build can kill the process
// (store.FailPoint): before a call's transaction, in it after the last write, and
// after it, when only the answer is missing.
func FailPoints() []string {
	var out []string
	for _, call := range []string{"RequestPool", "ReleasePool", "RequestAddress", "ReleaseAddress", "Audit"} {
		out = append(out, "ipam."+call+".before", "ipam."+call+".written", "ipam."+call+".committed")
	}
	return out
}

// errUnchanged ends a transaction that has nothing to write, successfully.
var errUnchanged = errors.New("nothing to change")

// update runs fn in a transaction, with mu held. done is called after the commit
// and brings what is kept in memory up to date.
func (i *IPAM) update(ctx context.Context, call string, fn func(*store.Tx) (done func(), err error)) error {
	store.FailPoint("ipam." + call + ".before")
	i.mu.Lock()
	defer i.mu.Unlock()
	done := func() {}
	err := i.db.Update(ctx, func(tx *store.Tx) (err error) {
		if done, err = fn(tx); err != nil {
			return err
		}
		store.FailPoint("ipam." + call + ".written")
		return nil
	})
	if errors.Is(err, errUnchanged) {
		return nil
	}
	if err != nil {
		return err
	}
	store.FailPoint("ipam." + call + ".committed")
	done()
	return nil
}

// RequestPool gives out the pool asked for, or a free one of the defaults. Asking
// again for a pool that exists in the space (same subnet, same sub-pool) adds a
// reference to it; one that overlaps another pool of the space or a route of the
// host is refused.
func (i *IPAM) RequestPool(ctx context.Context, r api.RequestPoolRequest) (api.RequestPoolResponse, error) {
	p, err := i.requestPool(ctx, r)
	if err != nil {
		return api.RequestPoolResponse{}, fmt.Errorf("request pool %s: %w", quote(r.Pool), err)
	}
	return api.RequestPoolResponse{PoolID: p.ID, Pool: p.Prefix.String(), Data: map[string]string{}}, nil
}

func (i *IPAM) requestPool(ctx context.Context, r api.RequestPoolRequest) (p store.Pool, err error) {
	want, err := parsePoolRequest(r)
	if err != nil {
		return p, err
	}
	var routes []netip.Prefix
	// Swarm has decided on a pool that it confirms; a route that came later
	// cannot undo that on one host.
	if i.cfg.Routes != nil && !(want.Prefix.IsValid() && (i.cfg.Swarm || serial(r.Options))) {
		// A route that could not be read is not a route that is not there.
		if routes, err = i.cfg.Routes(ctx); err != nil {
			return p, fmt.Errorf("read the host's routes: %w", err)
		}
	}
	err = i.update(ctx, "RequestPool", func(tx *store.Tx) (func(), error) {
		if p, err = i.choosePool(tx, want, routes, r.V6); err != nil {
			return nil, err
		}
		has, _, err := ofSwarm(tx, p)
		if err != nil {
			return nil, err
		}
		kept, err := allocated(tx, p)
		if err != nil {
			return nil, err
		}
		swarms := serial(r.Options) || has || kept // Docker does not mark the first request for a pool
		switch {
		case !swarms:
			p.Refs++
		case p.Space == GlobalSpace && p.Refs > 0:
			if err := doubt(tx, p.ID, i.cfg.Now().UTC()); err != nil {
				return nil, err
			}
		default:
			p.Refs = 1 // a Swarm's networks do not share pools
		}
		p.Asked, p.Term, p.Swarm = i.cfg.Now().UTC(), i.term(), p.Swarm || has
		return func() {}, tx.PutPool(p)
	})
	return p, err
}

// choosePool returns the pool asked for or a free default one, new or held.
func (i *IPAM) choosePool(tx *store.Tx, want store.Pool, routes []netip.Prefix, v6 bool) (store.Pool, error) {
	pools, err := tx.Pools()
	if err != nil {
		return want, err
	}
	networks, err := tx.Networks()
	if err != nil {
		return want, err
	}
	if !want.Prefix.IsValid() {
		prefix, err := freeDefault(defaults(i.cfg.Defaults, v6), inUse(pools, networks, routes))
		if err != nil {
			return want, err
		}
		want.Auto = true
		want.Prefix = prefix
		return i.newPool(want), nil
	}
	p, err := tx.Pool(poolID(want.Space, want.Prefix, want.Sub))
	if err == nil || !errors.Is(err, store.ErrNotFound) {
		return p, err
	}
	if err := clash(want, i.living(pools), networks, routes); err != nil {
		return p, err
	}
	return i.newPool(want), nil
}

// living leaves out pools of the global space that may be gone: Docker has not asked
// for them since this host became the leader.
func (i *IPAM) living(pools []store.Pool) []store.Pool {
	return slices.DeleteFunc(slices.Clone(pools), i.former)
}

// former reports whether Docker asked for a pool of the global space in an earlier term
// alone, and asks anew in this one.
func (i *IPAM) former(p store.Pool) bool {
	term := i.term()
	return p.Space == GlobalSpace && term != 0 && p.Term != term && (i.cfg.Repeats == nil || i.cfg.Repeats())
}

func (i *IPAM) term() uint64 {
	if i.cfg.Term == nil {
		return 0
	}
	return i.cfg.Term()
}

// doubt notes since when the leases of a pool wait for their confirmation; the zero
// time takes the doubt back. Docker asks for a pool that it has when this host becomes
// the leader of the Swarm; then it asks for all addresses that are in use.
func doubt(tx *store.Tx, pool string, since time.Time) error {
	leases, err := tx.Leases(pool)
	if err != nil {
		return err
	}
	for _, l := range leases {
		if l.Freed.IsZero() && l.Kind != kindGateway && !l.Doubt.Equal(since) {
			l.Doubt = since
			if err := tx.PutLease(l); err != nil {
				return err
			}
		}
	}
	return nil
}

// allocated reports whether a network of the Swarm has the pool.
func allocated(tx *store.Tx, p store.Pool) (bool, error) {
	if p.Space != GlobalSpace {
		return false, nil
	}
	all, err := tx.Allocations()
	return slices.ContainsFunc(all, func(a store.Allocation) bool { return slices.Contains(a.Prefixes, p.Prefix) }), err
}

// ofSwarm reports whether a network of Swarm on this host has a pool of the local
// space, and whether Swarm chooses its addresses. Docker marks what a host asks for
// with optSerial only where the user gave an --ipam-opt, and asks for the pool again
// after a kill, so the records have to tell.
func ofSwarm(tx *store.Tx, p store.Pool) (has, chooses bool, err error) {
	if p.Space != LocalSpace {
		return false, false, nil
	}
	networks, err := tx.Networks()
	for _, n := range networks {
		if n.ID.OfSwarm() && slices.Contains(n.Prefixes(), p.Prefix) {
			return true, len(n.Key) > 0, nil
		}
	}
	return false, false, err
}

// newPool completes the record of a pool with space, prefix and sub-pool.
func (i *IPAM) newPool(p store.Pool) store.Pool {
	p.ID = poolID(p.Space, p.Prefix, p.Sub)
	p.Next = firstChoice(p, i.db.Self().ID)
	return p
}

// ReleasePool gives back one reference to a pool; with the last one the pool and
// its leases are gone. An unknown pool is no error, nor is one that a network of the
// Swarm still has: another was refused that wanted the same.
func (i *IPAM) ReleasePool(ctx context.Context, r api.ReleasePoolRequest) (struct{}, error) {
	if r.PoolID == "" {
		return struct{}{}, errors.New("release pool: PoolID is empty")
	}
	err := i.update(ctx, "ReleasePool", func(tx *store.Tx) (func(), error) {
		p, err := tx.Pool(r.PoolID)
		if errors.Is(err, store.ErrNotFound) {
			return nil, errUnchanged
		}
		if err != nil {
			return nil, err
		}
		kept, err := allocated(tx, p)
		if err != nil {
			return nil, err
		}
		if kept {
			return func() {}, doubt(tx, p.ID, time.Time{})
		}
		if p.Refs > 1 {
			p.Refs--
			return func() {}, tx.PutPool(p)
		}
		return func() { delete(i.books, p.ID) }, tx.DeletePool(p.ID)
	})
	if err != nil {
		return struct{}{}, fmt.Errorf("release pool %s: %w", quote(r.PoolID), err)
	}
	return struct{}{}, nil
}

// PoolStatus is a pool as the admin API shows it.
type PoolStatus struct {
	store.Pool
	Total   uint64        `json:"total"`   // usable addresses, at most MaxUint64
	Used    int           `json:"used"`    // leases that are held
	Cooling int           `json:"cooling"` // freed within the last minute
	Former  bool          `json:"former"`  // of an earlier term of Swarm's leader: may be gone
	Leases  []store.Lease `json:"leases"`  // held and cooling, in order of address
}

// Status returns all pools with their leases.
func (i *IPAM) Status() ([]PoolStatus, error) {
	var out []PoolStatus
	now := i.cfg.Now()
	err := i.db.View(func(tx *store.Tx) error {
		pools, err := tx.Pools()
		if err != nil {
			return err
		}
		for _, p := range pools {
			s := PoolStatus{Pool: p, Total: usable(p.Prefix, netip.Prefix{}).size(), Former: i.former(p)}
			leases, err := tx.Leases(p.ID)
			if err != nil {
				return err
			}
			for _, l := range leases {
				switch {
				case l.Freed.IsZero():
					s.Used++
				case cools(l, now):
					s.Cooling++
				default:
					continue
				}
				s.Leases = append(s.Leases, l)
			}
			out = append(out, s)
		}
		return nil
	})
	return out, err
}
