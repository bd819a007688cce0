package ipam

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// holders knows who has addresses of a pool, whatever its leases say: endpoints
// of this host whose lease was lost or freed too early, the gateway and auxiliary
// addresses of our own network, and endpoints of peers.
type holders struct {
	endpoints map[netip.Addr]store.EndpointID
	network   map[netip.Addr]bool // gateway and auxiliary addresses
	peers     []map[netip.Addr]store.HostID
}

func newHolders() holders {
	return holders{endpoints: map[netip.Addr]store.EndpointID{}, network: map[netip.Addr]bool{}}
}

// remoteView is the addresses of the peers' endpoints of one network. Decoding
// ten thousand records is too slow for each call, so they are kept while the
// versions (of the peers' records that we hold) stay.
type remoteView struct {
	versions map[store.HostID]remoteVersion
	owner    map[netip.Addr]store.HostID
}

type remoteVersion struct{ epoch, seq uint64 }

// holders reads who has addresses of a pool. The networks that count are those of
// this host with the pool's prefix. Before there is one (Docker asks for the
// gateway and auxiliary addresses first) the peers' networks count; an automatic
// address without a Weft network is another driver's, and no peer knows of it.
func (i *IPAM) holders(tx *store.Tx, p store.Pool, kind string) (holders, error) {
	h := newHolders()
	networks, err := tx.Networks()
	if err != nil {
		return h, err
	}
	vnis := map[store.VNI]bool{}
	for _, n := range networks {
		if !slices.ContainsFunc(n.Prefixes(), p.Prefix.Overlaps) {
			continue
		}
		vnis[n.VNI] = true
		if err := h.addNetwork(tx, n); err != nil {
			return h, err
		}
	}
	if len(vnis) == 0 && kind == kindAuto {
		return h, nil
	}
	peers, err := tx.Peers()
	if err != nil {
		return h, err
	}
	if len(vnis) == 0 {
		for _, peer := range peers {
			nets, err := tx.PeerNetworks(peer.ID)
			if err != nil {
				return h, err
			}
			for _, n := range nets {
				if slices.ContainsFunc(n.Prefixes, p.Prefix.Overlaps) {
					vnis[n.VNI] = true
				}
			}
		}
	}
	for v := range vnis {
		owner, err := i.remote(tx, v, peers)
		if err != nil {
			return h, err
		}
		h.peers = append(h.peers, owner)
	}
	return h, nil
}

func (h holders) addNetwork(tx *store.Tx, n store.Network) error {
	for _, s := range n.Subnets {
		h.network[s.Gateway] = true
		for _, aux := range s.Aux {
			h.network[aux.Addr()] = true
		}
	}
	eps, err := tx.Endpoints(n.ID)
	for _, e := range eps {
		h.endpoints[e.IPv4.Addr()] = e.ID
		h.endpoints[e.IPv6.Addr()] = e.ID
	}
	return err
}

// remote returns the addresses of the peers' endpoints of a network. A hidden
// peer counts: it may be cut off, not dead, and its containers may live.
func (i *IPAM) remote(tx *store.Tx, v store.VNI, peers []store.Peer) (map[netip.Addr]store.HostID, error) {
	versions := map[store.HostID]remoteVersion{}
	for _, peer := range peers {
		n, err := tx.PeerNetwork(peer.ID, v)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		versions[peer.ID] = remoteVersion{n.Epoch, n.Seq}
	}
	if view, ok := i.remotes[v]; ok && maps.Equal(view.versions, versions) {
		return view.owner, nil
	}
	eps, err := tx.RemoteEndpoints(v)
	if err != nil {
		return nil, err
	}
	owner := map[netip.Addr]store.HostID{}
	for _, e := range eps {
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if a.IsValid() {
				owner[a] = e.Owner
			}
		}
	}
	i.remotes[v] = remoteView{versions, owner}
	return owner, nil
}

// has reports whether an automatic choice must leave the address out.
func (h holders) has(a netip.Addr) bool {
	if _, ok := h.endpoints[a]; ok || h.network[a] {
		return true
	}
	_, ok := h.peer(a)
	return ok
}

func (h holders) peer(a netip.Addr) (store.HostID, bool) {
	for _, owner := range h.peers {
		if id, ok := owner[a]; ok {
			return id, true
		}
	}
	return "", false
}

// of names the endpoint that has an address, or returns "". The network's own
// gateway and auxiliary addresses are not told: asked for by address they may be
// had, since it is Docker that sets them.
func (h holders) of(tx *store.Tx, a netip.Addr) (string, error) {
	if id, ok := h.endpoints[a]; ok {
		return fmt.Sprintf("endpoint %.12s of this host", id), nil
	}
	id, ok := h.peer(a)
	if !ok {
		return "", nil
	}
	p, err := tx.Peer(id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return fmt.Sprintf("a container on host %s", id), nil
	case err != nil:
		return "", err
	case !p.DeadSince.IsZero():
		return fmt.Sprintf("a container on host %s, which has not been reachable since %s", p.Name, p.DeadSince.Format("15:04:05 MST")), nil
	}
	return "a container on host " + p.Name, nil
}

// count returns how many addresses of in, that are not leased, peers hold and
// this host holds.
func (h holders) count(in span, leased map[netip.Addr]bool) (peers, own int) {
	seen := map[netip.Addr]bool{}
	add := func(a netip.Addr, n *int) {
		if in.has(a) && !leased[a] && !seen[a] {
			seen[a] = true
			*n++
		}
	}
	for _, owner := range h.peers {
		for a := range owner {
			add(a, &peers)
		}
	}
	for a := range h.endpoints {
		add(a, &own)
	}
	for a := range h.network {
		add(a, &own)
	}
	return peers, own
}
