package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"testing/synctest"
)

// A plugin that was started anew on Swarm's leader is asked for its capabilities once or
// twice, and of nothing else: what Docker has not asked for since then is no less there.
func TestTermThatBeginsWithThePluginIsInDoubt(t *testing.T) {
	path := filepath.Join(t.TempDir(), termFile)
	synctest.Test(t, func(t *testing.T) { termInDoubt(t, path) })
}

func termInDoubt(t *testing.T, path string) {
	p := testProcess()
	ask := func(method string) uint64 {
		t.Helper()
		for _, c := range p.routes() {
			if c.method == method {
				if _, err := c.serve(context.Background(), nil, nil); err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // for the file
				return p.term.now.Load()
			}
		}
		t.Fatalf("%s is not answered", method)
		return 0
	}
	const driver, ipam = "NetworkDriver.GetCapabilities", "IpamDriver.GetCapabilities"
	restart := func(parent string) {
		t.Helper()
		p.term = openTerm(path, parent, slog.New(slog.DiscardHandler))
	}
	expect := func(when string, doubt bool) {
		t.Helper()
		if got := p.term.doubt.Load(); got != doubt {
			t.Errorf("%s: in doubt is %v, want %v", when, got, doubt)
		}
	}
	restart("one")
	expect("before Docker asks", true)
	first := ask(driver)
	if again := ask(driver); again == first || first == 0 {
		t.Errorf("terms %x and %x", first, again)
	}
	expect("a manager asks twice", true)
	restart("one") // a child that died meanwhile
	ask(driver)
	expect("another child of the same start", true)
	ask(ipam)
	expect("the start is over", true)
	leads := ask(driver)
	expect("this host becomes the leader", false)
	ask(ipam)
	restart("one")
	if p.term.now.Load() != leads {
		t.Errorf("the next child is in term %x, not %x", p.term.now.Load(), leads)
	}
	expect("the next child", false)
	ask(driver)
	expect("it leads again", false)
	restart("two")
	ask(driver)
	expect("the plugin is started anew", true)
}
