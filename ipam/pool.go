package ipam

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// Keys and values of Docker's request options.
const (
	dockerPrefix = "com.docker.network."
	optSerial    = dockerPrefix + "ipam.serial" // Swarm: the leader allocates in order, the host confirms
	optName      = dockerPrefix + "endpoint.name"
	optMAC       = dockerPrefix + "endpoint.macaddress"
	optType      = "RequestAddressType"
	typeGateway  = dockerPrefix + "gateway"
)

func serial(options map[string]string) bool {
	_, ok := options[optSerial]
	return ok
}

// poolID names a pool so that its record can be made again from the id alone:
// "WeftLocal/10.70.0.0/24" or, with a sub-pool, "WeftLocal/10.70.0.0/24/10.70.0.128/25".
func poolID(space string, prefix, sub netip.Prefix) string {
	if sub.IsValid() {
		return space + "/" + prefix.String() + "/" + sub.String()
	}
	return space + "/" + prefix.String()
}

// parsePoolID is the reverse of poolID.
func parsePoolID(id string) (store.Pool, error) {
	if id == "" {
		return store.Pool{}, errors.New("PoolID is empty")
	}
	parts := strings.Split(id, "/")
	if len(parts) != 3 && len(parts) != 5 {
		return store.Pool{}, fmt.Errorf("PoolID %s is not one of Weft's", quote(id))
	}
	subPool := ""
	if len(parts) == 5 {
		subPool = parts[3] + "/" + parts[4]
	}
	p, err := parsePools(parts[0], parts[1]+"/"+parts[2], subPool)
	if err != nil {
		return p, fmt.Errorf("PoolID %s: %w", quote(id), err)
	}
	if p.ID = poolID(p.Space, p.Prefix, p.Sub); p.ID != id {
		return p, fmt.Errorf("PoolID %s is not one of Weft's, which writes it %s", quote(id), p.ID)
	}
	return p, nil
}

// parsePoolRequest returns the pool that is asked for, without a prefix when any
// will do. The V6 flag of the request is not looked at: engines set it wrongly.
func parsePoolRequest(r api.RequestPoolRequest) (store.Pool, error) {
	for k := range r.Options {
		if k == optType { // Swarm's leader leaves it in for all subnets but the first
			continue
		}
		if !strings.HasPrefix(k, dockerPrefix) {
			return store.Pool{}, unknownOption(k)
		}
	}
	if r.Pool == "" && r.SubPool != "" {
		return store.Pool{}, fmt.Errorf("SubPool %s (--ip-range) needs a Pool (--subnet) that it lies in", quote(r.SubPool))
	}
	p, err := parsePools(r.AddressSpace, r.Pool, r.SubPool)
	p.Opts = maps.Clone(r.Options)
	delete(p.Opts, optType)
	return p, err
}

func parsePools(space, pool, subPool string) (p store.Pool, err error) {
	if space != LocalSpace && space != GlobalSpace {
		return p, fmt.Errorf("AddressSpace %s is not known; use %s or %s", quote(space), LocalSpace, GlobalSpace)
	}
	p.Space = space
	if pool == "" {
		return p, nil
	}
	if p.Prefix, err = parsePool(pool); err != nil {
		return p, err
	}
	if subPool != "" {
		p.Sub, err = parseSubPool(p.Prefix, subPool)
	}
	return p, err
}

func parsePrefix(field, s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%s %s is not a subnet; write it like 10.70.0.0/24 or fd00:70::/64", field, quote(s))
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%s %s is an IPv4 subnet in IPv6 form; write it as IPv4", field, s)
	case p != p.Masked():
		return p, fmt.Errorf("%s %s has bits set behind its length; use %s", field, s, p.Masked())
	}
	return p, nil
}

// parsePool accepts subnets from which interfaces can have addresses.
func parsePool(s string) (netip.Prefix, error) {
	p, err := parsePrefix("pool", s)
	if err != nil {
		return p, err
	}
	if p.Bits() == 0 {
		return p, fmt.Errorf("pool %s is every address; choose a part of it", s)
	}
	if p.Bits() > p.Addr().BitLen()-2 {
		return p, fmt.Errorf("pool %s is too small: a gateway and an endpoint need /%d or larger", s, p.Addr().BitLen()-2)
	}
	for _, r := range []struct{ prefix, what string }{
		{"0.0.0.0/8", "addresses of \"this network\""},
		{"127.0.0.0/8", "loopback addresses"},
		{"169.254.0.0/16", "link-local addresses"},
		{"224.0.0.0/4", "multicast addresses"},
		{"::/127", "the unspecified and the loopback address"},
		{"::ffff:0:0/96", "IPv4 addresses in IPv6 form"},
		{"fe80::/10", "link-local addresses"},
		{"ff00::/8", "multicast addresses"},
	} {
		if p.Overlaps(netip.MustParsePrefix(r.prefix)) {
			return p, fmt.Errorf("pool %s holds %s (%s), which no endpoint may have; choose another", s, r.what, r.prefix)
		}
	}
	return p, nil
}

