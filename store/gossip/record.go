package gossip

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"unicode/utf8"

	"github.com/weftnet/weft/store"
)

// record is what a host says of itself. It travels, signed, as memberlist's meta.
type record struct {
	store.Host
	Port uint16 // of gossip, UDP and TCP
	// Boot is when the process started, in nanoseconds of its own clock. It tells
	// two processes with one identity apart.
	Boot uint64
	// Counter rises with every record that the host signs; the highest one counts.
	Counter uint64
}

// Wire form, all numbers big-endian:
//
//	1 byte   recordFormat
//	32 bytes public key
//	64 bytes signature over recordLabel, public key and everything below
//	8 Counter, 8 Boot, 8 Epoch, 2 Port, 2 DataPort
//	1+n address (n is 4 or 16), 1+n name, 1+n version
//	1+n scope; records of the first version end before it
//	1 number of WireGuard keys, 32 each, 2 UDP port, 1 flags (1: Tunnel.Last),
//	1+n public address (n is 0, 4 or 16), 2 MTU; records of the second version end
//	before it
//
// A newer version may append fields; older ones ignore them.
const (
	recordFormat = 1
	recordLabel  = "weft host record 1\x00"
	recordHead   = 1 + ed25519.PublicKeySize + ed25519.SignatureSize
	maxRecord    = 512 // memberlist.MetaMaxSize
	maxHostName  = 64  // HOST_NAME_MAX of Linux
	maxVersion   = 32
	maxScope     = 16
)

// memberName is the name under which memberlist knows a host at one address. The
// address is part of it because memberlist refuses another address for a name
// until long after the old one died; with it the host at its new address is a new
// member at once, and the old member dies by itself.
func (r record) memberName() string {
	return string(r.ID) + "/" + r.gossipAddr().String()
}

func (r record) gossipAddr() netip.AddrPort { return netip.AddrPortFrom(r.Address, r.Port) }

// sign returns the wire form of r with the identity's key, at most maxRecord bytes.
func (r record) sign(id store.Identity) []byte {
	pub := id.Key.Public().(ed25519.PublicKey)
	var body []byte
	body = binary.BigEndian.AppendUint64(body, r.Counter)
	body = binary.BigEndian.AppendUint64(body, r.Boot)
	body = binary.BigEndian.AppendUint64(body, r.Epoch)
	body = binary.BigEndian.AppendUint16(body, r.Port)
	body = binary.BigEndian.AppendUint16(body, r.DataPort)
	for _, field := range []string{string(r.Address.AsSlice()), cut(r.Name, maxHostName), cut(r.Version, maxVersion), cut(r.Scope, maxScope)} {
		body = append(append(body, byte(len(field))), field...)
	}
	body = appendTunnel(body, r.Host)
	out := append([]byte{recordFormat}, pub...)
	out = append(out, ed25519.Sign(id.Key, signed(pub, body))...)
	return append(out, body...)
}

func signed(pub, body []byte) []byte {
	return bytes.Join([][]byte{[]byte(recordLabel), pub, body}, nil)
}

