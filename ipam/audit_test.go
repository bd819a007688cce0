package ipam

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

func (b *bed) audit(t *testing.T) []string {
	t.Helper()
	freed, err := b.Audit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range freed {
		out = append(out, l.Pool+" "+l.Address.String())
	}
	return out
}

func TestAuditFreesOnlyWhatIsLeaked(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.must(t, id, "10.70.0.1", optType, gatewayType)
	for _, a := range []string{"10.70.0.2", "10.70.0.3", "10.70.0.4", "10.70.0.5"} {
		b.must(t, id, a)
	}
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.2/24")
	b.write(t, func(tx *store.Tx) error { // .3 is auxiliary, .4 and .5 are leaked
		n, err := tx.Network("n1")
		if err != nil {
			return err
		}
		n.Subnets[0].Aux = map[string]netip.Prefix{"router": netip.MustParsePrefix("10.70.0.3/24")}
		return tx.PutNetwork(n)
	})
	other := b.pool(t, "10.71.0.0/24", "") // of another driver
	b.must(t, other, "10.71.0.2")
	shared := b.pool(t, "10.72.0.0/24", "") // of another driver too
	b.pool(t, "10.72.0.0/24", "")
	b.must(t, shared, "10.72.0.2")
	b.network(t, "n2", 4097, "10.72.0.0/24")
	global, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: "10.70.0.0/24"})
	if err != nil {
		t.Fatal(err)
	}
	b.must(t, global.PoolID, "10.70.0.9") // of a task on another host

	if got := b.audit(t); got != nil { // first sighting
		t.Fatal(got)
	}
	b.now = b.now.Add(9 * time.Minute)
	if got := b.audit(t); got != nil { // within the grace period
		t.Fatal(got)
	}
	// .5 becomes another lease: its own sightings count.
	b.release(t, id, "10.70.0.5")
	b.must(t, id, "10.70.0.5")
	b.now = b.now.Add(time.Minute)
	if d := cmp.Diff([]string{id + " 10.70.0.4"}, b.audit(t)); d != "" {
		t.Fatal(d)
	}
	b.now = b.now.Add(10 * time.Minute)
	if d := cmp.Diff([]string{id + " 10.70.0.5"}, b.audit(t)); d != "" {
		t.Fatal(d)
	}
	b.now = b.now.Add(2 * time.Minute)
	if got := b.audit(t); got != nil {
		t.Fatal(got)
	}
	s, err := b.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s {
		if want := map[string]int{id: 3, other: 1, shared: 1, global.PoolID: 1}[p.ID]; p.Used != want {
			t.Errorf("%s: %d used, want %d", p.ID, p.Used, want)
		}
	}
	if strings.Contains(b.state(t), "10.70.0.4") {
		t.Error("the record of an address that has cooled stays")
	}
}

func TestAuditCountsFromTheFirstSighting(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.must(t, id, "10.70.0.2")
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.2/24")
	b.now = b.now.Add(time.Hour)
	b.write(t, func(tx *store.Tx) error { return tx.DeleteEndpoint("n1", "ep-10.70.0.2/24") })
	for _, wait := range []time.Duration{0, time.Minute, 8 * time.Minute} { // Docker's release may be on its way
		b.now = b.now.Add(wait)
		if got := b.audit(t); got != nil {
			t.Fatal(got)
		}
	}
	b.now = b.now.Add(time.Minute)
	if got := b.audit(t); len(got) != 1 {
		t.Fatal(got)
	}
}

func TestAuditLooksAgainBeforeItFrees(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.must(t, id, "10.70.0.2")
	b.network(t, "n1", 4096, "10.70.0.0/24")
	var ripe []store.Lease
	b.write(t, func(tx *store.Tx) error {
		f, err := b.find(tx, b.now)
		ripe = f.leaked
		return err
	})
	if len(ripe) != 1 {
		t.Fatal(ripe)
	}
	b.network(t, "n1", 4096, "10.70.0.0/24", "10.70.0.2/24") // the endpoint comes
	b.write(t, func(tx *store.Tx) error {
		freed, err := free(tx, ripe, b.now)
		if len(freed) > 0 {
			t.Error("a live lease was freed")
		}
		return err
	})
}

func TestAuditCorrectsWhatWasFreedInTheFuture(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "10.70.0.8/31")
	b.must(t, id, "")
	b.release(t, id, "10.70.0.8")
	b.now = b.now.Add(-time.Hour) // the clock goes back
	if got := b.must(t, id, ""); got != "10.70.0.9/24" {
		t.Fatal(got)
	}
	b.audit(t)
	b.now = b.now.Add(cooling)
	s, err := b.Status()
	if err != nil || s[0].Cooling != 0 {
		t.Fatal(s, err)
	}
	if got := b.must(t, id, ""); got != "10.70.0.8/24" {
		t.Fatal(got)
	}
}

func TestRunFreesALeakWithinFifteenMinutes(t *testing.T) {
	b := newBed(t)
	synctest.Test(t, func(t *testing.T) {
		b.cfg.Now = time.Now
		var log strings.Builder
		b.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		id := b.pool(t, "10.70.0.0/24", "")
		b.must(t, id, "10.70.0.2", optName, "web")
		b.network(t, "n1", 4096, "10.70.0.0/24")
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
		defer cancel()
		if err := b.Run(ctx); err != nil {
			t.Fatal(err)
		}
		s, err := b.Status()
		if err != nil || s[0].Used != 0 {
			t.Error(s, err)
		}
		if n := strings.Count(log.String(), "leaked lease freed"); n != 1 || !strings.Contains(log.String(), "address=10.70.0.2") {
			t.Errorf("log: %s", log.String())
		}
	})
}
