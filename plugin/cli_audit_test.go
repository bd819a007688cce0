package main

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// On an attachable network Docker does not tell who has an address; the hosts' records
// of endpoints do, when all hosts are heard.
func TestLeakedAddressesOfAttachableNetworks(t *testing.T) {
	const plugin = "weft:latest"
	prefix := netip.MustParsePrefix("10.91.0.0/24")
	addr := func(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 91, 0, last}) }
	lease := func(last byte, age time.Duration) store.Lease {
		return store.Lease{Address: addr(last), Kind: "auto", Taken: time.Now().Add(-age)}
	}
	pools := []poolReply{{Pool: store.Pool{Space: ipam.GlobalSpace, Prefix: prefix}, Leases: []store.Lease{
		{Address: addr(1), Kind: "gateway"}, lease(2, time.Hour), lease(3, time.Hour), lease(4, time.Hour), lease(5, time.Hour), lease(6, time.Minute)}}}
	nets := []networkReply{{Network: store.Network{ID: "n", VNI: 4096}}}
	eps := []endpointReply{{Network: "n", Local: true, IPv4: addr(3)}, {Network: "n", State: "hidden", IPv4: addr(4)}}
	var docker dockerNetwork
	if err := json.Unmarshal([]byte(`{"Id":"n","Scope":"swarm","IPAM":{"Driver":"weft:latest","Config":[{"Subnet":"10.91.0.0/24"}]}}`), &docker); err != nil {
		t.Fatal(err)
	}
	node := func(name string, leads, has bool) (n dockerNode) {
		n.Description.Hostname, n.Status.Addr, n.ManagerStatus.Leader = name, "192.0.2.9", leads
		if has {
			n.Description.Engine.Plugins = []struct{ Type, Name string }{{"Network", plugin}}
		}
		return n
	}
	well := peerReply{Alive: true, InSync: true, Peer: store.Peer{}}
	well.Name = "b"
	for name, c := range map[string]struct {
		attachable bool
		peers      []peerReply
		nodes      []dockerNode
		nets       []networkReply
		leaked     []byte // last bytes of the addresses that are told
	}{
		"not attachable":               {false, nil, nil, nets, []byte{3, 4, 5, 6}},
		"all are heard":                {true, []peerReply{well}, []dockerNode{node("a", true, true), node("b", false, true), node("c", false, false)}, nets, []byte{5}},
		"a host is silent":             {true, []peerReply{{InSync: true}}, []dockerNode{node("a", true, true)}, nets, nil},
		"a host's records are old":     {true, []peerReply{{Alive: true}}, []dockerNode{node("a", true, true)}, nets, nil},
		"a host was never heard":       {true, []peerReply{well}, []dockerNode{node("a", true, true), node("c", false, true)}, nets, nil},
		"the leader does not run it":   {true, []peerReply{well}, []dockerNode{node("a", true, true), node("b", false, true)}, nil, nil},
		"a host's records are refused": {true, []peerReply{{Alive: true, InSync: true, LastErr: "no route to host"}}, nil, nets, nil},
	} {
		docker.Attachable = c.attachable
		swarm := swarmUse{active: true, leader: true, nodes: c.nodes, used: map[store.NetworkID]map[netip.Addr]string{"n": {addr(2): "task t"}}}
		if swarm.heard(plugin, c.peers) {
			swarm.attached = attached(c.nets, eps)
		}
		var got, want []string
		for _, d := range compareLeases(plugin, []dockerNetwork{docker}, pools, swarm) {
			what, _, _ := strings.Cut(d.Text, " is leased")
			got = append(got, what)
		}
		for _, last := range c.leaked {
			want = append(want, "address "+addr(last).String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: told are %q, want %q", name, got, want)
		}
	}
}