// parseSubPool returns the part of pool that --ip-range names; none when it is
// the whole pool.
func parseSubPool(pool netip.Prefix, s string) (netip.Prefix, error) {
	sub, err := parsePrefix("SubPool", s)
	switch {
	case err != nil:
		return sub, err
	case !within(pool, sub):
		return sub, fmt.Errorf("SubPool %s does not lie in Pool %s", sub, pool)
	case usable(pool, sub).size() == 0:
		return sub, fmt.Errorf("SubPool %s has no address for an endpoint: it is only the network or broadcast address of Pool %s", sub, pool)
	case sub == pool:
		return netip.Prefix{}, nil
	}
	return sub, nil
}

func within(outer, inner netip.Prefix) bool {
	return inner.Bits() >= outer.Bits() && outer.Overlaps(inner)
}

// clash says what an asked-for pool overlaps, or returns nil.
func clash(want store.Pool, pools []store.Pool, networks []store.Network, routes []netip.Prefix) error {
	for _, p := range pools {
		if p.Space != want.Space || !p.Prefix.Overlaps(want.Prefix) {
			continue
		}
		owner := ""
		for _, n := range networks {
			for _, s := range n.Prefixes() {
				if s == p.Prefix {
					owner = fmt.Sprintf(" of network %.12s", n.ID)
				}
			}
		}
		return fmt.Errorf("it overlaps pool %s%s; choose another subnet", p.ID, owner)
	}
	for _, r := range routes {
		if r.Bits() > 0 && r.Overlaps(want.Prefix) {
			return fmt.Errorf("it overlaps the host's route to %s; choose another subnet", r)
		}
	}
	return nil
}

// inUse returns all that a default pool must keep clear of. Pools of the other
// space count too: a Swarm host will use them here.
func inUse(pools []store.Pool, networks []store.Network, routes []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range routes {
		if r.Bits() > 0 {
			out = append(out, r)
		}
	}
	for _, p := range pools {
		out = append(out, p.Prefix)
	}
	for _, n := range networks {
		out = append(out, n.Prefixes()...)
	}
	return out
}

// defaults returns the prefixes of one family from which pools are cut. The
// built-in ones are the same on all hosts, so that a network made without a
// subnet on two hosts agrees; Docker's own are elsewhere (172.17 to 172.31 and
// 192.168). The IPv6 one is a unique local prefix (RFC 4193) that spells "weft".
func defaults(given []netip.Prefix, v6 bool) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range given {
		if p.Addr().Is6() == v6 {
			out = append(out, p.Masked())
		}
	}
	switch {
	case len(out) > 0:
		return out
	case v6:
		return []netip.Prefix{netip.MustParsePrefix("fd77:6566:7400::/48")}
	}
	return []netip.Prefix{netip.MustParsePrefix("10.32.0.0/11")}
}

// freeDefault returns the first pool cut from the defaults that is clear of used.
func freeDefault(defaults, used []netip.Prefix) (netip.Prefix, error) {
	var names []string
	for _, d := range defaults {
		if _, err := parsePool(d.String()); err != nil {
			return d, fmt.Errorf("default pool (WEFT_SUBNETS): %w", err)
		}
		size := 20
		if d.Addr().Is6() {
			size = 64
		}
		size = max(size, d.Bits())
		all := whole(d)
		for a := d.Addr(); all.has(a); {
			p := netip.PrefixFrom(a, size)
			u, ok := overlapping(p, used)
			if !ok {
				return p, nil
			}
			// One of the two holds the other: go on behind the larger.
			if u.Bits() > size {
				u = p
			}
			a = whole(u).hi.Next()
		}
		names = append(names, d.String())
	}
	return netip.Prefix{}, fmt.Errorf("every part of the default pools (%s) is in use by networks, pools or routes of the host; remove a network, give --subnet, or set WEFT_SUBNETS",
		strings.Join(names, ", "))
}

func overlapping(p netip.Prefix, used []netip.Prefix) (netip.Prefix, bool) {
	for _, u := range used {
		if u.Overlaps(p) {
			return u.Masked(), true
		}
	}
	return netip.Prefix{}, false
}

// unknownOption names the nearest option that exists.
func unknownOption(key string) error {
	best, least := "", len(key)/2+1
	for _, known := range []string{optSerial, optName, optMAC} {
		if d := distance(cut(key), known); d < least {
			best, least = known, d
		}
	}
	if best == "" {
		return fmt.Errorf("ipam option %s is not known; Weft's IPAM has no options of its own, only Docker's %s* ones", quote(key), dockerPrefix)
	}
	return fmt.Errorf("ipam option %s is not known; the nearest known one is %s", quote(key), best)
}

// distance returns how many bytes must be inserted, removed or replaced to make b
// of a (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// maxShown is how many bytes of what came from outside are kept or shown.
const maxShown = 128

func cut(s string) string { return s[:min(len(s), maxShown)] }

// quote makes a value from outside safe to show.
func quote(s string) string { return fmt.Sprintf("%q", cut(s)) }
