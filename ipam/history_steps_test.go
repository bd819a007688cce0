package ipam

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

func (h *history) releaseStep() {
	p := h.any()
	if p == nil {
		return
	}
	if len(p.held) == 0 || h.rnd.IntN(20) == 0 {
		a := whole(p.Prefix).lo // never held
		h.release(h.t, p.ID, a.String())
		h.release(h.t, "WeftLocal/10.200.0.0/24", a.String())
		return
	}
	k := h.rnd.IntN(len(p.held))
	a := p.held[k]
	if p.endpoint[a] && h.rnd.IntN(50) > 0 { // the rest: its DeleteEndpoint is late
		h.deleteEndpoint(p, a)
	}
	h.release(h.t, p.ID, a.String())
	if p.leases[a].kind == kindGateway && p.Refs > 1 {
		return
	}
	p.leases[a].freed = h.now
	p.held = slices.Delete(p.held, k, k+1)
}

func (h *history) deleteEndpoint(p *modelPool, a netip.Addr) {
	delete(p.endpoint, a)
	h.write(h.t, func(tx *store.Tx) error { return tx.DeleteEndpoint(netID(p), store.EndpointID(a.String())) })
}

// news lets the peer have other endpoints in one network, and late
// DeleteEndpoints come.
func (h *history) news() {
	p := h.any()
	if p == nil || p.vni == 0 {
		return
	}
	for a := range p.endpoint {
		if !p.leases[a].live() {
			h.deleteEndpoint(p, a)
		}
	}
	clear(p.peer)
	in := usable(p.Prefix, netip.Prefix{})
	for range h.rnd.IntN(4) {
		if a := in.at(h.rnd.Uint64N(min(in.size(), 1<<16))); a.Is4() && !p.leases[a].live() && !p.endpoint[a] {
			p.peer[a] = true
		}
	}
	var shown []string
	for a := range p.peer {
		shown = append(shown, a.String())
	}
	p.seq++
	h.peer(h.t, peerName(p), p.vni, p.Prefix.String(), p.seq, shown...)
}

// cancelled calls whose deadline has passed change nothing.
func (h *history) cancelled() {
	p := h.any()
	if p == nil {
		return
	}
	ctx, cancel := context.WithCancel(h.t.Context())
	cancel()
	_, err := h.RequestAddress(ctx, api.RequestAddressRequest{PoolID: p.ID})
	if err == nil || !strings.Contains(err.Error(), "canceled") {
		h.t.Errorf("a call without time left: %v", err)
	}
}

func (h *history) auditStep() {
	freed, err := h.Audit(h.t.Context())
	if err != nil {
		h.t.Error(err)
	}
	got := map[string]bool{}
	for _, l := range freed {
		got[l.Pool+" "+l.Address.String()] = true
	}
	for _, p := range h.pools {
		for a, l := range p.leases {
			leaked := p.vni != 0 && p.Refs == 1 && l.live() && l.kind != kindGateway && !p.endpoint[a]
			if !got[p.ID+" "+a.String()] {
				continue
			}
			if !leaked || h.now.Sub(l.taken) < 10*time.Minute {
				h.t.Errorf("audit freed %s %s, taken %s ago, leaked: %v", p.ID, a, h.now.Sub(l.taken), leaked)
			}
			delete(got, p.ID+" "+a.String())
			h.count["leak"]++
			l.freed = h.now
			p.held = slices.DeleteFunc(p.held, func(b netip.Addr) bool { return b == a })
		}
	}
	if len(got) > 0 {
		h.t.Errorf("audit freed what is not there: %v", got)
	}
}

// compare demands that the database holds exactly what the model does.
func (h *history) compare() {
	all, err := h.Status()
	if err != nil || len(all) != len(h.pools) {
		h.t.Fatalf("%d pools, want %d; %v", len(all), len(h.pools), err)
	}
	for _, s := range all {
		p := h.pools[s.ID]
		if p == nil || p.Refs != s.Refs || len(p.held) != s.Used {
			h.t.Fatalf("pool %s: %d references, %d used; want %+v", s.ID, s.Refs, s.Used, p)
		}
		cooling := 0
		for _, l := range p.leases {
			if h.cooling(l) {
				cooling++
			}
		}
		if cooling != s.Cooling {
			h.t.Errorf("pool %s: %d cooling, want %d", s.ID, s.Cooling, cooling)
		}
		for _, l := range s.Leases {
			m := p.leases[l.Address]
			if m == nil || m.live() != l.Freed.IsZero() || m.kind != l.Kind {
				h.t.Errorf("lease %+v, want %+v", l, m)
			}
		}
	}
}
