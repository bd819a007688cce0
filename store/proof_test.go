package store_test

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

func TestProof(t *testing.T) {
	n := store.Network{VNI: 5000, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.50.0.0/24")}}, Key: bytes.Repeat([]byte{7}, 32)}
	const host = store.HostID("0102030405060708090a0b0c0d0e0f10")
	// Hosts of several versions must agree on it.
	const golden = "f008900b35b33fc9457a530aea1c6a57e5af884c8a20e129c9734ce8f9908aa4"
	if got := hex.EncodeToString(n.Proof(host)); got != golden {
		t.Errorf("the proof is %s", got)
	}
	other, open := n, n
	other.Key, open.Key = bytes.Repeat([]byte{8}, 32), nil
	peer := func(by store.Network, proofOf, owner store.HostID) store.PeerNetwork {
		shared := by.Shared()
		shared.Proof = by.Proof(proofOf)
		return store.PeerNetwork{Owner: owner, SharedNetwork: shared}
	}
	moved := n
	moved.VNI = 5001
	for _, c := range []struct {
		name string
		own  store.Network
		peer store.PeerNetwork
		want bool
	}{
		{"same key", n, peer(n, host, host), true},
		{"no keys", open, peer(open, host, host), true},
		{"other key", n, peer(other, host, host), false},
		{"peer has none", n, peer(open, host, host), false},
		{"only the peer has one", open, peer(n, host, host), false},
		{"proof of another host", n, peer(n, host, "ff"), false},
		{"other vni", n, peer(moved, host, host), false},
	} {
		if got := c.own.Runs(c.peer); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
