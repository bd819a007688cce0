package gossip

import (
	"context"
	"log"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// underlay is how a host reaches others: sockets, or a network in memory when
// hundreds of hosts are simulated in one process.
type underlay interface {
	// listen opens the port of the record stream.
	listen(at netip.AddrPort) (net.Listener, error)
	// gossip opens the port of memberlist, UDP and TCP; it is not asked to dial.
	gossip(at netip.AddrPort, logger *log.Logger) (memberlist.NodeAwareTransport, error)
	// dial opens a stream, of memberlist or of records. The peer's rules let in the
	// address that it knows, so it comes from there if from is valid.
	dial(ctx context.Context, from netip.Addr, to string, limit time.Duration) (net.Conn, error)
}

type sockets struct{}

func (sockets) listen(at netip.AddrPort) (net.Listener, error) {
	return net.Listen("tcp", at.String())
}

func (sockets) gossip(at netip.AddrPort, logger *log.Logger) (memberlist.NodeAwareTransport, error) {
	return memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{at.Addr().String()}, BindPort: int(at.Port()), Logger: logger})
}

func (sockets) dial(ctx context.Context, from netip.Addr, to string, limit time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: limit}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	return d.DialContext(ctx, "tcp", to)
}
