package main

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	relayDial = 5 * time.Second
	mostRelay = 256 // connections at once, of one port
)

// holdPort binds a port of the host until it is closed. What reaches it all the same,
// past the rules that lead to the container, is turned away; but from the host's own
// loopback it is handed on: rules cannot lead ::1 anywhere else.
func holdPort(proto string, at, to netip.AddrPort) (io.Closer, error) {
	family := "4"
	if at.Addr().Is6() {
		family = "6"
	}
	switch proto {
	case "tcp":
		l, err := net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(at))
		if err != nil {
			return nil, err
		}
		go serveHeld(l, to)
		return l, nil
	case "udp":
		c, err := net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(at))
		if err != nil {
			return nil, err
		}
		_ = c.SetReadBuffer(0) // nobody reads
		return c, nil
	}
	return io.NopCloser(nil), nil // Go has no SCTP; records alone keep those apart
}

func serveHeld(l *net.TCPListener, to netip.AddrPort) {
	room := make(chan struct{}, mostRelay)
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		from, _ := c.RemoteAddr().(*net.TCPAddr)
		if from == nil || !from.IP.IsLoopback() {
			_ = c.Close()
			continue
		}
		select {
		case room <- struct{}{}:
			go func() {
				relay(c, to)
				<-room
			}()
		default:
			_ = c.Close()
		}
	}
}

// relay copies both ways until both sides have ended.
func relay(c *net.TCPConn, to netip.AddrPort) {
	defer c.Close()
	out, err := net.DialTimeout("tcp", to.String(), relayDial)
	if err != nil {
		return
	}
	defer out.Close()
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(out, c)
		_ = out.(*net.TCPConn).CloseWrite()
	})
	both.Go(func() {
		_, _ = io.Copy(c, out)
		_ = c.CloseWrite()
	})
	both.Wait()
}
