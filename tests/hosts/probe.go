package hosts

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Probe is a pair of flows from one container to another: a UDP packet each
// millisecond, numbered, and one TCP connection with a message every ten. Both
// ends are sockets of this process in the containers' network namespaces, so
// there is one clock and nothing to install.
//
// Four goroutines own their half of a flow each; Stop ends them and then reads
// what they counted.
type Probe struct {
	udpIn, udpOut net.Conn
	tcpIn, tcpOut net.Conn

	cancel context.CancelFunc
	group  sync.WaitGroup

	sent, tcpSent uint64
	pause         time.Duration
	arrivals      []arrival
	tcpErr        error
	report        Report
}

// Report is what a probe saw.
type Report struct {
	Sent, Received   uint64 // UDP packets, each counted once
	Lost, Duplicated uint64
	Gap              time.Duration // longest run of lost packets; 0 when none is lost
	Delay            time.Duration // longest way of a packet that arrived
	Pause            time.Duration // longest time the sender itself did not run: noise of the machine

	TCPSent, TCPReceived uint64        // messages
	TCPDelay             time.Duration // longest way of a message
	TCPErr               error         // why the connection broke, or nil
}

// Err says what was lost, or nil.
func (r Report) Err() error {
	var errs []error
	if r.Lost > 0 {
		errs = append(errs, fmt.Errorf("%d of %d packets lost, longest gap %s", r.Lost, r.Sent, r.Gap))
	}
	if r.TCPErr != nil {
		errs = append(errs, fmt.Errorf("TCP connection: %w", r.TCPErr))
	} else if r.TCPReceived != r.TCPSent {
		errs = append(errs, fmt.Errorf("TCP connection: %d of %d messages arrived", r.TCPReceived, r.TCPSent))
	}
	return errors.Join(errs...)
}

// String is one line for a log.
func (r Report) String() string {
	broken := ""
	if r.TCPErr != nil {
		broken = ", broken: " + r.TCPErr.Error()
	}
	return fmt.Sprintf("UDP sent %d lost %d duplicated %d gap %s delay %s (sender paused %s); TCP sent %d received %d delay %s%s",
		r.Sent, r.Lost, r.Duplicated, r.Gap.Round(time.Millisecond), r.Delay.Round(time.Millisecond), r.Pause.Round(time.Millisecond),
		r.TCPSent, r.TCPReceived, r.TCPDelay.Round(time.Millisecond), broken)
}

// udpInterval and tcpInterval are how often a probe sends; in a guest less often, for that
// has to compute with each packet.
func udpInterval() time.Duration { return Patience(time.Millisecond) }
func tcpInterval() time.Duration { return Patience(10 * time.Millisecond) }

const (
	messageSize = 16 // sequence number and send time, big-endian
	// stragglers is how long Stop waits for packets on their way.
	stragglers = 500 * time.Millisecond
)

type arrival struct {
	seq  uint64
	sent int64 // nanoseconds since 1970
}

// StartProbe starts both flows from one container to the address of another. It
// returns once the TCP connection stands; ctx bounds that.
func StartProbe(ctx context.Context, from, to Container, address netip.Addr) (*Probe, error) {
	p := &Probe{}
	if err := p.connect(ctx, from, to, address); err != nil {
		p.closeAll()
		return nil, fmt.Errorf("probe %s to %s: %w", from.Name, to.Name, err)
	}
	pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p.cancel = cancel
	p.group.Go(func() { p.sendUDP(pctx) })
	p.group.Go(p.receiveUDP)
	p.group.Go(func() { p.sendTCP(pctx) })
	p.group.Go(p.receiveTCP)
	return p, nil
}

func (p *Probe) connect(ctx context.Context, from, to Container, address netip.Addr) error {
	fromPID, err := from.PID(ctx)
	if err != nil {
		return err
	}
	toPID, err := to.PID(ctx)
	if err != nil {
		return err
	}
	var listener net.Listener
	err = InNetNS(fmt.Sprintf("/proc/%d/ns/net", toPID), func() error {
		at := netip.AddrPortFrom(address, 0)
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		p.udpIn = u
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return errors.Join(err, BigBuffer(u))
	})
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	err = InNetNS(fmt.Sprintf("/proc/%d/ns/net", fromPID), func() error {
		var d net.Dialer
		p.udpOut, err = d.DialContext(ctx, "udp", p.udpIn.LocalAddr().String())
		if err != nil {
			return err
		}
		p.tcpOut, err = d.DialContext(ctx, "tcp", listener.Addr().String())
		return err
	})
	if err != nil {
		return err
	}
	p.tcpIn, err = listener.Accept()
	return err
}

// BigBuffer gives the receiver room for four seconds of a probe: a busy machine must not
// look like a lossy network.
func BigBuffer(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20)
	})
	return errors.Join(err, serr)
}