// parseRecord reads and verifies a record. The host id follows from the key, so a
// record that parses is the word of the host that it names.
func parseRecord(b []byte) (record, error) {
	var r record
	var err error
	if len(b) > maxRecord {
		return r, fmt.Errorf("host record has %d bytes, the limit is %d", len(b), maxRecord)
	}
	if len(b) < recordHead || b[0] != recordFormat {
		return r, errors.New("host record is missing, cut off or of an unknown format")
	}
	pub := ed25519.PublicKey(bytes.Clone(b[1 : 1+ed25519.PublicKeySize]))
	sig, body := b[1+ed25519.PublicKeySize:recordHead], b[recordHead:]
	if !ed25519.Verify(pub, signed(pub, body), sig) {
		return r, errors.New("signature of host record is wrong")
	}
	const fixed = 8 + 8 + 8 + 2 + 2
	if len(body) < fixed {
		return r, errors.New("host record is cut off")
	}
	r.ID, r.PublicKey = store.HostIDOf(pub), pub
	r.Counter = binary.BigEndian.Uint64(body)
	r.Boot = binary.BigEndian.Uint64(body[8:])
	r.Epoch = binary.BigEndian.Uint64(body[16:])
	r.Port = binary.BigEndian.Uint16(body[24:])
	r.DataPort = binary.BigEndian.Uint16(body[26:])
	var fields [4][]byte
	rest := body[fixed:]
	for i := range fields {
		if len(rest) == 0 && i == 3 {
			break // a record of the first version
		}
		if len(rest) == 0 || len(rest) < 1+int(rest[0]) {
			return r, errors.New("host record is cut off")
		}
		fields[i], rest = rest[1:1+int(rest[0])], rest[1+int(rest[0]):]
	}
	addr, ok := netip.AddrFromSlice(fields[0])
	if !ok || addr.Is4In6() || addr.IsUnspecified() || addr.IsMulticast() {
		return r, errors.New("address in host record is not that of a host")
	}
	if r.Port == 0 || r.DataPort == 0 {
		return r, errors.New("port in host record is 0")
	}
	if len(fields[1]) > maxHostName || len(fields[2]) > maxVersion || !printable(fields[1]) || !printable(fields[2]) {
		return r, errors.New("name or version in host record is too long or not text")
	}
	if len(fields[3]) > maxScope || !printable(fields[3]) {
		return r, errors.New("scope in host record is too long or not text")
	}
	r.Address, r.Name, r.Version, r.Scope = addr, string(fields[1]), string(fields[2]), string(fields[3])
	if len(rest) == 0 {
		return r, nil // of the second version
	}
	err = r.parseTunnel(rest)
	return r, err
}

const (
	maxKeys  = 2
	flagLast = 1
)

func appendTunnel(body []byte, h store.Host) []byte {
	keys := h.Tunnel.Keys[:min(len(h.Tunnel.Keys), maxKeys)]
	body = append(body, byte(len(keys)))
	for _, k := range keys {
		body = append(body, k[:]...)
	}
	body = binary.BigEndian.AppendUint16(body, h.Tunnel.Port)
	flags := byte(0)
	if h.Tunnel.Last {
		flags = flagLast
	}
	public := h.Public.AsSlice()
	body = append(append(body, flags, byte(len(public))), public...)
	return binary.BigEndian.AppendUint16(body, uint16(min(h.MTU, math.MaxUint16)))
}

func (r *record) parseTunnel(b []byte) error {
	var t store.Tunnel
	var public netip.Addr
	keys := int(b[0])
	b = b[1:]
	if keys > maxKeys || len(b) < 32*keys+4 {
		return errors.New("WireGuard keys in host record are too many or cut off")
	}
	for range keys {
		t.Keys = append(t.Keys, store.WGKey(b[:32]))
		b = b[32:]
	}
	t.Port, t.Last = binary.BigEndian.Uint16(b), b[2]&flagLast != 0
	n := int(b[3])
	b = b[4:]
	if len(b) < n+2 {
		return errors.New("public address or MTU in host record is cut off")
	}
	if n > 0 {
		ok := false
		if public, ok = netip.AddrFromSlice(b[:n]); !ok || public.Is4In6() || public.IsUnspecified() || public.IsMulticast() {
			return errors.New("public address in host record is not that of a host")
		}
	}
	if keys > 0 && (t.Port == 0 || t.Port == 65535) {
		return errors.New("WireGuard port in host record is 0 or has none after it")
	}
	r.Tunnel, r.Public, r.MTU = t, public, int(binary.BigEndian.Uint16(b[n:]))
	return nil
}

// printable keeps control characters of a stranger out of logs and terminals.
func printable(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c == 0x7f {
			return false
		}
	}
	return utf8.Valid(b)
}

// cut shortens s to at most n bytes without splitting a character.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
