package ipam

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

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

// open2 is a crash: the database is opened again.
func (b *bed) open2(t testing.TB) {
	t.Helper()
	if err := b.db.Close(); err != nil {
		t.Fatal(err)
	}
	b.open(t)
}

func TestPoolsAreForgottenUnlessAnotherHasThem(t *testing.T) {
	b := newBed(t)
	for _, pool := range []string{"10.70.0.0/24", "10.71.0.0/24", "10.72.0.0/24"} {
		b.must(t, b.pool(t, pool, ""), "")
	}
	b.write(t, func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: "other", VNI: 5000, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.71.0.0/24")}}})
	})
	gone, err := b.Forget(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.70.0.0/24"), netip.MustParsePrefix("10.71.0.0/24")})
	if err != nil || len(gone) != 1 || gone[0].ID != LocalSpace+"/10.70.0.0/24" {
		t.Errorf("gone are %+v, %v", gone, err)
	}
	pools, err := b.Status()
	if err != nil || len(pools) != 2 {
		t.Errorf("left are %+v, %v", pools, err)
	}
	// Made again it is empty, also in memory.
	if got := b.must(t, b.pool(t, "10.70.0.0/24", ""), "10.70.0.1"); got != "10.70.0.1/24" {
		t.Errorf("got %s", got)
	}
}
