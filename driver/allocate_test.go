package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

const swarmNet = "uevk9dbp5kwsf7p8jnic6u85c"

func allocation(id, pool string, options map[string]string) network.AllocateNetworkRequest {
	return network.AllocateNetworkRequest{NetworkID: id, Options: options, IPv4Data: []network.IPAMData{{Pool: pool, Gateway: strings.Replace(pool, ".0/", ".1/", 1)}}}
}

func mustAllocate(t *testing.T, d *Driver, r network.AllocateNetworkRequest) map[string]string {
	t.Helper()
	a, err := d.AllocateNetwork(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return a.Options
}

func TestAllocationIsRepeated(t *testing.T) {
	d, _ := newDriver(t)
	given := map[string]string{"mtu": "1400"}
	first := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", given))
	if first["mtu"] != "1400" || len(first) != 3 {
		t.Errorf("the user's options are not echoed: %v", first)
	}
	// The VNI must never change for an id: managers of several versions derive it.
	if first[OptVNI] != "12639212" || len(first[OptKey]) != 64 {
		t.Errorf("answered vni %s and a key of %d digits", first[OptVNI], len(first[OptKey]))
	}
	for option, value := range map[string]string{"mtu": "1300", OptVNI: "4999", "ifname": "net"} {
		altered := maps.Clone(first)
		altered[option] = value
		if answer, err := d.AllocateNetwork(t.Context(), allocation(swarmNet, "10.90.0.0/24", altered)); err == nil {
			t.Errorf("the answer with %s=%s is one of this leader: %v", option, value, answer)
		}
	}
	if answer, err := d.AllocateNetwork(t.Context(), allocation(swarmNet, "10.91.0.0/24", first)); err == nil {
		t.Errorf("it has other subnets now: %v", answer)
	}
	for name, options := range map[string]map[string]string{"answer lost": given, "former answer": first} {
		if again := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", options)); !maps.Equal(again, first) {
			t.Errorf("%s: answered %v, then %v", name, first, again)
		}
	}
	other, _ := newDriver(t) // a new leader, with what Docker has kept
	if again := mustAllocate(t, other, allocation(swarmNet, "10.90.0.0/24", first)); !maps.Equal(again, first) {
		t.Errorf("a new leader answers %v, not %v", again, first)
	}
	// The answer makes the same network on every host.
	n, err := parseNetwork(network.CreateNetworkRequest{NetworkID: swarmNet, Options: map[string]any{keyGeneric: anyValues(first)},
		IPv4Data: []*network.IPAMData{{Pool: "10.90.0.0/24"}}})
	if err != nil || n.VNI != 12639212 || len(n.Key) != keyBytes {
		t.Errorf("a host makes %+v of it, %v", n, err)
	}
	if _, err := d.FreeNetwork(t.Context(), network.FreeNetworkRequest{NetworkID: swarmNet}); err != nil {
		t.Error(err)
	}
	if _, err := d.FreeNetwork(t.Context(), network.FreeNetworkRequest{NetworkID: swarmNet}); err != nil {
		t.Errorf("once more: %v", err)
	}
	if again := mustAllocate(t, d, allocation(swarmNet, "10.91.0.0/24", nil)); again[OptKey] == first[OptKey] {
		t.Error("a new network has the key of the one that was freed")
	}
}

