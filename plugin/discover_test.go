package main

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// testProcess is one that answers calls with the settings' defaults.
func testProcess() *process {
	return &process{set: settings{scope: "local"}, swarm: newDiscovery(), term: openTerm("/nonexistent/term", "", slog.New(slog.DiscardHandler))}
}

func TestDiscovery(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "00"})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	d := newDiscovery()
	hear := func(gone bool, body string) error {
		_, err := d.call("NetworkDriver.Discover", gone).serve(t.Context(), nil, []byte(body))
		return err
	}
	node := func(address, self string) string {
		return `{"DiscoveryType":1,"DiscoveryData":{"Address":"` + address + `","BindAddress":"","Self":` + self + `}}`
	}
	known := func() (text []string) {
		t.Helper()
		if _, err := saveNodes(t.Context(), db, d.take()); err != nil {
			t.Fatal(err)
		}
		s := &services{db: db}
		r, err := s.swarm()
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, "self "+r.Self.String())
		for _, a := range r.Discovered {
			word := ""
			if slices.Contains(r.Gone, a) {
				word = " gone"
			}
			text = append(text, a.String()+word)
		}
		return text
	}
	for _, step := range []struct {
		gone bool
		body string
		want []string
	}{
		{false, node("192.0.2.1", "true"), []string{"self 192.0.2.1"}},
		{false, node("192.0.2.2", "false"), []string{"self 192.0.2.1", "192.0.2.2"}},
		{false, node("192.0.2.3", "false"), []string{"self 192.0.2.1", "192.0.2.2", "192.0.2.3"}},
		{true, node("192.0.2.3", "false"), []string{"self 192.0.2.1", "192.0.2.2", "192.0.2.3 gone"}},
		{true, node("192.0.2.9", "false"), []string{"self 192.0.2.1", "192.0.2.2", "192.0.2.3 gone"}},
		{false, node("192.0.2.3", "false"), []string{"self 192.0.2.1", "192.0.2.2", "192.0.2.3"}},
		{false, node("192.0.2.111", "true"), []string{"self 192.0.2.111", "192.0.2.2", "192.0.2.3"}}, // renumbered
		{false, `{"DiscoveryType":2,"DiscoveryData":{}}`, []string{"self 192.0.2.111", "192.0.2.2", "192.0.2.3"}},
	} {
		if err := hear(step.gone, step.body); err != nil {
			t.Errorf("%s: %v", step.body, err)
		}
		if got := known(); !slices.Equal(got, step.want) {
			t.Errorf("after %s (gone %t): %v, want %v", step.body, step.gone, got, step.want)
		}
	}
	for _, body := range []string{"{}", "", node("ten", "false"), node("0.0.0.0", "false"), node("224.0.0.1", "false"), `{"DiscoveryType":1}`, `{"DiscoveryType":1,"DiscoveryData":[]}`} {
		before := known()
		if err := hear(false, body); body != "{}" && (err == nil || !strings.Contains(err.Error(), "NetworkDriver.Discover")) {
			t.Errorf("%q: error %v", body, err)
		}
		if got := known(); !slices.Equal(got, before) {
			t.Errorf("%q changed %v to %v", body, before, got)
		}
	}
	// The clock is set a year ahead and back: nobody is forgotten.
	in := func(d time.Duration, address string) store.Node {
		return store.Node{Address: netip.MustParseAddr(address), Heard: time.Now().Add(d)}
	}
	const day = 24 * time.Hour
	all := []string{"self 192.0.2.111", "192.0.2.2", "192.0.2.3"}
	for _, off := range []time.Duration{365 * day, 0, -365 * day, 0} {
		for range 2 {
			d.add(in(off, "192.0.2.3"))
			if got := known(); !slices.Equal(got, all) {
				t.Errorf("with the clock off by %s: %v, want %v", off, got, all)
			}
		}
	}
	// What nobody spoke of for long, while others were, is forgotten; this host is not.
	d.add(in(20*day, "192.0.2.4"))
	d.add(in(forgetNodes+day, "192.0.2.4"))
	if got := known(); !slices.Equal(got, []string{"self 192.0.2.111", "192.0.2.4"}) {
		t.Errorf("a month later: %v", got)
	}
}

// The tie to other hosts comes up when Docker tells of some.
func TestDiscoveryWakesTheCluster(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "00"})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	p := &process{}
	c, d := newCluster(p, db, store.Identity{}, nil, nil), newDiscovery()
	if c.expects() || !c.inSync() {
		t.Error("a host alone waits for others")
	}
	go func() { _ = d.run(t.Context(), db, c, slog.New(slog.DiscardHandler)) }()
	d.add(store.Node{Address: netip.MustParseAddr("192.0.2.1"), Self: true, Heard: time.Now()})
	d.add(store.Node{Address: netip.MustParseAddr("192.0.2.2"), Heard: time.Now()})
	select {
	case <-c.others:
	case <-time.After(10 * time.Second):
		t.Fatal("the cluster does not hear of the others")
	}
	// And when the plugin starts again.
	again := newCluster(p, db, store.Identity{}, nil, nil)
	go func() { _ = newDiscovery().run(t.Context(), db, again, slog.New(slog.DiscardHandler)) }()
	select {
	case <-again.others:
	case <-time.After(10 * time.Second):
		t.Fatal("the others are forgotten at a restart")
	}
}
