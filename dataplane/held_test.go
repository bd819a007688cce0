package dataplane_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// ways are networks of each way to the peers, and the underlay where they take it.
func ways() map[string]func(*host) store.Network {
	kind := func(mode string, encrypted, near, nat bool) func(*host) store.Network {
		return func(h *host) store.Network {
			if nat {
				h.public = netip.MustParseAddr("198.51.100.1")
			}
			u := underlay
			u.Program, u.Ethernet = true, true
			if near {
				u.Prefix = netip.PrefixFrom(u.Address, 24).Masked()
			}
			h.kernel.SetUnderlay(u)
			n := network(1)
			n.Mode, n.Encrypted = mode, encrypted
			if err := h.db.SetTunnel(kerneltest.TunnelOf("self", 1)); err != nil {
				h.t.Fatal(err)
			}
			return n
		}
	}
	return map[string]func(*host) store.Network{
		"vxlan":                  kind(store.ModeVXLAN, false, false, false),
		"routed":                 kind(store.ModeRouted, false, true, false),
		"routed through tunnels": kind(store.ModeRouted, false, false, false),
		"routed behind a NAT":    kind(store.ModeRouted, false, false, true),
		"encrypted":              kind(store.ModeVXLAN, true, false, false),
	}
}

// holds returns what the kernel holds for the host and for network 1.
func (h *host) holds() (all [2]dataplane.Plan) {
	h.t.Helper()
	for v := range all {
		var err error
		if all[v], err = h.kernel.Read(h.t.Context(), store.VNI(v)); err != nil {
			h.t.Fatal(err)
		}
	}
	return all
}

// serve makes a peer tell of a service on network 1 whose tasks are this host's endpoint
// and those of n peers.
func (h *host) serve(teller store.HostID, n int) {
	h.t.Helper()
	all := []netip.Addr{endpoint(1, 2).IPv4.Addr()}
	for i := range n {
		all = append(all, endpoint(1, 100+i).IPv4.Addr())
	}
	h.update(func(tx *store.Tx) error {
		return tx.PutServices(teller, false, []store.Service{{VNI: 1, VIP: netip.MustParseAddr("10.1.255.1"), Backends: all}})
	})
}

// held waits until the status says why deletions wait on the host and on network 1.
func (h *host) held(want string) {
	h.t.Helper()
	h.within(5*time.Second, "held", func() error {
		for _, s := range h.loop.Status() {
			if s.Held != want {
				return fmt.Errorf("vni %d: held is %q, not %q", s.VNI, s.Held, want)
			}
		}
		return nil
	})
}

// unchanged fails if the kernel lacks anything that it held, or has it otherwise.
func (h *host) unchanged(when string, before [2]dataplane.Plan) {
	h.t.Helper()
	for v, have := range h.holds() {
		if !maps.Equal(have, before[v]) {
			h.t.Errorf("%s, vni %d:\n%v", when, v, dataplane.Diff(before[v], have))
		}
	}
}

// silence makes the first peers silent, and hides some of them.
func (h *host) silence(silent, hidden int) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		all, err := tx.Peers()
		if err != nil {
			return err
		}
		for i, p := range all[:silent] {
			p.Hidden, p.DeadSince = i < hidden, time.Unix(1, 0)
			if err := tx.PutPeer(p); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestSilentPeersAreNotRemovedAtOnce: when most peers fall silent together it is more
// likely ours that is cut off; all that leads to and from them stays until they are
// forgotten. What somebody wants to go, goes.
func TestSilentPeersAreNotRemovedAtOnce(t *testing.T) {
	for name, way := range ways() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			n := way(h)
			h.peersOf(n, 30)
			h.serve("peer029", 30)
			h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
			h.settled()
			before := h.holds()
			for _, hidden := range []int{5, 20} { // not all are hidden in the same moment
				h.silence(20, hidden)
				h.settled()
				h.unchanged(fmt.Sprintf("%d of 20 silent peers are hidden", hidden), before)
			}
			h.held("20 of 30 peers are silent at once; their entries stay until they are back or forgotten")
			h.update(func(tx *store.Tx) error { return errors.Join(tx.Revoke("peer000", true), tx.ForgetPeer("peer001")) })
			h.settled()
			for v, have := range h.holds() {
				for i, id := range []store.HostID{"peer000", "peer001", "peer002"} {
					key := kerneltest.TunnelOf(id, 1).Keys[0].String()
					there := strings.Contains(have.String(), fmt.Sprintf("192.0.2.%d", 10+i)) || strings.Contains(have.String(), key)
					if there != (i == 2) {
						t.Errorf("vni %d: %s is there: %t", v, id, there)
					}
				}
			}
			h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(n.ID) })
			h.settled()
			if have := h.holds(); len(have[0])+len(have[1]) > 0 {
				t.Errorf("of a network that was deleted is left: %v", have)
			}
			h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
			// Forgetting is the second source.
			h.update(func(tx *store.Tx) error {
				for i := range 20 {
					if err := tx.ForgetPeer(store.HostID(fmt.Sprintf("peer%03d", i))); err != nil {
						return err
					}
				}
				return nil
			})
			h.settled()
			h.held("")
		})
	}
}

