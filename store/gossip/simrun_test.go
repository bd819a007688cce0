package gossip

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weftnet/weft/store"
)

// Sizes of the simulation. WEFT_SIM names the folder into which the long form
// (make sim) writes its figures, with which tests/sim checks its model;
// WEFT_SIM_HOSTS gives other sizes.
const (
	simShort = "25"
	simLong  = "25,100,250"
	simMany  = 500 // hosts, from which on changes are made at a pace for half as long
)

const simSeed = 1

// pass lets virtual time pass.
func pass(d time.Duration) { time.Sleep(d) }

// figures of one run, by name, in the order in which they were taken.
type figures struct {
	Variant   string             `json:"variant"`
	Hosts     int                `json:"hosts"`
	Endpoints int                `json:"endpoints"`
	Seed      uint64             `json:"seed"`
	Names     []string           `json:"names"`
	Values    map[string]float64 `json:"values"`

	t *testing.T
}

// set keeps a figure and prints it at once: a run of many hosts takes hours, and
// one that is cut short has shown what it found.
func (f *figures) set(name string, v float64) {
	f.t.Logf("%s %.3g", name, v)
	f.Names = append(f.Names, name)
	f.Values[name] = v
}

// times sets the median and the 99th of a hundred, in seconds.
func (f *figures) times(name string, took []time.Duration) {
	f.set(name+" p50, s", percentile(took, 50).Seconds())
	f.set(name+" p99, s", percentile(took, 99).Seconds())
}

func percentile(d []time.Duration, p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[(len(d)-1)*p/100]
}

// TestScale simulates whole clusters: this package's own code on databases, with
// memberlist, on a network in memory and in virtual time, and beside it the naive
// variant. It fails on a wrong record at the end, never on a time.
func TestScale(t *testing.T) {
	sizes, out := simShort, os.Getenv("WEFT_SIM")
	if out != "" {
		sizes = cmp.Or(os.Getenv("WEFT_SIM_HOSTS"), simLong)
	}
	for word := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatalf("WEFT_SIM_HOSTS: %v", err)
		}
		var both []*figures
		for _, v := range []struct {
			name string
			make func(*sim, *simHost) party
		}{{"weft", makeReal}, {"naive", makeNaive}} {
			t.Run(fmt.Sprintf("%s/%d", v.name, n), func(t *testing.T) {
				begun := time.Now()
				f := &figures{Variant: v.name, Hosts: n, Endpoints: n * perHost, Seed: simSeed, Values: map[string]float64{}, t: t}
				dir := memoryDir(t)
				synctest.Test(t, func(t *testing.T) {
					newSim(t, dir, simSeed, n, v.make).scenarios(f, out != "")
				})
				t.Logf("took %s", time.Since(begun).Round(time.Second))
				both = append(both, f)
				if out != "" {
					writeFigures(t, filepath.Join(out, fmt.Sprintf("%s-%d.json", v.name, n)), f)
				}
			})
		}
		if len(both) == 2 {
			printRatios(t, both[0], both[1])
		}
	}
}

