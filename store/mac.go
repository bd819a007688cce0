package store

import (
	"crypto/sha256"
	"fmt"
	"net"
)

// MAC is an Ethernet address (EUI-48). The zero value means "none". It is an
// array so that records compare with ==.
type MAC [6]byte

// ParseMAC reads a unicast EUI-48 address.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, fmt.Errorf("%q is not a MAC address; write it as 02:11:22:33:44:55", s)
	}
	m := MAC(hw)
	if m[0]&1 != 0 || m == (MAC{}) {
		return MAC{}, fmt.Errorf("%s is not a unicast MAC address; the lowest bit of the first byte must be 0", m)
	}
	return m, nil
}

// DeriveMAC returns a locally administered unicast MAC made from the parts, the
// same for the same parts on every host and version (the test pins values).
func DeriveMAC(parts ...string) MAC {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	m := MAC(h.Sum(nil)[:6])
	m[0] = m[0]&^0x01 | 0x02
	return m
}

// String returns the address in colon form, or "" for the zero value.
func (m MAC) String() string {
	if m == (MAC{}) {
		return ""
	}
	return net.HardwareAddr(m[:]).String()
}

// IsZero reports whether there is no address.
func (m MAC) IsZero() bool { return m == MAC{} }

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. The empty text is no address.
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*m = MAC{}
		return nil
	}
	v, err := ParseMAC(string(b))
	if err != nil {
		return err
	}
	*m = v
	return nil
}
