package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// discovery takes what Docker tells of the hosts of a Swarm (moby
// daemon/libnetwork/docs/remote.md, DiscoverNew): the addresses that they
// advertise. After a restart of the plugin alone Docker tells of this host only, so
// what was heard is kept in the database.
//
// Docker's own start waits for the answers, so the calls do not wait for the
// database.
type discovery struct {
	wake chan struct{} // cap 1

	mu    sync.Mutex // guards what follows
	heard []store.Node
}

// Limits of what is kept.
const (
	maxNodes = 8192
	// forgetNodes is after what time without a word a host is no longer looked for,
	// while there is word of others. Docker tells of all when it starts.
	forgetNodes = 30 * 24 * time.Hour
	nodeHosts   = 1 // DiscoveryType of hosts
)

func newDiscovery() *discovery { return &discovery{wake: make(chan struct{}, 1)} }

// discoverRequest is network.DiscoveryNotification with the data of a host.
type discoverRequest struct {
	DiscoveryType int
	DiscoveryData struct {
		Address     string
		BindAddress string
		Self        bool
	}
}

// call serves DiscoverNew or, with gone, DiscoverDelete.
func (d *discovery) call(method string, gone bool) call {
	return call{method: method, serve: func(_ context.Context, _ *gate, body []byte) (any, error) {
		r, err := decode[discoverRequest](method, body)
		if err != nil {
			return nil, err
		}
		if r.DiscoveryType != nodeHosts {
			return struct{}{}, nil // not about hosts: no news for us
		}
		a, err := netip.ParseAddr(r.DiscoveryData.Address)
		if err != nil || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" {
			return nil, &requestError{http.StatusBadRequest, fmt.Sprintf("%s: DiscoveryData.Address %.60q is not the address of a host", method, r.DiscoveryData.Address)}
		}
		d.add(store.Node{Address: a.Unmap(), Self: r.DiscoveryData.Self, Heard: time.Now().UTC(), Gone: gone})
		return struct{}{}, nil
	}}
}

func (d *discovery) add(n store.Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.heard) < maxNodes {
		d.heard = append(d.heard, n)
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *discovery) take() []store.Node {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.heard
	d.heard = nil
	return out
}

// run keeps what is heard in the database until ctx ends, and tells the cluster that
// there are others.
func (d *discovery) run(ctx context.Context, db *store.DB, c *cluster, log *slog.Logger) error {
	records := db.Watch() // networks name hosts to meet, too
	for {
		heard := d.take()
		records.Take()
		inSwarm, err := saveNodes(ctx, db, heard)
		if err != nil && ctx.Err() == nil {
			log.Error("cannot keep what Docker told of the Swarm's hosts", "err", err)
		}
		if inSwarm {
			c.expect()
		}
		changed := records.C
		if c.expects() {
			changed = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		case <-changed:
		}
	}
}

// saveNodes writes what was heard, in order, and reports whether this host is in a
// Swarm, or has been told of other hosts. It takes part in the cluster then, though it
// may be the first one: the others may know of it alone.
func saveNodes(ctx context.Context, db *store.DB, heard []store.Node) (inSwarm bool, err error) {
	write := func(tx *store.Tx) error {
		all, err := tx.Nodes()
		if err != nil {
			return err
		}
		known := map[netip.Addr]store.Node{}
		for _, n := range all {
			known[n.Address] = n
		}
		for _, n := range heard {
			fresh := clockMoved(known, n.Heard)
			for a, o := range known {
				if fresh || o.Heard.After(n.Heard) {
					o.Heard = n.Heard
					known[a] = o
					if err := tx.PutNode(o); err != nil {
						return err
					}
				}
				// This host has one address, of which Docker tells when it starts; one
				// that was not heard of for long is nobody's.
				if o.Self && n.Self && a != n.Address || !o.Self && n.Heard.Sub(o.Heard) > forgetNodes {
					delete(known, a)
					if err := tx.DeleteNode(a); err != nil {
						return err
					}
				}
			}
			if _, ok := known[n.Address]; !ok && (n.Gone || len(known) >= maxNodes) {
				continue
			}
			known[n.Address] = n
			if err := tx.PutNode(n); err != nil {
				return err
			}
		}
		inSwarm = len(known) > 0
		return nil
	}
	if len(heard) == 0 {
		err = db.View(write)
	} else {
		err = db.Update(ctx, write)
	}
	return inSwarm, err
}

// clockMoved reports whether there was no word of any host for so long that this
// host's clock was set, or Docker did not run: that tells nothing of one host.
func clockMoved(known map[netip.Addr]store.Node, now time.Time) bool {
	for _, o := range known {
		if now.Sub(o.Heard) <= forgetNodes {
			return false
		}
	}
	return true
}

// underlayAddress returns the function that says by which address other hosts reach
// this one: the one set, or in a Swarm the one that it advertises, if this host has
// it (there may be address translation between), or the zero Addr.
func (p *process) underlayAddress(db *store.DB) func() netip.Addr {
	return func() netip.Addr {
		if p.set.address.IsValid() {
			return p.set.address
		}
		var self netip.Addr
		_ = db.View(func(tx *store.Tx) error { // the default route is there too
			nodes, err := tx.Nodes()
			for _, n := range nodes {
				if n.Self && !n.Gone {
					self = n.Address
				}
			}
			return err
		})
		if !self.IsValid() || !isLocal(self) {
			return netip.Addr{}
		}
		return self
	}
}

func isLocal(a netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, o := range addrs {
		if p, err := netip.ParsePrefix(o.String()); err == nil && p.Addr().Unmap() == a {
			return true
		}
	}
	return false
}
