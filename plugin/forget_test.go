package main

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// A network that is forgotten takes its pool along, unless Docker has given it to another.
func TestForgetTakesThePoolAlong(t *testing.T) {
	for _, pools := range []bool{true, false} {
		db, err := store.Open(filepath.Join(t.TempDir(), databaseFile), store.Host{ID: "self"})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		log := slog.New(slog.DiscardHandler)
		s := &services{db: db, log: log, ipam: ipam.New(db, ipam.Config{}), driver: driver.New(driver.Config{DB: db, Sync: wellSyncer{}, Log: log})}
		if _, err := s.ipam.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: ipam.LocalSpace, Pool: "10.32.0.0/16"}); err != nil {
			t.Fatal(err)
		}
		const id = "aa11aa11aa11"
		if err := db.Update(t.Context(), func(tx *store.Tx) error {
			return tx.PutNetwork(store.Network{ID: id, VNI: 4096, Mode: store.ModeVXLAN, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.32.0.0/16")}}})
		}); err != nil {
			t.Fatal(err)
		}
		r, err := s.forget(t.Context(), id, pools)
		if err != nil || r.VNI != 4096 || slices.Contains(r.Pools, "10.32.0.0/16") != pools {
			t.Errorf("answered %+v, %v", r, err)
		}
		left, err := s.ipam.Status()
		if err != nil || (len(left) == 0) != pools {
			t.Errorf("pools too %v, and left are %+v, %v", pools, left, err)
		}
		if _, err := s.forget(t.Context(), id, pools); err == nil {
			t.Error("a network that is not there was forgotten")
		}
	}
}

func TestNetworkIsFoundByVNIThenID(t *testing.T) {
	all := []store.Network{{ID: "4097aa", VNI: 4096}, {ID: "4097bb", VNI: 5000}, {ID: "c0", VNI: 4097}}
	for name, want := range map[string]string{"4097": "c0", "4097a": "4097aa", "5000": "4097bb", "c": "c0",
		"40": "2 networks begin with", "4098": "not found", "": "not found", "app": "not found"} {
		n, err := match(all, name)
		if err != nil && !strings.Contains(err.Error(), want) || err == nil && string(n.ID) != want {
			t.Errorf("%q: %s, %v; want %s", name, n.ID, err, want)
		}
	}
}
