package gossip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/store"
)

// Times of the client's side.
const (
	// With each owner, also when gossip is silent: once a minute, and in larger
	// clusters four owners a second, for push/pull of all digests finds the same.
	compareEvery   = 60 * time.Second
	compareSpacing = 250 * time.Millisecond
	// After the start, what push/pull says of a peer whose records are held already
	// is waited for. When one host starts anew all others ask it, spread over
	// doubtSpacing for each of them.
	hearTime     = time.Second
	doubtSpacing = 10 * time.Millisecond
	idleStream   = 10 * time.Second // an open stream is kept so long for the next digest
	dialTime     = 2 * time.Second
	fetchTime    = time.Minute // all answers of a fetch; what has come is kept
	retryFirst   = 200 * time.Millisecond
	retryMost    = 5 * time.Second
	maxFetches   = 16 // at once, of all peers
	// Peers that did not answer have slots of their own: one to which packets are dropped
	// holds a slot for the time of a dial, and news of the others would wait for it.
	maxRetries = 4
)

// stream is an open record stream to an owner.
type stream struct {
	conn *tls.Conn
	addr string
	stop func() bool // ends the watch on the context
}

func (s *stream) close() {
	s.stop()
	_ = s.conn.Close()
}

func (c *Cluster) streamAddr(r record) string {
	return netip.AddrPortFrom(c.wayTo(r.Host), r.DataPort).String()
}

// dialAt opens a stream to the host at one of its addresses. It must prove to be id.
func (c *Cluster) dialAt(ctx context.Context, r record, id store.HostID, at netip.Addr) (*stream, error) {
	if err := c.reachable(at); err != nil {
		return nil, err
	}
	addr := netip.AddrPortFrom(at, r.DataPort).String()
	raw, err := c.under.dial(ctx, c.db.Self().Address, addr, dialTime)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, tlsConfig(c.cert, func(got store.HostID) error {
		if got != id {
			return fmt.Errorf("host at %s is %s, not %s", addr, got, id)
		}
		return nil
	}))
	s := &stream{conn: conn, addr: addr, stop: context.AfterFunc(ctx, func() { _ = raw.Close() })}
	if err := c.greet(conn); err != nil {
		s.close()
		return nil, fmt.Errorf("stream to %s: %w", addr, err)
	}
	return s, nil
}

func (c *Cluster) greet(conn *tls.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	if err := conn.Handshake(); err != nil {
		return err
	}
	state := conn.ConnectionState()
	p, err := c.keys.proof(state, "client")
	if err != nil {
		return err
	}
	if err := writeFrame(conn, hello{Proto: streamProto, Proof: p}); err != nil {
		return err
	}
	var h hello
	if err := readFrame(conn, maxAsk, &h); err != nil {
		return err
	}
	if h.Err != "" {
		return fmt.Errorf("refused: %.200q", h.Err)
	}
	return c.keys.checkProof(state, "owner", h.Proof)
}

// ask sends one request and reads the whole answer, until end at most.
func (s *stream) ask(q request, end time.Time) (answer, error) {
	inTime := func() {
		deadline := time.Now().Add(ioTime)
		if deadline.After(end) {
			deadline = end
		}
		_ = s.conn.SetDeadline(deadline)
	}
	inTime()
	if err := writeFrame(s.conn, q); err != nil {
		return answer{}, err
	}
	var all answer
	backends, from := 0, &io.LimitedReader{R: s.conn, N: maxAnswer}
	for first := true; ; first = false {
		var a answer
		inTime()
		if err := readFrame(from, maxFrame, &a); err != nil {
			if from.N <= 0 {
				err = fmt.Errorf("answer for vni %d is over the limit of %d bytes", q.VNI, maxAnswer)
			}
			return answer{}, err
		}
		switch {
		case a.Err != "":
			return answer{}, fmt.Errorf("owner says: %.200q", a.Err)
		case a.VNI != q.VNI:
			return answer{}, fmt.Errorf("answer is about vni %d, not %d", a.VNI, q.VNI)
		case !first && (a.Epoch != all.Epoch || a.Seq != all.Seq || a.Full != all.Full):
			return answer{}, errors.New("parts of the answer do not fit together")
		}
		if err := a.check(); err != nil {
			return answer{}, err
		}
		eps, nets := append(all.Endpoints, a.Endpoints...), append(all.Networks, a.Networks...)
		services := append(all.Services, a.Services...)
		for _, service := range a.Services {
			backends += len(service.Backends)
		}
		if len(eps) > maxEndpoints || len(nets) > maxNetworks || len(services) > maxNetworks || backends > store.MaxBackends {
			return answer{}, fmt.Errorf("answer for vni %d has too many records", q.VNI)
		}
		more := a.More
		if !first {
			a.Revoked = all.Revoked
		}
		a.Endpoints, a.Networks, a.Services, a.More = eps, nets, services, false
		all = a
		if !more {
			return all, nil
		}
		if len(eps)+len(nets)+len(services) == 0 {
			return answer{}, errors.New("answer has empty parts")
		}
	}
}

