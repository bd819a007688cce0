package gossip

import (
	"context"
	"crypto/hmac"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// Limits of the owner's side. A stranger can hold a connection for handshakeTime
// and one address only a few of them; a member can be idle for idleServe, and not at
// all while more than busyStreams are open.
const (
	handshakeTime   = 5 * time.Second
	ioTime          = 10 * time.Second // one frame, either way
	idleServe       = 30 * time.Second
	maxHandshakes   = 64
	maxPerAddress   = 8 // handshakes
	maxStreams      = 1024
	busyStreams     = 256
	maxPerHost      = 4
	acceptRetryTime = 100 * time.Millisecond
	// A host that joins learns of all members at once, and they of it a moment later, by
	// gossip. Refused, it would come again, at the price of a handshake each time.
	newsTime  = time.Second
	newsEvery = 50 * time.Millisecond
)

// server answers peers' questions about this host's records.
type server struct {
	c          *Cluster
	conf       *tls.Config
	handshakes chan struct{} // semaphore

	mu        sync.Mutex         // guards what follows
	addresses map[netip.Addr]int // that shake hands
	streams   int
	hosts     map[store.HostID]int
}

func (c *Cluster) newServer() *server {
	s := &server{c: c, handshakes: make(chan struct{}, maxHandshakes), addresses: map[netip.Addr]int{}, hosts: map[store.HostID]int{}}
	s.conf = tlsConfig(c.cert, func(id store.HostID) error { return nil })
	return s
}

// serve accepts until ctx ends, and returns when all streams are over.
func (s *server) serve(ctx context.Context, l net.Listener) error {
	var open sync.WaitGroup
	defer open.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		// Many peers come at once when all run one large network: they wait in the
		// kernel's queue, and are not turned away.
		select {
		case <-ctx.Done():
			return nil
		case s.handshakes <- struct{}{}:
		}
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			<-s.handshakes
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Too many open files, or a connection that died in the queue.
			select {
			case <-ctx.Done():
			case <-time.After(acceptRetryTime):
			}
			continue
		}
		addr := remoteAddr(conn)
		if !s.beginHandshake(addr) {
			<-s.handshakes
			s.c.drops.count("stream-too-many")
			_ = conn.Close()
			continue
		}
		open.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			s.stream(ctx, conn, addr)
		})
	}
}

func remoteAddr(c net.Conn) netip.Addr {
	ap, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

func (s *server) beginHandshake(a netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.addresses[a] >= maxPerAddress {
		return false
	}
	s.addresses[a]++
	return true
}

func (s *server) endHandshake(a netip.Addr) {
	<-s.handshakes
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.addresses[a]--; s.addresses[a] <= 0 {
		delete(s.addresses, a)
	}
}

func (s *server) beginStream(id store.HostID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams >= maxStreams || s.hosts[id] >= maxPerHost {
		return false
	}
	s.streams++
	s.hosts[id]++
	return true
}

func (s *server) endStream(id store.HostID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams--
	if s.hosts[id]--; s.hosts[id] <= 0 {
		delete(s.hosts, id)
	}
}

// stream serves one connection. Its failures are the other side's to report; here
// they are counted.
func (s *server) stream(ctx context.Context, raw net.Conn, addr netip.Addr) {
	conn := tls.Server(raw, s.conf)
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	id, err := s.handshake(ctx, conn)
	s.endHandshake(addr)
	if err != nil {
		s.c.drops.count("stream-refused")
		s.c.log.Debug("record stream refused", "from", addr, "err", err)
		return
	}
	if !s.beginStream(id) {
		s.c.drops.count("stream-too-many")
		return
	}
	defer s.endStream(id)
	if id == s.c.id {
		s.c.sawCopy(addr)
	}
	for {
		_ = conn.SetDeadline(time.Now().Add(idleServe))
		var q request
		if err := readFrame(conn, maxAsk, &q); err != nil {
			return
		}
		if err := s.answer(ctx, conn, q, id); err != nil || s.busy() {
			return
		}
	}
}

func (s *server) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams > busyStreams
}

