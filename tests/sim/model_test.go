package sim

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
)

// Layer B: what gossip and fetches do in a cluster that is too large to run. Times
// are seconds of virtual time. The constants are those of memberlist's LAN
// configuration and of store/gossip; costs come from layer A.
const (
	gossipEvery    = 0.1
	gossipNodes    = 3
	probeRounds    = 10   // gossip rounds between two probes of a host
	packetBytes    = 1360 // of 1,400, without label and encryption
	digestBytes    = 37 + 3
	naiveBytes     = 72 + 3
	quietTime      = 0.05 // changes of one host become one digest
	mostTime       = 0.2
	compareEvery   = 60.0
	compareSpacing = 0.25 // a peer
	idleStream     = 10.0
	maxStreams     = 1024 // at one owner
	busyStreams    = 256  // of which stay open
	roundTrip      = 0.001
	fetchTrips     = 4 // connect, TLS, hello, question
)

// message is a digest, or with the naive variant an endpoint. A later one of the
// same key stands for the earlier ones.
type message struct {
	owner      int
	born       []float64 // the changes that it tells of
	interested []int32
	older      *message
	newer      *message
	sent       float64 // when it enters the owner's queue
	known      []uint64
	missing    int // interested hosts that do not know it
}

func (m *message) has(i int) bool { return m.known[i>>6]&(1<<(i&63)) != 0 }
func (m *message) set(i int)      { m.known[i>>6] |= 1 << (i & 63) }

// waiting is a message in a host's queue.
type waiting struct {
	m    *message
	dead bool // a newer one took its place
}

// queue is memberlist's: what was sent least goes first, and of that the newest.
type queue struct {
	tiers [][]*waiting
	size  int
	byOld map[*message]*waiting // those for which a newer one will come
}

// model is a cluster.
type model struct {
	n        int
	rnd      *rand.Rand
	naive    bool
	serve    float64 // seconds of processor for one stream at its owner
	limit    int     // how often a host sends a message
	each     int     // messages in a packet
	queues   []queue
	owners   map[int]*owner
	took     []float64 // from a change to its sight on an interested host
	born     []float64 // of the same entries
	lost     int       // entries that gossip never brought
	refused  int       // streams
	asks     asks
	pushPull float64
}

// owner is the serving side of one host.
type owner struct {
	busy    float64         // until when its processor has work
	streams map[int]float64 // until when a host's stream stays open
	looked  float64         // when closed ones were last taken out
}

func newModel(n int, seed uint64, naive bool, serve float64) *model {
	m := &model{n: n, rnd: rand.New(rand.NewPCG(seed, uint64(n))), naive: naive, serve: serve,
		limit: 4 * int(math.Ceil(math.Log10(float64(n+1)))), each: packetBytes / digestBytes,
		queues: make([]queue, n), owners: map[int]*owner{}, pushPull: 30}
	if naive {
		m.each = packetBytes / naiveBytes
	}
	if n > 32 {
		m.pushPull *= math.Ceil(math.Log2(float64(n))-5) + 1
	}
	return m
}

// change is one change of one host's endpoints in a network.
type change struct {
	at    float64
	owner int
	net   int
}

// messages makes what is gossiped of the changes: each one, or one digest for what
// falls together on a host.
func (m *model) messages(changes []change, runBy [][]int32) []*message {
	slices.SortFunc(changes, func(a, b change) int { return int(math.Copysign(1, a.at-b.at)) })
	type window struct{ first, last float64 }
	open := map[int]*window{}
	pending := map[[2]int]*message{}
	newest := map[[2]int]*message{}
	var out []*message
	for _, c := range changes {
		key := [2]int{c.owner, c.net}
		w := open[c.owner]
		if w == nil || c.at > min(w.last+quietTime, w.first+mostTime) {
			w = &window{first: c.at}
			open[c.owner] = w
			for k := range pending {
				if k[0] == c.owner {
					delete(pending, k)
				}
			}
		}
		w.last = c.at
		msg := pending[key]
		if msg == nil || m.naive {
			msg = &message{owner: c.owner, interested: runBy[c.net], known: make([]uint64, m.n/64+1)}
			if old := newest[key]; old != nil && !m.naive {
				msg.older, old.newer = old, msg
			}
			newest[key], pending[key] = msg, msg
			out = append(out, msg)
		}
		msg.born = append(msg.born, c.at)
		msg.sent = c.at
		for _, p := range pending { // the whole host's changes go out together
			if p.owner == c.owner && !m.naive {
				p.sent = min(c.at+quietTime, w.first+mostTime)
			}
		}
	}
	for _, msg := range out {
		msg.missing = len(msg.interested) - 1
	}
	slices.SortStableFunc(out, func(a, b *message) int { return int(math.Copysign(1, a.sent-b.sent)) })
	return out
}

