package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	relayDial = 5 * time.Second
	mostRelay = 256 // connections at once, of one port
)

// holdPort binds a port of the host until it is closed. What reaches it all the same,
// past the rules that lead to the container, is turned away; but what comes from the host's
// own loopback is handed on, by TCP and UDP: rules cannot lead ::1 anywhere else.
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
		if a := at.Addr(); a == netip.IPv6Loopback() || a == netip.IPv6Unspecified() {
			go (&udpRelay{in: c, to: to, idle: relayIdle}).serve()
		} else {
			_ = c.SetReadBuffer(0) // nobody reads
		}
		return c, nil
	}
	return holdSCTP(at)
}

// holdSCTP binds an SCTP port, which Go's net cannot. A socket that does not listen keeps
// the port from others as well, and the kernel refuses associations with it. A kernel
// without SCTP is an error, as it is to Docker: no program of the host could use the port.
func holdSCTP(at netip.AddrPort) (io.Closer, error) {
	family := unix.AF_INET
	var to unix.Sockaddr
	if at.Addr().Is6() {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	} else {
		to = &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, fmt.Errorf("this host's kernel has no SCTP, modprobe sctp: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("SCTP socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "sctp "+at.String())
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err = errors.Join(err, unix.Bind(fd, to)); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("bind: %w", err)
	}
	return f, nil
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
