package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

// bed is an IPAM with a database and a clock that tests set.
type bed struct {
	*IPAM
	db     *store.DB
	path   string
	now    time.Time
	routes []netip.Prefix
}

// memoryDir returns a folder where syncing costs nothing, if there is one.
func memoryDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "weft-ipam-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func newBed(t testing.TB, defaults ...string) *bed {
	t.Helper()
	b := &bed{path: filepath.Join(memoryDir(t), "weft.db"), now: time.Unix(1_700_000_000, 0)}
	b.open(t, defaults...)
	t.Cleanup(func() { _ = b.db.Close() })
	return b
}

func (b *bed) open(t testing.TB, defaults ...string) {
	t.Helper()
	db, err := store.Open(b.path, store.Host{ID: "self"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Now: func() time.Time { return b.now }, Routes: func(context.Context) ([]netip.Prefix, error) { return b.routes, nil }}
	for _, d := range defaults {
		cfg.Defaults = append(cfg.Defaults, netip.MustParsePrefix(d))
	}
	b.db, b.IPAM = db, New(db, cfg)
}

func (b *bed) pool(t testing.TB, pool, sub string) string {
	t.Helper()
	r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, Pool: pool, SubPool: sub})
	if err != nil {
		t.Fatal(err)
	}
	return r.PoolID
}

func (b *bed) ask(t testing.TB, pool, addr string, options ...string) (string, error) {
	t.Helper()
	r := api.RequestAddressRequest{PoolID: pool, Address: addr}
	if len(options) > 0 {
		r.Options = map[string]string{}
	}
	for i := 0; i < len(options); i += 2 {
		r.Options[options[i]] = options[i+1]
	}
	got, err := b.RequestAddress(t.Context(), r)
	return got.Address, err
}

func (b *bed) must(t testing.TB, pool, addr string, options ...string) string {
	t.Helper()
	got, err := b.ask(t, pool, addr, options...)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func (b *bed) release(t testing.TB, pool, addr string) {
	t.Helper()
	a, _, _ := strings.Cut(addr, "/")
	if _, err := b.ReleaseAddress(t.Context(), api.ReleaseAddressRequest{PoolID: pool, Address: a}); err != nil {
		t.Fatal(err)
	}
}

func (b *bed) releasePool(t testing.TB, pool string) {
	t.Helper()
	if _, err := b.ReleasePool(t.Context(), api.ReleasePoolRequest{PoolID: pool}); err != nil {
		t.Fatal(err)
	}
}

// state returns all that the database holds of pools and leases, as text.
func (b *bed) state(t testing.TB) string {
	t.Helper()
	var all struct {
		Pools  []store.Pool
		Leases []store.Lease
	}
	err := b.db.View(func(tx *store.Tx) (err error) {
		if all.Pools, err = tx.Pools(); err != nil {
			return err
		}
		for _, p := range all.Pools {
			l, err := tx.Leases(p.ID)
			if err != nil {
				return err
			}
			all.Leases = append(all.Leases, l...)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func (b *bed) write(t testing.TB, fn func(tx *store.Tx) error) {
	t.Helper()
	if err := b.db.Update(t.Context(), fn); err != nil {
		t.Fatal(err)
	}
}

// network puts a Weft network and its endpoints, one per address.
func (b *bed) network(t testing.TB, id store.NetworkID, v store.VNI, subnet string, endpoints ...string) {
	t.Helper()
	b.write(t, func(tx *store.Tx) error {
		if err := tx.PutNetwork(store.Network{ID: id, VNI: v, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(subnet)}}}); err != nil {
			return err
		}
		for _, e := range endpoints {
			p := netip.MustParsePrefix(e)
			if _, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID("ep-" + e), Network: id, VNI: v, IPv4: p}); err != nil {
				return err
			}
		}
		return nil
	})
}

// peer puts a peer that runs a network with endpoints.
func (b *bed) peer(t testing.TB, name string, v store.VNI, subnet string, seq uint64, endpoints ...string) {
	t.Helper()
	id := store.HostID("id-" + name)
	b.write(t, func(tx *store.Tx) error {
		if _, err := tx.Peer(id); errors.Is(err, store.ErrNotFound) {
			if err := tx.PutPeer(store.Peer{Host: store.Host{ID: id, Name: name, Epoch: 1}}); err != nil {
				return err
			}
		}
		err := tx.MergeNetworks(id, 1, seq, []store.SharedNetwork{{VNI: v, Mode: "vxlan", Prefixes: []netip.Prefix{netip.MustParsePrefix(subnet)}}})
		if err != nil {
			return err
		}
		d := store.Delta{VNI: v, Epoch: 1, Seq: seq, Full: true}
		for _, e := range endpoints {
			d.Endpoints = append(d.Endpoints, store.SharedEndpoint{ID: store.EndpointID("ep-" + e), IPv4: netip.MustParseAddr(e)})
		}
		_, err = tx.MergeEndpoints(id, 0, d)
		return err
	})
}

// wantErr fails unless err names all the words.
func wantErr(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q lacks %q", err, w)
		}
	}
}

