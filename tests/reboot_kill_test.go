package tests

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// numbered is a datagram of the Docker host's container and, with all of its fields, what
// the guest's container answers. Nobody sends one again.
type numbered struct {
	Marker    [len(marker)]byte
	Number    uint32 // from 1
	Kills     uint32 // how often the guest is to kill its plugin
	Taken     uint32 // how many have come to the guest
	Begun     uint32 // kills so far; one more than Kills when all is over
	WhileDead uint32 // answers given while no plugin ran
}

const (
	numberedPort  = 7780
	numberedEvery = 20 * time.Millisecond // ten seconds of them fit into the queues before a guest that gets no processor
	// How many datagrams the guest answers before the first kill, while the plugin is
	// dead, and after each.
	answersBefore, answersDead, answersAfter = 500, 150, 100
)

// killedInGuest has the guest kill its plugin with SIGKILL again and again, while the
// Docker host's container and the guest's exchange datagrams.
func killedInGuest(t *testing.T, guest *hosts.Guest, peer hosts.Container) {
	t.Helper()
	kills := uint32(5)
	if soak() {
		kills = 50
	}
	var c *net.UDPConn
	if err := inside(t, peer, func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(guestContainer), numberedPort)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := hosts.BigBuffer(c); err != nil {
		t.Fatal(err)
	}
	var (
		lock     sync.Mutex
		answers  = map[uint32]numbered{} // by number
		last     numbered                // the newest
		received sync.WaitGroup
	)
	received.Go(func() {
		for raw := make([]byte, 100); ; {
			n, err := c.Read(raw)
			if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			var a numbered
			if _, err := binary.Decode(raw[:n], binary.BigEndian, &a); err != nil {
				continue
			}
			lock.Lock()
			if answers[a.Number] = a; a.Number > last.Number {
				last = a
			}
			lock.Unlock()
		}
	})
	newest := func() numbered {
		lock.Lock()
		defer lock.Unlock()
		return last
	}
	q := numbered{Kills: kills}
	copy(q.Marker[:], marker)
	tick := time.NewTicker(numberedEvery)
	defer tick.Stop()
	start := time.Now()
	limit := guestLimit + time.Duration(kills)*time.Minute
	for newest().Begun <= kills {
		<-tick.C
		q.Number++
		raw, err := binary.Append(nil, binary.BigEndian, q)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(raw) // what cannot leave is lost
		if q.Number%50 == 0 && strings.Contains(guest.Console(), "GUEST ends") || time.Since(start) > limit {
			t.Fatalf("the guest does not kill its plugin %d times; the newest of %d answers is %+v; it printed:\n%s", kills, len(answers), newest(), guest.Console())
		}
	}
	for deadline := time.Now().Add(20 * time.Second); newest().Number < q.Number && time.Now().Before(deadline); {
		pause(t, 50*time.Millisecond) // for those on their way
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	received.Wait()

	before, lostBefore := q.Number, uint32(0)
	for number := uint32(1); number <= q.Number; number++ {
		a, ok := answers[number]
		if ok && a.Begun > 0 {
			before = number - 1
			break
		}
		if !ok {
			lostBefore++
		}
	}
	lost := q.Number - uint32(len(answers))
	there := q.Number - last.Taken // on the way to the guest, if the last ones came
	if lost > 0 {
		t.Errorf("of %d datagrams %d had no answer: %d did not come to the guest; of the %d before the first kill %d had none", q.Number, lost, there, before, lostBefore)
	}
	if before < answersBefore || last.WhileDead < (kills+1)/2*answersDead {
		t.Errorf("%d datagrams before the first kill, and %d answered while no plugin ran: the test sees nothing", before, last.WhileDead)
	}
	figure(t, "encrypted: plugin killed in a guest with the kernel's WireGuard", int(kills), "%d of %d datagrams lost there and back (target 0), %d of them answered while no plugin ran; of %d before the first kill %d lost",
		lost-lostBefore, q.Number-before, last.WhileDead, before, lostBefore)
}

// supervised is the plugin in the guest, and who starts it again.
type supervised struct {
	docker string // address of the Docker host
	cmd    *exec.Cmd
	served time.Time // when the process that serves has begun

	begun, taken, answered, whileDead atomic.Uint32
	dead                              atomic.Bool
}

func (s *supervised) start() error {
	s.cmd = exec.Command("/weft", "plugin", "--run-dir", guestSockets, "--state-dir", filepath.Join(guestState, "weft"), "--sysnet", "/proc/sys/net")
	s.cmd.Env = append(os.Environ(), "WEFT_JOIN="+s.docker, "WEFT_WIREGUARD=kernel")
	s.cmd.Stdout, s.cmd.Stderr = os.Stdout, os.Stderr
	return s.cmd.Start()
}

// serves waits for a process that was not there at the last call, and for what it does at
// its start.
func (s *supervised) serves() error {
	var status struct {
		Started time.Time
		Ready   bool
		Loop    struct{ Passes uint64 }
	}
	return s.await("a new plugin serves", func() bool {
		raw, err := askAt(context.Background(), filepath.Join(guestSockets, "weft-admin.sock"), http.MethodGet, "/v1/status", nil)
		if err != nil || json.Unmarshal(raw, &status) != nil || !status.Ready || status.Loop.Passes == 0 || status.Started.Equal(s.served) {
			return false
		}
		s.served = status.Started
		return true
	})
}

func (s *supervised) await(what string, ok func() bool) error {
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("not within two minutes: %s", what)
		}
	}
	return nil
}

