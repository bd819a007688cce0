package ipam

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// history runs random calls of Docker, steps of the driver and news of a peer
// against the IPAM, and a plain model of what must be true beside it.
type history struct {
	*bed
	t     *testing.T
	rnd   *rand.Rand
	pools map[string]*modelPool
	ids   []string // keys of pools, for a reproducible choice
	vni   store.VNI
	count map[string]int
}

type modelPool struct {
	store.Pool
	leases   map[netip.Addr]*modelLease
	held     []netip.Addr // addresses of live leases
	vni      store.VNI    // of its Weft network; 0: another driver's pool
	endpoint map[netip.Addr]bool
	peer     map[netip.Addr]bool
	seq      uint64
}

type modelLease struct {
	kind  string
	taken time.Time
	freed time.Time
}

func (l *modelLease) live() bool { return l != nil && l.freed.IsZero() }

// TestHistory demands over a long random history with crashes: no address is
// given out while another holds it, none too early, nothing is lost, and every
// refusal is due. WEFT_SOAK=1 runs a million operations.
func TestHistory(t *testing.T) {
	ops := 50_000
	if os.Getenv("WEFT_SOAK") != "" {
		ops = 1_000_000
	}
	if testing.Short() {
		ops = 5_000
	}
	seed := uint64(time.Now().UnixNano())
	h := &history{bed: newBed(t), t: t, rnd: rand.New(rand.NewPCG(seed, 1)), pools: map[string]*modelPool{}, vni: store.FirstVNI, count: map[string]int{}}
	h.routes = []netip.Prefix{netip.MustParsePrefix("10.32.0.0/19"), netip.MustParsePrefix("10.9.3.0/26")}
	begin := time.Now()
	for n := range ops {
		h.step()
		if n%5000 == 0 || n == ops-1 {
			h.compare()
		}
		if t.Failed() {
			t.Fatalf("at operation %d of seed %d", n, seed)
		}
	}
	fmt.Printf("TestHistory: %d operations, %d addresses given out (%d of them cooled too short because the pool was full), %d refused, %d pools, %d crashes, %d leaks freed: 0 given out twice, 0 lost (%.0f s)\n",
		ops, h.count["given"], h.count["early"], h.count["refused"], h.count["pool"], h.count["crash"], h.count["leak"], time.Since(begin).Seconds())
}

func (h *history) step() {
	switch n := h.rnd.IntN(10_000); {
	case n < 5:
		h.count["crash"]++
		h.open2(h.t)
		h.compare()
	case n < 20:
		h.cancelled()
	case n < 40:
		h.auditStep()
	case n < 140 && len(h.ids) < 16: // more are slower and show nothing else
		h.requestPool()
	case n < 170:
		h.releasePoolStep()
	case n < 420:
		longest := 20_000
		if h.rnd.IntN(10) == 0 {
			longest = 300_000
		}
		h.now = h.now.Add(time.Duration(h.rnd.IntN(longest)) * time.Millisecond)
	case n < 470:
		h.news()
	case n < 5000:
		h.requestAuto()
	case n < 5700:
		h.requestFixed()
	case n < 5900:
		h.requestGateway()
	default:
		h.releaseStep()
	}
}

func (h *history) prefix() (pool, sub netip.Prefix) {
	base, least, most := netip.MustParsePrefix("10.9.0.0/22"), 24, 29
	if h.rnd.IntN(4) == 0 {
		base, least, most = netip.MustParsePrefix("fd00:9::/118"), 121, 125
	}
	at := func(in netip.Prefix, length int) netip.Prefix {
		p, _ := whole(in).at(h.rnd.Uint64N(whole(in).size())).Prefix(length)
		return p
	}
	pool = at(base, least+h.rnd.IntN(most-least+1))
	if h.rnd.IntN(3) == 0 {
		sub = at(pool, pool.Bits()+1+h.rnd.IntN(2))
	}
	return pool, sub
}

