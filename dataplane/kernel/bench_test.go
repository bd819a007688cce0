package kernel_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
)

// bench runs f in a new namespace; its goroutine ends with it.
func bench(b *testing.B, f func(k *kernel.Kernel)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer runtime.Goexit()
		f(newKernel(b, kernel.Config{}))
	}()
	<-done
}

func must[T any](b *testing.B, v T, err error) T {
	b.Helper()
	if err != nil {
		b.Error(err)
		runtime.Goexit()
	}
	return v
}

func apply(b *testing.B, k *kernel.Kernel, ops []dataplane.Op) {
	b.Helper()
	for _, err := range k.Apply(b.Context(), ops) {
		b.Error(err)
	}
}

// One endpoint more on a host that has some: the whole pass (read, plan, diff,
// apply), the part of Apply in it, and the removal.
func BenchmarkEndpoint(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			bench(b, func(k *kernel.Kernel) {
				u := dataplane.Underlay{Address: kerneltest.Underlay4, Link: kerneltest.UnderlayLink, MTU: kerneltest.UnderlayMTU, Program: true, Ethernet: true}
				few := kerneltest.Example{Snapshot: kerneltest.Network(4096, n, 1, 10, u, "10.1.0.0/16"), Underlay: u}
				many := few
				many.Snapshot = kerneltest.Network(4096, n+1, 1, 10, u, "10.1.0.0/16")
				p1, err := few.Plan()
				must(b, p1, err)
				p2, err := many.Plan()
				must(b, p2, err)
				// Only the endpoint differs, not the peers' addresses.
				for key, o := range p2 {
					if _, ok := p1[key]; ok || key.Kind != dataplane.KindVeth && key.Kind != dataplane.KindFDB {
						continue
					}
					if v, ok := o.(dataplane.Veth); ok {
						p2 = dataplane.Plan{}
						for k1, o1 := range p1 {
							p2[k1] = o1
						}
						p2.Add(v)
						p2.Add(dataplane.FDB{Link: v.Name, MAC: v.MAC, Master: true})
						p2.Add(dataplane.Dest{VNI: 4096, MAC: v.MAC, Link: v.Name})
						break
					}
				}
				apply(b, k, dataplane.Diff(p1, dataplane.Plan{}))
				var reading, applying, removing time.Duration
				for b.Loop() {
					start := time.Now()
					have, err := k.Read(b.Context(), 4096)
					must(b, have, err)
					ops := dataplane.Diff(p2, have)
					reading += time.Since(start)
					start = time.Now()
					apply(b, k, ops)
					applying += time.Since(start)
					start = time.Now()
					apply(b, k, dataplane.Diff(p1, p2))
					removing += time.Since(start)
				}
				for name, d := range map[string]time.Duration{"read-ms": reading, "apply-ms": applying, "remove-ms": removing} {
					b.ReportMetric(float64(d.Microseconds())/1000/float64(b.N), name)
				}
			})
		})
	}
}

// A network with 10,000 endpoints on 100 peers: programming all, reading all, and
// the pass for one change.
func BenchmarkRemote(b *testing.B) {
	bench(b, func(k *kernel.Kernel) {
		u := dataplane.Underlay{Address: kerneltest.Underlay4, Link: kerneltest.UnderlayLink, MTU: kerneltest.UnderlayMTU, Program: true, Ethernet: true}
		e := kerneltest.Example{Snapshot: kerneltest.Network(4096, 10, 100, 100, u, "10.0.0.0/8"), Underlay: u}
		var programming, reading, removing time.Duration
		for b.Loop() {
			want, err := e.Plan()
			must(b, want, err)
			start := time.Now()
			apply(b, k, dataplane.Diff(want, dataplane.Plan{}))
			programming += time.Since(start)
			start = time.Now()
			have, err := k.Read(b.Context(), 4096)
			must(b, have, err)
			reading += time.Since(start)
			if ops := dataplane.Diff(want, have); len(ops) != 0 {
				b.Errorf("%d operations left", len(ops))
			}
			start = time.Now()
			apply(b, k, dataplane.Diff(dataplane.Plan{}, want))
			removing += time.Since(start)
		}
		for name, d := range map[string]time.Duration{"program-ms": programming, "read-ms": reading, "remove-ms": removing} {
			b.ReportMetric(float64(d.Microseconds())/1000/float64(b.N), name)
		}
	})
}