// answers waits until some more datagrams have been answered.
func (s *supervised) answers(n uint32) error {
	until := s.answered.Load() + n
	return s.await(fmt.Sprintf("%d datagrams are answered after kill %d", n, s.begun.Load()), func() bool { return s.answered.Load() >= until })
}

// answer answers datagrams in the container, and calls first when the first one has come.
func (s *supervised) answer(first func(kills uint32)) error {
	var c *net.UDPConn
	if err := hosts.InNetNS("/run/netns/c", func() (err error) {
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: numberedPort})
		return err
	}); err != nil {
		return err
	}
	if err := hosts.BigBuffer(c); err != nil {
		return err
	}
	for raw := make([]byte, 100); ; {
		n, from, err := c.ReadFromUDPAddrPort(raw)
		if err != nil {
			return err
		}
		var a numbered
		if _, err := binary.Decode(raw[:n], binary.BigEndian, &a); err != nil || !bytes.Equal(a.Marker[:], []byte(marker)) {
			continue
		}
		if a.Taken = s.taken.Add(1); a.Taken == 1 {
			go first(a.Kills)
		}
		if s.dead.Load() {
			s.whileDead.Add(1)
		}
		a.WhileDead, a.Begun = s.whileDead.Load(), s.begun.Load()
		text, err := binary.Append(nil, binary.BigEndian, a)
		if err != nil {
			return err
		}
		_, _ = c.WriteToUDPAddrPort(text, from) // what cannot leave is lost
		s.answered.Add(1)
	}
}

// kill kills the plugin in turn as Docker sees it, and then starts it again only after
// some time, and the process alone that works, which the other starts again.
func (s *supervised) kill(times uint32) error {
	if err := errors.Join(s.serves(), s.answers(answersBefore)); err != nil {
		return err
	}
	for i := range times {
		child, err := hosts.PluginChild(s.cmd.Process.Pid)
		if err != nil {
			return err
		}
		process, err := os.FindProcess(child)
		if err != nil {
			return err
		}
		if s.begun.Add(1); i%2 == 1 {
			err = process.Kill()
		} else {
			err = s.killAll(child)
		}
		if err = errors.Join(err, s.serves(), s.answers(answersAfter)); err != nil {
			return err
		}
	}
	s.begun.Add(1)
	return nil
}

func (s *supervised) killAll(child int) error {
	if err := s.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = s.cmd.Wait() // it was killed
	if err := s.await("the other process ends", func() bool {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child)) // empty once it has ended
		return len(line) == 0
	}); err != nil {
		return err
	}
	s.dead.Store(true)
	err := s.answers(answersDead)
	s.dead.Store(false)
	return errors.Join(err, s.start())
}