func (h *history) requestPool() {
	r := api.RequestPoolRequest{AddressSpace: LocalSpace}
	if h.rnd.IntN(5) == 0 {
		r.AddressSpace = GlobalSpace
	}
	prefix, sub := h.prefix()
	if h.rnd.IntN(5) == 0 {
		r.V6 = h.rnd.IntN(2) == 0
	} else if r.Pool = prefix.String(); sub.IsValid() {
		r.SubPool = sub.String()
	}
	got, err := h.RequestPool(h.t.Context(), r)
	if err != nil {
		due := false
		for _, p := range h.pools {
			due = due || p.Space == r.AddressSpace && p.Prefix.Overlaps(prefix)
		}
		for _, route := range h.routes {
			due = due || route.Overlaps(prefix)
		}
		if r.Pool == "" || !due {
			h.t.Errorf("%+v refused: %v", r, err)
		}
		h.count["refused"]++
		return
	}
	if p, ok := h.pools[got.PoolID]; ok && r.Pool != "" {
		p.Refs++
		return
	}
	prefix = netip.MustParsePrefix(got.Pool)
	for _, p := range h.pools {
		if (r.Pool == "" || p.Space == r.AddressSpace) && p.Prefix.Overlaps(prefix) {
			h.t.Errorf("%+v gave %s, which overlaps %s", r, got.PoolID, p.ID)
		}
	}
	for _, route := range h.routes {
		if route.Overlaps(prefix) {
			h.t.Errorf("%+v gave %s over route %s", r, got.PoolID, route)
		}
	}
	h.count["pool"]++
	if r.Pool == "" {
		sub = netip.Prefix{}
	}
	p := &modelPool{Pool: store.Pool{ID: got.PoolID, Space: r.AddressSpace, Prefix: prefix, Sub: sub, Refs: 1},
		leases: map[netip.Addr]*modelLease{}, endpoint: map[netip.Addr]bool{}, peer: map[netip.Addr]bool{}}
	h.pools[p.ID], h.ids = p, append(h.ids, p.ID)
	if p.Space == LocalSpace && h.rnd.IntN(3) == 0 && !h.networkOver(prefix) {
		h.vni++
		p.vni = h.vni
		h.network(h.t, netID(p), p.vni, prefix.String())
	}
}

// networkOver: the driver refuses a network over another one.
func (h *history) networkOver(prefix netip.Prefix) bool {
	for _, p := range h.pools {
		if p.vni != 0 && p.Prefix.Overlaps(prefix) {
			return true
		}
	}
	return false
}

func peerName(p *modelPool) string { return fmt.Sprintf("of-%d", p.vni) }

func netID(p *modelPool) store.NetworkID { return store.NetworkID(fmt.Sprintf("net-%d", p.vni)) }

func (h *history) releasePoolStep() {
	p := h.any()
	if p == nil || h.rnd.IntN(20) == 0 {
		h.releasePool(h.t, "WeftLocal/10.200.0.0/24")
		return
	}
	if p.Refs == 1 && len(p.held) > 8 && h.rnd.IntN(4) > 0 {
		return // let pools fill
	}
	h.releasePool(h.t, p.ID)
	if p.Refs--; p.Refs > 0 {
		return
	}
	if p.vni != 0 { // DeleteNetwork comes after, on the peer too
		h.write(h.t, func(tx *store.Tx) error {
			return errors.Join(tx.DeleteNetwork(netID(p)), tx.ForgetPeer(store.HostID("id-"+peerName(p))))
		})
	}
	delete(h.pools, p.ID)
	h.ids = slices.DeleteFunc(h.ids, func(id string) bool { return id == p.ID })
}

func (h *history) any() *modelPool {
	if len(h.ids) == 0 {
		return nil
	}
	return h.pools[h.ids[h.rnd.IntN(len(h.ids))]]
}

