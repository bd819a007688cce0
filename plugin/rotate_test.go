package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// A change of this host's key takes no step while a peer's plugin is silent, at whatever
// step it falls silent: its kernel goes on with the keys that it has. Once it is back, or
// hidden, the change goes on to its end.
func TestChangeOfKeyWaitsForSilentPeers(t *testing.T) {
	for _, c := range []struct {
		name string
		at   wgKeyState // what the peer falls silent at; both keys are there, of the moment
		back func(store.Peer) store.Peer
	}{
		{"before it begins", wgKeyState{Keys: make([]wgKey, 1)}, alive},
		{"hidden before it begins", wgKeyState{Keys: make([]wgKey, 1)}, hidden},
		{"before traffic moves", wgKeyState{Keys: make([]wgKey, 2)}, alive},
		{"before the old key goes", wgKeyState{Keys: make([]wgKey, 2), Last: true}, alive},
		{"hidden before the old key goes", wgKeyState{Keys: make([]wgKey, 2), Last: true}, hidden},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, peer, told := newRotator(t)
				for i := range c.at.Keys {
					k, err := newWGKey()
					if err != nil {
						t.Fatal(err)
					}
					c.at.Keys[i] = k
				}
				if err := r.keys.put(r.db, c.at); err != nil {
					t.Fatal(err)
				}
				silent := peer
				silent.DeadSince = time.Now()
				putPeer(t, r.db, silent)
				over := make(chan error, 1)
				go func() {
					if !c.at.rotates() {
						if err := r.begin(t.Context()); err != nil {
							over <- err
							return
						}
					}
					over <- r.finish(t.Context())
				}()
				time.Sleep(90 * time.Second)
				synctest.Wait()
				if got := r.keys.state(); !slices.Equal(got.Keys, c.at.Keys) || got.Last != c.at.Last {
					t.Errorf("with a silent peer the change went on to %d keys, last=%t", len(got.Keys), got.Last)
				}
				if n := strings.Count(told.String(), "key waits"); n != 1 || !strings.Contains(told.String(), "beta: its plugin is silent") {
					t.Errorf("what is waited for is told %d times:\n%s", n, told)
				}
				putPeer(t, r.db, c.back(peer))
				if err := <-over; err != nil {
					t.Fatal(err)
				}
				if got := r.keys.state(); got.rotates() || got.Keys[0] == c.at.Keys[0] {
					t.Errorf("the change did not come to its end: %d keys", len(got.Keys))
				}
			})
		})
	}
}

func alive(p store.Peer) store.Peer { return p }

func hidden(p store.Peer) store.Peer {
	p.DeadSince, p.Hidden = time.Now(), true
	return p
}

// A change that would begin while a peer changes its own key waits, and says so once.
func TestChangeOfKeyWaitsForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, peer, told := newRotator(t)
		peer.Tunnel.Keys = append(peer.Tunnel.Keys, store.WGKey{8})
		putPeer(t, r.db, peer)
		over := make(chan error, 1)
		go func() { over <- r.begin(t.Context()) }()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(r.keys.state().Keys); n != 1 {
			t.Errorf("it began: %d keys", n)
		}
		if n := strings.Count(told.String(), "beta: it changes its own key"); n != 1 {
			t.Errorf("what is waited for is told %d times:\n%s", n, told)
		}
		peer.Tunnel.Keys = peer.Tunnel.Keys[1:]
		putPeer(t, r.db, peer)
		if err := <-over; err != nil || len(r.keys.state().Keys) != 2 {
			t.Errorf("it did not begin: %v", err)
		}
	})
}

// newRotator returns the one of a host with an encrypted network that a peer runs, too,
// and what it logs. The kernel has no device, so nobody ever answers.
func newRotator(t *testing.T) (*rotator, store.Peer, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	db, err := store.Open(filepath.Join(dir, "weft.db"), store.Host{ID: "a", Name: "alpha"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	keys, err := openWGKeys(filepath.Join(dir, wgKeyFile), 4798)
	if err != nil {
		t.Fatal(err)
	}
	n := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Encrypted: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	peer := store.Peer{Host: store.Host{ID: "b", Name: "beta", Epoch: 1, Tunnel: store.Tunnel{Port: 4798, Keys: []store.WGKey{{9}}}}}
	putPeer(t, db, peer)
	if err := db.Update(t.Context(), func(tx *store.Tx) error {
		if err := tx.PutNetwork(n); err != nil {
			return err
		}
		shared := n.Shared()
		shared.Proof = n.Proof("b")
		return tx.MergeNetworks("b", 1, 1, []store.SharedNetwork{shared})
	}); err != nil {
		t.Fatal(err)
	}
	if host, err := db.HostSnapshot(); err != nil || len(host.Tunnels) != 1 {
		t.Fatalf("the peer runs no network of this host: %v", err)
	}
	var told bytes.Buffer
	log := slog.New(slog.NewTextHandler(&told, nil))
	return &rotator{keys: keys, db: db, loop: dataplane.NewLoop(db, nil, nil, nil, log), log: log,
		settled: func(context.Context) error { return nil },
		taken:   func(context.Context, store.HostID, store.Tunnel) (bool, error) { return true, nil },
		tunnels: func(context.Context) ([]kernel.Tunnel, error) { return nil, nil }}, peer, &told
}

func putPeer(t *testing.T, db *store.DB, p store.Peer) {
	t.Helper()
	if err := db.Update(t.Context(), func(tx *store.Tx) error { return tx.PutPeer(p) }); err != nil {
		t.Fatal(err)
	}
}

// The key is changed once it is older than the age, and never at age zero; its file is for
// root alone before and after.
func TestKeyChangesByAge(t *testing.T) {
	for age, changes := range map[time.Duration]bool{24 * time.Hour: true, 0: false} {
		t.Run(age.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _, told := newRotator(t)
				first := r.keys.state().Keys[0]
				private := func() {
					t.Helper()
					if st, err := os.Stat(r.keys.path); err != nil || st.Mode() != 0o600 {
						t.Errorf("mode of the key's file: %v, %v", st.Mode(), err)
					}
				}
				private()
				ctx, stop := context.WithCancel(t.Context())
				over := make(chan error, 1)
				go func() { over <- r.run(ctx, age) }()
				time.Sleep(24 * time.Hour)
				synctest.Wait()
				if got := r.keys.state(); got.rotates() || got.Keys[0] != first {
					t.Error("it changes before its time")
				}
				time.Sleep(agePoll + time.Minute)
				synctest.Wait()
				if got := r.keys.state(); got.rotates() || (got.Keys[0] != first) != changes {
					t.Errorf("a little later there are %d keys, another one: %t, want %t", len(got.Keys), got.Keys[0] != first, changes)
				}
				private()
				time.Sleep(23 * time.Hour)
				stop()
				if err := <-over; err != nil {
					t.Error(err)
				}
				if n := strings.Count(told.String(), "key was changed"); changes && n != 1 || !changes && n != 0 {
					t.Errorf("it changed %d times:\n%s", n, told)
				}
			})
		})
	}
}

