package main

import (
	"io"
	"net"
	"net/netip"
)

// holdPort binds a port of the host until it is closed. What reaches it all the same,
// past the rules that lead to the container, is turned away.
func holdPort(proto string, at netip.AddrPort) (io.Closer, error) {
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
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.Close()
			}
		}()
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
