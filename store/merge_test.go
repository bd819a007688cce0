package store_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/weftnet/weft/store"
)

var equateAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

const owner = store.HostID("0123456789abcdef0123456789abcdef")

// told is what an owner answers at some moment: a difference since a version.
type told struct {
	since uint64
	delta store.Delta
}

func ask(t testing.TB, db *store.DB, v store.VNI, since uint64) (d told) {
	t.Helper()
	view(t, db, func(tx *store.Tx) error {
		delta, err := tx.Delta(v, since)
		delta.Epoch = db.Self().Epoch
		d = told{since, delta}
		return err
	})
	return d
}

func shared(t testing.TB, db *store.DB) (seq uint64, nets []store.SharedNetwork) {
	t.Helper()
	view(t, db, func(tx *store.Tx) error {
		seq = tx.Version(store.HostVNI)
		all, err := tx.Networks()
		for _, n := range all {
			nets = append(nets, n.Shared())
		}
		return err
	})
	return seq, nets
}

// meet tells db of the owner and its networks.
func meet(t testing.TB, db, from *store.DB) {
	t.Helper()
	seq, nets := shared(t, from)
	update(t, db, func(tx *store.Tx) error {
		if _, err := tx.Peer(owner); errors.Is(err, store.ErrNotFound) {
			if err := tx.PutPeer(store.Peer{Host: store.Host{ID: owner, Epoch: from.Self().Epoch}}); err != nil {
				return err
			}
		}
		return tx.MergeNetworks(owner, from.Self().Epoch, seq, nets)
	})
}

func merge(t testing.TB, db *store.DB, d told) (fits bool) {
	t.Helper()
	update(t, db, func(tx *store.Tx) (err error) {
		fits, err = tx.MergeEndpoints(owner, d.since, d.delta)
		return err
	})
	return fits
}

// holds returns the version and the endpoints that db has of the owner.
func holds(t testing.TB, db *store.DB, v store.VNI) (seq uint64, out []store.SharedEndpoint) {
	t.Helper()
	view(t, db, func(tx *store.Tx) error {
		pn, err := tx.PeerNetwork(owner, v)
		if err != nil {
			return err
		}
		all, err := tx.RemoteEndpoints(v)
		for _, e := range all {
			out = append(out, e.SharedEndpoint)
		}
		seq = pn.Seq
		return err
	})
	return seq, out
}

// TestMergeHoldsExactlyAVersionOfTheOwner: whatever answers arrive, in whatever
// order and however often, the copy equals what the owner had at the version that
// the copy says it has; and one more question brings it up to date.
func TestMergeHoldsExactlyAVersionOfTheOwner(t *testing.T) {
	dir := t.TempDir()
	runs := 0
	rapid.Check(t, func(r *rapid.T) {
		runs++
		from, err := store.Open(filepath.Join(dir, fmt.Sprint("from", runs)), store.Host{ID: owner})
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		to, err := store.Open(filepath.Join(dir, fmt.Sprint("to", runs)), store.Host{ID: "self"})
		if err != nil {
			t.Fatal(err)
		}
		defer to.Close()
		update(t, from, func(tx *store.Tx) error { return tx.PutNetwork(testNetwork(5000)) })
		meet(t, to, from)

		history := map[uint64][]store.SharedEndpoint{}
		record := func() uint64 {
			full := ask(t, from, 5000, 0).delta
			history[full.Seq] = full.Endpoints
			return full.Seq
		}
		now := record()
		answers := []told{ask(t, from, 5000, 0)}
		same := func(seq uint64, got []store.SharedEndpoint) {
			if d := cmp.Diff(history[seq], got, equateAddrs, cmpopts.EquateEmpty()); d != "" {
				r.Fatalf("copy at version %d of %d: %s", seq, now, d)
			}
		}
		r.Repeat(map[string]func(*rapid.T){
			"put": func(r *rapid.T) {
				e := testEndpoint(5000, rapid.StringMatching("[a-e]").Draw(r, "id"))
				e.IPv4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, 0, rapid.Byte().Draw(r, "ip")}), 16)
				e.Left = rapid.IntRange(0, 3).Draw(r, "left") == 0
				update(t, from, func(tx *store.Tx) error { _, err := tx.PutEndpoint(e); return err })
				now = record()
			},
			"delete": func(r *rapid.T) {
				id := store.EndpointID(rapid.StringMatching("[a-e]").Draw(r, "id"))
				update(t, from, func(tx *store.Tx) error { return tx.DeleteEndpoint(testNetwork(5000).ID, id) })
				now = record()
			},
			"ask": func(r *rapid.T) {
				answers = append(answers, ask(t, from, 5000, rapid.Uint64Range(0, now+1).Draw(r, "since")))
			},
			"merge": func(r *rapid.T) {
				d := rapid.SampledFrom(answers).Draw(r, "answer")
				before, _ := holds(t, to, 5000)
				fits := merge(t, to, d)
				seq, got := holds(t, to, 5000)
				same(seq, got)
				if seq < before || fits && seq < d.delta.Seq {
					r.Fatalf("version went from %d to %d by an answer at %d (fits: %v)", before, seq, d.delta.Seq, fits)
				}
				merge(t, to, d) // again
				if again, _ := holds(t, to, 5000); again != seq {
					r.Fatalf("the same answer again changed version %d to %d", seq, again)
				}
				same(seq, got)
			},
		})
		held, _ := holds(t, to, 5000)
		if d := ask(t, from, 5000, held); !merge(t, to, d) {
			merge(t, to, ask(t, from, 5000, 0))
		}
		seq, got := holds(t, to, 5000)
		if same(seq, got); seq != now {
			r.Fatalf("copy ends at version %d, the owner is at %d", seq, now)
		}
	})
}

