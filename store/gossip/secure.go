package gossip

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/weftnet/weft/store"
)

// KeyBytes is the length of a cluster key.
const KeyBytes = 32

// keys are made from the cluster key, one for each use. Both are nil without one.
type keys struct {
	gossip []byte // AES-256 of memberlist
	stream []byte // proof of the key on record streams
}

func deriveKeys(cluster []byte) (keys, error) {
	if len(cluster) == 0 {
		return keys{}, nil
	}
	if len(cluster) != KeyBytes {
		return keys{}, fmt.Errorf("cluster key has %d bytes; it must have %d", len(cluster), KeyBytes)
	}
	g, err1 := hkdf.Key(sha256.New, cluster, nil, "weft gossip 1", KeyBytes)
	s, err2 := hkdf.Key(sha256.New, cluster, nil, "weft record stream 1", KeyBytes)
	return keys{gossip: g, stream: s}, errors.Join(err1, err2)
}

// certificate makes a certificate whose key is the host's identity. Peers look at
// the key alone, so names and times in it mean nothing.
func certificate(id store.Identity) (tls.Certificate, error) {
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<36, 0)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, id.Key.Public(), id.Key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: id.Key}, nil
}

// tlsConfig is used by both sides of a record stream. Verification is ours: the
// certificate's key must hash to the id of the host that we expect, and TLS 1.3
// proves that the other side holds it.
func tlsConfig(cert tls.Certificate, allow func(store.HostID) error) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		Certificates:       []tls.Certificate{cert},
		ClientAuth:         tls.RequireAnyClientCert,
		InsecureSkipVerify: true, // no names and no authorities here; VerifyConnection decides
		// Go's default adds ML-KEM-768 to it, which is half of what a short stream costs
		// and sends. Records are no secret to be kept for decades, and WireGuard's
		// handshake has X25519 alone too.
		CurvePreferences:       []tls.CurveID{tls.X25519},
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			id, err := certHost(s)
			if err != nil {
				return err
			}
			return allow(id)
		},
	}
}

// certHost returns the id of the host at the other end.
func certHost(s tls.ConnectionState) (store.HostID, error) {
	if len(s.PeerCertificates) == 0 {
		return "", errors.New("the other side has no certificate")
	}
	pub, ok := s.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return "", errors.New("the other side's key is not Ed25519")
	}
	return store.HostIDOf(pub), nil
}

// proof shows knowledge of the cluster key on this one connection: the exported
// material differs for each, so a proof cannot be passed on. It is nil without key.
func (k keys) proof(s tls.ConnectionState, side string) ([]byte, error) {
	if k.stream == nil {
		return nil, nil
	}
	material, err := s.ExportKeyingMaterial("EXPORTER-weft-cluster-key", nil, 32)
	if err != nil {
		return nil, err
	}
	m := hmac.New(sha256.New, k.stream)
	m.Write([]byte(side))
	m.Write(material)
	return m.Sum(nil), nil
}

// checkProof compares what the other side sent with what it should have sent.
func (k keys) checkProof(s tls.ConnectionState, side string, got []byte) error {
	want, err := k.proof(s, side)
	if err != nil {
		return err
	}
	if !hmac.Equal(want, got) {
		return errors.New("the cluster keys of the two hosts differ; set the same WEFT_KEY on all")
	}
	return nil
}
