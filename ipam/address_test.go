package ipam

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

func TestRequestAddressRefuses(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	id6 := b.pool(t, "fd00:70::/64", "")
	b.must(t, id, "10.70.0.7")
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.8/24")
	b.peer(t, "beta", 4096, "10.70.0.0/24", 1, "10.70.0.9")
	for _, c := range []struct {
		pool, addr string
		options    []string
		words      []string
	}{
		{"", "", nil, []string{"PoolID", "empty"}},
		{"x", "", nil, []string{"PoolID", `"x"`}},
		{"WeftLocal/10.70.0.0/24/", "", nil, []string{"PoolID"}},
		{"WeftLocal/10.71.0.0/024", "", nil, []string{"PoolID"}},
		{"WeftLocal/10.71.0.1/24", "", nil, []string{"PoolID"}},
		{"WeftLocal/fd00:0::/64", "", nil, []string{"PoolID", "fd00::/64"}},
		{"Elsewhere/10.71.0.0/24", "", nil, []string{"PoolID", "AddressSpace"}},
		{"WeftLocal/10.70.0.0/16", "", nil, []string{"WeftLocal/10.70.0.0/16", "overlaps", "WeftLocal/10.70.0.0/24"}},
		{id, "10.70.1.1", nil, []string{"10.70.1.1", "outside", "10.70.0.0/24"}},
		{id, "fd00::1", nil, []string{"outside"}},
		{id, "10.70.0.0", nil, []string{"network address"}},
		{id, "10.70.0.255", nil, []string{"broadcast"}},
		{id6, "fd00:70::", nil, []string{"anycast"}},
		{id, "::ffff:10.70.0.5", nil, []string{"10.70.0.5"}},
		{id, "10.70.0.5/24", nil, []string{"address", "10.70.0.5/24"}},
		{id, "10.70.0.7", nil, []string{"10.70.0.7", "taken", "lease since"}},
		{id, "10.70.0.7", []string{optType, gatewayType}, []string{"10.70.0.7", "taken"}},
		{id, "10.70.0.8", nil, []string{"10.70.0.8", "endpoint ep-10.70.0.8"}},
		{id, "10.70.0.9", nil, []string{"10.70.0.9", "host beta"}},
		{id, "10.70.0.9", []string{optType, gatewayType}, []string{"10.70.0.9", "host beta"}},
		{id, "", []string{optType, "x"}, []string{optType, `"x"`}},
	} {
		before := b.state(t)
		_, err := b.ask(t, c.pool, c.addr, c.options...)
		wantErr(t, err, c.words...)
		if d := cmp.Diff(before, b.state(t)); d != "" {
			t.Errorf("%+v changed the state: %s", c, d)
		}
	}
	// In Swarm the leader has decided.
	for _, a := range []string{"10.70.0.7", "10.70.0.8", "10.70.0.9"} {
		if got := b.must(t, id, a, optSerial, "true"); got != a+"/24" {
			t.Fatal(got)
		}
	}
	b.must(t, id6, "fd00:70::ffff:ffff:ffff:ffff")
}

func TestSameContainerMayAskAgain(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.must(t, id, "10.70.0.7", optName, "web")
	b.must(t, id, "10.70.0.7", optName, "web")
	_, err := b.ask(t, id, "10.70.0.7", optName, "db")
	wantErr(t, err, `container "web"`)
	_, err = b.ask(t, id, "10.70.0.7")
	wantErr(t, err, `container "web"`)
}

func TestAutoSkipsWhatOthersHold(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/28", "") // 14 usable
	b.network(t, "n1", 4096, "10.70.0.0/28", "10.70.0.2/28")
	b.write(t, func(tx *store.Tx) error {
		n, err := tx.Network("n1")
		if err != nil {
			return err
		}
		n.Subnets[0].Gateway = netip.MustParseAddr("10.70.0.1")
		n.Subnets[0].Aux = map[string]netip.Prefix{"router": netip.MustParsePrefix("10.70.0.14/28")}
		return tx.PutNetwork(n)
	})
	b.peer(t, "beta", 4096, "10.70.0.0/28", 1, "10.70.0.5", "10.70.0.6")
	b.peer(t, "gamma", 4096, "10.70.0.0/28", 1, "10.70.0.8")
	b.peer(t, "delta", 4097, "10.70.0.0/28", 1, "10.70.0.9") // another network with the same subnet
	got := map[string]bool{}
	for range 8 {
		got[b.must(t, id, "")] = true
	}
	want := map[string]bool{}
	for _, a := range []string{"3", "4", "7", "9", "10", "11", "12", "13"} {
		want["10.70.0."+a+"/28"] = true
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	_, err := b.ask(t, id, "")
	wantErr(t, err, "WeftLocal/10.70.0.0/28", "14 usable", "8 used", "0 cooling", "3 held by peers", "3 by endpoints or the network")
	// What a peer gives up can be had at once here: it cools there.
	b.peer(t, "beta", 4096, "10.70.0.0/28", 2, "10.70.0.5")
	if got := b.must(t, id, ""); got != "10.70.0.6/28" {
		t.Fatal(got)
	}
}

// A second network with the subnet of the first, and a gateway of its own, is refused;
// that gateway was leased for as long as the first network lived.
func TestGatewayOfARefusedNetworkIsFreed(t *testing.T) {
	b := newBed(t)
	const pool = "10.70.0.0/24"
	id := b.pool(t, pool, "")
	b.must(t, id, "10.70.0.1", optType, gatewayType)
	for _, recorded := range []bool{false, true} {
		b.now = b.now.Add(time.Hour)
		if recorded { // of another driver it is not
			b.write(t, func(tx *store.Tx) error {
				return tx.PutNetwork(store.Network{ID: "n1", VNI: 4096, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(pool), Gateway: netip.MustParseAddr("10.70.0.1")}}})
			})
		}
		for _, gateway := range []string{"10.70.0.254", "10.70.0.1"} {
			b.pool(t, pool, "")
			b.must(t, id, gateway, optType, gatewayType)
			b.release(t, id, gateway)
			b.releasePool(t, id)
		}
		b.must(t, id, "10.70.0.254")
		b.release(t, id, "10.70.0.254")
		_, err := b.ask(t, id, "10.70.0.1")
		wantErr(t, err, "taken by the gateway")
	}
	b.release(t, id, "10.70.0.1") // of the last one
	b.must(t, id, "10.70.0.1")
}

