package main

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// relayIdle is after how long a client of a UDP port is forgotten, when neither it nor its
// container says anything.
const relayIdle = 2 * time.Minute

// udpRelay hands on what reaches the socket that holds a UDP port from the host's own
// loopback. Each client has a socket to the container.
type udpRelay struct {
	in   *net.UDPConn
	to   netip.AddrPort
	idle time.Duration

	mu      sync.Mutex
	clients map[netip.AddrPort]*net.UDPConn
}

// serve returns when the port is given back.
func (r *udpRelay) serve() {
	packet := make([]byte, 1<<16)
	for {
		n, from, err := r.in.ReadFromUDPAddrPort(packet)
		if err != nil {
			break
		}
		if !from.Addr().IsLoopback() {
			continue
		}
		if out := r.client(from); out != nil {
			_ = out.SetReadDeadline(time.Now().Add(r.idle))
			_, _ = out.Write(packet[:n])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, out := range r.clients {
		_ = out.Close()
	}
}

// client returns the socket of a client, or nil if there are too many.
func (r *udpRelay) client(from netip.AddrPort) *net.UDPConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	if out := r.clients[from]; out != nil || len(r.clients) >= mostRelay {
		return out
	}
	out, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(r.to))
	if err != nil {
		return nil
	}
	if r.clients == nil {
		r.clients = map[netip.AddrPort]*net.UDPConn{}
	}
	r.clients[from] = out
	go r.answer(out, from)
	return out
}

// answer brings a client what the container answers, until both are silent or the
// container has nobody at the port.
func (r *udpRelay) answer(out *net.UDPConn, from netip.AddrPort) {
	packet := make([]byte, 1<<16)
	for {
		_ = out.SetReadDeadline(time.Now().Add(r.idle))
		n, err := out.Read(packet)
		if err != nil {
			break
		}
		_, _ = r.in.WriteToUDPAddrPort(packet[:n], from)
	}
	_ = out.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.clients, from)
}