// A leader hands on what another one answered, also what it cannot do or read itself:
// the network lives. A host that cannot have it refuses it.
func TestAllocationOfAnotherLeaderIsHandedOn(t *testing.T) {
	d, _ := newDriver(t)
	d.Fits = func(n store.Network) error {
		if n.MTU > 1450 {
			return errors.New("mtu does not fit")
		}
		return nil
	}
	for name, user := range map[string]map[string]string{
		"an option of a newer version": {"newer": "yes"}, "an mtu too large here": {"mtu": "8950"},
		"a value of a newer version": {"mode": "newest"}, "hosts to meet in another form": {optMeet: "host.example"}} {
		r := allocation("net", "10.90.0.0/24", user)
		if answer, err := d.AllocateNetwork(t.Context(), r); err == nil {
			t.Errorf("%s: a new network is allocated: %v", name, answer)
		}
		answer := maps.Clone(user)
		answer[OptVNI], answer[OptKey] = "5000", strings.Repeat("ab", keyBytes)
		r.Options = answer
		if again := mustAllocate(t, d, r); !maps.Equal(again, answer) {
			t.Errorf("%s: answered %v, then %v", name, answer, again)
		}
		create := network.CreateNetworkRequest{NetworkID: swarmNet, Options: map[string]any{keyGeneric: anyValues(answer)}, IPv4Data: []*network.IPAMData{{Pool: "10.90.0.0/24"}}}
		if _, err := d.CreateNetwork(t.Context(), create); err == nil {
			t.Errorf("%s: made on a host", name)
		}
		// It counts like one of this leader's own.
		if _, err := d.AllocateNetwork(t.Context(), allocation("another", "10.90.0.0/25", nil)); err == nil {
			t.Errorf("%s: its subnet is given to another network", name)
		}
		if _, err := d.FreeNetwork(t.Context(), network.FreeNetworkRequest{NetworkID: "net"}); err != nil {
			t.Fatal(err)
		}
	}
	r := allocation("../net", "10.90.0.0/24", map[string]string{OptVNI: "5000", OptKey: strings.Repeat("ab", keyBytes)})
	if answer, err := d.AllocateNetwork(t.Context(), r); err == nil {
		t.Errorf("no id, and allocated: %v", answer)
	}
}

// A leader that died before Swarm had committed its answer leads again: what the other
// one answered meanwhile is what the hosts have.
func TestAllocationThatSwarmCommittedWins(t *testing.T) {
	d, _ := newDriver(t)
	d.DB.SetAddress(netip.MustParseAddr("192.0.2.1"), 1500)
	lost := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", map[string]string{"mtu": "1400"}))
	other, _ := newDriver(t)
	other.DB.SetAddress(netip.MustParseAddr("192.0.2.2"), 1500)
	addRemote(t, other, "beta", deriveVNI(swarmNet, 0), "10.99.0.0/24", "10.99.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	committed := mustAllocate(t, other, allocation(swarmNet, "10.90.0.0/24", map[string]string{"mtu": "1400"}))
	for _, option := range []string{OptVNI, OptKey, optMeet} {
		if committed[option] == lost[option] {
			t.Fatalf("both leaders answer %s=%s", option, lost[option])
		}
	}
	if again := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", committed)); !maps.Equal(again, committed) {
		t.Errorf("answers %v, not what was committed, %v", again, committed)
	}
	// A free vni is one of those that count.
	if answer, err := d.AllocateNetwork(t.Context(), allocation("another", "10.91.0.0/24", map[string]string{"vni": committed[OptVNI]})); err == nil {
		t.Errorf("the network's vni is given to another: %v", answer)
	}
	mustAllocate(t, d, allocation("another", "10.91.0.0/24", map[string]string{"vni": lost[OptVNI]}))
}

// Other hosts to meet are no other network: a leader may have given those of its own.
func TestNetworkOfOtherHostsToMeetIsTheSame(t *testing.T) {
	d, _ := newDriver(t)
	answer := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil))
	for _, meet := range []string{"192.0.2.1", "192.0.2.2"} {
		answer[optMeet] = meet
		create := network.CreateNetworkRequest{NetworkID: swarmNet, Options: map[string]any{keyGeneric: anyValues(answer)}, IPv4Data: []*network.IPAMData{{Pool: "10.90.0.0/24"}}}
		if _, err := d.CreateNetwork(t.Context(), create); err != nil {
			t.Fatal(err)
		}
	}
	_ = d.DB.View(func(tx *store.Tx) error {
		nodes, err := tx.Nodes()
		if n, err2 := tx.Network(swarmNet); err != nil || err2 != nil || len(nodes) != 2 || n.Options[optMeet] != "192.0.2.2" {
			t.Errorf("nodes to meet: %v, network %+v (%v, %v)", nodes, n, err, err2)
		}
		return nil
	})
}

