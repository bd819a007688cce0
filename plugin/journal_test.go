package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

const (
	usedNetwork  = "1111111111111111111111111111111111111111111111111111111111111111"
	newNetwork   = "2222222222222222222222222222222222222222222222222222222222222222"
	goneNetwork  = "3333333333333333333333333333333333333333333333333333333333333333"
	joinedOne    = "4444444444444444444444444444444444444444444444444444444444444444"
	unjoinedOne  = "5555555555555555555555555555555555555555555555555555555555555555"
	cutOffLeave  = "6666666666666666666666666666666666666666666666666666666666666666"
	cutOffDelete = "7777777777777777777777777777777777777777777777777777777777777777"
)

// TestJournalEndsWhatWasCutOff: clean-up is done, what a cut-off call made is
// removed, and what is in use stays.
func TestJournalEndsWhatWasCutOff(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "h"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	log := slog.New(slog.DiscardHandler)
	svc := &services{db: db, driver: driver.New(driver.Config{DB: db, Log: log}), ipam: ipam.New(db, ipam.Config{})}
	used, unused := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.9.0.0/24")
	pools := map[string]netip.Prefix{"WeftLocal/10.1.0.0/24": used, "WeftLocal/10.9.0.0/24": unused}
	fill(t, db, pools)

	dir := filepath.Join(t.TempDir(), journalFolder)
	before, now := openJournal(dir, log), openJournal(dir, log)
	keep := func(j *journal, method, body string) { _ = j.begin(method, []byte(body)) }
	ids := func(network, endpoint string) string {
		return `{"NetworkID":"` + network + `","EndpointID":"` + endpoint + `"}`
	}
	keep(before, "NetworkDriver.CreateNetwork", ids(usedNetwork, ""))
	keep(before, "NetworkDriver.CreateNetwork", ids(newNetwork, ""))
	keep(before, "NetworkDriver.DeleteNetwork", ids(goneNetwork, ""))
	keep(before, "NetworkDriver.CreateEndpoint", ids(usedNetwork, joinedOne))
	keep(before, "NetworkDriver.CreateEndpoint", ids(usedNetwork, unjoinedOne))
	keep(before, "NetworkDriver.Leave", ids(usedNetwork, cutOffLeave))
	keep(before, "NetworkDriver.DeleteEndpoint", ids(usedNetwork, cutOffDelete))
	keep(before, "NetworkDriver.DeleteEndpoint", `{"NetworkID":`) // no JSON: nothing is kept
	keep(before, "IpamDriver.RequestPool", `{}`)
	keep(before, "IpamDriver.ReleaseAddress", `{"PoolID":"WeftLocal/10.1.0.0/24","Address":"10.1.0.9"}`)
	before.begin("NetworkDriver.DeleteNetwork", []byte(ids(usedNetwork, "")))() // came to its end
	if err := os.WriteFile(filepath.Join(dir, before.boot+"-99999999"), []byte(`{"method":"Netw`), 0o600); err != nil {
		t.Fatal(err)
	}
	keep(now, "NetworkDriver.DeleteNetwork", ids(usedNetwork, "")) // in flight, of this process
	now.finish(t.Context(), svc)

	var got []string
	if err := db.View(func(tx *store.Tx) error {
		nets, _ := tx.Networks()
		for _, n := range nets {
			got = append(got, "network "+string(n.ID[:1]))
		}
		eps, _ := tx.AllEndpoints()
		for _, e := range eps {
			text := "endpoint " + string(e.ID[:1])
			if e.Left {
				text += " left"
			}
			got = append(got, text)
		}
		all, _ := tx.Pools()
		for _, p := range all {
			leases, _ := tx.Leases(p.ID)
			got = append(got, "pool "+p.Prefix.String())
			for _, l := range leases {
				if l.Freed.IsZero() {
					got = append(got, "lease "+l.Address.String())
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if text, want := strings.Join(got, ", "), "network 1, endpoint 4, endpoint 6 left, pool 10.1.0.0/24, lease 10.1.0.1"; text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("files left: %v %v; want the one in flight", files, err)
	}
}

// fill makes the records that the calls are about.
func fill(t *testing.T, db *store.DB, pools map[string]netip.Prefix) {
	t.Helper()
	err := db.Update(context.Background(), func(tx *store.Tx) error {
		for i, id := range []store.NetworkID{usedNetwork, newNetwork, goneNetwork} {
			n := store.Network{ID: id, VNI: store.VNI(5001 + i), Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(1 + i), 0, 0}), 24)}}}
			if err := tx.PutNetwork(n); err != nil {
				return err
			}
		}
		for id, sandbox := range map[store.EndpointID]string{joinedOne: "/s", unjoinedOne: "", cutOffLeave: "/s", cutOffDelete: "/s"} {
			if _, err := tx.PutEndpoint(store.Endpoint{ID: id, Network: usedNetwork, VNI: 5001, Sandbox: sandbox}); err != nil {
				return err
			}
		}
		for id, prefix := range pools {
			if err := tx.PutPool(store.Pool{ID: id, Space: ipam.LocalSpace, Prefix: prefix, Refs: 1}); err != nil {
				return err
			}
		}
		for _, a := range []string{"10.1.0.1", "10.1.0.9"} {
			if err := tx.PutLease(store.Lease{Pool: "WeftLocal/10.1.0.0/24", Address: netip.MustParseAddr(a), Kind: "auto"}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
