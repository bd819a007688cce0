package gossip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// memNet is an underlay in memory for a simulation: packets and streams arrive
// after a delay like that of a LAN, packets may be lost, hosts may be cut off. Under
// testing/synctest the delays are virtual. Bandwidth is not limited.
type memNet struct {
	overflow atomic.Uint64 // packets dropped because a host did not read them
	dials    atomic.Uint64 // streams opened

	mu      sync.Mutex // guards what follows
	rnd     *rand.Rand
	loss    float64 // of packets, 0 to 1
	cut     func(a, b netip.Addr) bool
	ports   map[netip.AddrPort]*memPort
	records map[netip.AddrPort]*memListener
	sent    map[netip.Addr]uint64 // IP bytes of each host
}

// One way through the network, and what IP, UDP and TCP add.
const (
	leastDelay = 200 * time.Microsecond
	mostDelay  = 800 * time.Microsecond
	udpHeader  = 28
	tcpHeader  = 52
	tcpSegment = 1448
	tcpOpen    = 7 * tcpHeader // three packets to open, four to close
)

func newMemNet(rnd *rand.Rand) *memNet {
	return &memNet{rnd: rnd, ports: map[netip.AddrPort]*memPort{}, records: map[netip.AddrPort]*memListener{},
		sent: map[netip.Addr]uint64{}, cut: func(a, b netip.Addr) bool { return false }}
}

// set changes loss and cuts. A stream that is used while it is cut is dead for good.
func (n *memNet) set(loss float64, cut func(a, b netip.Addr) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = loss
	n.cut = func(a, b netip.Addr) bool { return cut != nil && cut(a, b) }
}

// pass counts what a host sends and says when it arrives, if it does.
func (n *memNet) pass(from, to netip.Addr, bytes int, packet bool) (delay time.Duration, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent[from] += uint64(bytes)
	delay = leastDelay + time.Duration(n.rnd.Int64N(int64(mostDelay-leastDelay)))
	return delay, !n.cut(from, to) && !(packet && n.rnd.Float64() < n.loss)
}

// total is what all hosts have sent.
func (n *memNet) total() (sum uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, b := range n.sent {
		sum += b
	}
	return sum
}

func (n *memNet) sentBy(a netip.Addr) uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent[a]
}

// memUnderlay is one host's way into the network.
type memUnderlay struct{ net *memNet }

func (u memUnderlay) listen(at netip.AddrPort) (net.Listener, error) {
	l := &memListener{net: u.net, at: at, conns: make(chan *memConn, 1024), done: make(chan struct{})}
	u.net.mu.Lock()
	defer u.net.mu.Unlock()
	if u.net.records[at] != nil {
		return nil, fmt.Errorf("%s is in use", at)
	}
	u.net.records[at] = l
	return l, nil
}

func (u memUnderlay) gossip(at netip.AddrPort, _ *log.Logger) (memberlist.NodeAwareTransport, error) {
	p := &memPort{net: u.net, at: at, packets: make(chan *memberlist.Packet, 4096), streams: make(chan net.Conn, 1024)}
	u.net.mu.Lock()
	defer u.net.mu.Unlock()
	if u.net.ports[at] != nil {
		return nil, fmt.Errorf("%s is in use", at)
	}
	u.net.ports[at] = p
	return p, nil
}

func (u memUnderlay) dial(ctx context.Context, from netip.Addr, to string, limit time.Duration) (net.Conn, error) {
	at, err := netip.ParseAddrPort(to)
	if err != nil {
		return nil, err
	}
	u.net.dials.Add(1)
	delay, ok := u.net.pass(from, at.Addr(), tcpOpen, false)
	if !ok {
		delay = limit
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(2 * delay):
	}
	if !ok {
		return nil, fmt.Errorf("dial %s: %w", to, os.ErrDeadlineExceeded)
	}
	source := netip.AddrPortFrom(from, 1)
	there, back := newPipe(), newPipe()
	client := &memConn{net: u.net, local: source, remote: at, in: back, out: there}
	server := &memConn{net: u.net, local: at, remote: source, in: there, out: back}
	u.net.mu.Lock()
	port, l := u.net.ports[at], u.net.records[at]
	u.net.mu.Unlock()
	switch {
	case port != nil:
		port.streams <- server
	case l != nil:
		l.conns <- server
	default:
		return nil, fmt.Errorf("dial %s: connection refused", to)
	}
	return client, nil
}

// memPort is memberlist's transport of one host.
type memPort struct {
	net     *memNet
	at      netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
}

func (p *memPort) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return net.IP(p.at.Addr().AsSlice()), int(p.at.Port()), nil
}

func (p *memPort) PacketCh() <-chan *memberlist.Packet { return p.packets }
func (p *memPort) StreamCh() <-chan net.Conn           { return p.streams }

func (p *memPort) Shutdown() error {
	p.net.mu.Lock()
	defer p.net.mu.Unlock()
	delete(p.net.ports, p.at)
	return nil
}

func (p *memPort) WriteTo(b []byte, addr string) (time.Time, error) {
	return p.WriteToAddress(b, memberlist.Address{Addr: addr})
}