// Stop ends the flows, waits for what is on its way and reports.
func (p *Probe) Stop() (Report, error) {
	p.cancel()
	_ = p.udpIn.SetReadDeadline(time.Now().Add(stragglers))
	// The TCP message stream may be in the middle of a retransmission.
	_ = p.tcpIn.SetReadDeadline(time.Now().Add(5 * time.Second))
	_ = p.tcpOut.SetWriteDeadline(time.Now().Add(5 * time.Second))
	p.group.Wait()
	p.closeAll()
	p.count()
	return p.report, p.report.Err()
}

func (p *Probe) closeAll() {
	for _, c := range []net.Conn{p.udpIn, p.udpOut, p.tcpIn, p.tcpOut} {
		if c != nil {
			_ = c.Close()
		}
	}
}

// mostOwed is how many packets a probe sends at once after a pause of its own. Queues on
// the way hold some hundreds, and what they drop of a burst tells nothing of the network.
const mostOwed = 200

// sendUDP keeps to the clock: after a pause it sends what it owes, so that the
// number of packets is the number of milliseconds, but for pauses longer than mostOwed.
func (p *Probe) sendUDP(ctx context.Context) {
	tick := time.NewTicker(udpInterval())
	defer tick.Stop()
	started := time.Now()
	last := started
	buf := make([]byte, messageSize)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		p.pause = max(p.pause, now.Sub(last))
		last = now
		owed := uint64(now.Sub(started) / udpInterval())
		if owed > p.sent+mostOwed {
			started = started.Add(time.Duration(owed-p.sent-mostOwed) * udpInterval())
			owed = p.sent + mostOwed
		}
		for ; p.sent < owed; p.sent++ {
			binary.BigEndian.PutUint64(buf, p.sent)
			binary.BigEndian.PutUint64(buf[8:], uint64(time.Now().UnixNano()))
			_, _ = p.udpOut.Write(buf) // a packet that cannot leave counts as lost
		}
	}
}

func (p *Probe) receiveUDP() {
	buf := make([]byte, messageSize)
	for {
		n, err := p.udpIn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n != messageSize {
			continue
		}
		a := arrival{binary.BigEndian.Uint64(buf), int64(binary.BigEndian.Uint64(buf[8:]))}
		p.arrivals = append(p.arrivals, a)
		p.report.Delay = max(p.report.Delay, time.Duration(time.Now().UnixNano()-a.sent))
	}
}

func (p *Probe) sendTCP(ctx context.Context) {
	tick := time.NewTicker(tcpInterval())
	defer tick.Stop()
	buf := make([]byte, messageSize)
	for {
		select {
		case <-ctx.Done():
			// The receiver reads to the end of the stream.
			_ = p.tcpOut.(*net.TCPConn).CloseWrite()
			return
		case <-tick.C:
		}
		binary.BigEndian.PutUint64(buf, p.tcpSent)
		binary.BigEndian.PutUint64(buf[8:], uint64(time.Now().UnixNano()))
		if _, err := p.tcpOut.Write(buf); err != nil {
			p.tcpErr = err
			return
		}
		p.tcpSent++
	}
}

func (p *Probe) receiveTCP() {
	buf := make([]byte, messageSize)
	for {
		if _, err := io.ReadFull(p.tcpIn, buf); err != nil {
			if !errors.Is(err, io.EOF) {
				p.report.TCPErr = err
			}
			return
		}
		p.report.TCPReceived++
		sent := int64(binary.BigEndian.Uint64(buf[8:]))
		p.report.TCPDelay = max(p.report.TCPDelay, time.Duration(time.Now().UnixNano()-sent))
	}
}

// count turns the arrivals into the report. Every goroutine has ended.
func (p *Probe) count() {
	r := &p.report
	r.Sent, r.Pause, r.TCPSent = p.sent, p.pause, p.tcpSent
	r.TCPErr = errors.Join(r.TCPErr, p.tcpErr)
	slices.SortFunc(p.arrivals, func(a, b arrival) int { return int(int64(a.seq) - int64(b.seq)) })
	for i, a := range p.arrivals {
		if i > 0 && a.seq == p.arrivals[i-1].seq {
			r.Duplicated++
			continue
		}
		r.Received++
		if i > 0 && a.seq > p.arrivals[i-1].seq+1 {
			r.Gap = max(r.Gap, time.Duration(a.sent-p.arrivals[i-1].sent))
		}
	}
	r.Lost = r.Sent - r.Received
	if n := len(p.arrivals); n > 0 && r.Sent > 0 {
		// Losses at either end have an arrival on one side only.
		r.Gap = max(r.Gap, time.Duration(p.arrivals[0].seq)*udpInterval(),
			time.Duration(r.Sent-1-p.arrivals[n-1].seq)*udpInterval())
	} else {
		r.Gap = time.Duration(r.Sent) * udpInterval()
	}
}