// memoryDir is a folder that costs no disk where there is one.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "weft-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func writeFigures(t *testing.T, path string, f *figures) {
	raw, err := json.MarshalIndent(f, "", " ")
	if err == nil {
		err = os.WriteFile(path, append(raw, '\n'), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

func printRatios(t *testing.T, weft, naive *figures) {
	t.Logf("%d hosts, %d endpoints, seed %d | weft | naive | naive / weft", weft.Hosts, weft.Endpoints, weft.Seed)
	for _, name := range weft.Names {
		w, n := weft.Values[name], naive.Values[name]
		t.Logf("%s | %.3g | %.3g | %.2f", name, w, n, n/w)
	}
}

// scenarios runs one after the other on one cluster. The short form leaves out
// what takes long.
func (s *sim) scenarios(f *figures, long bool) {
	defer func() {
		for _, h := range s.hosts {
			if h.p != nil {
				s.halt(h)
			}
		}
		pass(time.Minute) // memberlist's tasks end by themselves
	}()
	s.boot(f)
	s.quiet(f)
	s.singles(f, "one change, wide network,", wideVNI)
	s.singles(f, "one change, small network,", smallVNI)
	busy := 2 * time.Second
	if long {
		if busy = 10 * time.Second; len(s.hosts) >= simMany {
			busy /= 2
		}
		s.net.set(0.01, nil)
		s.singles(f, "one change, wide, 1% loss,", wideVNI)
		s.net.set(0, nil)
		s.rate(f, 500, busy)
	}
	s.rate(f, 100, busy)
	s.burst(f)
	s.join(f)
	s.partition(f)
	s.kill(f)
	s.settle("the end")
	if n := s.net.overflow.Load(); n > 0 {
		s.t.Errorf("%d packets were dropped for want of room, so the figures mean little", n)
	}
}

func (s *sim) boot(f *figures) {
	begun := time.Now()
	for _, h := range s.hosts {
		s.start(h)
		// memberlist's tickers keep the rhythm of the start: an even pace would make
		// all hosts gossip in step.
		pass(bootEvery/2 + time.Duration(s.rnd.Int64N(int64(bootEvery))))
	}
	last := time.Now()
	s.settle("boot")
	f.set("boot: all know all after the last start, s", time.Since(last).Seconds())
	f.set("boot: sent per host, KB", float64(s.net.total())/float64(len(s.hosts))/1e3)
	s.t.Logf("boot of %d hosts took %v", len(s.hosts), time.Since(begun))
}

// settle waits until every host holds exactly what the others have. To look at all of
// them each second would be most of the work where they are many: the first one that
// does not is looked at until it does, and at the end all at one time.
func (s *sim) settle(what string) {
	late := time.Now().Add(simMost)
	for {
		hosts := s.living()
		i := slices.IndexFunc(hosts, func(h *simHost) bool { return s.wrong(h) > 0 })
		if i < 0 {
			return
		}
		for s.wrong(hosts[i]) > 0 {
			if time.Now().After(late) {
				s.t.Errorf("%s: %d wrong entries after %v", what, s.wrong(hosts...), simMost)
				return
			}
			pass(time.Second)
		}
	}
}

// measure runs fn and sets what each living host sent, and what it cost of a
// processor, per second. The cost has the simulation in it: the network in memory,
// and looking who knows what.
func (s *sim) measure(f *figures, name string, fn func()) {
	sent, dials, cpu, begun := s.net.total(), s.net.dials.Load(), spent(), time.Now()
	fn()
	per := time.Since(begun).Seconds() * float64(len(s.living()))
	f.set(name+" sent per host, KB/s", float64(s.net.total()-sent)/per/1e3)
	f.set(name+" streams opened per host, 1/s", float64(s.net.dials.Load()-dials)/per)
	f.set(name+" CPU per host, % of a core", 100*(spent()-cpu).Seconds()/per)
}

func (s *sim) quiet(f *figures) {
	pass(30 * time.Second) // what the start has left is over
	s.measure(f, "quiet:", func() { pass(time.Minute) })
}

func (s *sim) singles(f *figures, name string, v store.VNI) {
	var all []*awaited
	hosts := s.runBy[v]
	for range 20 {
		all = append(all, s.change(s.hosts[hosts[s.rnd.IntN(len(hosts))]], v))
		pass(time.Second/2 + time.Duration(s.rnd.Int64N(int64(time.Second))))
	}
	f.times(name, s.wait(name, all...))
}

// rate makes changes on random hosts and networks at an even pace, and tells
// whether those of the second half took longer than those of the first.
func (s *sim) rate(f *figures, perSecond int, d time.Duration) {
	var all []*awaited
	name := fmt.Sprintf("%d changes/s:", perSecond)
	n := perSecond * int(d/time.Second)
	s.measure(f, name, func() {
		for range n {
			h := s.hosts[s.rnd.IntN(len(s.hosts))]
			all = append(all, s.change(h, h.nets[s.rnd.IntN(len(h.nets))]))
			pass(d / time.Duration(n))
		}
	})
	f.times(name+" known", s.wait(name, all...))
	first, second := s.wait(name, all[:n/2]...), s.wait(name, all[n/2:]...)
	f.set(name+" p99 of second half / first", percentile(second, 99).Seconds()/percentile(first, 99).Seconds())
}

// burst starts 1,000 tasks on one network, within a second.
func (s *sim) burst(f *figures) {
	const tasks = 1000
	var all []*awaited
	for i := range tasks {
		h, start := s.hosts[i%len(s.hosts)], time.Now()
		want := h.write(wideVNI, s.fresh(1), false)
		a := await(s.others(wideVNI, h.i), func(p party) bool { return p.holds(want) })
		a.start = start
		all = append(all, a)
		pass(time.Second / tasks)
	}
	last := time.Now()
	f.times("1,000-task burst known", s.wait("burst", all...))
	f.set("1,000-task burst: all known after the last, s", time.Since(last).Seconds())
}

func (s *sim) join(f *figures) {
	var known, knows []time.Duration
	before := s.net.total()
	var bytes uint64
	for range simJoins {
		others := s.living()
		h := s.addHost()
		s.start(h)
		a := await(others, func(p party) bool { return p.found(h.i) })
		b := await([]*simHost{h}, func(p party) bool { return len(p.endpoints(wideVNI)) == s.count(wideVNI, h.i) })
		known, knows = append(known, s.wait("join", a)...), append(knows, s.wait("join", b)...)
		pass(5 * time.Second)
		bytes += s.net.sentBy(h.addr)
	}
	f.times("join: known to others", known)
	f.set("join: holds all, slowest, s", slices.Max(knows).Seconds())
	f.set("join: sent by the new host, KB", float64(bytes)/simJoins/1e3)
	f.set("join: sent by all, KB", float64(s.net.total()-before)/simJoins/1e3)
}

// count is how many endpoints the others have in a network.
func (s *sim) count(v store.VNI, but int) (n int) {
	for _, h := range s.others(v, but) {
		n += len(h.own[v])
	}
	return n
}

// partition cuts the cluster in two halves until each thinks the other dead, with
// a change each second in one of them, and heals it.
func (s *sim) partition(f *figures) {
	const d = time.Minute
	side := map[netip.Addr]int{}
	for _, h := range s.hosts {
		side[h.addr] = h.i % 2
	}
	s.net.set(0, func(a, b netip.Addr) bool { return side[a] != side[b] })
	last := map[*simHost]version{}
	for end := time.Now().Add(d); time.Now().Before(end); pass(time.Second) {
		h := s.hosts[s.rnd.IntN(len(s.hosts))]
		last[h] = h.write(wideVNI, s.fresh(1), false)
	}
	s.net.set(0, nil)
	var all []*awaited
	for h, want := range last {
		var far []*simHost
		for _, o := range s.others(wideVNI, h.i) {
			if side[o.addr] != side[h.addr] {
				far = append(far, o)
			}
		}
		all = append(all, await(far, func(p party) bool { return p.found(h.i) && p.holds(want) }))
	}
	took := s.wait("heal", all...)
	f.times("heal of a partition: known", took)
	f.set("heal of a partition: slowest, s", slices.Max(took).Seconds())
	s.settle("after the partition")
}

// kill takes the power from a tenth of the hosts at once.
func (s *sim) kill(f *figures) {
	dead := map[netip.Addr]bool{}
	var victims []*simHost
	for _, i := range s.rnd.Perm(len(s.hosts))[:max(1, len(s.hosts)/10)] {
		victims = append(victims, s.hosts[i])
		dead[s.hosts[i].addr] = true
	}
	s.net.set(0, func(a, b netip.Addr) bool { return dead[a] || dead[b] })
	begun := time.Now()
	for _, h := range victims {
		s.halt(h)
	}
	var all []*awaited
	for _, h := range victims {
		a := await(s.living(), func(p party) bool { return p.lost(h.i) })
		a.start = begun
		all = append(all, a)
	}
	f.times("death of 10% known", s.wait("death", all...))
}
