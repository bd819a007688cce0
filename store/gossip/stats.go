package gossip

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weftnet/weft/store"
)

// Stats are figures for metrics. Counters count from the start of the process.
type Stats struct {
	Members     int               // living hosts with this one
	Dead        int               // known peers that are not reachable
	Hidden      int               // of those, that are hidden
	Records     int               // peers' endpoints held for networks of this host, hidden ones too
	Fetches     uint64            // questions to owners
	FetchErrors uint64            // fetches that failed; they are tried again
	Dropped     map[string]uint64 // messages, records and streams refused, by reason
	// Twin is the address of another process that has this host's identity (a
	// copied state folder or cloned machine), or "".
	Twin string
	// Err is why this host is no member now (an address or port that cannot be
	// bound, say), or "". It is tried again every second.
	Err string
}

// PeerStatus is what is known of one peer.
type PeerStatus struct {
	store.Peer
	Alive   bool   // a member now
	LastErr string // of the last fetch, or ""
	// Cut: the last fetch found no way to the peer, though others may.
	Cut    bool
	InSync bool // everything that this peer is known to have is held here
}

type counters struct{ fetches, fetchErrors atomic.Uint64 }

// drops counts by reason what was refused. Reasons are constants of this package.
type drops struct {
	mu     sync.Mutex // guards what follows
	counts map[string]uint64
	said   map[string]bool
}

// maxSaid bounds the memory of what was logged already.
const maxSaid = 256

func (d *drops) init() { d.counts, d.said = map[string]uint64{}, map[string]bool{} }

func (d *drops) count(reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts[reason]++
}

// first reports whether reason was never counted before for who.
func (d *drops) first(reason, who string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts[reason]++
	key := reason + " " + who
	if d.said[key] || len(d.said) >= maxSaid {
		return false
	}
	d.said[key] = true
	return true
}

// Peers returns all known peers, sorted by id, dead and hidden ones too. It
// returns nil when the database cannot be read.
func (c *Cluster) Peers() []PeerStatus {
	var out []PeerStatus
	if err := c.db.View(func(tx *store.Tx) error {
		own, err := tx.Networks()
		if err != nil {
			return err
		}
		peers, err := tx.Peers()
		for _, p := range peers {
			st := PeerStatus{Peer: p}
			if see, ok := c.table.sight(p.ID); ok {
				st.Alive, st.LastErr, st.Cut = see.alive, see.err, see.cut
				list, wants, err := c.compare(tx, own, p.ID, see)
				st.InSync = see.alive && see.heard() && !see.doubt && err == nil && !list && len(wants) == 0
			}
			out = append(out, st)
		}
		return err
	}); err != nil {
		return nil
	}
	return out
}

// Stats returns the figures of now.
func (c *Cluster) Stats() Stats {
	s := Stats{Members: c.table.size(), Fetches: c.stats.fetches.Load(), FetchErrors: c.stats.fetchErrors.Load()}
	_ = c.db.View(func(tx *store.Tx) error { // figures stay 0 while the database cannot be read
		peers, err := tx.Peers()
		for _, p := range peers {
			if !p.DeadSince.IsZero() {
				s.Dead++
			}
			if p.Hidden {
				s.Hidden++
			}
		}
		for _, v := range c.table.networks() {
			n, countErr := tx.RemoteCount(v)
			s.Records, err = s.Records+n, errors.Join(err, countErr)
		}
		return err
	})
	c.drops.mu.Lock()
	s.Dropped = maps.Clone(c.drops.counts)
	c.drops.mu.Unlock()
	c.mu.Lock()
	switch {
	case c.twin.ID != "":
		s.Twin = c.twin.Address.String()
	case !c.copyAt.IsZero() && time.Since(c.copyAt) < copyStays:
		s.Twin = c.copy.String()
	}
	s.Err = c.absent
	c.mu.Unlock()
	return s
}

// logWriter takes memberlist's log lines: all to the debug level, and those that
// tell of refused messages into the counters, for memberlist says it nowhere else.
type logWriter struct{ c *Cluster }

// refusals are parts of memberlist's log lines, with the reason to count.
var refusals = [][2]string{
	{"Decrypt packet failed", "other-key"},
	{"could decrypt", "other-key"},
	{"encryption", "other-key"},
	{"label", "foreign-label"},
	{"decode", "malformed"},
	{"decompress", "malformed"},
	{"msgType", "malformed"},
	{"checksum", "malformed"},
	{"too short", "malformed"},
	{"limit", "too-large"},
	{"queue full", "busy"},
	{"Too many pending", "busy"},
}

// Write implements io.Writer; p is one line.
func (w logWriter) Write(p []byte) (int, error) {
	line := strings.TrimSpace(string(p))
	if i := slices.IndexFunc(refusals, func(r [2]string) bool { return strings.Contains(line, r[0]) }); i >= 0 {
		w.c.drops.count(refusals[i][1])
	}
	w.c.log.Debug("memberlist says", "text", line)
	return len(p), nil
}
