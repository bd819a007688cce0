package driver

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

func TestAuditNeedsTwoSightingsAndTime(t *testing.T) {
	d, f := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	for ep, address := range map[string]string{epA: "10.50.0.2/24", epB: "10.50.0.3/24"} {
		if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, ep, address))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Join(t.Context(), network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/x"}); err != nil {
		t.Fatal(err)
	}
	a, now := NewAudit(d, 0, nil), time.Now()
	a.now = func() time.Time { return now }
	left := func() (out []store.EndpointID) {
		if err := a.once(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = d.DB.View(func(tx *store.Tx) error {
			all, err := tx.AllEndpoints()
			for _, e := range all {
				out = append(out, e.ID)
			}
			return err
		})
		return out
	}
	shared := func() (n int) { // endpoints that peers are told of
		_ = d.DB.View(func(tx *store.Tx) error {
			delta, err := tx.Delta(4096, 0)
			n = len(delta.Endpoints)
			return err
		})
		return n
	}
	f.missing = []store.EndpointID{epA}
	left()
	now = now.Add(lostGrace - time.Second)
	if left(); shared() != 2 {
		t.Fatal("withdrawn too early")
	}
	f.missing = nil // it was there after all: the count begins anew
	left()
	f.missing = []store.EndpointID{epA}
	now = now.Add(2 * time.Second)
	if left(); shared() != 2 {
		t.Fatal("withdrawn at one sighting")
	}
	now = now.Add(lostGrace)
	if got := left(); len(got) != 2 || shared() != 1 {
		t.Fatalf("after %s without a link: %v, %d shared; want it kept and withdrawn", lostGrace, got, shared())
	}
	f.missing = nil // it has left: no link is wanted
	now = now.Add(goneGrace - 10*time.Second)
	if got := left(); len(got) != 2 {
		t.Fatalf("removed too early: %v", got)
	}
	now = now.Add(10 * time.Second)
	if diff := cmp.Diff([]store.EndpointID{epB}, left()); diff != "" {
		t.Fatal(diff)
	}
	now = now.Add(idleGrace) // never joined
	if got := left(); len(got) != 0 {
		t.Fatalf("idle endpoint stays: %v", got)
	}
}

// A dockerd that is killed between Join and the next step leaves the link where it is.
func TestLinkThatDockerNeverTookIsRemoved(t *testing.T) {
	d, f := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.2/24"))); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Join(t.Context(), network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/x"}); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	a := NewAudit(d, 0, func() time.Time { return now })
	left := func(later time.Duration) (n int) {
		t.Helper()
		now = now.Add(later)
		if err := a.once(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = d.DB.View(func(tx *store.Tx) error {
			all, err := tx.AllEndpoints()
			n = len(all)
			return err
		})
		return n
	}
	f.untaken = []store.EndpointID{epA}
	left(0)
	if left(idleGrace-time.Second) != 1 {
		t.Fatal("removed too early")
	}
	f.untaken = nil // it was slow
	left(0)
	f.untaken = []store.EndpointID{epA}
	left(0)
	if left(idleGrace-time.Second) != 1 {
		t.Fatal("the count did not begin anew")
	}
	if left(time.Second) != 0 {
		t.Error("it stays")
	}
}

// Docker forgets networks of Swarm when it is killed, and creates those anew that a
// task needs.
func TestForgottenNetworkOfSwarmIsRemoved(t *testing.T) {
	d, _ := newDriver(t)
	term := uint64(1)
	d.Term = func() uint64 { return term }
	for i, id := range []string{netA, swarmNet, "a" + swarmNet[1:], "b" + swarmNet[1:]} {
		mustNet(t, d, createNet(id, fmt.Sprintf("10.5%d.0.0/24", i), ""))
	}
	used := store.NetworkID("a" + swarmNet[1:])
	if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(string(used), epA, "10.52.0.2/24"))); err != nil {
		t.Fatal(err)
	}
	term = 2 // dockerd starts anew
	mustNet(t, d, createNet("b"+swarmNet[1:], "10.53.0.0/24", ""))
	now := time.Now()
	a := NewAudit(d, 0, func() time.Time { return now })
	left := func() (ids []store.NetworkID) {
		t.Helper()
		if err := a.networks(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = d.DB.View(func(tx *store.Tx) error {
			all, err := tx.Networks()
			for _, n := range all {
				ids = append(ids, n.ID)
			}
			return err
		})
		return ids
	}
	left()
	now = now.Add(emptyGrace - time.Second)
	if got := left(); len(got) != 4 {
		t.Fatalf("removed too early: %v", got)
	}
	now = now.Add(time.Second)
	want := []store.NetworkID{netA, used, "b" + store.NetworkID(swarmNet[1:])}
	if diff := cmp.Diff(want, left()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// A removal that came while the plugin was disabled does not come again; subnet and vni
// were taken for ever.
func TestForgottenByCommand(t *testing.T) {
	d, f := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", `"vni":"5000"`))
	for ep, address := range map[string]string{epA: "10.50.0.2/24", epB: "10.50.0.3/24"} {
		if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, ep, address))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.Join(t.Context(), network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/x"}); err != nil {
		t.Fatal(err)
	}
	again := decode[network.CreateNetworkRequest](t, createNet(netB, "10.50.0.0/24", ""))
	if _, err := d.CreateNetwork(t.Context(), again); err == nil || !strings.Contains(err.Error(), "weft forget aaaaaaaaaaaa") {
		t.Errorf("the clash does not say what to do: %v", err)
	}
	before := state(t, d)
	if _, err := d.Forget(t.Context(), netA); err == nil || !strings.Contains(err.Error(), "is in a container") {
		t.Errorf("a container lives on it: %v", err)
	}
	if after := state(t, d); after != before {
		t.Errorf("records changed:\n%s\n%s", before, after)
	}
	f.missing = []store.EndpointID{epA} // its container is gone, as the other's
	if n, err := d.Forget(t.Context(), netA); err != nil || n.VNI != 5000 {
		t.Fatalf("%+v, %v", n, err)
	}
	if _, err := d.Forget(t.Context(), netA); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("twice: %v", err)
	}
	if _, err := d.CreateNetwork(t.Context(), again); err != nil {
		t.Error(err)
	}
}
