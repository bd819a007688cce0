package main

import (
	"slices"
	"testing"

	"github.com/weftnet/weft/store"
)

// A host that tells another's key is told so, not that its version cannot encrypt.
func TestRefusedTunnelSaysWhy(t *testing.T) {
	p := store.Peer{Host: store.Host{ID: "b", Name: "beta", Version: "1.0"}, KeyOf: "c"}
	for _, c := range []struct {
		names map[store.HostID]string
		self  store.HostID
		want  string
	}{
		{map[store.HostID]string{"c": "gamma"}, "a", "refused, it tells the key of host gamma"},
		{nil, "a", "refused, it tells the key of host c"},
		{nil, "c", "refused, it tells the key of this host"},
	} {
		rows := tunnelsTo(p, keyOwner(p.KeyOf, c.self, c.names), nil)
		if len(rows) != 1 || rows[0].State != c.want {
			t.Errorf("the row says %+v, want %q", rows, c.want)
		}
		all := []peerReply{{Peer: p, Way: "wireguard"}}
		if silentTunnels(all, encryptionReply{Peers: rows}); all[0].Way != "wireguard ("+c.want+")" {
			t.Errorf("the way is %q", all[0].Way)
		}
	}
}

// A name goes before the beginning of an id; an empty one is nobody's, also where
// hosts were forgotten and have none.
func TestHostIsCalled(t *testing.T) {
	hosts := []revokedReply{{ID: "c0ffee", Name: "a"}, {ID: "beef", Name: "c"}, {ID: "be11", Name: "d"}, {ID: "dead"}, {ID: "f00d", Name: "twin"}, {ID: "fade", Name: "twin"}}
	for host, want := range map[string][]string{
		"c": {"beef"}, "c0": {"c0ffee"}, "be": {"beef", "be11"}, "dead": {"dead"}, "d": {"be11"}, "de": {"dead"}, "twin": {"f00d", "fade"}, "x": nil,
	} {
		var got []string
		for _, h := range called(hosts, host) {
			got = append(got, string(h.ID))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q is %v, want %v", host, got, want)
		}
	}
	if got := called(hosts, ""); got != nil {
		t.Errorf("nothing is %v", got)
	}
}
