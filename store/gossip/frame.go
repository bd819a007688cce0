package gossip

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/weftnet/weft/store"
)

// The record stream is a sequence of frames: four bytes of length, big-endian, and
// that many bytes of JSON. Both sides send a hello; then the client asks and the
// owner answers, one question after the other. Unknown fields are ignored, so that
// a newer version may add some.
const (
	streamProto  = 1
	maxFrame     = 16 << 20 // bytes of a frame of an answer
	maxAnswer    = 64 << 20 // bytes of an answer, all its frames
	maxItems     = 1 << 19  // values in a frame
	maxAsk       = 4 << 10  // bytes of a hello or request
	chunk        = 4000     // records per answer frame
	serviceChunk = 64       // services per answer frame, each of up to some thousand addresses
	maxEndpoints = 1 << 18  // of one host in one network
	maxPrefixes  = 64       // of one network
)

// hello is the first frame of each side. Proof is empty without a cluster key.
type hello struct {
	Proto int    `json:"proto"`
	Proof []byte `json:"proof,omitempty"`
	Err   string `json:"err,omitempty"` // why the owner refuses
}

// request asks for what changed in a network since a version that the client holds;
// store.HostVNI asks for the list of networks.
type request struct {
	VNI   store.VNI `json:"vni"`
	Epoch uint64    `json:"epoch,omitempty"`
	Since uint64    `json:"since,omitempty"`
	Boot  uint64    `json:"boot,omitempty"`  // of the owner's process that told Since
	Proof []byte    `json:"proof,omitempty"` // store.Network.Proof of the client
	// Taken asks instead whether the owner has acted on this record of the client's
	// tunnel. A version that does not know it answers with the list of networks.
	Taken *store.Tunnel `json:"taken,omitempty"`
}

// answer is one frame of an answer. More says that another one follows.
type answer struct {
	store.Delta
	Networks []versioned `json:"networks,omitempty"`
	// Revoked comes with the first part of a list of networks.
	Revoked []store.Revocation `json:"revoked,omitempty"`
	// Services come with a list of networks.
	Services []store.Service `json:"services,omitempty"`
	Taken    *bool           `json:"taken,omitempty"` // answers Taken of the request
	More     bool            `json:"more,omitempty"`
	Err      string          `json:"err,omitempty"`
}

// versioned is a network with the version of the owner's endpoints in it.
type versioned struct {
	store.SharedNetwork
	Seq uint64 `json:"seq"`
}

func writeFrame(w io.Writer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) > maxFrame {
		return fmt.Errorf("frame of %d bytes is over the limit of %d", len(body), maxFrame)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body))), body...))
	return err
}

// readFrame reads one frame of at most limit bytes into v. Memory grows with what
// arrives, not with what the length promises.
func readFrame(r io.Reader, limit int64, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(head[:]))
	if n > limit {
		return fmt.Errorf("frame of %d bytes is over the limit of %d", n, limit)
	}
	var body bytes.Buffer
	if got, err := io.Copy(&body, io.LimitReader(r, n)); err != nil {
		return err
	} else if got < n {
		return fmt.Errorf("frame of %d bytes ends after %d: %w", n, got, io.ErrUnexpectedEOF)
	}
	// Two bytes of a list may be a hundred when they are decoded.
	if bytes.Count(body.Bytes(), []byte{','}) >= maxItems {
		return errors.New("frame has too many values")
	}
	if err := json.Unmarshal(body.Bytes(), v); err != nil {
		return fmt.Errorf("frame: %w", err)
	}
	return nil
}

// check refuses an answer with records that no host of ours would write.
func (a answer) check() error {
	for _, n := range a.Networks {
		if n.VNI == store.HostVNI || n.VNI > store.MaxVNI || len(n.Mode) > 32 || len(n.Prefixes) > maxPrefixes || len(n.Proof) > store.ProofBytes {
			return fmt.Errorf("network with vni %d is not valid", n.VNI)
		}
		for _, p := range n.Prefixes {
			if !p.IsValid() {
				return fmt.Errorf("prefix of network with vni %d is not valid", n.VNI)
			}
		}
	}
	for _, s := range a.Services {
		if err := s.Check(); err != nil {
			return err
		}
	}
	for _, r := range a.Revoked {
		if !validID(string(r.Host)) {
			return fmt.Errorf("revoked host %.80q is not valid", r.Host)
		}
	}
	for _, e := range a.Endpoints {
		if !validID(string(e.ID)) {
			return fmt.Errorf("endpoint id %.80q is not valid", e.ID)
		}
		if e.Gone {
			continue
		}
		if e.MAC.IsZero() || !hostAddr(e.IPv4) || !hostAddr(e.IPv6) || e.IPv6.Is4() || e.IPv4.Is6() {
			return fmt.Errorf("MAC or address of endpoint %s is not valid", e.ID)
		}
	}
	return nil
}

// hostAddr reports whether a is none or one that an interface may have.
func hostAddr(a netip.Addr) bool {
	return !a.IsValid() || !(a.IsMulticast() || a.IsUnspecified() || a.Is4In6() || a.Zone() != "")
}

func validID(s string) bool {
	if len(s) == 0 || len(s) > 128 {
		return false
	}
	for _, c := range []byte(s) {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}