// The answer stands beside the user's own options, in Weft's spelling.
func TestAllocationOfOptionsInAnySpelling(t *testing.T) {
	d, _ := newDriver(t)
	for i, given := range []map[string]string{
		{"meet": "10.0.0.1, 10.0.0.2"}, {"vni": "05000"}, {"key": strings.Repeat("AB", keyBytes)},
		{"encrypted": "", "weft.encrypted": "yes", "weft.meet": "10.0.0.1", "meet": "::ffff:10.0.0.1"}} {
		id, pool := fmt.Sprint("network", i), fmt.Sprintf("10.9%d.0.0/24", i)
		answer := mustAllocate(t, d, allocation(id, pool, given))
		n, err := parseNetwork(network.CreateNetworkRequest{NetworkID: id, Options: map[string]any{keyGeneric: anyValues(answer)},
			IPv4Data: []*network.IPAMData{{Pool: pool, Gateway: strings.Replace(pool, ".0/", ".1/", 1)}}})
		if err != nil {
			t.Errorf("%v is allocated as %v, which no host makes: %v", given, answer, err)
		}
		if want := strings.Count(given["meet"], ",") + 1; given["meet"] != "" && len(n.Meet) != want {
			t.Errorf("%v: hosts to meet are %v, not %d", given, n.Meet, want)
		}
		if again := mustAllocate(t, d, allocation(id, pool, answer)); !maps.Equal(again, answer) {
			t.Errorf("%v: answered %v, then %v", given, answer, again)
		}
	}
}

func TestAllocationAvoidsTakenVNIs(t *testing.T) {
	d, _ := newDriver(t)
	addRemote(t, d, "beta", deriveVNI(swarmNet, 0), "10.99.0.0/24", "10.99.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	if got := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil)); got[OptVNI] == "12639212" {
		t.Error("allocated the VNI of a network on a peer")
	}
}

