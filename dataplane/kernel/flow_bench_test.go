package kernel

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// BenchmarkFlows runs the program over one packet again and again, with flows counted
// and not, in turns, and reports what a packet takes and the ratio.
func BenchmarkFlows(b *testing.B) {
	kerneltest.Netns(b)
	frames := map[string][]byte{}
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 2)), own, victim) {
		frames[f.Kind] = f.Data
	}
	for _, c := range []struct {
		name, frame string
		known       bool // its destination
	}{{"fast", "ipv4", true}, {"slow", "ipv4", false}, {"fast 6", "ipv6", true}, {"dropped", "ipv4 of another", false}} {
		b.Run(c.name, func(b *testing.B) {
			p, _ := guarded(b, dataplane.Port{Guard: true, Fast: true})
			if c.known {
				d := dataplane.Dest{VNI: 1, MAC: victim.MAC}
				must(b, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
			}
			const repeat = 2000
			p.inTurns(b, repeat, func() error {
				_, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: frames[c.frame], Repeat: repeat})
				return err
			})
		})
	}
}

// BenchmarkFlowsOnTheWay sends UDP packets from one container to another of the same
// host, on the fast path, with flows counted and not, in turns. Nobody takes them from the
// socket at the end, so the way is as short as it can be.
func BenchmarkFlowsOnTheWay(b *testing.B) {
	p := loadProgram(b)
	host, from, to := kerneltest.NewPlace(b), kerneltest.NewPlace(b), kerneltest.NewPlace(b)
	for link, c := range map[string]struct {
		*kerneltest.Place
		is, other kerneltest.Station
	}{"own": {from, own, victim}, "victim": {to, victim, own}} {
		kerneltest.Wire(b, host, link, nil, c.Place, "eth0", []netip.Prefix{netip.PrefixFrom(c.is.IPv4, 24)})
		c.Run(b, fmt.Sprintf("ip link set eth0 address %s\nip neigh replace %s lladdr %s dev eth0", c.is.MAC, c.other.IPv4, c.other.MAC))
	}
	host.Do(func() {
		k, err := New(Config{Program: p})
		if err != nil {
			b.Error(err)
			return
		}
		b.Cleanup(k.Close)
		in, err := k.link("own")
		out, err2 := k.link("victim")
		if err := errors.Join(err, err2); err != nil {
			b.Error(err)
			return
		}
		d := dataplane.Dest{VNI: 1, MAC: victim.MAC}
		if err := errors.Join(k.putPort(in.index, dataplane.Port{VNI: 1, MAC: own.MAC, IPv4: own.IPv4, Guard: true, Fast: true}),
			p.objects.WeftDests.Put(destKey(d), destValue(d, uint32(out.index)))); err != nil {
			b.Error(err)
		}
	})
	if b.Failed() {
		b.FailNow()
	}
	var ear net.PacketConn
	var mouth net.Conn
	var err, err2 error
	at := netip.AddrPortFrom(victim.IPv4, 9).String()
	to.Do(func() { ear, err = net.ListenPacket("udp4", at) })
	from.Do(func() { mouth, err2 = net.Dial("udp4", at) })
	must(b, errors.Join(err, err2))
	defer func() { _, _ = ear.Close(), mouth.Close() }()
	const repeat = 200
	p.inTurns(b, repeat, func() error {
		for range repeat {
			if _, err := mouth.Write([]byte("x")); err != nil {
				return err
			}
		}
		return nil
	})
	_, sums, err := (&Kernel{program: p, cfg: Config{Flows: true}}).FlowTotals()
	must(b, err)
	if want := uint64(b.N * repeat); sums["fast"].Packets != want {
		b.Errorf("of %d packets that were to be counted, the fast path has %+v", want, sums)
	}
}

// inTurns runs send, of some packets, with flows counted and not. A run is shorter than a
// processor's slice, so that the middle one of all is undisturbed.
func (p *Program) inTurns(b *testing.B, packets int, send func() error) {
	b.Helper()
	var took [2][]float64
	for b.Loop() {
		for on := range took {
			must(b, p.objects.WeftSettings.Put(uint32(0), bpf.ProgramSettings{Flags: uint16(on) * hasFlows}))
			start := time.Now()
			must(b, send())
			took[on] = append(took[on], float64(time.Since(start).Nanoseconds())/float64(packets))
		}
	}
	var middle [2]float64
	for on, all := range took {
		slices.Sort(all)
		middle[on] = all[len(all)/2]
	}
	b.ReportMetric(middle[0], "off-ns/packet")
	b.ReportMetric(middle[1], "on-ns/packet")
	b.ReportMetric(middle[1]/middle[0], "on/off")
	b.ReportMetric(0, "ns/op")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkDestinations runs the program on packets to one destination in turn, of so
// many that it knows.
func BenchmarkDestinations(b *testing.B) {
	var frame []byte
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 2)), own, victim) {
		if f.Kind == "ipv4" {
			frame = f.Data
		}
	}
	for _, n := range []int{1, 5000, 200_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p, _ := guarded(b, dataplane.Port{Guard: true, Fast: true})
			macs := make([]store.MAC, n)
			for i := range macs {
				macs[i] = store.DeriveMAC("bench", fmt.Sprint(i))
				d := dataplane.Dest{VNI: 1, MAC: macs[i]}
				must(b, p.objects.WeftDests.Put(destKey(d), destValue(d, loopback)))
			}
			const repeat = 1000
			at := 0
			for b.Loop() {
				at = (at + 7919) % n // another one each time, as the cache of a busy host sees it
				copy(frame, macs[at][:])
				if _, err := p.objects.WeftFromContainer.Run(&ebpf.RunOptions{Data: frame, Repeat: repeat}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/repeat, "ns/packet")
		})
	}
}
