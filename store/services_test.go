package store_test

import (
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// TestServices: of what several hosts tell of one virtual address the word of a living
// one counts, then the newer one; who has no key of the network, or is revoked, has no
// say; and what nobody else tells holds while its host is silent.
func TestServices(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	n := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Key: make([]byte, 32), Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	update := func(fn func(tx *store.Tx) error) {
		t.Helper()
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	service := func(by store.HostID, index uint64, backends ...string) store.Service {
		s := store.Service{VNI: 7, VIP: netip.MustParseAddr("10.1.0.9"), Name: "web", Index: index, Proof: n.Proof(by)}
		for _, b := range backends {
			s.Backends = append(s.Backends, netip.MustParseAddr(b))
		}
		return s
	}
	counts := func(want ...string) {
		t.Helper()
		s, err := db.Snapshot(7)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, service := range s.Services {
			for _, a := range service.Backends {
				got = append(got, a.String())
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("tasks are %v, want %v", got, want)
		}
	}
	update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
	for _, id := range []store.HostID{"b", "c", "d"} {
		update(func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: store.Host{ID: id, Epoch: 1}}) })
	}
	watch := db.Watch()
	watch.Take()
	update(func(tx *store.Tx) error {
		return tx.PutServices("b", false, []store.Service{service("b", 5, "10.1.0.2")})
	})
	if got := watch.Take(); !slices.Contains(got, 7) {
		t.Errorf("the network is not touched: %v", got)
	}
	counts("10.1.0.2")
	update(func(tx *store.Tx) error {
		return tx.PutServices("b", false, []store.Service{service("b", 5, "10.1.0.2")})
	})
	if got := watch.Take(); len(got) != 0 {
		t.Errorf("the same again touches %v", got)
	}
	update(func(tx *store.Tx) error {
		return tx.PutServices("c", false, []store.Service{service("c", 6, "10.1.0.3")})
	})
	counts("10.1.0.3")
	update(func(tx *store.Tx) error {
		return tx.PutServices("d", false, []store.Service{service("b", 9, "10.1.0.4")})
	})
	counts("10.1.0.3")
	update(func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(store.Endpoint{ID: "e", Network: "n", VNI: 7, MAC: store.MAC{2, 0, 0, 0, 0, 1}})
		return err
	})
	if s, err := db.EndpointSnapshot(7, "e"); err != nil || !s.Served || len(s.Services) != 0 {
		t.Errorf("beside one endpoint alone the tasks of a service cannot be told: %+v, %v", s, err)
	}
	silent := func(id store.HostID, since time.Time) {
		update(func(tx *store.Tx) error {
			return tx.PutPeer(store.Peer{Host: store.Host{ID: id, Epoch: 1}, DeadSince: since})
		})
	}
	silent("c", time.Now())
	counts("10.1.0.2")
	silent("b", time.Now())
	counts("10.1.0.3")
	update(func(tx *store.Tx) error { return tx.Revoke("c", true) })
	counts("10.1.0.2")
	before := uint64(0)
	if err := db.View(func(tx *store.Tx) error { before = tx.Version(store.HostVNI); return nil }); err != nil {
		t.Fatal(err)
	}
	self := db.Self().ID
	update(func(tx *store.Tx) error {
		return tx.PutServices(self, true, []store.Service{service(self, 1, "10.1.0.5")})
	})
	counts("10.1.0.5")
	if err := db.View(func(tx *store.Tx) error {
		if tx.Version(store.HostVNI) == before {
			t.Error("peers are not told")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	update(func(tx *store.Tx) error { return tx.PutServices(self, true, nil) })
	update(func(tx *store.Tx) error { return tx.ForgetPeer("b") })
	update(func(tx *store.Tx) error { return tx.Revoke("c", false) })
	update(func(tx *store.Tx) error { return tx.ForgetPeer("c") })
	counts()
}

func TestServiceCheck(t *testing.T) {
	good := store.Service{VNI: 1, VIP: netip.MustParseAddr("10.1.0.9"), Name: "web", Backends: []netip.Addr{netip.MustParseAddr("10.1.0.2")}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*store.Service){
		"no vni":       func(s *store.Service) { s.VNI = 0 },
		"no address":   func(s *store.Service) { s.VIP = netip.Addr{} },
		"long name":    func(s *store.Service) { s.Name = string(make([]byte, 1000)) },
		"many tasks":   func(s *store.Service) { s.Backends = make([]netip.Addr, 5000) },
		"zero task":    func(s *store.Service) { s.Backends = []netip.Addr{{}} },
		"multicast":    func(s *store.Service) { s.Backends = []netip.Addr{netip.MustParseAddr("224.0.0.1")} },
		"own loopback": func(s *store.Service) { s.Backends = []netip.Addr{netip.MustParseAddr("127.0.0.1")} },
	} {
		s := good
		change(&s)
		if s.Check() == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