// handshake ends when the other side is known to be a member that holds the
// cluster key, or tells it why not.
func (s *server) handshake(ctx context.Context, conn *tls.Conn) (store.HostID, error) {
	if err := conn.Handshake(); err != nil {
		return "", err
	}
	state := conn.ConnectionState()
	id, err := certHost(state)
	if err != nil {
		return "", err
	}
	var h hello
	if err := readFrame(conn, maxAsk, &h); err != nil {
		return id, err
	}
	err = s.c.keys.checkProof(state, "client", h.Proof)
	if err == nil && !s.c.hearsOf(ctx, id) {
		err = errors.New("host " + string(id) + " is not a member of the cluster here")
	}
	if err != nil {
		return id, errors.Join(err, writeFrame(conn, hello{Proto: streamProto, Err: err.Error()}))
	}
	p, err := s.c.keys.proof(state, "owner")
	if err != nil {
		return id, err
	}
	return id, writeFrame(conn, hello{Proto: streamProto, Proof: p})
}

// knows reports whether a host is a member or a remembered peer. The own identity
// is one too: a second process that has it must be able to see that (see twins).
func (c *Cluster) knows(id store.HostID) bool {
	_, ok := c.table.sight(id)
	return ok || id == c.id
}

// hearsOf waits for a host that is not known to become so.
func (c *Cluster) hearsOf(ctx context.Context, id store.HostID) bool {
	for end := time.Now().Add(newsTime); !c.knows(id); {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(newsEvery):
		}
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// answer reads the records in one transaction and sends them in chunks.
func (s *server) answer(ctx context.Context, conn net.Conn, q request, id store.HostID) error {
	var a answer
	var err error
	if q.Taken != nil && s.c.cfg.Settled != nil {
		a, err = s.c.readTaken(ctx, q, id)
	} else {
		a, err = s.c.read(q, id)
	}
	if err != nil {
		s.c.log.Warn("cannot answer a peer", "vni", q.VNI, "err", err)
		a = answer{Err: "the owner cannot read its database"}
	}
	eps, nets, services := a.Endpoints, a.Networks, a.Services
	for {
		part := a
		n, m := min(len(eps), chunk), min(len(nets), chunk)
		s := min(len(services), serviceChunk)
		part.Endpoints, part.Networks, part.Services = eps[:n], nets[:m], services[:s]
		eps, nets, services = eps[n:], nets[m:], services[s:]
		part.More = len(eps)+len(nets)+len(services) > 0
		a.Revoked = nil
		_ = conn.SetDeadline(time.Now().Add(ioTime))
		if err := writeFrame(conn, part); err != nil || !part.More {
			return err
		}
	}
}

// read returns the answer to a host. The endpoints of a network with a key are told
// to those alone who hold it.
func (c *Cluster) read(q request, id store.HostID) (answer, error) {
	epoch := c.db.Self().Epoch
	var a answer
	err := c.db.View(func(tx *store.Tx) error {
		if out, err := tx.Revoked(id); err != nil || out && q.VNI != store.HostVNI {
			a.Err = fmt.Sprintf("host %s is revoked", id)
			return err
		}
		if q.VNI != store.HostVNI {
			n, err := tx.NetworkByVNI(q.VNI)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			if err == nil && len(n.Key) > 0 && !hmac.Equal(q.Proof, n.Proof(id)) {
				c.drops.count("no-network-key")
				a.Err = fmt.Sprintf("host %s does not hold the key of network %d", id, q.VNI)
				return nil
			}
			since := q.Since
			// A version of another database, or of a newer copy of this one, which has
			// gone on from an older: what the peer holds may never have been here.
			if q.Epoch != epoch || q.Boot != 0 && q.Boot != c.boot && q.Since > c.db.Began(q.VNI) {
				since = 0
			}
			d, err := tx.Delta(q.VNI, since)
			d.Boot = c.boot
			a.Delta = d
			return err
		}
		a.Seq = tx.Version(store.HostVNI)
		nets, err := tx.Networks()
		for _, n := range nets {
			shared := n.Shared()
			shared.Proof = n.Proof(c.id)
			a.Networks = append(a.Networks, versioned{SharedNetwork: shared, Seq: tx.Version(n.VNI)})
		}
		if err == nil {
			a.Revoked, err = tx.Revocations()
		}
		if err == nil {
			a.Services, err = tx.ServicesOf(c.id)
		}
		return err
	})
	a.VNI, a.Epoch = q.VNI, epoch
	return a, err
}