// A vni and a key that the user chose are no former answer.
func TestAllocationOfChosenVNIAndKeyIsChecked(t *testing.T) {
	d, _ := newDriver(t)
	d.DB.SetAddress(netip.MustParseAddr("192.0.2.1"), 1500)
	addRemote(t, d, "beta", 5001, "10.99.0.0/24", "10.99.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	mustAllocate(t, d, allocation("another", "10.92.0.0/24", nil))
	given := func(vni string) map[string]string {
		return map[string]string{"vni": vni, "key": strings.Repeat("ab", keyBytes)}
	}
	for want, r := range map[string]network.AllocateNetworkRequest{
		"on host beta":     allocation(swarmNet, "10.90.0.0/24", given("5001")),
		"overlaps":         allocation(swarmNet, "10.92.0.0/25", given("5000")),
		"leave --ipv6 out": allocation(swarmNet, "fd00:92::/64", given("5000")),
		"link flannel.1":   allocation(swarmNet, "10.90.0.0/24", given("77")),
		"not a key of 32":  allocation(swarmNet, "10.90.0.0/24", map[string]string{"vni": "5000", "key": "ab"}),
	} {
		if answer, err := d.AllocateNetwork(t.Context(), r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, %v; want %q", r.Options, answer, err, want)
		}
	}
	answer := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", given("5000")))
	if answer[optMeet] != "192.0.2.1" || answer[OptVNI] != "5000" {
		t.Errorf("answered %v; hosts cannot find each other by it", answer)
	}
}

func TestAllocationIsRefused(t *testing.T) {
	d, _ := newDriver(t)
	mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", map[string]string{"mtu": "1400", "vni": "5000"}))
	addRemote(t, d, "beta", 5001, "10.99.0.0/24", "10.99.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	for _, c := range []struct {
		r    network.AllocateNetworkRequest
		want string
	}{
		{allocation(swarmNet, "10.90.0.0/24", map[string]string{"mtu": "1300", "vni": "5000"}), "1400"},
		{allocation(swarmNet, "10.91.0.0/24", map[string]string{"mtu": "1400", "vni": "5000"}), "10.90.0.0/24"},
		{allocation(swarmNet, "10.90.0.0/24", map[string]string{"mtu": "1400", "vni": "5000", OptVNI: "5002"}), "contradict"},
		{allocation("another", "10.92.0.0/24", map[string]string{"vni": "5000"}), "belongs to Swarm network"},
		{allocation("another", "10.90.0.0/25", nil), "overlaps [10.90.0.0/24] of Swarm network"},
		{allocation("another", "10.92.0.0/24", map[string]string{"vni": "5001"}), "on host beta"},
		{allocation("another", "10.92.0.0/24", map[string]string{"vnii": "1"}), "did you mean vni"},
		{allocation("another", "10.92.0.0/24", map[string]string{"encrypted": "perhaps"}), "neither true nor false"},
		{allocation("another", "10.92.0.0/24", map[string]string{OptKey: "00"}), "key of 32 bytes"},
		{allocation("another", "10.92.0.1/24", nil), "host bits"},
		{allocation("another", "fd00:92::/64", nil), "leave --ipv6 out"},
		{network.AllocateNetworkRequest{NetworkID: "another", IPv4Data: []network.IPAMData{{Pool: "10.92.0.0/24"}, {Pool: "fd00:92::/64"}}}, "subnet fd00:92::/64"},
		{allocation("", "10.92.0.0/24", nil), "NetworkID"},
		{network.AllocateNetworkRequest{NetworkID: "another"}, "subnet"},
	} {
		_, err := d.AllocateNetwork(t.Context(), c.r)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got error %v, want one with %q", c.r, err, c.want)
		}
	}
	if r := d.Refusals()["another"]; !strings.Contains(r.Reason, "subnet") {
		t.Errorf("the last refusal is told as %q", r.Reason)
	}
	mustAllocate(t, d, allocation("another", "10.92.0.0/24", nil))
	if _, err := d.FreeNetwork(t.Context(), network.FreeNetworkRequest{NetworkID: "another"}); err != nil {
		t.Error(err)
	}
	if r, told := d.Refusals()["another"]; told {
		t.Errorf("refused no more, but told: %+v", r)
	}
	_ = d.DB.View(func(tx *store.Tx) error {
		all, err := tx.Allocations()
		if err != nil || len(all) != 1 {
			t.Errorf("%d allocations, %v", len(all), err)
		}
		return nil
	})
}

// A network of an earlier term, whose end this manager may have missed, does not stand
// in the way; no clock is asked.
func TestAllocationOfAnEarlierTerm(t *testing.T) {
	d, _ := newDriver(t)
	term := uint64(7)
	d.Term = func() uint64 { return term }
	former := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil))
	clash := allocation("another", "10.90.0.0/25", nil)
	if _, err := d.AllocateNetwork(t.Context(), clash); err == nil {
		t.Error("an overlapping subnet is given out in the same term")
	}
	term = 3 // it need not rise
	mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", former))
	if _, err := d.AllocateNetwork(t.Context(), clash); err == nil {
		t.Error("an overlapping subnet is given out though Docker asked for the network again")
	}
	term = 8
	mustAllocate(t, d, clash)
	if ids := allocated(t, d); !slices.Equal(ids, []store.NetworkID{"another"}) {
		t.Errorf("allocated are %v: the earlier one, whose subnet is given to another, is gone", ids)
	}
}