// TestMergeOrderOfOwnersDoesNotMatter: what several owners tell gives the same
// copy in any order.
func TestMergeOrderOfOwnersDoesNotMatter(t *testing.T) {
	type word struct {
		host store.HostID
		d    store.Delta
	}
	var words []word
	for i := range 5 {
		d := store.Delta{VNI: 5000, Epoch: 9, Seq: 4, Full: true}
		for j := range i + 1 {
			d.Endpoints = append(d.Endpoints, testEndpoint(5000, fmt.Sprintf("ep%d-%d", i, j)).Shared())
		}
		words = append(words, word{store.HostID(fmt.Sprint("host", i)), d})
	}
	result := func(order []word) store.Snapshot {
		db := tempDB(t)
		update(t, db, func(tx *store.Tx) error {
			errs := []error{tx.PutNetwork(testNetwork(5000))}
			for _, w := range order {
				errs = append(errs, tx.PutPeer(store.Peer{Host: store.Host{ID: w.host, Epoch: 9}}),
					tx.MergeNetworks(w.host, 9, 1, []store.SharedNetwork{testNetwork(5000).Shared()}))
			}
			return errors.Join(errs...)
		})
		for _, w := range append(slices.Clone(order), order[0]) {
			update(t, db, func(tx *store.Tx) error { _, err := tx.MergeEndpoints(w.host, 0, w.d); return err })
		}
		s, err := db.Snapshot(5000)
		if err != nil {
			t.Fatal(err)
		}
		s.Self = store.Host{}
		return s
	}
	want := result(words)
	if len(want.Remote) != 15 || len(want.Peers) != 5 {
		t.Fatalf("snapshot has %d records of %d peers", len(want.Remote), len(want.Peers))
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 10 {
		order := slices.Clone(words)
		rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		if d := cmp.Diff(want, result(order), equateAddrs); d != "" {
			t.Error(d)
		}
	}
}

func TestEndpointMadeAgainIsInTheDifference(t *testing.T) {
	from, to := tempDB(t), tempDB(t)
	update(t, from, func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(testEndpoint(5000, "a"))
		return errors.Join(tx.PutNetwork(testNetwork(5000)), err)
	})
	meet(t, to, from)
	merge(t, to, ask(t, from, 5000, 0))
	since, _ := holds(t, to, 5000)
	update(t, from, func(tx *store.Tx) error {
		err := tx.DeleteEndpoint(testNetwork(5000).ID, "a")
		_, err2 := tx.PutEndpoint(testEndpoint(5000, "a"))
		return errors.Join(err, err2)
	})
	if d := ask(t, from, 5000, since); !merge(t, to, d) {
		t.Fatal("difference does not fit")
	}
	if _, got := holds(t, to, 5000); len(got) != 1 {
		t.Errorf("endpoint that was deleted and made again: copy has %v", got)
	}
}

