package dataplane

import (
	"encoding/json"
	"flag"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/weftnet/weft/store"
)

var update = flag.Bool("update", false, "rewrite the plans in testdata")

// scene is the input of a planner, as it stands in testdata.
type scene struct {
	Snapshot store.Snapshot
	Host     store.HostSnapshot
	Underlay Underlay
}

func readScene(t *testing.T, path string) (*txtar.Archive, scene) {
	t.Helper()
	a, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var s scene
	for _, f := range a.Files {
		if f.Name == "scene.json" {
			if err := json.Unmarshal(f.Data, &s); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
		}
	}
	return a, s
}

func (s scene) plan(t *testing.T) string {
	t.Helper()
	p, err := PlanNetwork(s.Snapshot, s.Underlay)
	if err != nil {
		t.Fatal(err)
	}
	return p.String() + "# host\n" + PlanHost(s.Host, s.Underlay).String()
}

// TestPlans compares each scene's plan with the text beside it, also when the
// records come in another order.
func TestPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata: ", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, s := readScene(t, path)
			got := s.plan(t)
			i := slices.IndexFunc(a.Files, func(f txtar.File) bool { return f.Name == "plan" })
			if *update {
				if i < 0 {
					a.Files = append(a.Files, txtar.File{Name: "plan"})
					i = len(a.Files) - 1
				}
				a.Files[i].Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if i < 0 {
				t.Fatal("no plan; run with -update and read the result")
			}
			if diff := cmp.Diff(string(a.Files[i].Data), got); diff != "" {
				t.Fatalf("plan (-want +got; -update rewrites it):\n%s", diff)
			}
			rnd := rand.New(rand.NewPCG(1, 2))
			for range 20 {
				shuffle(rnd, s.Snapshot.Endpoints)
				shuffle(rnd, s.Snapshot.Peers)
				shuffle(rnd, s.Host.Networks)
				shuffle(rnd, s.Host.Peers)
				shuffle(rnd, s.Host.Tunnels)
				if diff := cmp.Diff(got, s.plan(t)); diff != "" {
					t.Fatalf("the order of records matters:\n%s", diff)
				}
			}
		})
	}
}

func shuffle[T any](r *rand.Rand, s []T) {
	r.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
}

// TestDiffLaws: nothing to do between equals; the operations reach what is
// wanted; guards are made before what they guard and removed after it.
func TestDiffLaws(t *testing.T) {
	var plans []Plan
	files, _ := filepath.Glob("testdata/*.txtar")
	for _, path := range files {
		_, s := readScene(t, path)
		p, err := PlanNetwork(s.Snapshot, s.Underlay)
		if err != nil {
			t.Fatal(err)
		}
		plans = append(plans, p, PlanHost(s.Host, s.Underlay), Plan{})
	}
	for _, want := range plans {
		if ops := Diff(want, want); len(ops) != 0 {
			t.Errorf("equal plans differ: %v", ops)
		}
		for _, have := range plans {
			got := Plan{}
			for k, o := range have {
				got[k] = o
			}
			ops := Diff(want, have)
			apply(got, ops)
			for k, o := range want {
				if h, ok := got[k]; !lost(o, want, have) && (!ok || !same(h, o)) {
					t.Errorf("%v is %v after the operations", o, h)
				}
			}
			for k := range got {
				if _, ok := want[k]; !ok {
					t.Errorf("%v is left after the operations", k)
				}
			}
			for len(ops) > 0 && ops[0].Verb == Delete && ops[0].Object.Key().Kind == KindService {
				ops = ops[1:] // TestDiffRemovesServicesFirst
			}
			last := Key{}
			for _, op := range ops {
				k := op.Object.Key()
				if last != (Key{}) && op.Verb == Put && k.Kind < last.Kind {
					t.Errorf("%v is made after %v", k, last)
				}
				if op.Verb == Delete && last != (Key{}) && k.Kind > last.Kind {
					t.Errorf("%v is removed after %v", k, last)
				}
				last = k
				if op.Verb == Put && nextIsDelete(ops, op) {
					last = Key{}
				}
			}
		}
	}
}

