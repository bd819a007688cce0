package gossip

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/weftnet/weft/store"
)

// real is a host that runs Cluster on a database.
type real struct {
	s     *sim
	db    *store.DB
	c     *Cluster
	watch *store.Watch
	seen  map[store.VNI]map[int]uint64 // versions by owner, read since the network was touched
}

// simIdentity is the key of host i.
func simIdentity(i int) store.Identity {
	var seed [ed25519.SeedSize]byte
	binary.BigEndian.PutUint64(seed[:], uint64(i)+1)
	key := ed25519.NewKeyFromSeed(seed[:])
	return store.Identity{ID: store.HostIDOf(key.Public().(ed25519.PublicKey)), Key: key}
}

// simConfig is what both variants have in common.
func simConfig(i int) Config {
	cfg := Config{Identity: simIdentity(i), Port: testPort, DataPort: testDataPort, Key: bytes.Repeat([]byte{7}, KeyBytes)}
	for j := range simJoinHosts {
		cfg.Join = append(cfg.Join, simAddr(j).String())
	}
	return cfg
}

func simRecord(cfg Config, h *simHost) store.Host {
	return store.Host{ID: cfg.Identity.ID, PublicKey: cfg.Identity.Key.Public().(ed25519.PublicKey),
		Name: fmt.Sprintf("host%d", h.i), Address: h.addr, DataPort: testDataPort, Version: "simulated"}
}

func makeReal(s *sim, h *simHost) party {
	cfg := simConfig(h.i)
	db, err := store.Open(filepath.Join(s.dir, fmt.Sprint(h.i), "weft.db"), simRecord(cfg, h))
	if err != nil {
		s.t.Fatal(err)
	}
	cfg.DB = db
	r := &real{s: s, db: db, watch: db.Watch(), seen: map[store.VNI]map[int]uint64{}}
	if r.c, err = New(cfg); err != nil {
		s.t.Fatal(err)
	}
	r.c.under = memUnderlay{s.net}
	r.update(func(tx *store.Tx) error {
		for _, v := range h.nets {
			if err := tx.PutNetwork(store.Network{ID: networkID(v), VNI: v, Mode: "vxlan",
				Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.64.0.0/12")}}}); err != nil {
				return err
			}
		}
		return nil
	})
	return r
}

func (r *real) run(ctx context.Context) error { return r.c.Run(ctx) }
func (r *real) close() error                  { return r.db.Close() }
func (r *real) woken() <-chan struct{}        { return r.watch.C }

func (r *real) update(fn func(*store.Tx) error) {
	if err := r.db.Update(context.Background(), fn); err != nil {
		r.s.t.Error(err)
	}
}

func (r *real) view(fn func(*store.Tx) error) bool { return r.db.View(fn) == nil }

func (r *real) write(v store.VNI, names []string, gone bool) (seq uint64) {
	r.update(func(tx *store.Tx) error {
		for _, name := range names {
			if gone {
				if err := tx.DeleteEndpoint(networkID(v), store.EndpointID(name)); err != nil {
					return err
				}
			} else if _, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(name), Network: networkID(v), VNI: v,
				MAC: store.DeriveMAC(name), IPv4: netip.PrefixFrom(simEndpoint(name), 12)}); err != nil {
				return err
			}
		}
		seq = tx.Version(v)
		return nil
	})
	return seq
}

// simEndpoint is the address of an endpoint.
func simEndpoint(name string) netip.Addr {
	n := simNumber(name)
	return netip.AddrFrom4([4]byte{10, 64 + byte(n>>16&15), byte(n >> 8), byte(n)})
}

// look forgets what was read of the networks that were touched, and of no other: to read
// all that is waited for after each change is a tenth of the simulation's work.
func (r *real) look() {
	for _, v := range r.watch.Take() {
		delete(r.seen, v)
	}
}

func (r *real) holds(w version) bool {
	if r.seen[w.vni] == nil {
		r.seen[w.vni] = map[int]uint64{}
	}
	seq, ok := r.seen[w.vni][w.owner]
	if !ok {
		r.view(func(tx *store.Tx) error {
			n, err := tx.PeerNetwork(r.s.ids[w.owner], w.vni)
			seq = n.Seq
			return err
		})
		r.seen[w.vni][w.owner] = seq
	}
	return seq >= w.seq
}

func (r *real) found(owner int) bool { return r.peer(owner, true) }
func (r *real) lost(owner int) bool  { return r.peer(owner, false) }

func (r *real) peer(owner int, alive bool) bool {
	return r.view(func(tx *store.Tx) error {
		p, err := tx.Peer(r.s.ids[owner])
		if err == nil && p.DeadSince.IsZero() != alive {
			err = store.ErrNotFound
		}
		return err
	})
}

func (r *real) endpoints(v store.VNI) map[string]int {
	out := map[string]int{}
	snap, err := r.db.Snapshot(v)
	if err != nil {
		r.s.t.Error(err)
	}
	for _, e := range snap.Remote {
		out[string(e.ID)] = r.s.index[e.Owner]
	}
	return out
}
