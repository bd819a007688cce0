package kernel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestReplacedProgram puts another version's program in the place of the one that stands,
// and back, as upgrades do, with the same maps and, where there are no pins, with new ones:
// no packet between containers is lost, and none that the guard drops passes in between.
func TestReplacedProgram(t *testing.T) {
	for _, pins := range []bool{true, false} {
		t.Run(map[bool]string{true: "same maps", false: "new maps"}[pins], func(t *testing.T) {
			folder := ""
			if pins {
				kerneltest.Need(t, "root", unix.Geteuid() == 0, "needs root to mount a bpf file system")
				folder = kernel.BPFFolder(t)
			}
			load := func(newer bool) *kernel.Program {
				if !newer {
					p := kernel.LoadOlder(t, folder)
					t.Cleanup(p.Close)
					return p
				}
				p := kernel.LoadProgram(folder)
				if err := p.Err(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(p.Close)
				return p
			}
			older := load(false)
			all := fastHostsWith(t, store.ModeVXLAN, older, loaded(t, true))
			a, b := all[0], all[1]
			for i, name := range load(true).Names() {
				if name == older.Names()[i] {
					t.Fatalf("both versions' filters are called %s, so none is replaced", name)
				}
			}
			var streams []*stream
			for _, to := range []struct {
				from, to *kerneltest.Place
				at       netip.Addr
			}{
				{a.containers[1], a.containers[0], a.endpoints[0].IPv4.Addr()},
				{a.containers[1], b.containers[0], b.endpoints[0].IPv4.Addr()},
				{b.containers[0], a.containers[1], a.endpoints[1].IPv4.Addr()},
			} {
				streams = append(streams, startStream(t, to.from, to.to, to.at))
			}
			spoof := startSpoofing(t, a)
			for i := range 4 {
				a.k.Close()
				a.open(t, load(i%2 == 0))
				a.program(t, all...)
				spoof.goesOn(t)
			}
			for _, s := range streams {
				if lost, sent := s.end(); lost > 0 || sent == 0 {
					t.Errorf("%d of %d packets to %s are lost", lost, sent, s.to)
				}
			}
			if n := spoof.seen.Load(); n > 0 {
				t.Errorf("%d frames passed that the guard drops", n)
			}
			// What does not come is looked for in the right place.
			a.Run(t, "tc qdisc del dev "+dataplane.VethName(a.endpoints[0].ID)+" clsact")
			for deadline := time.Now().Add(10 * time.Second); spoof.seen.Load() == 0; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("without the program no such frame passes either")
				}
			}
		})
	}
}

// stream is numbered packets from one container to another, without a pause.
type stream struct {
	to  netip.Addr
	end func() (lost, sent int)
}

func startStream(t *testing.T, from, to *kerneltest.Place, at netip.Addr) *stream {
	t.Helper()
	target := netip.AddrPortFrom(at, 7005).String()
	var in net.PacketConn
	var out net.Conn
	var err, err2 error
	to.Do(func() { in, err = net.ListenPacket("udp4", target) })
	from.Do(func() { out, err2 = net.Dial("udp4", target) })
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if err := in.(*net.UDPConn).SetReadBuffer(8 << 20); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = in.Close(), out.Close() })
	var sent, last atomic.Uint32
	stop, done := make(chan struct{}), make(chan struct{})
	came := map[uint32]bool{}
	go func() {
		defer close(done)
		buf := make([]byte, 100)
		for {
			n, _, err := in.ReadFrom(buf)
			if err != nil {
				return
			}
			if n == 4 {
				came[binary.BigEndian.Uint32(buf)] = true
				last.Store(binary.BigEndian.Uint32(buf))
			}
		}
	}()
	var sender sync.WaitGroup
	sender.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				if _, err := out.Write(binary.BigEndian.AppendUint32(nil, sent.Load()+1)); err != nil {
					t.Error(err)
				}
				sent.Add(1)
			}
		}
	})
	return &stream{at, func() (int, int) {
		close(stop)
		sender.Wait()
		for deadline := time.Now().Add(5 * time.Second); last.Load() != sent.Load() && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
		_ = in.Close()
		<-done
		return int(sent.Load()) - len(came), int(sent.Load())
	}}
}

// spoofing is a container that sends all that the guard drops, without a pause, and its
// neighbour that listens for it.
type spoofing struct {
	sent, seen atomic.Uint64
}

func startSpoofing(t *testing.T, m *machine) *spoofing {
	t.Helper()
	s := &spoofing{}
	var forbidden [][]byte
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 2)), stationOf(m.endpoints[0]), stationOf(m.endpoints[1])) {
		if f.Reason != "" && bytes.Contains(f.Data, []byte(kerneltest.Marker)) {
			forbidden = append(forbidden, f.Data)
		}
	}
	out, in := packetSocket(t, m.containers[0]), packetSocket(t, m.containers[1])
	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, frame := range forbidden {
				if _, err := unix.Write(out, frame); err != nil && !errors.Is(err, unix.ENOBUFS) {
					t.Error(err)
				}
				s.sent.Add(1)
			}
		}
	})
	all.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := unix.Recvfrom(in, buf, 0)
			select {
			case <-stop:
				return
			default:
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype != unix.PACKET_OUTGOING && bytes.Contains(buf[:n], []byte(kerneltest.Marker)) {
				s.seen.Add(1)
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		all.Wait()
		_, _ = unix.Close(in), unix.Close(out)
	})
	return s
}

// goesOn waits until more has been sent.
func (s *spoofing) goesOn(t *testing.T) {
	t.Helper()
	before := s.sent.Load()
	for deadline := time.Now().Add(10 * time.Second); s.sent.Load() < before+200; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is sent any more")
		}
	}
}

// packetSocket opens a packet socket on a container's link.
func packetSocket(t *testing.T, c *kerneltest.Place) (fd int) {
	t.Helper()
	const all = uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8) // in network order
	var err error
	c.Do(func() {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return
		}
		var link *net.Interface
		if link, err = net.InterfaceByName("eth0"); err != nil {
			return
		}
		err = errors.Join(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