func TestGatewayIsChosenClearOfPeers(t *testing.T) {
	b := newBed(t)
	b.peer(t, "beta", 4096, "10.70.0.0/24", 1, "10.70.0.1", "10.70.0.2")
	id := b.pool(t, "10.70.0.0/24", "")
	if got := b.must(t, id, "", optType, gatewayType); got != "10.70.0.3/24" {
		t.Fatal(got)
	}
}

func TestFreedAddressCools(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/29", "10.70.0.0/29") // 6 usable
	for range 6 {
		b.must(t, id, "")
	}
	freed := []string{"10.70.0.3/29", "10.70.0.1/29", "10.70.0.5/29"}
	for _, a := range freed {
		b.now = b.now.Add(time.Second)
		b.release(t, id, a)
	}
	// Nearly full: the one that cools for longest goes first.
	if got := b.must(t, id, ""); got != freed[0] {
		t.Fatal(got)
	}
	b.now = b.now.Add(59 * time.Second) // .1 has cooled, .5 not
	b.release(t, id, "10.70.0.2/29")
	if got := b.must(t, id, ""); got != freed[1] {
		t.Fatal(got)
	}
	b.open2(t)
	if got := b.must(t, id, ""); got != freed[2] {
		t.Fatal(got)
	}
	// Asked for by address it need not cool.
	b.must(t, id, "10.70.0.2")
	_, err := b.ask(t, id, "")
	wantErr(t, err, "6 usable", "6 used")
}

func TestUnknownPoolIsMadeAgain(t *testing.T) {
	b := newBed(t)
	id := "WeftLocal/10.70.0.0/24/10.70.0.128/25"
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.128/24")
	if got := b.must(t, id, ""); got != "10.70.0.129/24" {
		t.Fatal(got)
	}
	// With the lease of the endpoint that lives there.
	s, err := b.Status()
	if err != nil || len(s) != 1 || s[0].ID != id || s[0].Refs != 1 || s[0].Used != 2 || s[0].Total != 254 {
		t.Fatal(s, err)
	}
}

func TestParallelRequestsGetDifferentAddresses(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/18", "")
	n, each := 100, 100 // 10,000 together
	if testing.Short() {
		each = 5
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seen = map[string]bool{}
	)
	for range n {
		wg.Go(func() {
			for range each {
				r, err := b.RequestAddress(t.Context(), api.RequestAddressRequest{PoolID: id})
				mu.Lock()
				if err != nil || seen[r.Address] {
					t.Errorf("%s twice, or %v", r.Address, err)
				}
				seen[r.Address] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) != n*each {
		t.Fatalf("%d addresses, want %d", len(seen), n*each)
	}
}

// BenchmarkRequestAddress is one request and one release in a pool with 65,000
// leases, then in one whose network has 1,000 endpoints here and 10,000 on a peer.
func BenchmarkRequestAddress(b *testing.B) {
	b.Run("65000-leases", func(b *testing.B) {
		bed := newBed(b)
		id := bed.pool(b, "10.64.0.0/10", "")
		bed.write(b, func(tx *store.Tx) error {
			p, err := tx.Pool(id)
			if err != nil {
				return err
			}
			a := p.Next
			for range 65_000 {
				if err := tx.PutLease(store.Lease{Pool: id, Address: a, Kind: kindAuto, Taken: bed.now}); err != nil {
					return err
				}
				a = a.Next()
			}
			return nil
		})
		bed.must(b, id, "") // fills the book
		for b.Loop() {
			bed.release(b, id, bed.must(b, id, ""))
		}
	})
	b.Run("1000-endpoints-10000-remote", func(b *testing.B) {
		bed := newBed(b)
		id := bed.pool(b, "10.64.0.0/10", "")
		all := usable(netip.MustParsePrefix("10.64.0.0/10"), netip.Prefix{})
		var here, there []string
		for n := range uint64(1000) {
			here = append(here, all.at(n).String()+"/10")
		}
		for n := range uint64(10_000) {
			there = append(there, all.at(5000+n).String())
		}
		bed.network(b, "n1", 4096, "10.64.0.0/10", here...)
		bed.peer(b, "beta", 4096, "10.64.0.0/10", 1, there...)
		bed.must(b, id, "")
		for b.Loop() {
			bed.release(b, id, bed.must(b, id, ""))
		}
	})
}
