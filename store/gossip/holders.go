package gossip

import (
	"slices"

	"github.com/weftnet/weft/store"
)

// holders tells whose each WireGuard key is: this host's present ones, and those that were
// taken over from peers. The kernel knows a host by its key, so of two with one key the
// endpoints of both would be sought at one of them. A record proves nothing of its keys:
// who told one first keeps it, also while it is dead, until it is forgotten or revoked or
// tells others. The zero value knows nothing, and refuses nothing.
type holders struct {
	of  map[store.WGKey]store.HostID
	out map[store.HostID]bool // revoked: they hold nothing
}

// holders reads who holds what. What two peers hold, as a former version took it over, is
// the lower id's.
func (c *Cluster) holders(tx *store.Tx) (holders, error) {
	peers, err := tx.Peers()
	if err != nil {
		return holders{}, err
	}
	revoked, err := tx.Revocations()
	if err != nil {
		return holders{}, err
	}
	h := holders{make(map[store.WGKey]store.HostID, len(peers)), map[store.HostID]bool{}}
	for _, r := range revoked {
		h.out[r.Host] = r.Out()
	}
	for _, k := range c.db.Self().Tunnel.Keys {
		h.of[k] = c.id
	}
	for _, p := range peers {
		h.take(p)
	}
	return h, nil
}

// holdersFor is holders if one of the peers that are to be written tells a key that was
// not taken over from it. While a cluster starts all peers are read for that with each
// news of a new one, else hardly ever.
func (c *Cluster) holdersFor(tx *store.Tx, write []store.Peer, was map[store.HostID]store.Peer) (holders, error) {
	for _, p := range write {
		if o := was[p.ID]; p.KeyOf != o.KeyOf || !slices.Equal(p.Tunnel.Keys, o.Tunnel.Keys) {
			return c.holders(tx)
		}
	}
	return holders{}, nil
}

// take gives a peer those of its keys that nobody has.
func (h holders) take(p store.Peer) {
	for _, k := range p.Tunnel.Keys {
		if _, taken := h.of[k]; !taken && !h.out[p.ID] {
			h.of[k] = p.ID
		}
	}
}

// judge takes a peer's tunnel away if it tells a key of another host, which it returns.
// was is the peer before; what it told then is free.
func (h holders) judge(was, p store.Peer) (store.Peer, store.WGKey) {
	if h.of == nil {
		return p, store.WGKey{}
	}
	for _, k := range was.Tunnel.Keys {
		if h.of[k] == p.ID {
			delete(h.of, k)
		}
	}
	for _, k := range p.Tunnel.Keys {
		if of, taken := h.of[k]; taken && of != p.ID {
			p.Tunnel, p.KeyOf = store.Tunnel{}, of
			return p, k
		}
	}
	h.take(p)
	return p, store.WGKey{}
}

// told puts into a peer what it tells of its tunnel itself, as far as this process has
// heard it, whatever was taken over of that.
func (s sight) told(p store.Peer) store.Peer {
	if s.rec.ID != "" && (s.alive || s.stored == s.rec.Counter) {
		p.Tunnel, p.KeyOf = s.rec.Tunnel, ""
	}
	return p
}

// logKey says that a peer begins or ends to tell another host's key.
func (c *Cluster) logKey(was, is store.Peer, key store.WGKey) {
	switch {
	case is.KeyOf == was.KeyOf:
	case is.KeyOf == "":
		c.log.Info("peer tells no key of another host any more; it is encrypted to again", "peer", is.Name, "host", is.ID)
	case c.drops.first("key-of-another", string(is.ID+" "+is.KeyOf)):
		c.log.Warn("peer tells the WireGuard key of another host; nothing is encrypted to it until that ends", "peer", is.Name, "host", is.ID,
			"key", key, "of", c.nameOf(is.KeyOf), "ofHost", is.KeyOf)
	}
}

// nameOf returns the name of a host, or "" if it is not known.
func (c *Cluster) nameOf(id store.HostID) string {
	if id == c.id {
		return c.db.Self().Name
	}
	var p store.Peer
	_ = c.db.View(func(tx *store.Tx) (err error) { p, err = tx.Peer(id); return err })
	return p.Name
}