func nextIsDelete(ops []Op, op Op) bool {
	for i := range ops {
		if ops[i] == op {
			return i+1 < len(ops) && ops[i+1].Verb == Delete
		}
	}
	return false
}

// TestAliasesRoundTrip: what a link's alias says is enough to rebuild the record.
func TestAliasesRoundTrip(t *testing.T) {
	_, s := readScene(t, "testdata/dualstack.txtar")
	want := *s.Snapshot.Network
	routed, bare := want, want
	routed.Mode, bare.Mode = store.ModeRouted, store.ModeRouted
	bare.NoMasquerade, bare.Internal = true, false
	for _, want := range []store.Network{want, routed, bare} {
		got, ok := ParseNetworkAlias(NetworkAlias(want))
		if !ok || got.ID != want.ID || got.VNI != want.VNI || got.MTU != want.MTU || got.Internal != want.Internal || got.Mode != want.Mode || got.NoMasquerade != want.NoMasquerade ||
			!slices.EqualFunc(got.Subnets, want.Subnets, func(a, b store.Subnet) bool { return a.Pool == b.Pool && a.Gateway == b.Gateway }) {
			t.Errorf("network %+v came back as %+v", want, got)
		}
	}
	ports := []store.Port{{Proto: "tcp", Port: 80, HostPort: 8080}, {Proto: "udp", Port: 53, HostPort: 53, HostIP: netip.MustParseAddr("192.0.2.1")},
		{Proto: "sctp", Port: 1, HostPort: 65535, HostIP: netip.MustParseAddr("::1")}}
	published := s.Snapshot.Endpoints[0]
	published.Ports = ports
	waiting, many := published, published
	waiting.Sandbox, many.Ports = "", slices.Repeat(ports, 10)
	for _, e := range append(s.Snapshot.Endpoints, published, waiting, many) {
		got, ok := ParseEndpointAlias(EndpointAlias(e))
		fits := len(got.Ports) == len(e.Ports) || len(e.Ports) > len(ports) && len(got.Ports) >= len(ports)
		if !fits || !slices.Equal(got.Ports, e.Ports[:len(got.Ports)]) {
			t.Errorf("ports %v came back as %v", e.Ports, got.Ports)
		}
		if !ok || got.ID != e.ID || got.Network != e.Network || got.MAC != e.MAC || got.IPv4 != e.IPv4 || got.IPv6 != e.IPv6 || (got.Sandbox != "") != (e.Sandbox != "") {
			t.Errorf("endpoint %+v came back as %+v", e, got)
		}
		if n := len(EndpointAlias(e)); n > maxAlias {
			t.Errorf("alias of %d bytes", n)
		}
	}
	for _, text := range []string{"", "weft:", "weft:net", "weft:ep", "weft:net x y z 1", "other"} {
		if _, ok := ParseNetworkAlias(text); ok {
			t.Errorf("network alias %q accepted", text)
		}
		if _, ok := ParseEndpointAlias(text); ok {
			t.Errorf("endpoint alias %q accepted", text)
		}
		if _, ok := AliasVNI(text); ok {
			t.Errorf("alias %q has a VNI", text)
		}
	}
}

func FuzzAliases(f *testing.F) {
	f.Add("weft:net 4096 abc 1450 1 10.1.0.0/16=10.1.0.1,fd00::/64")
	f.Add("weft:ep 4096 abc def 02:00:00:00:00:01 10.1.0.2/16 - joined")
	f.Add("weft:ep 4096 abc def 02:00:00:00:00:01 10.1.0.2/16 - - 8080:80,[::1]:53:53/udp,::,1:2:3")
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := ParseNetworkAlias(s); ok && n.ID == "" {
			t.Errorf("%q: a network without id", s)
		}
		if e, ok := ParseEndpointAlias(s); ok && e.ID == "" {
			t.Errorf("%q: an endpoint without id", s)
		}
		AliasVNI(s)
	})
}