func TestOldDeletionsAreForgottenAndAskedInFull(t *testing.T) {
	from, to := tempDB(t), tempDB(t)
	update(t, from, func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(testEndpoint(5000, "stays"))
		_, err2 := tx.PutEndpoint(testEndpoint(5000, "goes"))
		return errors.Join(tx.PutNetwork(testNetwork(5000)), err, err2)
	})
	meet(t, to, from)
	merge(t, to, ask(t, from, 5000, 0))
	since, _ := holds(t, to, 5000)
	update(t, from, func(tx *store.Tx) error { return tx.DeleteEndpoint(testNetwork(5000).ID, "goes") })
	if d := ask(t, from, 5000, since).delta; d.Full || len(d.Endpoints) != 1 || !d.Endpoints[0].Gone {
		t.Errorf("difference after one deletion: %+v", d)
	}
	update(t, from, func(tx *store.Tx) error {
		for i := range 2000 {
			id := fmt.Sprint("x", i)
			_, err := tx.PutEndpoint(testEndpoint(5000, id))
			if err := errors.Join(err, tx.DeleteEndpoint(testNetwork(5000).ID, store.EndpointID(id))); err != nil {
				return err
			}
		}
		return nil
	})
	d := ask(t, from, 5000, since)
	if !d.delta.Full || len(d.delta.Endpoints) != 1 {
		t.Errorf("answer to a peer that is far behind: full %v, %d endpoints", d.delta.Full, len(d.delta.Endpoints))
	}
	if !merge(t, to, d) {
		t.Error("full answer does not fit")
	}
	if _, got := holds(t, to, 5000); len(got) != 1 || got[0].ID != "stays" {
		t.Errorf("copy has %v", got)
	}
}

func TestMergeNetworks(t *testing.T) {
	from, to := tempDB(t), tempDB(t)
	put := func(v store.VNI) {
		update(t, from, func(tx *store.Tx) error {
			_, err := tx.PutEndpoint(testEndpoint(v, fmt.Sprint("ep", v)))
			return errors.Join(tx.PutNetwork(testNetwork(v)), err)
		})
	}
	vnis := func() (out []store.VNI) {
		view(t, to, func(tx *store.Tx) error {
			all, err := tx.PeerNetworks(owner)
			for _, n := range all {
				out = append(out, n.VNI)
			}
			return err
		})
		return out
	}
	put(5000)
	put(5001)
	meet(t, to, from)
	oldSeq, oldNets := shared(t, from)
	merge(t, to, ask(t, from, 5000, 0))
	merge(t, to, ask(t, from, 5001, 0))
	update(t, from, func(tx *store.Tx) error { return tx.DeleteNetwork(testNetwork(5000).ID) })
	meet(t, to, from)
	if got := vnis(); !slices.Equal(got, []store.VNI{5001}) {
		t.Errorf("networks %v, want 5001", got)
	}
	view(t, to, func(tx *store.Tx) error {
		if left, err := tx.RemoteEndpoints(5000); err != nil || len(left) != 0 {
			t.Errorf("endpoints of a network that is gone: %v, %v", left, err)
		}
		return nil
	})
	// An older list and a late answer change nothing.
	update(t, to, func(tx *store.Tx) error { return tx.MergeNetworks(owner, from.Self().Epoch, oldSeq, oldNets) })
	if !merge(t, to, told{0, store.Delta{VNI: 5000, Epoch: from.Self().Epoch, Seq: 9, Full: true}}) {
		t.Error("answer for a network that is gone must count as done")
	}
	if got := vnis(); !slices.Equal(got, []store.VNI{5001}) {
		t.Errorf("networks after an old list: %v, want 5001", got)
	}
	// Another epoch counts whatever its number is.
	update(t, to, func(tx *store.Tx) error { return tx.MergeNetworks(owner, 1, 1, oldNets) })
	if got := vnis(); !slices.Equal(got, []store.VNI{5000, 5001}) {
		t.Errorf("networks of a new database: %v", got)
	}
	if fits := merge(t, to, told{3, store.Delta{VNI: 5001, Epoch: 1, Seq: 4}}); fits {
		t.Error("a difference to another database fits")
	}
	update(t, to, func(tx *store.Tx) error { return tx.ForgetPeer(owner) })
	if got := vnis(); len(got) != 0 {
		t.Errorf("networks of a forgotten peer: %v", got)
	}
}

