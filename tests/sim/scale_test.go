package sim

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// figures are what layer A (TestScale of store/gossip) leaves.
type figures struct {
	Hosts  int
	Values map[string]float64
}

// layerA reads the figures of a run, of make sim or those that are kept here; nil
// if there are none.
func layerA(t *testing.T, variant string, hosts int) map[string]float64 {
	name := fmt.Sprintf("%s-%d.json", variant, hosts)
	raw, err := os.ReadFile(filepath.Join(os.Getenv("WEFT_SIM"), name))
	if os.Getenv("WEFT_SIM") == "" || err != nil {
		raw, err = os.ReadFile(filepath.Join("testdata", name))
	}
	if err != nil {
		return nil
	}
	var f figures
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	return f.Values
}

const (
	modelSeed = 1
	smallNets = 4
	smallSize = 25
)

// networks are as in layer A: number 0 is run by all, each host has four more, of
// at most 25 hosts.
func networks(n int, rnd *rand.Rand) (runBy [][]int32, of [][]int) {
	of = make([][]int, n)
	runBy = append(runBy, nil)
	for i := range n {
		runBy[0] = append(runBy[0], int32(i))
		of[i] = append(of[i], 0)
	}
	for range smallNets {
		for part := range slices.Chunk(rnd.Perm(n), smallSize) {
			var by []int32
			for _, i := range part {
				by = append(by, int32(i))
				of[i] = append(of[i], len(runBy))
			}
			slices.Sort(by)
			runBy = append(runBy, by)
		}
	}
	return runBy, of
}

// result of one scenario.
type result struct{ p50, p99, most, halves, lost float64 }

func percentile(v []float64, p int) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[(len(v)-1)*p/100]
}

// scenario runs changes on a new cluster of the model.
func scenario(n int, naive bool, serve float64, changes func(rnd *rand.Rand, of [][]int) []change) (result, *model) {
	rnd := rand.New(rand.NewPCG(modelSeed, uint64(n)))
	runBy, of := networks(n, rnd)
	m := newModel(n, modelSeed, naive, serve)
	all := changes(rnd, of)
	m.run(m.messages(all, runBy))
	end := 0.0
	for _, b := range m.born {
		end = max(end, b)
	}
	var first, second []float64
	for k, b := range m.born {
		if b < end/2 {
			first = append(first, m.took[k])
		} else {
			second = append(second, m.took[k])
		}
	}
	return result{percentile(m.took, 50), percentile(m.took, 99), slices.Max(m.took),
		percentile(second, 99) / max(percentile(first, 99), 1e-9), float64(m.lost) / float64(len(m.took))}, m
}

func singles(net func([]int) int) func(*rand.Rand, [][]int) []change {
	return func(rnd *rand.Rand, of [][]int) (out []change) {
		for k := range 20 {
			i := rnd.IntN(len(of))
			out = append(out, change{float64(k) * 30, i, net(of[i])}) // apart, and no stream is open
		}
		return out
	}
}

func rate(perSecond int, seconds float64) func(*rand.Rand, [][]int) []change {
	return func(rnd *rand.Rand, of [][]int) (out []change) {
		for at := 0.0; at < seconds; at += 1 / float64(perSecond) {
			i := rnd.IntN(len(of))
			out = append(out, change{at, i, of[i][rnd.IntN(len(of[i]))]})
		}
		return out
	}
}

func burst(rnd *rand.Rand, of [][]int) (out []change) {
	for k := range 1000 {
		out = append(out, change{float64(k) / 1000, k % len(of), 0})
	}
	return out
}