// run gossips the messages until nobody has anything to send.
func (m *model) run(msgs []*message) {
	phase := make([]float64, m.n)
	order := make([]int, m.n)
	for i := range phase {
		phase[i], order[i] = m.rnd.Float64()*gossipEvery, i
	}
	slices.SortFunc(order, func(a, b int) int { return int(math.Copysign(1, phase[a]-phase[b])) })
	exchange := make([]float64, m.n) // when a host begins its next push/pull
	for i := range exchange {
		exchange[i] = m.rnd.Float64() * m.pushPull
	}
	next := 0
	for round := 0; ; round++ {
		busy := next < len(msgs)
		for _, i := range order {
			now := float64(round)*gossipEvery + phase[i]
			if now > exchange[i] {
				exchange[i] += m.pushPull
				m.exchange(i, m.other(i), msgs[:next], now)
			}
			if (round+i)%probeRounds == 0 { // ping and answer carry messages too
				to := m.other(i)
				m.packet(i, to, now)
				m.packet(to, i, now)
			}
			for ; next < len(msgs) && msgs[next].sent <= now; next++ {
				msgs[next].set(msgs[next].owner)
				m.put(msgs[next].owner, msgs[next])
			}
			if m.queues[i].size > 0 {
				busy = true
				m.tick(i, now)
			}
			m.fetch(now)
		}
		if !busy {
			break
		}
	}
	m.makeUp(msgs)
	m.fetch(math.Inf(1))
}

func (m *model) put(i int, msg *message) {
	q := &m.queues[i]
	if q.tiers == nil {
		q.tiers, q.byOld = make([][]*waiting, m.limit), map[*message]*waiting{}
	}
	for o := msg.older; o != nil; o = o.older {
		if w := q.byOld[o]; w != nil {
			w.dead = true
			delete(q.byOld, o)
			q.size--
		}
	}
	w := &waiting{m: msg}
	if msg.newer != nil {
		q.byOld[msg] = w
	}
	q.tiers[0] = append(q.tiers[0], w)
	q.size++
}

// other is a random host but i.
func (m *model) other(i int) int {
	to := m.rnd.IntN(m.n - 1)
	if to >= i {
		to++
	}
	return to
}

func (m *model) tick(i int, now float64) {
	for range gossipNodes {
		m.packet(i, m.other(i), now)
	}
}

// packet sends what fits into one.
func (m *model) packet(i, to int, now float64) {
	q := &m.queues[i]
	if q.size == 0 {
		return
	}
	left := m.each
	var again []*waiting
	var tier []int
	for t := 0; t < m.limit && left > 0; t++ {
		for len(q.tiers[t]) > 0 && left > 0 {
			last := len(q.tiers[t]) - 1
			w := q.tiers[t][last]
			q.tiers[t] = q.tiers[t][:last]
			if w.dead {
				continue
			}
			left--
			m.arrive(to, w.m, now+roundTrip/2)
			if t+1 < m.limit {
				again, tier = append(again, w), append(tier, t+1)
			} else {
				delete(q.byOld, w.m)
				q.size--
			}
		}
	}
	for k, w := range again {
		if !w.dead {
			q.tiers[tier[k]] = append(q.tiers[tier[k]], w)
		}
	}
}

// exchange is push/pull between two hosts: both know then what one of them knew,
// and do not pass it on.
func (m *model) exchange(i, to int, msgs []*message, now float64) {
	for _, msg := range msgs {
		if msg.has(i) != msg.has(to) {
			m.learn(i, msg, now)
			m.learn(to, msg, now)
		}
	}
}

// arrive is a message at a host, which passes it on if it is news.
func (m *model) arrive(i int, msg *message, now float64) {
	for o := msg; o != nil; o = o.newer {
		if o.has(i) {
			return
		}
	}
	m.learn(i, msg, now)
	m.put(i, msg)
}