// follow keeps this host's copy of one living peer's records up to date until ctx
// ends. It is the only writer of that copy.
func (c *Cluster) follow(ctx context.Context, id store.HostID) {
	var s *stream
	hangUp := func() {
		if s != nil {
			s.close()
			s = nil
		}
	}
	defer hangUp()
	see, ok := c.table.sight(id)
	if !ok {
		return
	}
	compare, idle := time.NewTimer(jitter(hearTime)), time.NewTimer(idleStream)
	defer compare.Stop()
	defer idle.Stop()
	failed, first, spread, anew := 0, true, false, true
	for {
		whole, timed := false, false
		select {
		case <-ctx.Done():
			return
		case <-idle.C:
			hangUp()
			continue
		case <-compare.C:
			now, _ := c.table.sight(id)
			timed, whole = true, !first || now.doubt || !now.heard()
			spread = false
		case <-see.wake:
			if failed > 0 { // the retry below looks at everything
				continue
			}
			if now, _ := c.table.sight(id); now.doubt && !spread {
				compare.Reset(rand.N(time.Duration(c.table.size()) * doubtSpacing))
				spread = true
			}
		}
		slots := c.fetches
		if failed > 0 {
			slots = c.retries
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		open := s != nil
		err := c.fetch(ctx, id, &s, whole)
		<-slots
		if ctx.Err() != nil {
			return
		}
		c.table.fetched(id, err)
		idle.Reset(idleStream)
		if err != nil {
			hangUp()
			c.stats.fetchErrors.Add(1)
			if failed++; failed == 5 {
				c.log.Warn("cannot fetch records from peer; trying on", "host", id, "err", err)
			}
			compare.Reset(jitter(min(retryFirst<<min(failed-1, 10), retryMost)))
			continue
		}
		if failed >= 5 {
			c.log.Info("records of peer are fetched again", "host", id)
		}
		if timed {
			every := max(compareEvery, time.Duration(c.table.size())*compareSpacing)
			if first && !whole { // all peers were seen at once
				every = rand.N(every)
			}
			compare.Reset(jitter(every))
			first = false
		}
		failed = 0
		if s != nil && !open && (timed || anew) {
			// A stream is kept for the next digest of a peer that changes. At the start
			// and after a partition all peers are asked, and all streams would be kept.
			hangUp()
			anew = false
		}
	}
}

// jitter returns d, more or less a fifth.
func jitter(d time.Duration) time.Duration {
	return d - d/5 + rand.N(d*2/5+1)
}

// fetch brings the list of networks (always when whole is set, else when a digest
// says it changed or nothing is held) and then the endpoints of those that this host
// runs too.
func (c *Cluster) fetch(ctx context.Context, id store.HostID, s **stream, whole bool) error {
	see, ok := c.table.sight(id)
	if !ok || !see.alive {
		return nil
	}
	if *s != nil && (*s).addr != c.streamAddr(see.rec) {
		(*s).close()
		*s = nil
	}
	end := time.Now().Add(fetchTime)
	ask := func(q request) (answer, error) {
		c.stats.fetches.Add(1)
		if *s != nil {
			if a, err := (*s).ask(q, end); err == nil {
				return a, nil
			}
			(*s).close() // a busy owner closes idle streams
			*s = nil
		}
		if time.Now().After(end) {
			return answer{}, fmt.Errorf("records did not come within %v", fetchTime)
		}
		n, err := c.dial(ctx, see.rec, id)
		if err != nil {
			return answer{}, err
		}
		*s = n
		return n.ask(q, end)
	}
	list, _, err := c.wanted(id, see)
	if err != nil {
		return err
	}
	if whole || list {
		a, err := ask(request{VNI: store.HostVNI})
		if err != nil {
			return err
		}
		if err := c.mergeList(ctx, id, a, see.claims); err != nil {
			return err
		}
	}
	see, _ = c.table.sight(id)
	_, wants, err := c.wanted(id, see)
	if err != nil {
		return err
	}
	for _, q := range wants {
		if err := c.fetchNetwork(ctx, id, q, see.claims, ask); err != nil {
			return err
		}
	}
	return nil
}

// mergeList takes over a list of networks; before are the claims from which it was
// asked for.
func (c *Cluster) mergeList(ctx context.Context, id store.HostID, a answer, before claims) error {
	nets := make([]store.SharedNetwork, 0, len(a.Networks))
	told := claims{epoch: a.Epoch, seq: map[store.VNI]uint64{store.HostVNI: a.Seq}}
	for _, n := range a.Networks {
		nets = append(nets, n.SharedNetwork)
		told.seq[n.VNI] = n.Seq
	}
	held := false
	if err := c.db.View(func(tx *store.Tx) error {
		p, err := tx.Peer(id)
		if held = p.Epoch == a.Epoch && p.Networks == a.Seq; err != nil || !held || a.Seq != 0 {
			return err
		}
		// Version 0 is also what is held of a new database of which nothing was fetched.
		old, err := tx.PeerNetworks(id)
		if err != nil {
			return err
		}
		services, err := tx.ServicesOf(id)
		held = len(old)+len(services) == 0
		return err
	}); err != nil {
		return err
	}
	if !held { // a transaction that changes nothing still costs a sync of the disk
		err := c.db.Update(ctx, func(tx *store.Tx) error {
			p, err := tx.Peer(id)
			if err != nil {
				return err
			}
			if p.Epoch == a.Epoch && p.Networks > a.Seq {
				// The owner went back to an older copy of its database. It is right.
				p.Networks = 0
				if err := tx.PutPeer(p); err != nil {
					return err
				}
			}
			// What it revoked first: MergeNetworks notes which list this was.
			return errors.Join(tx.MergeRevocations(id, a.Revoked), tx.PutServices(id, false, a.Services), tx.MergeNetworks(id, a.Epoch, a.Seq, nets), tx.AdoptRevocationsOf(id))
		})
		if err != nil {
			return err
		}
	}
	c.table.told(id, before, told, true)
	return nil
}

func (c *Cluster) fetchNetwork(ctx context.Context, id store.HostID, q request, before claims, ask func(request) (answer, error)) error {
	for range 2 {
		a, err := ask(q)
		if err != nil {
			return err
		}
		fits := false
		err = c.db.Update(ctx, func(tx *store.Tx) error {
			if err := rewind(tx, id, a.Delta); err != nil {
				return err
			}
			fits, err = tx.MergeEndpoints(id, q.Since, a.Delta)
			return err
		})
		if err != nil {
			return err
		}
		if fits {
			c.tellForeign(id, a.Delta)
			c.table.told(id, before, claims{epoch: a.Epoch, seq: map[store.VNI]uint64{q.VNI: a.Seq}}, false)
			return nil
		}
		q.Since = 0
	}
	return fmt.Errorf("records of vni %d do not fit, even from the beginning", q.VNI)
}

// tellForeign says once of a peer that it tells addresses that are not of the network.
// Such records are kept, since this host may set up the network anew with other subnets,
// but nothing is programmed for the addresses.
func (c *Cluster) tellForeign(id store.HostID, d store.Delta) {
	var n store.Network
	if err := c.db.View(func(tx *store.Tx) (err error) { n, err = tx.NetworkByVNI(d.VNI); return err }); err != nil {
		return // removed meanwhile
	}
	for _, e := range d.Endpoints {
		if a := n.Foreign(e); a.IsValid() && c.drops.first("foreign-address", fmt.Sprint(id, d.VNI)) {
			c.log.Warn("peer tells an address that is not one of the network; nothing is programmed for it", "host", id, "vni", d.VNI, "endpoint", e.ID, "address", a)
		}
	}
}

// rewind makes room for a full list that is older than what we hold, of an owner
// that went back to an older copy of its database: the network is dropped and
// taken over anew, in the same transaction.
func rewind(tx *store.Tx, id store.HostID, d store.Delta) error {
	held, err := tx.PeerNetwork(id, d.VNI)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil || !d.Full || held.Epoch != d.Epoch || held.Seq <= d.Seq {
		return err
	}
	p, err := tx.Peer(id)
	if err != nil {
		return err
	}
	all, err := tx.PeerNetworks(id)
	if err != nil {
		return err
	}
	var nets []store.SharedNetwork
	for _, n := range all {
		nets = append(nets, n.SharedNetwork)
	}
	less := slices.DeleteFunc(slices.Clone(nets), func(n store.SharedNetwork) bool { return n.VNI == d.VNI })
	if err := tx.MergeNetworks(id, p.Epoch, 0, less); err != nil {
		return err
	}
	return tx.MergeNetworks(id, p.Epoch, p.Networks, nets)
}

// wanted compares what a peer is said to have with what the database holds: is the
// list of networks out of date, and which networks that this host runs are. While
// nothing is said of a peer, what is held stands.
func (c *Cluster) wanted(id store.HostID, see sight) (list bool, wants []request, err error) {
	err = c.db.View(func(tx *store.Tx) error {
		own, err := tx.Networks()
		if err != nil {
			return err
		}
		list, wants, err = c.compare(tx, own, id, see)
		return err
	})
	return list, wants, err
}

func (c *Cluster) compare(tx *store.Tx, own []store.Network, id store.HostID, see sight) (list bool, wants []request, err error) {
	p, err := tx.Peer(id)
	if err != nil {
		return false, nil, err
	}
	if !see.heard() {
		return p.Epoch != see.claims.epoch || p.Networks == 0, nil, nil
	}
	list = p.Epoch != see.claims.epoch || p.Networks != see.claims.seq[store.HostVNI]
	for _, o := range own {
		n, err := tx.PeerNetwork(id, o.VNI)
		if errors.Is(err, store.ErrNotFound) || err == nil && !o.Runs(n) {
			continue
		}
		if err != nil {
			return false, nil, err
		}
		if n.Epoch != see.claims.epoch || n.Seq != see.claims.seq[o.VNI] {
			q := request{VNI: o.VNI, Epoch: n.Epoch, Since: n.Seq, Boot: n.Boot, Proof: o.Proof(c.id)}
			if n.Epoch != see.claims.epoch {
				q.Since = 0
			}
			wants = append(wants, q)
		}
	}
	return list, wants, nil
}