// TestModel (layer B) prints what the model says, beside layer A where that ran,
// and fails if the two disagree: then one of them is wrong.
func TestModel(t *testing.T) {
	sizes := "25,100"
	if os.Getenv("WEFT_SIM") != "" {
		sizes = cmp.Or(os.Getenv("WEFT_SIM_MODEL"), "25,100,250,1000,5000")
	}
	serve := serveCost(t)
	wide, small := func(of []int) int { return of[0] }, func(of []int) int { return of[1] }
	for word := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatalf("WEFT_SIM_MODEL: %v", err)
		}
		var spread []float64
		for _, s := range []struct {
			name, layerA string
			changes      func(*rand.Rand, [][]int) []change
		}{
			{"one change, wide network", "one change, wide network,", singles(wide)},
			{"one change, small network", "one change, small network,", singles(small)},
			{"1,000-task burst", "1,000-task burst known", burst},
			{"100 changes/s", "100 changes/s: known", rate(100, 10)},
			{"500 changes/s", "500 changes/s: known", rate(500, 10)},
		} {
			w, m := scenario(n, false, serve, s.changes)
			v, _ := scenario(n, true, serve, s.changes)
			if spread == nil {
				spread = m.took
			}
			figure(t, fmt.Sprintf("layer B: %d hosts: %s", n, s.name),
				"p50 %.2f p99 %.2f most %.1f s (half 2 / half 1 %.2f, lost %.1e, refused %d) | naive p50 %.2f p99 %.2f most %.1f s (%.2f) | naive/weft p99 %.1f",
				w.p50, w.p99, w.most, w.halves, w.lost, m.refused, v.p50, v.p99, v.most, v.halves, v.p99/w.p99)
			agree(t, n, "weft", s.layerA, w)
			agree(t, n, "naive", s.layerA, v)
		}
		died := newModel(n, modelSeed, false, serve).deaths(spread)
		d := result{p50: percentile(died, 50), p99: percentile(died, 99)}
		figure(t, fmt.Sprintf("layer B: %d hosts: death of 10%%", n), "known p50 %.1f p99 %.1f s (the naive variant has the same membership)", d.p50, d.p99)
		agree(t, n, "weft", "death of 10% known", d)
	}
	extrapolate(t)
}

// agree compares the median of the model with layer A's.
func agree(t *testing.T, n int, variant, name string, r result) {
	t.Helper()
	a := layerA(t, variant, n)
	if a == nil {
		return
	}
	p50, p99 := a[name+" p50, s"], a[name+" p99, s"]
	if p50 == 0 {
		t.Errorf("layer A has no %q", name)
		return
	}
	figure(t, fmt.Sprintf("layer B / layer A: %d hosts, %s: %s", n, variant, name), "p50 %.2f / %.2f = %.2f, p99 %.2f / %.2f = %.2f",
		r.p50, p50, r.p50/p50, r.p99, p99, r.p99/p99)
	if r.p50 > 2*p50 || r.p50 < p50/2 {
		t.Errorf("%d hosts, %s: %s: the model says %.2f s, layer A %.2f s", n, variant, name, r.p50, p50)
	}
}

// line is the least squares fit of a figure of layer A over the streams that a
// host opens a second.
func line(t *testing.T, name string) (base, slope float64) {
	var x, y []float64
	for _, n := range []int{25, 100, 250, 500} {
		if a := layerA(t, "weft", n); a != nil {
			x, y = append(x, a["quiet: streams opened per host, 1/s"]), append(y, a[name])
		}
	}
	if len(x) < 2 {
		t.Fatal("layer A has left no two sizes to fit")
	}
	var sx, sy, sxx, sxy float64
	for i := range x {
		sx, sy, sxx, sxy = sx+x[i], sy+y[i], sxx+x[i]*x[i], sxy+x[i]*y[i]
	}
	k := float64(len(x))
	slope = (k*sxy - sx*sy) / (k*sxx - sx*sx)
	return (sy - slope*sx) / k, slope
}

// serveCost is the processor time that an owner spends on a stream: half of what
// both sides spend on it in a quiet cluster of layer A.
func serveCost(t *testing.T) float64 {
	_, slope := line(t, "quiet: CPU per host, % of a core")
	return slope / 100 / 2
}

// extrapolate prints what a quiet cluster costs at sizes that were not run: every
// host compares with every other once a minute, or with four a second.
func extrapolate(t *testing.T) {
	for _, n := range []int{100, 1000, 5000} {
		streams := min(float64(n-1)/compareEvery, 1/compareSpacing) * 1.05 // jitter of a fifth either way, and errors
		traffic, perStream := line(t, "quiet: sent per host, KB/s")
		cpu, cost := line(t, "quiet: CPU per host, % of a core")
		figure(t, fmt.Sprintf("layer B: %d hosts: quiet", n), "%.1f streams/s, sends %.0f KB/s, CPU %.1f %% of a core (fit of layer A)",
			streams, traffic+perStream*streams, cpu+cost*streams)
	}
}