const gatewayType = "com.docker.network.gateway"

func TestNetworkLifeLeavesNothing(t *testing.T) {
	b := newBed(t)
	empty := b.state(t)
	id := b.pool(t, "10.70.0.0/24", "10.70.0.128/25")
	if want := "WeftLocal/10.70.0.0/24/10.70.0.128/25"; id != want {
		t.Fatalf("pool id %s, want %s", id, want)
	}
	var got []string
	got = append(got, b.must(t, id, "", optType, gatewayType))
	got = append(got, b.must(t, id, "", optType, gatewayType)) // again: the same
	got = append(got, b.must(t, id, "10.70.0.9"))
	got = append(got, b.must(t, id, ""), b.must(t, id, "", optName, "web"))
	want := []string{"10.70.0.1/24", "10.70.0.1/24", "10.70.0.9/24", "10.70.0.128/24", "10.70.0.129/24"}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	_, err := b.ask(t, id, "10.70.0.129")
	wantErr(t, err, "10.70.0.129", `container "web"`)
	_, err = b.ask(t, id, "10.70.0.1")
	wantErr(t, err, "10.70.0.1", "gateway")
	for _, a := range got {
		b.release(t, id, a)
	}
	b.releasePool(t, id)
	b.releasePool(t, id)
	b.release(t, id, "10.70.0.1")
	if d := cmp.Diff(empty, b.state(t)); d != "" {
		t.Fatal(d)
	}
}

func TestRequestPoolRefuses(t *testing.T) {
	b := newBed(t)
	b.routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("fd01::/48")}
	b.pool(t, "10.70.0.0/16", "")
	b.pool(t, "10.80.0.0/24", "10.80.0.0/26")
	b.pool(t, "fd00:70::/64", "")
	b.network(t, "net-seventy-0123456789", 4096, "10.70.0.0/16")
	type r = api.RequestPoolRequest
	for _, c := range []struct {
		r     r
		words []string
	}{
		{r{}, []string{"AddressSpace", `""`, LocalSpace}},
		{r{AddressSpace: "Elsewhere", Pool: "10.1.0.0/24"}, []string{"AddressSpace", "Elsewhere"}},
		{r{AddressSpace: LocalSpace, SubPool: "10.1.0.0/24"}, []string{"SubPool", "needs"}},
		{r{AddressSpace: LocalSpace, Pool: "abc"}, []string{"pool", "abc"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0"}, []string{"pool", "10.1.0.0"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/33"}, []string{"pool"}},
		{r{AddressSpace: LocalSpace, Pool: "fe80::1%eth0/64"}, []string{"pool"}},
		{r{AddressSpace: LocalSpace, Pool: "::ffff:10.1.0.0/120"}, []string{"IPv4"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.5/24"}, []string{"10.1.0.5/24", "10.1.0.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/31"}, []string{"too small", "/30"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/32"}, []string{"too small"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00::/127"}, []string{"too small", "/126"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00::/128"}, []string{"too small"}},
		{r{AddressSpace: LocalSpace, Pool: "0.0.0.0/0"}, []string{"every address"}},
		{r{AddressSpace: LocalSpace, Pool: "::/0"}, []string{"every address"}},
		{r{AddressSpace: LocalSpace, Pool: "0.1.0.0/16"}, []string{"this network"}},
		{r{AddressSpace: LocalSpace, Pool: "127.0.0.0/16"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "126.0.0.0/7"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "169.254.7.0/24"}, []string{"link-local"}},
		{r{AddressSpace: LocalSpace, Pool: "239.0.0.0/8"}, []string{"multicast"}},
		{r{AddressSpace: LocalSpace, Pool: "::/64"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "fe80::/64"}, []string{"link-local"}},
		{r{AddressSpace: LocalSpace, Pool: "ff02::/64"}, []string{"multicast"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.1.0/25"}, []string{"SubPool 10.1.1.0/25", "10.1.0.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.0/16"}, []string{"SubPool", "does not lie"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "fd00::/80"}, []string{"SubPool"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.129/25"}, []string{"SubPool", "10.1.0.128/25"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.255/32"}, []string{"SubPool", "broadcast"}},
		{r{AddressSpace: LocalSpace, Pool: "10.70.3.0/24"}, []string{"overlaps", "WeftLocal/10.70.0.0/16", "net-seventy-"}},
		{r{AddressSpace: LocalSpace, Pool: "10.64.0.0/10"}, []string{"overlaps", "WeftLocal/10.70.0.0/16"}},
		{r{AddressSpace: LocalSpace, Pool: "10.80.0.0/24"}, []string{"overlaps", "WeftLocal/10.80.0.0/24/10.80.0.0/26"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00:70::/80"}, []string{"overlaps", "WeftLocal/fd00:70::/64"}},
		{r{AddressSpace: LocalSpace, Pool: "192.168.0.0/16"}, []string{"overlaps", "route", "192.168.1.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "192.168.1.64/26"}, []string{"overlaps", "route"}},
		{r{AddressSpace: LocalSpace, Pool: "fd01:0:0:5::/64"}, []string{"overlaps", "fd01::/48"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", Options: map[string]string{"io": "1"}}, []string{"ipam option", `"io"`, "com.docker.network."}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", Options: map[string]string{"docker.network.ipam.serial": "1"}}, []string{"nearest", optSerial}},
	} {
		before := b.state(t)
		_, err := b.RequestPool(t.Context(), c.r)
		wantErr(t, err, c.words...)
		if d := cmp.Diff(before, b.state(t)); d != "" {
			t.Errorf("%+v changed the state: %s", c.r, d)
		}
	}
}

func TestSamePoolIsCounted(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.routes = []netip.Prefix{netip.MustParsePrefix("10.70.0.0/24")} // a bridge made for it
	if again := b.pool(t, "10.70.0.0/24", ""); again != id {
		t.Fatalf("%s and %s", id, again)
	}
	if same := b.pool(t, "10.70.0.0/24", "10.70.0.0/24"); same != id {
		t.Fatalf("a sub-pool that is the whole pool gave %s", same)
	}
	gw := b.must(t, id, "10.70.0.1", optType, gatewayType)
	b.releasePool(t, id)
	b.release(t, id, gw) // of the second network, which failed: the first still has it
	b.releasePool(t, id)
	_, err := b.ask(t, id, "10.70.0.1")
	wantErr(t, err, "gateway")
	b.release(t, id, gw)
	b.must(t, id, "10.70.0.1")
	// The other space is another pool with leases of its own.
	r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: "10.70.0.0/24", Options: map[string]string{optSerial: "true"}})
	if err != nil {
		t.Fatal(err)
	}
	b.must(t, r.PoolID, "10.70.0.1", optType, gatewayType)
}

func TestRoutesThatCannotBeReadRefuseThePool(t *testing.T) {
	b := newBed(t)
	b.cfg.Routes = func(context.Context) ([]netip.Prefix, error) { return nil, errors.New("no netlink") }
	_, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, Pool: "10.70.0.0/24"})
	wantErr(t, err, "routes", "no netlink")
}

func TestAutoPoolsKeepClear(t *testing.T) {
	b := newBed(t, "10.32.0.0/18", "192.168.7.0/24")
	b.routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("10.32.1.0/24")}
	b.network(t, "n1", 4096, "10.32.16.0/24")
	auto := func(v6 bool) (string, error) {
		r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, V6: v6})
		return r.Pool, err
	}
	var got []string
	for range 3 {
		p, err := auto(false)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p)
	}
	if d := cmp.Diff([]string{"10.32.32.0/20", "10.32.48.0/20", "192.168.7.0/24"}, got); d != "" {
		t.Fatal(d)
	}
	_, err := auto(false)
	wantErr(t, err, "10.32.0.0/18", "192.168.7.0/24", "WEFT_SUBNETS")
	b.releasePool(t, poolID(LocalSpace, netip.MustParsePrefix("10.32.48.0/20"), netip.Prefix{}))
	if p, err := auto(false); err != nil || p != "10.32.48.0/20" {
		t.Fatal(p, err)
	}
	for _, want := range []string{"fd77:6566:7400::/64", "fd77:6566:7400:1::/64"} {
		if p, err := auto(true); err != nil || p != want {
			t.Fatalf("%s, %v; want %s", p, err, want)
		}
	}
}