// A plugin that is started anew on the leader is told nothing again: what it has counts.
func TestAllocationStaysWhenOnlyThePluginIsNew(t *testing.T) {
	d, _ := newDriver(t)
	term, doubt := uint64(1), false
	d.Term, d.Doubt = func() uint64 { return term }, func() bool { return doubt }
	stays := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil))
	mustAllocate(t, d, allocation("other", "10.91.0.0/24", nil))
	term, doubt = 2, true
	for _, r := range []network.AllocateNetworkRequest{allocation("late", "10.90.0.0/25", nil), allocation("late", "10.92.0.0/24", map[string]string{"vni": stays[OptVNI]})} {
		if answer, err := d.AllocateNetwork(t.Context(), r); err == nil {
			t.Errorf("%v is what another network has, and allocated: %v", r, answer)
		}
	}
	mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", stays)) // it repeats after all
	mustAllocate(t, d, allocation("late", "10.91.0.0/25", nil))
	if ids := allocated(t, d); !slices.Equal(ids, []store.NetworkID{"late", swarmNet}) {
		t.Errorf("allocated are %v", ids)
	}
}

// A manager that leads again is told of all networks that are left; it forgets the
// others. That only the plugin is new, and Docker repeats nothing, is no reason.
func TestAllocationThatIsNotRepeatedIsForgotten(t *testing.T) {
	d, _ := newDriver(t)
	term := uint64(1)
	d.Term = func() uint64 { return term }
	stays := mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil))
	mustAllocate(t, d, allocation("another", "10.91.0.0/24", nil))
	now := time.Now()
	a := NewAudit(d, 0, func() time.Time { return now })
	later := func(by time.Duration) []store.NetworkID {
		t.Helper()
		now = now.Add(by)
		if err := a.allocations(t.Context()); err != nil {
			t.Fatal(err)
		}
		return allocated(t, d)
	}
	term = 2
	later(0)
	if ids := later(time.Hour); len(ids) != 2 {
		t.Fatalf("Docker has repeated nothing, and %v are left", ids)
	}
	mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", stays))
	later(0)
	if ids := later(emptyGrace - time.Second); len(ids) != 2 {
		t.Fatalf("forgotten too early: %v are left", ids)
	}
	if ids := later(time.Second); !slices.Equal(ids, []store.NetworkID{swarmNet}) {
		t.Errorf("%v are left", ids)
	}
}

func allocated(t *testing.T, d *Driver) (ids []store.NetworkID) {
	t.Helper()
	if err := d.DB.View(func(tx *store.Tx) error {
		all, err := tx.Allocations()
		for _, a := range all {
			ids = append(ids, a.ID)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return ids
}

// Docker's user does not see why a network of Swarm is not made on a host.
func TestRefusedHereIsTold(t *testing.T) {
	d, _ := newDriver(t)
	route := []Route{{Prefix: netip.MustParsePrefix("10.90.0.0/16"), Link: "eth0"}}
	d.Routes = func(context.Context) ([]Route, error) { return route, nil }
	options := map[string]any{keyGeneric: anyValues(mustAllocate(t, d, allocation(swarmNet, "10.90.0.0/24", nil)))}
	create := func(id string) error {
		_, err := d.CreateNetwork(t.Context(), network.CreateNetworkRequest{NetworkID: id, Options: options, IPv4Data: []*network.IPAMData{{Pool: "10.90.0.0/24"}}})
		return err
	}
	alone := strings.Repeat("ab", 32)
	for _, id := range []string{swarmNet, alone} {
		if err := create(id); err == nil || !strings.Contains(err.Error(), "route 10.90.0.0/16 on eth0") {
			t.Errorf("network %s: %v", id, err)
		}
	}
	if all := d.Refusals(); len(all) != 1 || !all[swarmNet].Here {
		t.Errorf("told is %+v, want that of the network of Swarm alone", all)
	}
	route = nil
	if err := create(swarmNet); err != nil {
		t.Error(err)
	}
	if all := d.Refusals(); len(all) > 0 {
		t.Errorf("made, but told: %+v", all)
	}
}
