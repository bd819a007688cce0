package dataplane_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// TestFullMapIsSaidOnce: what the port program has no room for fails no pass, is told in
// the status and once in the log, and is neither a repair nor a difference, however often
// the kernel is read; when there is room it is there.
func TestFullMapIsSaidOnce(t *testing.T) {
	h := newHost(t)
	h.stop()
	var text bytes.Buffer
	u := underlay
	u.Program, u.Ethernet = true, true
	h.kernel.SetUnderlay(u)
	var full atomic.Bool
	full.Store(true)
	h.kernel.Before = func(_ int, op dataplane.Op) error {
		o, dest := op.Object.(dataplane.Dest)
		_, service := op.Object.(dataplane.Service)
		if op.Verb == dataplane.Put && full.Load() && (dest && o.Peer.IsValid() || service) {
			return fmt.Errorf("planted: %w", dataplane.ErrFull)
		}
		return nil
	}
	h.log = slog.New(slog.NewTextHandler(&text, nil))
	h.start()
	n := network(1)
	h.peers(1, 3)
	h.update(func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(endpoint(1, 2))
		return errors.Join(tx.PutNetwork(n), err,
			tx.PutServices("peer000", false, []store.Service{{VNI: 1, VIP: netip.MustParseAddr("10.1.0.250"), Proof: n.Proof("peer000")}}))
	})
	if err := h.loop.Sync(t.Context(), 1, endpoint(1, 2).ID); err != nil {
		t.Errorf("a call of Docker fails: %v", err)
	}
	status := func() (out dataplane.NetworkStatus) {
		for _, s := range h.loop.Status() {
			if s.VNI == 1 {
				out = s
			}
		}
		return out
	}
	for range 3 {
		h.kernel.Lost()
		before := status().LastPass
		h.within(5*time.Second, "another pass", func() error {
			if !status().LastPass.After(before) {
				return errors.New("none")
			}
			return nil
		})
		h.settled()
		if s := status(); s.Err != "" || s.Full["dest"] != 3 || s.Full["service"] != 1 {
			t.Errorf("status %+v, want 3 destinations and a service without room, and no failure", s)
		}
	}
	full.Store(false)
	h.kernel.Lost()
	h.within(5*time.Second, "there is room", func() error {
		if s := status(); s.Full != nil {
			return fmt.Errorf("%v", s.Full)
		}
		return nil
	})
	h.settled()
	h.stop() // the log is complete
	if all := h.loop.Stats().Repaired; len(all) != 0 {
		t.Errorf("counted as repaired: %v", all)
	}
	if got := strings.Count(text.String(), "maps are full"); got != 1 || strings.Contains(text.String(), "repaired") {
		t.Errorf("the log tells of full maps %d times, want once, and of no repair:\n%s", got, text.String())
	}
	s, err := h.db.Snapshot(1)
	if err != nil {
		t.Fatal(err)
	}
	want, err := dataplane.PlanNetwork(s, u)
	if err != nil {
		t.Fatal(err)
	}
	have, err := h.kernel.Read(t.Context(), 1)
	if ops := dataplane.Diff(want, have); err != nil || len(ops) > 0 {
		t.Errorf("with room there is still to do: %v, %v", ops, err)
	}
}