// learn notes the sight of a message and of all that it stands for.
func (m *model) learn(i int, msg *message, now float64) {
	for o := msg; o != nil && !o.has(i); o = o.older {
		o.set(i)
		if i == o.owner || !runs(o.interested, i) {
			continue
		}
		o.missing--
		if m.naive {
			m.see(o.born, now)
		} else {
			heap.Push(&m.asks, ask{at: now, host: i, owner: o.owner, born: o.born, wait: 0.2})
		}
	}
}

// see notes that a host has the records of some changes.
func (m *model) see(born []float64, now float64) {
	for _, b := range born {
		m.took, m.born = append(m.took, now-b), append(m.born, b)
	}
}

func runs(sorted []int32, i int) bool {
	_, ok := slices.BinarySearch(sorted, int32(i))
	return ok
}

// ask is a host that wants an owner's records.
type ask struct {
	at          float64
	host, owner int
	born        []float64
	wait        float64 // before it tries again
}

// asks is a heap, the next one first.
type asks []ask

func (a asks) Len() int           { return len(a) }
func (a asks) Less(i, j int) bool { return a[i].at < a[j].at }
func (a asks) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *asks) Push(x any)        { *a = append(*a, x.(ask)) }
func (a *asks) Pop() any {
	last := (*a)[len(*a)-1]
	*a = (*a)[:len(*a)-1]
	return last
}

// fetch serves what was asked up to now: a stream that is open serves at once, a
// new one costs the owner a handshake, and it has room for maxStreams, of which it keeps
// busyStreams open.
func (m *model) fetch(now float64) {
	for len(m.asks) > 0 && m.asks[0].at <= now {
		a := heap.Pop(&m.asks).(ask)
		o := m.owners[a.owner]
		if o == nil {
			o = &owner{streams: map[int]float64{}}
			m.owners[a.owner] = o
		}
		if len(o.streams) >= maxStreams && a.at > o.looked+gossipEvery/2 {
			o.looked = a.at
			for k, until := range o.streams {
				if until < a.at {
					delete(o.streams, k)
				}
			}
		}
		switch until, ok := o.streams[a.host]; {
		case ok && until >= a.at:
			m.see(a.born, a.at+roundTrip)
		case ok || len(o.streams) < maxStreams:
			o.busy = max(o.busy, a.at) + m.serve
			m.see(a.born, o.busy+fetchTrips*roundTrip)
		default:
			m.refused++
			a.at += a.wait * (0.8 + 0.4*m.rnd.Float64())
			a.wait = min(2*a.wait, 5)
			heap.Push(&m.asks, a)
			continue
		}
		if o.streams[a.host] = max(a.at, o.busy) + idleStream; len(o.streams) > busyStreams {
			delete(o.streams, a.host) // the owner closes it after the answer
		}
	}
}

// makeUp brings what gossip lost: push/pull with random members, and of digests
// the comparison with the owner.
func (m *model) makeUp(msgs []*message) {
	for _, msg := range msgs {
		if msg.missing == 0 || msg.newer != nil && !m.naive {
			continue // a newer one brings it
		}
		for _, i := range msg.interested {
			if int(i) == msg.owner || msg.has(int(i)) {
				continue
			}
			m.lost++
			late := m.rnd.ExpFloat64() * m.pushPull / 2
			if !m.naive {
				late = min(late, m.rnd.Float64()*max(compareEvery, compareSpacing*float64(m.n)))
			}
			m.learn(int(i), msg, msg.sent+late)
		}
	}
}

// deaths draws when the living know that a tenth of the hosts died at once: the
// first probe of a dead one, the suspicion, which two more probers confirm, and the
// gossip of it.
func (m *model) deaths(spread []float64) (took []float64) {
	least := 4 * max(1, math.Log10(float64(m.n)))
	most := 6 * least
	for range 400 {
		// Nine tenths of the members probe once a second each, in random order.
		first := m.rnd.ExpFloat64()/0.9 + 1
		second := first + m.rnd.ExpFloat64()/0.9
		third := second + m.rnd.ExpFloat64()/0.9
		one := most - math.Log(2)/math.Log(3)*(most-least)
		end := first + least
		if third > end {
			end = min(third, first+one)
		}
		for range 20 {
			took = append(took, end+spread[m.rnd.IntN(len(spread))])
		}
	}
	return took
}
