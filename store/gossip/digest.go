package gossip

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft/store"
)

// digest says which version of a network a host has; store.HostVNI stands for the
// list of its networks. It is not signed: a false one costs a question to the
// owner, who says what is true.
type digest struct {
	Host  store.HostID
	VNI   store.VNI
	Epoch uint64
	Seq   uint64
}

// Wire form of a digest that is gossiped: type, host id, VNI, epoch, seq.
const (
	msgDigest    = 1
	hostIDBytes  = 16
	digestBytes  = 1 + hostIDBytes + 4 + 8 + 8
	stateFormat  = 1
	maxState     = 8 << 20 // bytes of push/pull state that are read
	maxNetworks  = 8192    // of one host
	maxMembers   = 8192    // hosts in one cluster
	maxBroadcast = 8192    // digests that wait to be sent
	maxPacket    = 1 << 16 // bytes, more than any packet of gossip
)

// Errors by which dropped messages are counted.
var (
	errMalformed = errors.New("malformed")
	errUnknown   = errors.New("unknown type")
)

func (d digest) encode() []byte {
	out := appendHostID([]byte{msgDigest}, d.Host)
	out = binary.BigEndian.AppendUint32(out, uint32(d.VNI))
	out = binary.BigEndian.AppendUint64(out, d.Epoch)
	return binary.BigEndian.AppendUint64(out, d.Seq)
}

func parseDigest(b []byte) (digest, error) {
	if len(b) == 0 || b[0] != msgDigest {
		return digest{}, errUnknown
	}
	if len(b) != digestBytes {
		return digest{}, fmt.Errorf("digest of %d bytes: %w", len(b), errMalformed)
	}
	d := digest{
		Host:  parseHostID(b[1:]),
		VNI:   store.VNI(binary.BigEndian.Uint32(b[1+hostIDBytes:])),
		Epoch: binary.BigEndian.Uint64(b[5+hostIDBytes:]),
		Seq:   binary.BigEndian.Uint64(b[13+hostIDBytes:]),
	}
	if d.VNI > store.MaxVNI {
		return digest{}, fmt.Errorf("digest of vni %d: %w", d.VNI, errMalformed)
	}
	return d, nil
}

func appendHostID(out []byte, id store.HostID) []byte {
	var raw [hostIDBytes]byte
	if b, err := hex.DecodeString(string(id)); err == nil {
		copy(raw[:], b)
	}
	return append(out, raw[:]...)
}

func parseHostID(b []byte) store.HostID { return store.HostID(hex.EncodeToString(b[:hostIDBytes])) }

// claims are the versions that one host is said to have.
type claims struct {
	epoch uint64
	seq   map[store.VNI]uint64
}

// appendClaims adds one host's claims to push/pull state: id, epoch, count, then
// pairs of VNI and version as varints.
func appendClaims(out []byte, id store.HostID, c claims) []byte {
	if len(out) == 0 {
		out = append(out, stateFormat)
	}
	out = appendHostID(out, id)
	out = binary.BigEndian.AppendUint64(out, c.epoch)
	out = binary.AppendUvarint(out, uint64(len(c.seq)))
	for v, seq := range c.seq {
		out = binary.AppendUvarint(out, uint64(v))
		out = binary.AppendUvarint(out, seq)
	}
	return out
}

// parseState calls fn for each digest in push/pull state, up to the first one that
// is malformed. It keeps nothing of b.
func parseState(b []byte, fn func(digest)) error {
	if len(b) == 0 {
		return nil
	}
	if len(b) > maxState {
		return fmt.Errorf("state of %d bytes: %w", len(b), errMalformed)
	}
	if b[0] != stateFormat {
		return errUnknown
	}
	b = b[1:]
	for hosts := 0; len(b) > 0; hosts++ {
		if len(b) < hostIDBytes+8 || hosts == maxMembers {
			return fmt.Errorf("state: host %d: %w", hosts, errMalformed)
		}
		d := digest{Host: parseHostID(b), Epoch: binary.BigEndian.Uint64(b[hostIDBytes:])}
		b = b[hostIDBytes+8:]
		count, b2, ok := uvarint(b)
		if !ok || count > maxNetworks+1 {
			return fmt.Errorf("state of host %s: count: %w", d.Host, errMalformed)
		}
		b = b2
		for range count {
			vni, b2, ok1 := uvarint(b)
			seq, b3, ok2 := uvarint(b2)
			if !ok1 || !ok2 || vni > uint64(store.MaxVNI) {
				return fmt.Errorf("state of host %s: version: %w", d.Host, errMalformed)
			}
			b = b3
			d.VNI, d.Seq = store.VNI(vni), seq
			fn(d)
		}
	}
	return nil
}

func uvarint(b []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}

// broadcast is a digest in memberlist's queue. A newer one of the same host and
// network takes its place, whatever their order of arrival was.
type broadcast struct {
	name string
	msg  []byte
}

func newBroadcast(d digest) *broadcast {
	return &broadcast{name: fmt.Sprintf("%s/%d", d.Host, d.VNI), msg: d.encode()}
}

// Name implements memberlist.NamedBroadcast.
func (b *broadcast) Name() string { return b.name }

// Message implements memberlist.Broadcast.
func (b *broadcast) Message() []byte { return b.msg }

// Finished implements memberlist.Broadcast.
func (b *broadcast) Finished() {}

// Invalidates implements memberlist.Broadcast; the queue compares Name itself.
func (b *broadcast) Invalidates(memberlist.Broadcast) bool { return false }

// fewHosts is as how many hosts fewer are counted. Digests also go to members that are
// dead for less than half a minute, and a host that moves leaves one at each address: of
// the four sendings that three hosts would get, all may go to those.
const fewHosts = 99

// newQueue returns a queue that keeps digests until each was sent to about
// 4·log10(hosts) members.
//
// memberlist numbers its entries from one again when its queue becomes empty, also
// in the midst of replacing the only entry. Two entries then have one number, and if
// they have one length too, as digests do, one takes the other's place unsent. So
// the queue is never empty.
func newQueue(hosts func() int) *memberlist.TransmitLimitedQueue {
	q := &memberlist.TransmitLimitedQueue{NumNodes: func() int { return max(hosts(), fewHosts) }, RetransmitMult: 4}
	q.QueueBroadcast(&broadcast{name: "never sent", msg: make([]byte, maxPacket)})
	return q
}