func TestSnapshotFollowsPeers(t *testing.T) {
	db := tempDB(t)
	fill(t, db, 3)
	count := func() (n [2]int) {
		s, err := db.Snapshot(5000)
		if err != nil {
			t.Fatal(err)
		}
		return [2]int{len(s.Peers), len(s.Remote)}
	}
	peer := store.Peer{Host: store.Host{ID: "peer", Epoch: 1}, Networks: 1}
	for _, step := range []struct {
		what string
		do   func(*store.Tx) error
		want [2]int
	}{
		{"start", func(*store.Tx) error { return nil }, [2]int{1, 3}},
		{"hidden", func(tx *store.Tx) error { p := peer; p.Hidden = true; return tx.PutPeer(p) }, [2]int{0, 0}},
		{"back", func(tx *store.Tx) error { return tx.PutPeer(peer) }, [2]int{1, 3}},
		{"other subnet", func(tx *store.Tx) error {
			return tx.MergeNetworks("peer", 1, 2, []store.SharedNetwork{{VNI: 5000, Mode: "vxlan", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}}})
		}, [2]int{0, 0}},
		{"forgotten", func(tx *store.Tx) error { return tx.ForgetPeer("peer") }, [2]int{0, 0}},
	} {
		update(t, db, step.do)
		if got := count(); got != step.want {
			t.Errorf("%s: peers, endpoints are %v, want %v", step.what, got, step.want)
		}
	}
}

// TestDerivedValuesNeverChange pins what all versions on all hosts must derive alike.
func TestDerivedValuesNeverChange(t *testing.T) {
	got := map[string]string{}
	for _, parts := range [][]string{{}, {""}, {"a"}, {"a", "b"}, {"ab"}, {"1:a"}, {"a", ""}} {
		got[fmt.Sprintf("%q", parts)] = store.DeriveMAC(parts...).String()
	}
	want := map[string]string{
		`[]`:        "e2:b0:c4:42:98:fc",
		`[""]`:      "ba:76:8b:33:1f:d8",
		`["a"]`:     "42:62:fd:dd:39:a3",
		`["a" "b"]`: "fa:cd:de:7a:bf:1e",
		`["ab"]`:    "d2:ab:1a:7f:bf:5a",
		`["1:a"]`:   "4a:35:c7:14:53:11",
		`["a" ""]`:  "c6:85:5e:a9:37:d9",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("derived MACs: %s", d)
	}
	if n := len(slices.Compact(slices.Sorted(maps.Values(got)))); n != len(got) {
		t.Errorf("%d different MACs for %d inputs", n, len(got))
	}
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i)
	}
	if id := store.HostIDOf(key); id != "630dcd2966c4336691125448bbb25b4f" { // SHA-256 of 00 01 … 1f
		t.Errorf("host id %s", id)
	}
}

func TestDeriveMACIsLocalUnicast(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		m := store.DeriveMAC(rapid.SliceOf(rapid.String()).Draw(r, "parts")...)
		if m[0]&3 != 2 {
			r.Fatalf("%s is not a locally administered unicast address", m)
		}
		back, err := store.ParseMAC(m.String())
		if err != nil || back != m {
			r.Fatalf("%s reads as %s, %v", m, back, err)
		}
	})
}

func FuzzParseMAC(f *testing.F) {
	for _, s := range []string{"02:42:ac:11:00:02", "", "01:00:5e:00:00:01", "00:00:00:00:00:00", "0242.ac11.0002", "02-42-ac-11-00-02", "02:42:ac:11:00:02:03:04"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := store.ParseMAC(s)
		if err != nil {
			return
		}
		if m.IsZero() || m[0]&1 != 0 {
			t.Errorf("%q reads as %v", s, [6]byte(m))
		}
		var back store.MAC
		if err := back.UnmarshalText([]byte(m.String())); err != nil || back != m {
			t.Errorf("%q: %s does not read back: %v", s, m, err)
		}
	})
}
