package gossip

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft/store"
)

var compareAddrs = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}

func testIdentity(t testing.TB) store.Identity {
	t.Helper()
	id, err := store.LoadIdentity(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func testRecord(id store.Identity) record {
	pub := []byte(id.Key[32:])
	return record{Host: store.Host{ID: id.ID, Name: "alpha", PublicKey: pub, Address: netip.MustParseAddr("192.0.2.1"),
		DataPort: 4797, Version: "1.2.3", Scope: "local", Epoch: 7}, Port: 4796, Boot: 8, Counter: 9}
}

func TestRecordRoundTrip(t *testing.T) {
	id := testIdentity(t)
	for _, change := range []func(*record){
		func(*record) {},
		func(r *record) { r.Address = netip.MustParseAddr("2001:db8::1") },
		func(r *record) { r.Name, r.Version = "", "" },
		func(r *record) { r.Name = strings.Repeat("n", maxHostName) },
		func(r *record) { r.Scope = "" },
		func(r *record) { r.MTU = 9000 },
		func(r *record) { r.Public = netip.MustParseAddr("198.51.100.1") },
		func(r *record) {
			r.Tunnel, r.Public = store.Tunnel{Keys: []store.WGKey{{1}, {2}}, Port: 4798, Last: true}, netip.MustParseAddr("2001:db8::9")
		},
	} {
		want := testRecord(id)
		change(&want)
		wire := want.sign(id)
		got, err := parseRecord(wire)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got, compareAddrs); d != "" {
			t.Error(d)
		}
		if len(wire) > maxRecord || maxRecord > memberlist.MetaMaxSize {
			t.Errorf("record has %d bytes", len(wire))
		}
	}
}

func TestRecordOfTheFirstVersionIsRead(t *testing.T) {
	id := testIdentity(t)
	want := testRecord(id)
	wire := want.sign(id)
	tunnel := len(appendTunnel(nil, want.Host))
	pub, body := wire[1:33], wire[recordHead:len(wire)-tunnel-1-len(want.Scope)]
	old := append([]byte{recordFormat}, pub...)
	old = append(append(old, ed25519.Sign(id.Key, signed(pub, body))...), body...)
	want.Scope, want.Tunnel, want.Public, want.MTU = "", store.Tunnel{}, netip.Addr{}, 0
	got, err := parseRecord(old)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, compareAddrs); d != "" {
		t.Error(d)
	}
}