// blocked: an endpoint has the address, here or on the peer.
func (h *history) blocked(p *modelPool, a netip.Addr) bool {
	for _, o := range h.pools {
		if o.vni != 0 && o.Prefix.Overlaps(p.Prefix) && (o.endpoint[a] || o.peer[a]) {
			return true
		}
	}
	return false
}

func (h *history) cooling(l *modelLease) bool {
	return l != nil && !l.freed.IsZero() && h.now.Sub(l.freed) < time.Minute
}

func (h *history) requestAuto() {
	p := h.any()
	if p == nil {
		return
	}
	got, err := h.ask(h.t, p.ID, "")
	in := usable(p.Prefix, p.Sub)
	if err != nil {
		for k := range in.size() { // only small pools fill up
			if a := in.at(k); !p.leases[a].live() && !h.blocked(p, a) {
				h.t.Errorf("%s: %s is free, but: %v", p.ID, a, err)
				return
			}
		}
		h.count["refused"]++
		return
	}
	c := netip.MustParsePrefix(got)
	a := c.Addr()
	if c.Bits() != p.Prefix.Bits() || !in.has(a) || p.leases[a].live() || h.blocked(p, a) {
		h.t.Errorf("%s gave %s, which is out of range or held", p.ID, got)
	}
	if l := p.leases[a]; h.cooling(l) {
		h.count["early"]++
		for k := range in.size() {
			b := in.at(k)
			o := p.leases[b]
			if b != a && !o.live() && !h.blocked(p, b) && (!h.cooling(o) || o.freed.Before(l.freed)) {
				h.t.Errorf("%s gave %s before it has cooled, although %s was there", p.ID, a, b)
			}
		}
	}
	h.given(p, a, kindAuto)
}

// given notes a new lease; mostly its endpoint follows.
func (h *history) given(p *modelPool, a netip.Addr, kind string) {
	h.count["given"]++
	p.leases[a] = &modelLease{kind: kind, taken: h.now}
	p.held = append(p.held, a)
	if p.vni == 0 || kind == kindGateway || h.rnd.IntN(30) == 0 {
		return
	}
	p.endpoint[a] = true
	e := store.Endpoint{ID: store.EndpointID(a.String()), Network: netID(p), VNI: p.vni}
	if a.Is4() {
		e.IPv4 = netip.PrefixFrom(a, p.Prefix.Bits())
	} else {
		e.IPv6 = netip.PrefixFrom(a, p.Prefix.Bits())
	}
	h.write(h.t, func(tx *store.Tx) error { _, err := tx.PutEndpoint(e); return err })
}

func (h *history) requestFixed() {
	p := h.any()
	if p == nil {
		return
	}
	a := whole(p.Prefix).at(h.rnd.Uint64N(min(whole(p.Prefix).size(), 1<<16)))
	_, err := h.ask(h.t, p.ID, a.String())
	free := usable(p.Prefix, netip.Prefix{}).has(a) && !p.leases[a].live() && !h.blocked(p, a)
	if (err == nil) != free {
		h.t.Errorf("%s: %s asked for, free: %v, answer: %v", p.ID, a, free, err)
		return
	}
	if err != nil {
		h.count["refused"]++
		return
	}
	h.given(p, a, kindFixed)
}

func (h *history) requestGateway() {
	p := h.any()
	if p == nil {
		return
	}
	got, err := h.ask(h.t, p.ID, "", optType, gatewayType)
	if err != nil {
		h.count["refused"]++
		return
	}
	a := netip.MustParsePrefix(got).Addr()
	if p.leases[a].live() {
		if p.leases[a].kind != kindGateway {
			h.t.Errorf("%s: gateway %s is held as %s", p.ID, a, p.leases[a].kind)
		}
		return
	}
	for b, l := range p.leases {
		if l.live() && l.kind == kindGateway {
			h.t.Errorf("%s: gateway %s beside %s", p.ID, a, b)
		}
	}
	h.given(p, a, kindGateway)
}