func (p *memPort) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	at, err := netip.ParseAddrPort(a.Addr)
	if err != nil {
		return time.Time{}, err
	}
	delay, ok := p.net.pass(p.at.Addr(), at.Addr(), len(b)+udpHeader, true)
	if ok {
		body := append([]byte(nil), b...)
		time.AfterFunc(delay, func() { p.net.deliver(p.at, at, body) })
	}
	return time.Now(), nil
}

func (n *memNet) deliver(from, to netip.AddrPort, body []byte) {
	n.mu.Lock()
	port := n.ports[to]
	n.mu.Unlock()
	if port == nil {
		return
	}
	select {
	case port.packets <- &memberlist.Packet{Buf: body, From: net.UDPAddrFromAddrPort(from), Timestamp: time.Now()}:
	default:
		n.overflow.Add(1)
	}
}

func (p *memPort) DialTimeout(string, time.Duration) (net.Conn, error) {
	return nil, errors.New("the cluster dials by itself")
}

func (p *memPort) DialAddressTimeout(memberlist.Address, time.Duration) (net.Conn, error) {
	return p.DialTimeout("", 0)
}

// memListener is the port of a host's record stream.
type memListener struct {
	net   *memNet
	at    netip.AddrPort
	conns chan *memConn
	once  sync.Once
	done  chan struct{}
}

func (l *memListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		delete(l.net.records, l.at)
		l.net.mu.Unlock()
		close(l.done)
		for {
			select {
			case c := <-l.conns:
				_ = c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// memConn is one end of a stream.
type memConn struct {
	net           *memNet
	local, remote netip.AddrPort
	in, out       *pipe
}

func (c *memConn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *memConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func (c *memConn) Read(b []byte) (int, error) { return c.in.read(b) }

func (c *memConn) Write(b []byte) (int, error) {
	segments := (len(b) + tcpSegment - 1) / tcpSegment
	delay, ok := c.net.pass(c.local.Addr(), c.remote.Addr(), len(b)+segments*tcpHeader, false)
	return len(b), c.out.write(b, delay, ok)
}

func (c *memConn) Close() error {
	_, ok := c.net.pass(c.local.Addr(), c.remote.Addr(), 0, false)
	c.out.end(io.EOF, ok)
	c.in.end(net.ErrClosed, ok)
	return nil
}

func (c *memConn) SetDeadline(t time.Time) error      { return c.SetReadDeadline(t) }
func (c *memConn) SetWriteDeadline(t time.Time) error { return nil }
func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.mu.Lock()
	c.in.deadline = t
	c.in.mu.Unlock()
	poke(c.in.wake)
	return nil
}

// pipe is one direction of a stream. It has one reader and one writer, and room
// for all that is written.
type pipe struct {
	wake chan struct{} // cap 1: something changed for the reader

	mu       sync.Mutex // guards what follows
	chunks   []piece
	last     time.Time // when the newest chunk arrives; streams keep their order
	deadline time.Time
	err      error // for the reader, after the chunks
	dead     bool  // was used while cut off
}

type piece struct {
	at   time.Time
	body []byte
}

func newPipe() *pipe { return &pipe{wake: make(chan struct{}, 1)} }

func (p *pipe) write(b []byte, delay time.Duration, ok bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = p.dead || !ok
	if p.dead {
		return nil // TCP would try again until the reader gives up
	}
	if p.err != nil {
		return io.ErrClosedPipe
	}
	if at := time.Now().Add(delay); at.After(p.last) {
		p.last = at
	}
	p.chunks = append(p.chunks, piece{p.last, append([]byte(nil), b...)})
	poke(p.wake)
	return nil
}

// end closes one direction: io.EOF by its writer, net.ErrClosed by its reader. The
// other side does not hear of it while it is cut off.
func (p *pipe) end(err error, heard bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dead = p.dead || !heard
	if p.err == nil || errors.Is(err, net.ErrClosed) {
		p.err = err
	}
	if errors.Is(err, net.ErrClosed) {
		p.chunks = nil
	}
	poke(p.wake)
}

func (p *pipe) read(b []byte) (int, error) {
	for {
		p.mu.Lock()
		now := time.Now()
		var until time.Time
		switch {
		case !p.deadline.IsZero() && !now.Before(p.deadline):
			p.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(p.chunks) > 0 && !now.Before(p.chunks[0].at):
			n := copy(b, p.chunks[0].body)
			if p.chunks[0].body = p.chunks[0].body[n:]; len(p.chunks[0].body) == 0 {
				p.chunks = p.chunks[1:]
			}
			p.mu.Unlock()
			return n, nil
		case len(p.chunks) > 0:
			until = p.chunks[0].at
		case errors.Is(p.err, net.ErrClosed) || p.err != nil && !p.dead:
			p.mu.Unlock()
			return 0, p.err
		}
		if !p.deadline.IsZero() && (until.IsZero() || p.deadline.Before(until)) {
			until = p.deadline
		}
		p.mu.Unlock()
		p.await(until)
	}
}

func (p *pipe) await(until time.Time) {
	if until.IsZero() {
		<-p.wake
		return
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-p.wake:
	case <-timer.C:
	}
}