// What is asked for before a change begins is done with it, or once after it; while it
// runs, more is refused with the reason.
func TestChangeOfKeyIsAskedForTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, peer, told := newRotator(t)
		r.ask = make(chan struct{}, 1)
		s := &services{rotator: r}
		for range 3 {
			if err := s.changeKey(); err != nil {
				t.Errorf("before it begins: %v", err)
			}
		}
		ctx, stop := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- r.run(ctx, 0) }()
		time.Sleep(rotatePoll)
		synctest.Wait()
		if err := s.changeKey(); !r.keys.state().rotates() || err == nil || !strings.Contains(err.Error(), "is being changed already") {
			t.Errorf("while it runs: %v", err)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := strings.Count(told.String(), "key was changed"); n != 1 || r.keys.state().rotates() {
			t.Errorf("it changed %d times:\n%s", n, told)
		}
		// One that waits for a peer has not begun: what is asked for now is done once after it.
		peer.DeadSince = time.Now()
		putPeer(t, r.db, peer)
		for range 3 {
			if err := s.changeKey(); err != nil {
				t.Errorf("while it waits: %v", err)
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		putPeer(t, r.db, alive(store.Peer{Host: peer.Host}))
		time.Sleep(5 * time.Minute)
		stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
		if n := strings.Count(told.String(), "key was changed"); n != 3 || r.keys.state().rotates() {
			t.Errorf("after the peer is back it changed %d times in all:\n%s", n, told)
		}
	})
}

// A step is not taken before this host's kernel and all living peers have acted on the
// last one, however long that takes, and who is waited for is told once. A peer that lives
// and cannot be asked holds each step up for a minute.
func TestChangeOfKeyWaitsForWhoIsBusy(t *testing.T) {
	for name, who := range map[string]struct {
		busy string
		err  error // of the question; then the change goes on by itself in time
	}{
		"a peer":        {busy: "beta: it has not taken the last step yet"},
		"this host":     {busy: "this host: it has not taken the last step yet"},
		"a deaf peer":   {busy: "beta: whether it has taken the last step cannot be asked: no route", err: errors.New("no route")},
		"nobody at all": {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _, told := newRotator(t)
				var free atomic.Bool
				free.Store(who.busy == "")
				r.taken = func(_ context.Context, _ store.HostID, tell store.Tunnel) (bool, error) {
					if now, err := r.keys.tunnel(); err != nil || !tell.Equal(now) {
						t.Errorf("asked for another step than the last: %v", err)
					}
					if !free.Load() && who.err != nil {
						return false, who.err
					}
					return free.Load() || !strings.HasPrefix(who.busy, "beta"), nil
				}
				r.settled = func(ctx context.Context) error {
					if !free.Load() && strings.HasPrefix(who.busy, "this") {
						<-ctx.Done()
					}
					return ctx.Err()
				}
				if err := r.begin(t.Context()); err != nil {
					t.Fatal(err)
				}
				first := r.keys.state()
				over := make(chan error, 1)
				go func() { over <- r.finish(t.Context()) }()
				after := func(d time.Duration) wgKeyState {
					time.Sleep(d)
					synctest.Wait()
					return r.keys.state()
				}
				at := after(50 * time.Second)
				if who.busy == "" && at.rotates() {
					t.Errorf("with nobody busy it is at %+v", at)
				}
				if who.busy != "" && (at.Last != first.Last || !slices.Equal(at.Keys, first.Keys)) {
					t.Errorf("it goes on: from %+v to %+v", first, at)
				}
				if n := strings.Count(told.String(), "key waits"); who.busy == "" && n != 0 || who.busy != "" && (n != 1 || !strings.Contains(told.String(), who.busy)) {
					t.Errorf("who is waited for is told %d times:\n%s", n, told)
				}
				if done := !after(10 * time.Minute).rotates(); done != (who.busy == "" || who.err != nil) {
					t.Errorf("ten minutes later its end is reached: %t", done)
				}
				free.Store(true)
				if err := <-over; err != nil || r.keys.state().rotates() {
					t.Errorf("in the end: %+v, %v", r.keys.state(), err)
				}
			})
		})
	}
}
