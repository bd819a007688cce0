package dataplane

import (
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

// A link that Docker had taken and that is gone cannot be made again: what belongs to it
// is not tried, and what does not go with it, in a map of the program, is removed.
func TestDiffOfALostLink(t *testing.T) {
	mac := store.MAC{2, 0, 0, 0, 0, 1}
	want, have := Plan{}, Plan{}
	want.Add(Veth{Name: "weftv1", MAC: mac, Joined: true})
	want.Add(FDB{Link: "weftv1", MAC: mac, Master: true})
	want.Add(Dest{VNI: 5, MAC: mac, Link: "weftv1"})
	have.Add(Dest{VNI: 5, MAC: mac}) // of a link that has no name any more
	ops := Diff(want, have)
	if len(ops) != 1 || ops[0].Verb != Delete || ops[0].Object.Key().Kind != KindDest {
		t.Errorf("got %v, want the deletion of the destination", ops)
	}
	have.Add(Veth{Name: "weftv1", MAC: mac, Joined: true})
	ops = Diff(want, have)
	if len(ops) != 2 || ops[0].Verb != Put || ops[1].Verb != Put {
		t.Errorf("the link is there: got %v, want the entries", ops)
	}
}

// The links of a network with its last service reset the service's clients as long as
// they have services: so the service goes before that.
func TestDiffRemovesServicesFirst(t *testing.T) {
	want, have := Plan{}, Plan{}
	veth := Veth{Name: "weftv1", Program: Port{VNI: 5, Fast: true}}
	want.Add(veth)
	veth.Program.Services = true
	have.Add(veth)
	have.Add(Veth{Name: "weftv2"})
	have.Add(Service{VNI: 5, VIP: netip.MustParseAddr("10.0.0.2")})
	ops := Diff(want, have)
	if len(ops) != 3 || ops[0].Object.Key().Kind != KindService || ops[1].Verb != Put || ops[2].Verb != Delete {
		t.Errorf("got %v, want the service removed, a link changed, and the other removed", ops)
	}
}
