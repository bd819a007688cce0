package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/tests/hosts"
)

// member is a container of a network under attack.
type member struct {
	hosts.Container
	kerneltest.Station
	link string
}

// packetSocket opens an AF_PACKET socket on the member's link.
func (m member) packetSocket(t *testing.T, protocol uint16, set func(fd int) error) (fd int) {
	t.Helper()
	err := inside(t, m.Container, func() error {
		i, err := net.InterfaceByName(m.link)
		if err != nil {
			return err
		}
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := set(fd); err != nil {
			return err
		}
		// The protocol in network order; nothing arrives before this.
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: i.Index})
	})
	if err != nil {
		t.Fatalf("container %s: packet socket: %v", m.Name, err)
	}
	return fd
}

// sends sends n frames that the guard must drop, of all kinds in turn, to one victim and
// then to the other. On a routed network the host is the neighbour: next, unless zero,
// is its MAC. It returns how many left, by the reason that the guard has, and how many
// the container's own kernel refused to send.
func (m member) sends(t *testing.T, rng *rand.Rand, n int, next store.MAC, victims ...member) (sent map[string]int, refused int) {
	t.Helper()
	// One frame a call: the kernel says of each whether it left.
	fd := m.packetSocket(t, 0, func(int) error { return nil })
	defer func() { _ = unix.Close(fd) }()
	sent = map[string]int{}
	for left, turn := n, 0; left > 0; turn++ {
		to := victims[turn%len(victims)]
		for _, f := range kerneltest.Frames(rng, m.Station, to.Station) {
			if f.Reason == "" || left == 0 {
				continue
			}
			left--
			m.readdress(f.Data, to, next)
			if _, err := unix.Write(fd, f.Data); err != nil {
				refused++
				continue
			}
			sent[f.Reason]++
		}
	}
	return sent, refused
}

func (m member) readdress(frame []byte, to member, next store.MAC) {
	if next != (store.MAC{}) && bytes.Equal(frame[:6], to.MAC[:]) {
		copy(frame, next[:])
	}
}

// sendsOne sends the frame of that kind, which may pass.
func (m member) sendsOne(t *testing.T, kind string, next store.MAC, to member) {
	t.Helper()
	fd := m.packetSocket(t, 0, func(int) error { return nil })
	defer func() { _ = unix.Close(fd) }()
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 1)), m.Station, to.Station) {
		if f.Kind != kind {
			continue
		}
		m.readdress(f.Data, to, next)
		if _, err := unix.Write(fd, f.Data); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no frame of kind %q", kind)
}

// honest is in a packet that may pass.
const honest = "weft-honest"

// ear hears all frames that arrive at a member.
type ear struct {
	of       member
	file     *os.File
	done     chan struct{}
	accepted atomic.Int64 // frames that nobody may send to it
	honest   atomic.Int64
	first    string // of those accepted; read it after stop
}

func (m member) listens(t *testing.T) *ear {
	t.Helper()
	fd := m.packetSocket(t, unix.ETH_P_ALL, func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20), unix.SetNonblock(fd, true))
	})
	e := &ear{of: m, file: os.NewFile(uintptr(fd), "packets of "+m.Name), done: make(chan struct{})}
	go e.hear()
	t.Cleanup(func() { _ = e.file.Close(); <-e.done })
	return e
}

func (e *ear) hear() {
	defer close(e.done)
	buf := make([]byte, 1<<16)
	for {
		n, err := e.file.Read(buf)
		if err != nil {
			return // the deadline, or closed
		}
		if bytes.Contains(buf[:n], []byte(honest)) {
			e.honest.Add(1)
		} else if why := e.hostile(buf[:n]); why != "" {
			if e.accepted.Add(1) == 1 {
				e.first = fmt.Sprintf("%s: %x", why, buf[:n])
			}
		}
	}
}

// stop hears what is on its way, and returns how many frames were accepted.
func (e *ear) stop() int64 {
	_ = e.file.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	<-e.done
	return e.accepted.Load()
}

// hostile returns why a frame cannot come from a container that behaves, nor from the
// host; "" if it can. Not all hostile frames have room for the marker.
func (e *ear) hostile(b []byte) string {
	if bytes.Contains(b, []byte(kerneltest.Marker)) {
		return "marker"
	}
	switch binary.BigEndian.Uint16(b[12:]) {
	case unix.ETH_P_IP:
		if len(b) < 14+20+8 {
			return "short"
		}
	case unix.ETH_P_IPV6:
		if len(b) < 14+40+4 {
			return "short"
		}
		next, rest := b[20], b[54:]
		for (next == 0 || next == 60 || next == 44) && len(rest) >= 8 {
			size := 8 + 8*int(rest[1])
			if next == 44 {
				size = 8
			}
			next, rest = rest[0], rest[min(size, len(rest)):]
		}
		if next == 58 && len(rest) > 0 {
			return e.discovery(b, rest)
		}
	}
	return ""
}

// discovery looks at a message of ICMPv6.
func (e *ear) discovery(b, m []byte) string {
	const na = 136
	switch {
	case m[0] == 134 || m[0] == 137:
		return "router"
	case m[0] != 135 && m[0] != na:
		return ""
	case len(m) < 24:
		return "short"
	}
	target := netip.AddrFrom16([16]byte(m[8:24]))
	mine := target == e.of.IPv6 || target == e.of.LinkLocal()
	if mine && (m[0] == na || netip.AddrFrom16([16]byte(b[22:38])).IsUnspecified()) {
		return "claims the victim's address"
	}
	if len(m) >= 32 && m[24] <= 2 && !bytes.Equal(m[26:32], b[6:12]) {
		return "another's MAC"
	}
	return ""
}

// passing is what differs between two looks at the same table.
var passing = regexp.MustCompile(`\b(\d+sec|REACHABLE|STALE|DELAY|PROBE)\b`)

// tables are the neighbours on some links, the addresses and the routes of a network
// namespace, as lines. What it knows of the neighbours is left out where it is true.
func tables(t *testing.T, netns string, links *regexp.Regexp, all ...kerneltest.Station) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nsenter", "--net="+netns, "sh", "-c",
		"ip -4 neigh; ip -6 neigh; echo; ip -o address; ip -4 route show table all; ip -6 route show table all").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	neighbours, rest, _ := strings.Cut(string(out), "\n\n")
	var lines []string
	for line := range strings.Lines(neighbours) {
		line = strings.TrimSpace(passing.ReplaceAllString(line, ""))
		f := strings.Fields(line) // address, dev, link, lladdr, MAC
		if len(f) < 5 || f[3] != "lladdr" || !links.MatchString(f[2]) {
			continue
		}
		known := slices.ContainsFunc(all, func(s kerneltest.Station) bool {
			return f[4] == s.MAC.String() && slices.Contains([]string{s.IPv4.String(), s.IPv6.String(), s.LinkLocal().String()}, f[0])
		})
		if !known {
			lines = append(lines, strings.Join(f, " "))
		}
	}
	for line := range strings.Lines(passing.ReplaceAllString(rest, "")) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	slices.Sort(lines)
	return lines
}