// The host keeps whom one of its networks keeps, however many others it hears.
func TestHostKeepsWhomANetworkKeeps(t *testing.T) {
	h := newHost(t)
	h.peersOf(network(2), 42)
	h.peersOf(network(1), 12) // the first of them, which leave the other network
	h.update(func(tx *store.Tx) error { return errors.Join(tx.PutNetwork(network(1)), tx.PutNetwork(network(2))) })
	h.settled()
	before := h.holds()
	h.silence(12, 12)
	h.settled()
	h.unchanged("all peers of one network are silent", before)
}

// A few silent peers, or fewer than half, are gone.
func TestFewSilentPeersAreRemoved(t *testing.T) {
	for _, c := range [][2]int{{30, 15}, {12, 10}} {
		h := newHost(t)
		h.peers(1, c[0])
		h.update(func(tx *store.Tx) error { return tx.PutNetwork(network(1)) })
		h.silence(c[1], c[1])
		h.settled()
		have := h.holds()
		if n := countVTEPs(have[1]); n != c[0]-c[1] || strings.Count(have[0][dataplane.Key{Kind: dataplane.KindSet, Name: "weft-peers4"}].String(), ".") != 3*n {
			t.Errorf("%d of %d are silent: %d VTEPs are left, %v", c[1], c[0], n, have[0])
		}
	}
}

func countVTEPs(p dataplane.Plan) (n int) {
	for _, o := range p {
		if f, ok := o.(dataplane.FDB); ok && f.MAC.IsZero() {
			n++
		}
	}
	return n
}

// TestNothingOfPeersGoesBeforeSync: a host that lost its database knows no peers yet; what
// the kernel holds for them stays until they were heard.
func TestNothingOfPeersGoesBeforeSync(t *testing.T) {
	for name, way := range ways() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			n := way(h)
			h.peersOf(n, 3)
			h.serve("peer000", 3)
			h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
			here := endpoint(1, 2)
			for _, here.Sandbox = range []string{"", "/sandbox"} { // Docker has taken it
				h.update(func(tx *store.Tx) error { _, err := tx.PutEndpoint(here); return err })
				h.settled()
			}
			h.stop()
			before := h.holds()
			h.update(func(tx *store.Tx) error { return tx.ForgetPeer("peer002") })
			var synced atomic.Bool
			h.inSync = synced.Load
			h.start()
			<-h.loop.Ready()
			h.unchanged("one peer is not known yet", before)
			h.update(func(tx *store.Tx) error { return errors.Join(tx.ForgetPeer("peer000"), tx.ForgetPeer("peer001")) })
			if err := h.loop.Sync(t.Context(), 1, ""); err != nil {
				t.Error(err)
			}
			h.unchanged("no peer is known yet", before)
			if err := h.loop.Sync(t.Context(), 1, here.ID); err != nil {
				t.Error(err)
			}
			h.unchanged("after a call of Docker's", before)
			h.held("the hosts have not been heard yet; entries of unknown peers stay until then")
			h.update(func(tx *store.Tx) error { return tx.DeleteEndpoint(here.Network, here.ID) })
			if err := h.loop.Sync(t.Context(), 1, ""); err != nil {
				t.Error(err)
			}
			key := dataplane.Key{Kind: dataplane.KindService, IP: netip.MustParseAddr("10.1.255.1")}
			if service := h.holds()[1][key].(dataplane.Service); strings.Count(service.Backends, ",") != 2 {
				t.Errorf("without the task of this host: %v", service)
			}
			synced.Store(true)
			for v := range store.VNI(2) { // else in five seconds
				if err := h.loop.Sync(t.Context(), v, ""); err != nil {
					t.Error(err)
				}
			}
			h.settled()
			for v, have := range h.holds() {
				if text := have.String(); strings.Contains(text, "192.0.2.10") || strings.Contains(text, "services") {
					t.Errorf("vni %d: peers that nobody told of are left: %v", v, text)
				}
			}
		})
	}
}

// What was removed by somebody's will does not wait.
func TestRevokedPeersGoBeforeSync(t *testing.T) {
	for name, way := range ways() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			var synced atomic.Bool
			h.inSync = synced.Load
			h.restart()
			n := way(h)
			h.peersOf(n, 3)
			h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
			h.settled()
			h.update(func(tx *store.Tx) error { return errors.Join(tx.Revoke("peer000", true), tx.ForgetPeer("peer001")) })
			h.held("the hosts have not been heard yet; entries of unknown peers stay until then")
			host := h.holds()[0].String()
			for i, id := range []store.HostID{"peer000", "peer001", "peer002"} {
				key := kerneltest.TunnelOf(id, 1).Keys[0].String()
				there := strings.Contains(host, fmt.Sprintf("192.0.2.%d", 10+i)) || strings.Contains(host, key)
				if there != (i > 0) {
					t.Errorf("%s is there: %t", id, there)
				}
			}
			h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(n.ID) })
			h.settled()
			if have := h.holds(); len(have[0])+len(have[1]) > 0 {
				t.Errorf("of a network that was deleted is left: %v", have)
			}
		})
	}
}
