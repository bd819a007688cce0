package kernel_test

import (
	"slices"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// encryptedHost returns the plan of a host with an encrypted network, and the keys of its
// peers.
func encryptedHost(t *testing.T) (dataplane.Plan, []wgtypes.Key) {
	t.Helper()
	examples := kerneltest.Examples()
	e := examples[slices.IndexFunc(examples, func(e kerneltest.Example) bool { return e.Name == "encrypted" })]
	var keys []wgtypes.Key
	for _, o := range e.HostPlan().Sorted() {
		if p, ok := o.(dataplane.TunnelPeer); ok {
			keys = append(keys, wgtypes.Key(p.Public))
		}
	}
	if len(keys) == 0 {
		t.Fatal("the example has no peers")
	}
	return e.HostPlan(), keys
}

// A peer to which somebody gave a preshared key or another keepalive is repaired: with
// the one no handshake succeeds, without the other NAT on the way closes.
func TestPeerIsRepaired(t *testing.T) {
	k := newKernel(t, kernel.Config{})
	want, keys := encryptedHost(t)
	passHost(t, k, want)
	if ops := passHost(t, k, want); len(ops) != 0 {
		t.Fatalf("still to do: %v", ops)
	}
	secret, never := wgtypes.Key{7}, time.Duration(0)
	for name, c := range map[string]wgtypes.PeerConfig{
		"preshared key": {PublicKey: keys[0], PresharedKey: &secret},
		"keepalive":     {PublicKey: keys[0], PersistentKeepaliveInterval: &never},
	} {
		k.Configure(t, "weftw0", wgtypes.Config{Peers: []wgtypes.PeerConfig{c}})
		ops := passHost(t, k, want)
		p := k.Peer(t, "weftw0", keys[0])
		if len(ops) != 1 || p.PresharedKey != (wgtypes.Key{}) || p.PersistentKeepaliveInterval != 25*time.Second {
			t.Errorf("%s: after %v the peer has preshared key %s and keepalive %s", name, ops, p.PresharedKey, p.PersistentKeepaliveInterval)
		}
		if ops := passHost(t, k, want); len(ops) != 0 {
			t.Errorf("%s: still to do: %v", name, ops)
		}
	}
}