func TestAutoPoolBehindALargeRouteEnds(t *testing.T) {
	_, err := freeDefault([]netip.Prefix{netip.MustParsePrefix("fd00::/8")}, []netip.Prefix{netip.MustParsePrefix("fc00::/7")})
	wantErr(t, err, "fd00::/8")
	_, err = freeDefault([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, nil)
	wantErr(t, err, "WEFT_SUBNETS", "loopback")
}

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

// open2 is a crash: the database is opened again.
func (b *bed) open2(t testing.TB) {
	t.Helper()
	if err := b.db.Close(); err != nil {
		t.Fatal(err)
	}
	b.open(t)
}

func TestUnknownPoolIsMadeAgain(t *testing.T) {
	b := newBed(t)
	id := "WeftLocal/10.70.0.0/24/10.70.0.128/25"
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.128/24")
	if got := b.must(t, id, ""); got != "10.70.0.129/24" {
		t.Fatal(got)
	}
	s, err := b.Status()
	if err != nil || len(s) != 1 || s[0].ID != id || s[0].Refs != 1 || s[0].Used != 1 || s[0].Total != 254 {
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

func TestFailPointsAreNamed(t *testing.T) {
	raw, err := os.ReadFile("ipam.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range FailPoints() {
		if step := p[strings.LastIndex(p, "."):]; !strings.Contains(string(raw), `store.FailPoint("ipam." + call + "`+step+`")`) {
			t.Errorf("no step %s", p)
		}
	}
}

func BenchmarkRequestAddress(b *testing.B) {
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
}