func TestRecordRefusesWhatTheHostDidNotSign(t *testing.T) {
	id, other := testIdentity(t), testIdentity(t)
	good := testRecord(id).sign(id)
	for i := range good {
		for _, bit := range []byte{1, 0x80} {
			bad := bytes.Clone(good)
			bad[i] ^= bit
			if r, err := parseRecord(bad); err == nil {
				t.Fatalf("byte %d changed: record %+v was accepted", i, r)
			}
		}
		if r, err := parseRecord(good[:i]); err == nil {
			t.Fatalf("cut at %d: record %+v was accepted", i, r)
		}
	}
	for name, change := range map[string]func(*record){
		"no address":   func(r *record) { r.Address = netip.Addr{} },
		"unspecified":  func(r *record) { r.Address = netip.IPv4Unspecified() },
		"multicast":    func(r *record) { r.Address = netip.MustParseAddr("224.0.0.1") },
		"mapped":       func(r *record) { r.Address = netip.MustParseAddr("::ffff:192.0.2.1") },
		"no port":      func(r *record) { r.Port = 0 },
		"no data port": func(r *record) { r.DataPort = 0 },
		"terminal":     func(r *record) { r.Name = "a\x1b[31m" },
		"not text":     func(r *record) { r.Version = "\xff" },
		"scope":        func(r *record) { r.Scope = "\n" },
	} {
		r := testRecord(id)
		change(&r)
		if _, err := parseRecord(r.sign(id)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// Another host cannot speak for this one: its own key gives its own id.
	if r, err := parseRecord(testRecord(id).sign(other)); err != nil || r.ID != other.ID {
		t.Errorf("record signed by another host is one of %s (%v), want %s", r.ID, err, other.ID)
	}
	long := testRecord(id)
	long.Name, long.Version = strings.Repeat("ä", 100), strings.Repeat("v", 100)
	r, err := parseRecord(long.sign(id))
	if err != nil || r.Name != strings.Repeat("ä", maxHostName/2) || len(r.Version) != maxVersion {
		t.Errorf("long name: %+v, %v", r, err)
	}
}

func TestForgedMemberIsIgnored(t *testing.T) {
	c := unrunCluster(t)
	d := &delegate{c: c, name: "self"}
	id := testIdentity(t)
	r := testRecord(id)
	member := func(r record, wire []byte) *memberlist.Node {
		return &memberlist.Node{Name: r.memberName(), Addr: r.Address.AsSlice(), Port: r.Port, Meta: wire}
	}
	good := r.sign(id)
	if err := d.NotifyAlive(member(r, good)); err != nil {
		t.Fatal(err)
	}
	d.NotifyJoin(member(r, good))
	newer := r
	newer.Counter++
	d.NotifyUpdate(member(newer, newer.sign(id)))

	forged := bytes.Clone(good)
	forged[50] ^= 1
	elsewhere := member(newer, newer.sign(id))
	elsewhere.Addr = []byte{192, 0, 2, 66}
	renamed := member(newer, newer.sign(id))
	renamed.Name = string(testIdentity(t).ID) + renamed.Name[32:]
	for what, n := range map[string]*memberlist.Node{
		"bad signature": member(r, forged), "no meta": member(r, nil), "replayed": member(r, good),
		"other address": elsewhere, "other name": renamed,
	} {
		if err := d.NotifyAlive(n); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if got := c.Stats().Dropped; got["bad-record"] != 4 || got["old-record"] != 1 {
		t.Errorf("counted %v", got)
	}
	if see, _ := c.table.sight(id.ID); see.rec.Counter != newer.Counter {
		t.Errorf("record in use: %+v", see.rec)
	}
}

// unrunCluster is a cluster that was not started.
func unrunCluster(t testing.TB) *Cluster {
	t.Helper()
	id := testIdentity(t)
	db, err := store.Open(t.TempDir()+"/weft.db", store.Host{ID: id.ID, Address: netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	c, err := New(Config{DB: db, Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDigestRoundTrip(t *testing.T) {
	want := digest{Host: "000102030405060708090a0b0c0d0e0f", VNI: store.MaxVNI, Epoch: 1 << 63, Seq: 42}
	got, err := parseDigest(want.encode())
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for name, b := range map[string][]byte{"empty": nil, "type": {9, 9}, "short": want.encode()[:30], "long": append(want.encode(), 0)} {
		if _, err := parseDigest(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestQueueSendsEveryDigest(t *testing.T) {
	q := newQueue(func() int { return 2 })
	const overhead, limit = 3, 1400
	host := func(c string) store.HostID { return store.HostID(strings.Repeat(c, 2*hostIDBytes)) }
	sent := map[string]int{}
	// The first is alone in the queue when its successor takes its place.
	all := []digest{{Host: host("a"), Seq: 1}, {Host: host("a"), Seq: 2}, {Host: host("b"), Seq: 1}, {Host: host("c"), Seq: 1}}
	for _, d := range all {
		q.QueueBroadcast(newBroadcast(d))
	}
	for range 10 {
		for _, m := range q.GetBroadcasts(overhead, limit) {
			sent[string(m)]++
		}
	}
	for _, d := range all[1:] {
		if n := sent[string(d.encode())]; n != 8 {
			t.Errorf("%+v was sent %d times, want 8", d, n)
		}
	}
}

func TestStateRoundTrip(t *testing.T) {
	a := claims{epoch: 5, seq: map[store.VNI]uint64{0: 3, 4096: 1 << 40, store.MaxVNI: 0}}
	b := claims{epoch: 6, seq: map[store.VNI]uint64{0: 1}}
	ida, idb := store.HostID(strings.Repeat("a1", 16)), store.HostID(strings.Repeat("b2", 16))
	got := map[store.HostID]claims{}
	wire := appendClaims(appendClaims(nil, ida, a), idb, b)
	if err := parseState(wire, func(d digest) {
		if got[d.Host].seq == nil {
			got[d.Host] = claims{epoch: d.Epoch, seq: map[store.VNI]uint64{}}
		}
		got[d.Host].seq[d.VNI] = d.Seq
	}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[store.HostID]claims{ida: a, idb: b}, got, cmp.AllowUnexported(claims{})); d != "" {
		t.Error(d)
	}
	huge := binary.AppendUvarint(append([]byte{stateFormat}, make([]byte, 24)...), 1<<60)
	if err := parseState(huge, func(digest) {}); !errors.Is(err, errMalformed) {
		t.Errorf("huge count: %v", err)
	}
}

func TestClaims(t *testing.T) {
	id := testIdentity(t)
	r := testRecord(id)
	tab := newTable(time.Now, 1)
	d := digest{Host: id.ID, VNI: 5000, Epoch: r.Epoch, Seq: 5}
	if tab.claim(d) {
		t.Error("digest of an unknown host was taken over")
	}
	tab.joined(r)
	steps := []struct {
		what string
		d    digest
		news bool
	}{
		{"first", d, true},
		{"again", d, false},
		{"older", digest{id.ID, 5000, r.Epoch, 4}, false},
		{"newer", digest{id.ID, 5000, r.Epoch, 6}, true},
		{"other epoch", digest{id.ID, 5000, r.Epoch + 1, 99}, false},
		{"false one", digest{id.ID, 5000, r.Epoch, 1 << 60}, true},
	}
	for _, s := range steps {
		if got := tab.claim(s.d); got != s.news {
			t.Errorf("%s: news is %v", s.what, got)
		}
	}
	// The owner's word ends the false claim, but not one that came while it spoke.
	see, _ := tab.sight(id.ID)
	tab.claim(digest{id.ID, 5001, r.Epoch, 3})
	tab.told(id.ID, see.claims, claims{epoch: r.Epoch, seq: map[store.VNI]uint64{0: 1, 5000: 6, 5001: 2}}, true)
	see, _ = tab.sight(id.ID)
	if d := cmp.Diff(map[store.VNI]uint64{0: 1, 5000: 6, 5001: 3}, see.claims.seq); d != "" {
		t.Error(d)
	}
	for i := range 2 * maxNetworks {
		tab.claim(digest{id.ID, store.VNI(10000 + i), r.Epoch, 1})
	}
	if see, _ = tab.sight(id.ID); len(see.claims.seq) > maxNetworks+1 {
		t.Errorf("%d claims are held of one host", len(see.claims.seq))
	}
}

func TestFrames(t *testing.T) {
	var wire bytes.Buffer
	want := answer{Delta: store.Delta{VNI: 5000, Epoch: 1, Seq: 2, Full: true, Endpoints: []store.SharedEndpoint{{
		ID: "ep", MAC: store.DeriveMAC("ep"), IPv4: netip.MustParseAddr("10.0.0.1"), Seq: 2}}},
		Networks: []versioned{{store.SharedNetwork{VNI: 5000, Mode: "vxlan", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}, 2}}}
	if err := writeFrame(&wire, want); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(wire.Bytes())
	var got answer
	if err := readFrame(&wire, maxFrame, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, compareAddrs); d != "" {
		t.Error(d)
	}
	if err := got.check(); err != nil {
		t.Error(err)
	}
	for i := range whole {
		if err := readFrame(bytes.NewReader(whole[:i]), maxFrame, &got); err == nil {
			t.Fatalf("frame cut at %d was read", i)
		}
	}
	if err := readFrame(bytes.NewReader(whole), int64(len(whole)-5), &got); err == nil {
		t.Error("frame over the limit was read")
	}
	// A length that promises much costs nothing until it comes.
	lie := append([]byte{0, 0xff, 0xff, 0xff}, "{"...)
	if n := testing.AllocsPerRun(10, func() { _ = readFrame(bytes.NewReader(lie), maxFrame, &got) }); n > 20 {
		t.Errorf("%v allocations for a false length", n)
	}
	if err := readFrame(bytes.NewReader(lie), maxFrame, &got); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("false length: %v", err)
	}
}

func TestAnswerCheck(t *testing.T) {
	mac := store.DeriveMAC("x")
	for name, e := range map[string]store.SharedEndpoint{
		"no id": {MAC: mac}, "slash": {ID: "a/b", MAC: mac}, "no mac": {ID: "a"},
		"multicast": {ID: "a", MAC: mac, IPv4: netip.MustParseAddr("224.0.0.1")},
		"v6 as v4":  {ID: "a", MAC: mac, IPv4: netip.MustParseAddr("2001:db8::1")},
		"v4 as v6":  {ID: "a", MAC: mac, IPv6: netip.MustParseAddr("10.0.0.1")},
		"mapped":    {ID: "a", MAC: mac, IPv6: netip.MustParseAddr("::ffff:10.0.0.1")},
		"zone":      {ID: "a", MAC: mac, IPv6: netip.MustParseAddr("fe80::1%eth0")},
	} {
		if err := (answer{Delta: store.Delta{Endpoints: []store.SharedEndpoint{e}}}).check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := (answer{Delta: store.Delta{Endpoints: []store.SharedEndpoint{{ID: "a", Gone: true}}}}).check(); err != nil {
		t.Error(err)
	}
	for name, n := range map[string]store.SharedNetwork{"vni 0": {}, "vni": {VNI: store.MaxVNI + 1}, "prefix": {VNI: 1, Prefixes: make([]netip.Prefix, 1)}} {
		if err := (answer{Networks: []versioned{{n, 1}}}).check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]target{
		"10.0.0.1": {"10.0.0.1", 4796}, "10.0.0.1:99": {"10.0.0.1", 99}, "host": {"host", 4796}, "host.example:7": {"host.example", 7},
		"2001:db8::1": {"2001:db8::1", 4796}, "[2001:db8::1]": {"2001:db8::1", 4796}, "[2001:db8::1]:5": {"2001:db8::1", 5},
	} {
		if got, err := parseTarget(in, 4796); err != nil || got != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", ":1", "h:0", "h:x", "h:70000", "a b", "http://h:1"} {
		if got, err := parseTarget(in, 4796); err == nil {
			t.Errorf("%q: accepted as %v", in, got)
		}
	}
}

func TestJudge(t *testing.T) {
	t0 := time.Unix(1000, 0)
	id := testIdentity(t)
	rec := testRecord(id)
	moved := rec
	moved.Counter, moved.Address = 10, netip.MustParseAddr("192.0.2.9")
	reborn := rec
	reborn.Counter, reborn.Epoch = 10, 77
	base := store.Peer{Host: rec.Host, Networks: 3}
	with := func(f func(*store.Peer)) store.Peer { p := base; f(&p); return p }
	dead := with(func(p *store.Peer) { p.DeadSince = t0.UTC() })
	hidden := with(func(p *store.Peer) { p.DeadSince, p.Hidden = t0.UTC(), true })
	for name, c := range map[string]struct {
		s    sight
		p    store.Peer
		new  bool
		at   time.Duration
		want store.Peer
		drop bool
	}{
		"new":              {s: sight{alive: true, rec: rec}, new: true, want: store.Peer{Host: rec.Host}},
		"same":             {s: sight{alive: true, rec: rec, stored: 9}, p: base, want: base},
		"back":             {s: sight{alive: true, rec: rec, stored: 9}, p: hidden, want: base},
		"moved":            {s: sight{alive: true, rec: moved, stored: 9}, p: base, want: with(func(p *store.Peer) { p.Address = moved.Address })},
		"new database":     {s: sight{alive: true, rec: reborn, stored: 9}, p: base, want: store.Peer{Host: reborn.Host}},
		"unseen":           {s: sight{lost: t0}, p: base, at: time.Minute, want: base},
		"unseen, late":     {s: sight{lost: t0}, p: base, at: 2 * time.Minute, want: with(func(p *store.Peer) { p.DeadSince, p.Hidden = t0.Add(2*time.Minute).UTC(), true })},
		"dead":             {s: sight{lost: t0, dead: true}, p: base, want: dead},
		"dead, late":       {s: sight{lost: t0, dead: true}, p: dead, at: 2 * time.Minute, want: hidden},
		"dead, very late":  {s: sight{lost: t0, dead: true}, p: hidden, at: 30 * time.Minute, want: hidden, drop: true},
		"hidden at start":  {s: sight{lost: t0}, p: hidden, want: hidden},
		"clock went ahead": {s: sight{lost: t0}, p: with(func(p *store.Peer) { p.DeadSince = t0.Add(-1e6 * time.Hour).UTC() }), want: with(func(p *store.Peer) { p.DeadSince = t0.Add(-1e6 * time.Hour).UTC() })},
	} {
		got, drop := judge(t0.Add(c.at), c.s, c.p, !c.new, 2*time.Minute, 30*time.Minute)
		if d := cmp.Diff(c.want, got, compareAddrs); d != "" || drop != c.drop {
			t.Errorf("%s: drop %v, difference %s", name, drop, d)
		}
	}
}

func FuzzMeta(f *testing.F) {
	id := testIdentity(f)
	f.Add(testRecord(id).sign(id))
	f.Add([]byte{recordFormat})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err == nil && (r.ID == "" || !r.Address.IsValid() || len(r.Name) > maxHostName) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func FuzzDigest(f *testing.F) {
	f.Add(digest{Host: "00", VNI: 1, Seq: 1}.encode())
	f.Add(appendClaims(nil, "00", claims{epoch: 1, seq: map[store.VNI]uint64{1: 2}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseDigest(b); err == nil && !bytes.Equal(d.encode(), b) {
			t.Errorf("%x reads as %+v", b, d)
		}
		n := 0
		_ = parseState(b, func(d digest) {
			n++
			if d.VNI > store.MaxVNI {
				t.Errorf("vni %d", d.VNI)
			}
		})
		if n > len(b)/2 {
			t.Errorf("%d digests in %d bytes", n, len(b))
		}
	})
}

func FuzzFrame(f *testing.F) {
	for _, v := range []any{hello{Proto: 1}, request{VNI: 5}, answer{Delta: store.Delta{VNI: 5, Endpoints: []store.SharedEndpoint{{ID: "a", Gone: true}}}}} {
		var b bytes.Buffer
		if err := writeFrame(&b, v); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a answer
		if readFrame(bytes.NewReader(b), maxFrame, &a) == nil && a.check() == nil {
			if _, err := json.Marshal(a); err != nil {
				t.Errorf("what was read cannot be written: %v", err)
			}
		}
		var h hello
		_ = readFrame(bytes.NewReader(b), maxAsk, &h)
		var q request
		_ = readFrame(bytes.NewReader(b), maxAsk, &q)
	})
}
